"""Decoding the frames of a clip with PyAV, and no other frames where the file allows it.

A first pass reads the packets without decoding them. It yields the number of frames and their
times, so a wrong header does no harm. Then the decoder seeks from key frame to key frame where that
saves work, and skips frames in between that no other frame depends on. Files whose packets have no
timestamps (AVI) are decoded from the start up to the last frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stat_video.data.clip_buffer import (
    MAX_PIXELS,
    ClipBuffer,
    check_file,
    check_length,
    check_size,
)
from stat_video.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# The formats that FFmpeg may find. Others are lists of further files (DASH, concat, image
# sequences) or wait for more to come (HLS).
_FORMATS = (
    "3gp,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,"
    "obu,ogg,rm,webm,yuv4mpegpipe"
)
# In these containers the header is the table of all samples, so fewer packets mean a cut file.
_EXACT_CONTAINERS = {"mov", "mp4", "m4a", "3gp", "3g2", "mj2"}


@dataclass(frozen=True)
class PacketTable:
    """What the packets of a video stream tell about its frames.

    times: presentation times of the frames in display order, or None if the packets have none.
    keys: for each frame, the index of the last key frame at or before it.
    count: number of packets, which is the number of frames unless decoding says otherwise.
    """

    times: tuple[int, ...] | None
    keys: tuple[int, ...]
    count: int


def read_clip(
    path: Path, choose: Callable[[int], np.ndarray], *, min_frames: int = 2, threads: int = 1
) -> np.ndarray:
    """Decode the frames that `choose` picks; see `reading.read_video` for the arguments.

    Raises VideoError for errors that are recognised here; PyAV's own exceptions pass through.
    """
    check_file(path)
    table = _packet_table(path)
    check_length(path, table.count, min_frames)
    clip = ClipBuffer(path, choose(table.count))
    if _decode_by_time(clip, table, threads):
        return clip.frames
    count = _decode_from_start(clip, threads)
    if count <= clip.wanted[-1]:  # fewer than the packets promise
        check_length(path, count, min_frames)
        clip = ClipBuffer(path, choose(count))
        if _decode_from_start(clip, threads) <= clip.wanted[-1]:
            raise VideoError(f"{path} gave a different number of frames when read a second time")
    return clip.frames


@contextmanager
def _open(path: Path, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream."""
    import av

    limit = {"max_pixels": str(MAX_PIXELS)}  # also for frames that are larger than the header says
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", **limit}
    try:  # the prefix keeps FFmpeg from taking a name such as "concat:a|b" for a protocol
        container = av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except av.ArgumentError as error:  # said of formats that are not listed, for one
        raise VideoError(f"{path} is damaged, a playlist or in a format not read here") from error
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise VideoError(f"{path} has a codec that this FFmpeg cannot decode")
        check_size(path, codec.height, codec.width)
        codec.thread_count, codec.options = threads, limit
        yield container, stream


def _packet_table(path: Path) -> PacketTable:
    """Read the packets of the first video stream without decoding them."""
    with _open(path, threads=1) as (container, stream):
        packets = [
            (p.pts, p.is_keyframe, p.is_discard, p.is_corrupt)
            for p in container.demux(stream)
            if p.size
        ]
        promised, formats = stream.frames, set(container.format.name.split(","))
    damaged = sum(corrupt for *_, corrupt in packets)
    if formats & _EXACT_CONTAINERS and (len(packets) < promised or damaged):
        raise VideoError(
            f"{path} is truncated: its header promises {promised} frames, the file holds "
            f"{len(packets) - damaged}"
        )
    shown = [(pts, key) for pts, key, discard, _ in packets if not discard]
    times = [pts for pts, _ in shown if pts is not None]
    if len(set(times)) != len(shown):
        return PacketTable(None, (), len(shown))
    shown.sort()
    keys = np.maximum.accumulate([i if key else 0 for i, (_, key) in enumerate(shown)] or [0])
    return PacketTable(tuple(sorted(times)), tuple(keys.tolist()), len(shown))


def _decode_by_time(clip: ClipBuffer, table: PacketTable, threads: int) -> bool:
    """Seek from key frame to key frame. Returns False if a frame is missing where it should be, or
    if the packets have no timestamps."""
    if table.times is None:
        return False
    index_of = {time: index for index, time in enumerate(table.times)}
    times = {table.times[index] for index in clip.wanted}
    to_rgb = _ToRgb(threads)
    with _open(clip.path, threads) as (container, stream):
        decoder, position = _needed_frames(container, stream, times), -1
        for index in clip.wanted:
            if table.keys[index] > position + 1:  # frames can be left out: jump to the key frame
                container.seek(table.times[table.keys[index]], stream=stream)
                decoder = _needed_frames(container, stream, times)
            for frame in decoder:
                position = index_of.get(frame.pts, -1)
                if position == index:
                    clip.put(index, to_rgb(frame))
                if position >= index:
                    break
            if position != index:
                return False
    return True


def _needed_frames(container, stream, times: set[int]) -> Iterator:
    """The frames from the current position on: all of `times`, and those that others refer to.

    A frame that no other refers to (most B-frames of H.264) is not decoded unless it is wanted.
    """
    for packet in container.demux(stream):
        needed = packet.pts is None or packet.pts in times
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from packet.decode()


def _decode_from_start(clip: ClipBuffer, threads: int) -> int:
    """Decode up to the last wanted frame. Returns the number of frames that were decoded."""
    need, count, to_rgb = set(clip.wanted), 0, _ToRgb(threads)
    with _open(clip.path, threads) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index in need:
                clip.put(index, to_rgb(frame))
            count = index + 1
            if index == clip.wanted[-1]:
                break
    return count


class _ToRgb:
    """Turns decoded frames into (H, W, 3) uint8, upright (phones store clips on their side).

    One converter per file reuses the scaler's tables. It runs in one thread: starting FFmpeg's
    default of one thread per core costs more than converting a small frame.
    """

    def __init__(self, threads: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformat, self._threads = VideoReformatter().reformat, threads

    def __call__(self, frame) -> np.ndarray:
        image = self._reformat(frame, format="rgb24", threads=self._threads).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
