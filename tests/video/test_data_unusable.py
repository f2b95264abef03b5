"""Files that made a decoder raise, wait or fill the memory: each is one unusable video."""

import multiprocessing
import os
import re
import resource
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stat_video.data import clip_buffer, reading
from stat_video.data.reading import read_video
from stat_video.data.video import Video
from stat_video.errors import VideoError
from tests.video.clip_samples import encode, numbered


def error_of(video, *, seconds=8, mib=500):
    """What is wrong with a video, read in a process of its own, as it may wait for ever; it must
    not take more than `mib` MiB of memory."""
    here, there = (context := multiprocessing.get_context("fork")).Pipe()

    def read():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            text = f"read: {read_video(video, np.arange).shape}"
        except VideoError as error:
            text = str(error)
        there.send((text, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=read)
    process.start()
    try:
        assert here.poll(seconds), "it waits for ever"
        text, taken = here.recv()
    finally:
        process.kill()
        process.join()
    assert taken < mib
    return text


def file(path):
    return Video(path, 0)


def frames(folder):
    return Video(folder, 0, "")


def unknown_codec(folder):
    data = numbered().read_bytes()
    codec = next(name for name in (b"avc1", b"mp4v", b"FMP4") if name in data)
    (folder / "v.mp4").write_bytes(data.replace(codec, b"zzzz"))
    return file(folder / "v.mp4")


def long_name(folder):
    return file(folder / ("a" * 300 + ".mp4"))


def long_image_name(folder):
    return Video(folder, 0, "a" * 300 + ".jpg\n" + "b" * 300 + ".jpg")


def fifo(folder):
    os.mkfifo(folder / "v.mp4")
    return file(folder / "v.mp4")


def fifo_image(folder):
    for n in range(2):
        os.mkfifo(folder / f"{n}.jpg")
    return frames(folder)


def playlist(folder, name="v.m3u8"):
    """A live one: it has no end, so FFmpeg asks again and again for further segments."""
    encode(folder / "part.ts", 3 * [np.zeros((32, 48, 3), np.uint8)])
    text = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\npart.ts\n"
    (folder / name).write_text(text)
    return file(folder / name)


def disguised_playlist(folder):
    return playlist(folder, "v.mp4")


def eps(folder):
    for n in range(2):
        Image.new("RGB", (8, 8)).save(folder / f"{n}.jpg", format="EPS")
    return frames(folder)


def bomb(folder, side=20_000):
    """A PNG that is all header: PIL refuses it with an error of its own."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    blocks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in blocks
    )
    for n in range(2):
        (folder / f"{n}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return frames(folder)


def large_image(folder):
    return bomb(folder, side=6_000)


def narrow_image(folder):
    for n in range(2):
        Image.new("RGB", (2100, 100)).save(folder / f"{n}.png")
    return frames(folder)


def nested(folder):
    shutil.copy(numbered(), folder / "a.mp4")
    return frames(folder)


def no_images(folder):
    (folder / "._0.png").touch()
    (folder / "notes.txt").touch()
    return frames(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unknown_codec, "has a codec that this FFmpeg cannot decode"),
        (long_name, "cannot be read: File name too long"),
        (long_image_name, "cannot be read: File name too long"),
        (fifo, "is not a file"),
        (fifo_image, r"0\.jpg is not a file"),
        (playlist, r"v\.m3u8 is damaged, a playlist or in a format not read here"),
        (disguised_playlist, "cannot be decoded"),
        (eps, r"0\.jpg is no image that can be read \(UnidentifiedImageError\)"),
        (bomb, r"0\.png is no image that can be read \(DecompressionBombError\)"),
        (large_image, "is too large: frames of 6000x6000 pixels, at most 35,651,584 pixels"),
        (narrow_image, "is too narrow: frames of 2100x100 pixels"),
        (nested, "holds no images .* but videos: these must lie in the folder of their class"),
        (no_images, "holds no images"),
    ],
)
def test_hostile_files(tmp_path, make, message):
    text = error_of(make(tmp_path))
    assert re.search(message, text)
    assert str(tmp_path) in text
    assert "\n" not in text


@pytest.mark.parametrize("error", [IndexError("out of range"), MemoryError(), SyntaxError()])
def test_no_exception_of_a_decoder_escapes(monkeypatch, error):
    """PyAV's look-up of a packet's stream raises IndexError, for example."""

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(reading, "read_clip", broken)
    reason = str(error) or type(error).__name__
    with pytest.raises(VideoError, match=rf"a\.mp4 cannot be decoded: .* \({reason}\)$"):
        read_video(file("a.mp4"), np.arange)


def test_a_folder_that_must_not_be_entered(tmp_path, monkeypatch):
    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)  # the tests may run as root, who enters every folder
    with pytest.raises(VideoError, match=r"a\.mp4 cannot be read: Permission denied"):
        read_video(file(tmp_path / "a.mp4"), np.arange)


# -- memory ----------------------------------------------------------------------------------------


def write_black(path, side, count):
    images = count * [np.zeros((side, side, 3), np.uint8)]
    encode(path, images, "libx264", encoder={"preset": "ultrafast"})
    return path


def test_frames_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path):
    path = write_black(tmp_path / "v.mp4", 6144, 2)
    assert "too large: frames of 6144x6144 pixels" in error_of(file(path), mib=40)


def test_frames_that_grow_within_a_video_are_refused_too(tmp_path):
    sizes = ((64, 200), (6144, 2))  # FFmpeg looks some way ahead for the size
    small, large = (write_black(tmp_path / f"{side}.h264", side, count) for side, count in sizes)
    small.write_bytes(small.read_bytes() + large.read_bytes())
    assert "cannot be decoded" in error_of(file(small), mib=40)


def test_a_clip_of_many_large_frames_is_refused(monkeypatch):
    monkeypatch.setattr(clip_buffer, "MAX_BYTES", 10 * 32 * 48 * 3)
    with pytest.raises(VideoError, match="too large: 36 frames of 48x32 take"):
        read_video(file(numbered()), np.arange)
    assert len(read_video(file(numbered()), lambda n: np.arange(10))) == 10
