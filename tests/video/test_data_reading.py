"""Folders of frames, and torchcodec: tried before it is trusted, refused in one sentence."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stat_video.data import torchcodec_reader
from stat_video.data.decode import read_clip
from stat_video.data.reading import check_decoder, read_video
from stat_video.data.video import Video
from stat_video.errors import UserError, VideoError
from tests.video.clip_samples import frame_numbers, numbered, numbered_frames


def write_images(folder, count, pattern="img_{}.png"):
    folder.mkdir()
    for number, image in enumerate(numbered_frames(count, 16, 16)):
        Image.fromarray(image).save(folder / pattern.format(number))
    return folder


def test_a_folder_of_images_in_order_of_their_numbers(tmp_path):
    folder = write_images(tmp_path / "v", 12)
    (folder / "thumbs.db").write_text("no image")
    lengths = []
    clip = read_video(
        Video(folder, 0, ""), lambda n: lengths.append(n) or np.array([2, 9, 9, 10, 11])
    )
    assert lengths == [12]
    assert clip.shape == (5, 16, 16, 3)
    assert frame_numbers(clip) == [2, 9, 9, 10, 11]


def test_listed_frames_in_the_order_of_the_list(tmp_path):
    folder = write_images(tmp_path / "v", 5)
    video = Video(folder, 0, "img_3.png\nimg_1.png\nimg_0.png")
    assert frame_numbers(read_video(video, np.arange)) == [3, 1, 0]


def test_only_the_needed_images_are_opened(tmp_path):
    folder = write_images(tmp_path / "v", 4)
    (folder / "img_1.png").write_bytes(b"damaged")
    video = Video(folder, 0, "")
    assert frame_numbers(read_video(video, lambda n: np.array([0, 3]))) == [0, 3]
    with pytest.raises(VideoError, match=r"img_1\.png is no image that can be read"):
        read_video(video, np.arange)


def test_grey_images_become_colour(tmp_path):
    folder = write_images(tmp_path / "v", 2)
    for path in folder.iterdir():
        Image.open(path).convert("L").save(path)
    assert read_video(Video(folder, 0, ""), np.arange).shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: f.rename(f.with_name("elsewhere")), "v does not exist"),
        (lambda f: [p.unlink() for p in list(f.iterdir())[1:]], "too short: 1 frames"),
        (lambda f: Image.new("RGB", (8, 8)).save(f / "img_1.png"), "frames of different sizes"),
        (lambda f: (f / "img_0.png").write_bytes((f / "img_0.png").read_bytes()[:40]), "no image"),
    ],
)
def test_broken_folders(tmp_path, break_it, message):
    folder = write_images(tmp_path / "v", 3)
    break_it(folder)
    with pytest.raises(VideoError, match=message):
        read_video(Video(folder, 0, ""), np.arange)


def test_a_listed_frame_that_is_missing(tmp_path):
    folder = write_images(tmp_path / "v", 2)
    with pytest.raises(VideoError, match=r"img_7\.png does not exist"):
        read_video(Video(folder, 0, "img_0.png\nimg_7.png"), np.arange)


# -- torchcodec ------------------------------------------------------------------------------------


class StandIn:
    """torchcodec's VideoDecoder as far as it is used, on PyAV."""

    shift = 0
    calls: list = []  # noqa: RUF012

    def __init__(self, source, *, seek_mode, num_ffmpeg_threads, dimension_order):
        assert (seek_mode, num_ffmpeg_threads, dimension_order) == ("exact", 1, "NHWC")
        try:
            self.frames = read_clip(source, np.arange)
        except VideoError as error:
            raise RuntimeError("Could not open input file\nmore lines") from error

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        self.calls.append(indices)
        images = np.roll(self.frames, self.shift, axis=0)[indices]
        return SimpleNamespace(data=torch.from_numpy(images))


@pytest.fixture
def torchcodec(monkeypatch):
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder, package.decoders, package.__path__ = StandIn, decoders, []
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(StandIn, "shift", 0)
    monkeypatch.setattr(StandIn, "calls", [])
    torchcodec_reader.check_torchcodec.cache_clear()
    yield StandIn
    torchcodec_reader.check_torchcodec.cache_clear()


def test_torchcodec_gives_the_frames_that_were_asked_for(torchcodec):
    video = Video(numbered(), 0)
    clip = read_video(video, lambda n: np.array([3, 3, 30, 35]), decoder="torchcodec")
    assert frame_numbers(clip) == [3, 3, 30, 35]
    assert torchcodec.calls == [[3, 30, 35]]


def test_torchcodec_reports_files_as_pyav_does(torchcodec, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 50)
    (tmp_path / "zero.mp4").touch()
    for name, message in (
        ("text.mp4", r"text\.mp4 cannot be decoded: .* \(Could not open input file\)"),
        ("zero.mp4", "is empty"),
        ("none.mp4", "does not exist"),
    ):
        with pytest.raises(VideoError, match=message):
            read_video(Video(tmp_path / name, 0), np.arange, decoder="torchcodec")


def test_the_trial_passes_where_torchcodec_agrees_with_pyav(torchcodec):
    check_decoder("torchcodec")
    assert torchcodec.calls


def test_the_trial_refuses_wrong_frames(torchcodec, monkeypatch):
    monkeypatch.setattr(torchcodec, "shift", 1)
    with pytest.raises(UserError, match="other frames than PyAV for a trial clip"):
        check_decoder("torchcodec")


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("No module named 'torchcodec'"),
        RuntimeError("Could not load libtorchcodec.\nFFmpeg version 8: libavutil.so.60 ..."),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(torchcodec, monkeypatch, failure):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "torchcodec.decoders":
                raise failure

    monkeypatch.delitem(sys.modules, "torchcodec.decoders")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(UserError) as caught:
        check_decoder("torchcodec")
    first = str(failure).splitlines()[0]
    assert str(caught.value).startswith(f"data.decoder torchcodec cannot be used here ({first});")
    assert "\n" not in str(caught.value)
    check_decoder("pyav")
