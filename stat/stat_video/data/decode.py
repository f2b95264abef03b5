"""Decoding the frames of a clip with PyAV, and only those where the file allows it.

A first pass reads the packets (no decoding) and gives the number of frames and their times, so a
header that lies does no harm. Then the decoder jumps from key frame to key frame where that saves
work, and leaves out frames in between that no other frame is predicted from. Files whose packets
carry no times (AVI) are decoded from the start up to the last frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stat_video.errors import VideoError

# In these containers the header is the table of all samples, so fewer packets mean a cut file.
_EXACT_CONTAINERS = {"mov", "mp4", "m4a", "3gp", "3g2", "mj2"}


@dataclass(frozen=True)
class PacketTable:
    """What the packets of a video stream say.

    times: presentation times of the frames in display order, or None where packets carry none.
    keys: for each frame, the index of the last key frame at or before it.
    count: number of packets, which is the number of frames unless decoding says otherwise.
    """

    times: tuple[int, ...] | None
    keys: tuple[int, ...]
    count: int


def read_clip(
    path: str | Path,
    choose: Callable[[int], np.ndarray],
    *,
    min_frames: int = 2,
    threads: int = 1,
) -> np.ndarray:
    """Decode the frames that `choose` picks.

    choose: maps the number of frames in the video to frame indices, in ascending order; repeats
        are allowed. It is asked again when fewer frames can be decoded than the packets promise.
    min_frames: a video with fewer frames is refused as too short.
    threads: FFmpeg threads; one, as loader workers already run side by side.
    Returns (T, H, W, 3) uint8 RGB, upright where the file says how it is rotated.
    Raises VideoError, one sentence naming the file and what is wrong.
    """
    import av

    path = Path(path)
    check_file(path)
    try:
        table = _packet_table(path)
        check_length(path, table.count, min_frames)
        indices = np.asarray(choose(table.count))
        frames = _decode(path, indices, table, threads)
        if isinstance(frames, int):  # the number of frames that there really are
            check_length(path, frames, min_frames)
            indices = np.asarray(choose(frames))
            frames = _decode(path, indices, PacketTable(None, (), frames), threads)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(
            f"{path} cannot be decoded: it is truncated, damaged or no video ({_reason(error)})"
        ) from error
    if isinstance(frames, int):
        raise VideoError(f"{path} gave a different number of frames when read a second time")
    sizes = sorted({frame.shape[:2] for frame in frames.values()})
    if len(sizes) > 1:  # streams that were cut together
        raise VideoError(f"{path} changes its picture size from {sizes[0]} to {sizes[1]}")
    return np.stack([frames[int(i)] for i in indices])


def check_file(path: Path) -> None:
    """Tell apart what FFmpeg would report in its own terms, if at all."""
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if not path.is_file():
        raise VideoError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise VideoError(f"{path} is empty (0 bytes)")
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}") from error


def check_length(path: Path, count: int, min_frames: int) -> None:
    """Raise VideoError when there are fewer frames than are needed."""
    if count < min_frames:
        raise VideoError(f"{path} is too short: {count} frames, at least {min_frames} are needed")


def _reason(error: Exception) -> str:
    """FFmpeg's own words without the number and the file name around them."""
    return getattr(error, "strerror", None) or str(error)


def _open(path: Path, threads: int):
    """An open container and its first video stream."""
    import av

    container = av.open(str(path))
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = threads
    return container, stream


def _packet_table(path: Path) -> PacketTable:
    """Read the packets of the first video stream without decoding them."""
    container, stream = _open(path, threads=1)
    with container:
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
    times = [pts for pts, _ in shown]
    if None in times or len(set(times)) != len(times):
        return PacketTable(None, (), len(shown))
    shown.sort()
    keys = np.maximum.accumulate([i if key else 0 for i, (_, key) in enumerate(shown)] or [0])
    return PacketTable(tuple(pts for pts, _ in shown), tuple(keys.tolist()), len(shown))


def _decode(
    path: Path, indices: Sequence[int], table: PacketTable, threads: int
) -> dict[int, np.ndarray] | int:
    """The wanted frames by index, or, where they are not all there, how many frames there are."""
    wanted = sorted({int(i) for i in indices})
    if table.times is not None:
        frames = _decode_by_time(path, wanted, table, threads)
        if frames is not None:
            return frames
    return _decode_from_start(path, wanted, threads)


def _decode_by_time(
    path: Path, wanted: list[int], table: PacketTable, threads: int
) -> dict[int, np.ndarray] | None:
    """Seek from key frame to key frame; None when a frame does not turn up where it should."""
    index_of = {time: index for index, time in enumerate(table.times)}
    times = {table.times[index] for index in wanted}
    found: dict[int, np.ndarray] = {}
    container, stream = _open(path, threads)
    to_rgb = _ToRgb(threads)
    with container:
        decoder, position = _needed_frames(container, stream, times), -1
        for index in wanted:
            if table.keys[index] > position + 1:  # frames can be left out: jump to the key frame
                container.seek(table.times[table.keys[index]], stream=stream)
                decoder = _needed_frames(container, stream, times)
            for frame in decoder:
                position = index_of.get(frame.pts, -1)
                if position == index:
                    found[index] = to_rgb(frame)
                if position >= index:
                    break
            if index not in found:
                return None
    return found


def _needed_frames(container, stream, times: set[int]) -> Iterator:
    """The stream's frames from where it is, all of `times` and those that others refer to.

    A frame that none refers to (most B-frames of H.264) costs nothing where it is not wanted.
    """
    for packet in container.demux(stream):
        needed = packet.pts is None or packet.pts in times
        stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        yield from packet.decode()


def _decode_from_start(path: Path, wanted: list[int], threads: int) -> dict[int, np.ndarray] | int:
    """Decode up to the last wanted frame; the number of frames when the video ends before it."""
    found: dict[int, np.ndarray] = {}
    need, count = set(wanted), 0
    container, stream = _open(path, threads)
    to_rgb = _ToRgb(threads)
    with container:
        for index, frame in enumerate(container.decode(stream)):
            count = index + 1
            if index in need:
                found[index] = to_rgb(frame)
            if index == wanted[-1]:
                return found
    return count


class _ToRgb:
    """Turns decoded frames into (H, W, 3) uint8, upright (phones store clips on their side).

    One converter a file keeps the scaler's tables from frame to frame, and one thread: with
    FFmpeg's default of a thread a core, starting them costs more than converting a small frame.
    """

    def __init__(self, threads: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformat, self._threads = VideoReformatter().reformat, threads

    def __call__(self, frame) -> np.ndarray:
        image = self._reformat(frame, format="rgb24", threads=self._threads).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
