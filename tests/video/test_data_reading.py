"""Reading a video whatever holds it, and one kind of error whatever is wrong with it."""

import numpy as np
import pytest
from PIL import Image

from stat_video.data.reading import read_video
from stat_video.data.video import Video
from stat_video.errors import VideoError
from tests.video.clip_samples import frame_numbers, numbered_frames


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
        (lambda f: Image.new("RGB", (8, 8)).save(f / "img_1.png"), "changes its picture size"),
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
