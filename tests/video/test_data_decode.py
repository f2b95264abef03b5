"""Decoding: the right frames, only the needed ones, and one sentence for every broken file."""

from contextlib import contextmanager

import av
import numpy as np
import pytest

from stat_video.clips.make import write_mp4
from stat_video.data import decode
from stat_video.data.reading import read_video
from stat_video.data.video import Video
from stat_video.errors import VideoError
from tests.video.clip_samples import encode, frame_numbers, numbered, numbered_frames


def read_clip(path, choose):
    return read_video(Video(path, 0), choose)


def frames_of(path, indices):
    return frame_numbers(read_clip(path, lambda length: np.array(indices)))


@pytest.mark.parametrize("gop", [1, 5, 12, 250])
@pytest.mark.parametrize("indices", [[0], [35], [0, 1, 2, 3], [3, 3, 11, 12, 13, 30], [17, 34]])
def test_the_frames_that_were_asked_for(tmp_path, gop, indices):
    path = tmp_path / "v.mp4"
    write_mp4(path, numbered_frames(36), fps=25, gop=gop)
    assert frames_of(path, indices) == indices


def test_the_chooser_learns_the_length_and_the_clip_its_shape():
    lengths = []
    clip = read_clip(numbered(), lambda length: lengths.append(length) or np.array([0, 5]))
    assert lengths == [36]
    assert clip.shape == (2, 32, 48, 3)
    assert clip.dtype == np.uint8


@pytest.fixture
def decoded(monkeypatch):
    """The times of the frames that come out of a decoder."""
    decoded = []
    original = decode._open

    class Container:
        def __init__(self, container):
            self.container = container

        def demux(self, stream):
            return map(Packet, self.container.demux(stream))

        def __getattr__(self, name):
            return getattr(self.container, name)

    class Packet:
        def __init__(self, packet):
            self.packet = packet

        def decode(self):
            frames = self.packet.decode()
            decoded.extend(frame.pts for frame in frames)
            return frames

        def __getattr__(self, name):
            return getattr(self.packet, name)

    @contextmanager
    def counting_open(path, threads):
        with original(path, threads) as (container, stream):
            yield Container(container), stream

    monkeypatch.setattr(decode, "_open", counting_open)
    return decoded


def test_only_the_needed_frames_are_decoded(decoded):
    """A late frame costs its group of pictures, not the whole video."""
    key = decode._packet_table(numbered()).keys[30]
    assert key > 3
    decoded.clear()
    assert frames_of(numbered(), [2, 30]) == [2, 30]
    assert len(decoded) == len(range(3)) + len(range(key, 31))


def write_predicted(path, codec, gop=40):
    """Sixty frames with B-frames, which no other frame is predicted from.

    libx265 in PyAV's wheel corrupts the heap at such sizes, so it gets frames of 64 x 64 pixels.
    """

    def prepare(stream):
        stream.gop_size, stream.max_b_frames = gop, 3

    images = numbered_frames(36).repeat(2, axis=0)[:60]
    images[:, 8:24, 8:24] = np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3))
    if codec == "libx265":
        images = np.pad(images, ((0, 0), (0, 32), (0, 16), (0, 0)))
    encode(path, images, codec, prepare=prepare)
    return path


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9", "libx265"])
def test_frames_left_out_change_no_other_frame(tmp_path, codec):
    """Bit by bit what decoding everything gives."""
    path = write_predicted(tmp_path / "v.mp4", codec)
    whole = read_clip(path, np.arange)
    rng = np.random.default_rng(1)
    for count in (1, 2, 5, 5, 20):
        indices = np.sort(rng.integers(60, size=count))
        assert np.array_equal(read_clip(path, lambda n, i=indices: i), whole[indices])


def test_frames_that_nothing_refers_to_are_left_out(tmp_path, decoded):
    path = write_predicted(tmp_path / "v.mp4", "libx264")
    read_clip(path, lambda n: np.array([38]))
    assert len(decoded) < 30
    decoded.clear()
    read_clip(path, np.arange)
    assert len(decoded) == 60


def test_containers_without_times_are_read_from_the_start(tmp_path):
    path = tmp_path / "v.avi"
    encode(path, numbered_frames(30), format="avi")
    assert frames_of(path, [0, 9, 29]) == [0, 9, 29]


def test_a_file_that_promises_too_much_is_sampled_anew(monkeypatch):
    """Packets that cannot be decoded shorten the video, and the chooser is asked again."""
    real = decode._packet_table

    def optimistic(path):
        return decode.PacketTable(None, (), real(path).count + 100)

    monkeypatch.setattr(decode, "_packet_table", optimistic)
    lengths = []

    def last(length):
        lengths.append(length)
        return np.array([length - 1])

    assert frame_numbers(read_clip(numbered(), last)) == [35]
    assert lengths == [136, 36]


def test_a_clip_filmed_on_its_side_is_turned_upright(tmp_path):
    path = tmp_path / "side.mp4"
    image = np.zeros((32, 48, 3), np.uint8)
    image[:, :16] = 255  # bright on the left: after a quarter turn to the left, at the bottom
    encode(path, 4 * [image], prepare=lambda stream: stream.set_display_rotation(90))
    clip = read_clip(path, lambda length: np.array([0]))
    assert clip.shape == (1, 48, 32, 3)
    assert clip[0, -8:].mean() > 200 > 50 > clip[0, :8].mean()


def broken_file(kind, good, folder):
    path, data = folder / f"{kind}.mp4", good.read_bytes()
    if kind == "text":
        path.write_text("I am no video\n" * 50)
    elif kind == "zero":
        path.write_bytes(b"")
    elif kind == "truncated":  # the index at the end is gone
        path.write_bytes(data[: len(data) // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "short":
        write_mp4(path, numbered_frames(1), fps=25)
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            samples = av.AudioFrame.from_ndarray(
                np.zeros((1, 4096), np.float32), format="fltp", layout="mono"
            )
            samples.sample_rate = 16000
            container.mux(stream.encode(samples))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("folder", "is not a file"),
        ("zero", "is empty"),
        ("text", "cannot be decoded"),
        ("truncated", "is truncated"),
        ("short", "too short: 1 frames"),
        ("sound", "has no video stream"),
    ],
)
def test_broken_files(kind, reason, tmp_path):
    path = broken_file(kind, numbered(), tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        read_clip(path, np.arange)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_file_with_its_index_in_front_is_truncated_too(tmp_path):
    whole = tmp_path / "whole.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    encode(whole, noise, options={"movflags": "faststart"})
    assert len(read_clip(whole, np.arange)) == 40
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(VideoError, match="is truncated: its header promises 40 frames"):
        read_clip(cut, np.arange)
