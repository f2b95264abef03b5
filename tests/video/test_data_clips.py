"""The generated benchmark: real files, the same each time, and nothing to see in single frames."""

import av
import numpy as np
import pytest

from stat_video.clips.make import ClipOptions, write_clips, write_mp4
from stat_video.clips.materials import PHOTOS, Materials, load_materials
from stat_video.clips.render import DIRECTIONS, Layer, _compose, _pair, class_names, render_clip
from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.decode import read_clip
from stat_video.errors import UserError
from tests.video.clip_samples import OPTIONS, clips


def draw(task, label, **changes):
    looks = {"size": 32, "frames": 16, "speed": (0.8, 1.6), "distractors": 1, "drift": 0.2}
    rng, materials = np.random.default_rng(0), load_materials("train")
    return render_clip(rng, materials, task, label, **looks | changes)


def test_files_and_lists():
    folder = clips()
    names = read_class_names(folder / "labels.txt")
    assert names == ("left", "right")
    videos = read_annotations(folder / "train.txt", folder, names)
    assert [v.label for v in videos] == [0, 1] * 6
    for video in videos:
        assert names[video.label] in video.path.name
        assert read_clip(video.path, np.arange).shape == (16, 32, 32, 3)
    assert len(read_annotations(folder / "val.txt", folder, names)) == OPTIONS.val
    assert (folder / "contact_sheet.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_two_runs_write_the_same_frames_and_another_seed_others(tmp_path):
    few = {"size": 32, "frames": 8, "train": 2, "val": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_clips(tmp_path / name, ClipOptions(**few, seed=seed))
    a, b, c = (
        read_clip(tmp_path / name / "train" / "00001_right.mp4", np.arange) for name in "abc"
    )
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_every_frame_is_a_key_frame():
    """Predicted frames would show which way time runs."""
    path = next((clips() / "train").glob("*.mp4"))
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        assert len(packets) == 16
        assert all(p.is_keyframe for p in packets)


def test_compression_keeps_the_picture():
    clip = draw("direction", 0)
    path = clips().parent / "one.mp4"
    write_mp4(path, clip, fps=16)
    decoded = read_clip(path, np.arange)
    assert np.abs(decoded.astype(int) - clip).mean() < 12


def test_training_and_validation_share_no_material():
    assert not set(PHOTOS["train"]) & set(PHOTOS["val"])
    train, val = load_materials("train"), load_materials("val")
    seen = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in seen for digit in val.digits)
    for materials in (train, val):
        assert {0, 1} <= set(materials.digit_classes.tolist())
        assert all(p.ndim == 3 and p.shape[2] == 3 and p.max() <= 1 for p in materials.photos)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_patch_drifts_the_way_that_its_class_says(name):
    """The brightness of a bright patch alone on black is followed around the torus."""
    white = np.zeros((32, 32, 3), np.float32)
    white[:6, :6] = 1
    dy, dx = DIRECTIONS[name]
    layer = Layer(white, white[..., :1], (8.0, 8.0), (1.5 * dy, 1.5 * dx))
    centres = [np.argwhere(_compose([layer], t, 32)[..., 0] > 100).mean(0) for t in range(4)]
    moves = np.diff(centres, axis=0).mean(0)
    assert moves == pytest.approx((1.5 * dy, 1.5 * dx), abs=0.3)


def test_motion_wraps_around():
    white = np.zeros((32, 32, 3), np.float32)
    white[:4, :4] = 1
    layer = Layer(white, white[..., :1], (0.0, 30.0), (0.0, 1.0))
    frames = [_compose([layer], t, 32)[..., 0].sum() for t in (0, 2, 8)]
    assert frames[0] == frames[1] == frames[2] > 0


@pytest.mark.parametrize("label", [0, 1])
def test_order_shows_one_digit_and_then_the_other(label):
    """A zero that fills its box and a one that is a thin line are told apart by their area."""
    digits = np.zeros((2, 8, 8), np.float32)
    digits[0] = 1
    digits[1, :, 4] = 1
    materials = Materials((), digits, np.array([0, 1]))
    leads, gaps = [], []
    for index in range(200):
        first, second = _pair(np.random.default_rng(index), materials, label, 32, 32)
        zero, one = (first, second) if label == 0 else (second, first)
        assert zero.alpha.sum() > 2 * one.alpha.sum() > 0
        assert 0 <= first.first < first.last <= second.first < second.last <= 32
        leads.append((first.first, 32 - second.last))
        gaps.append(second.first - first.last)
    before, after = np.mean(leads, axis=0)
    assert before == pytest.approx(after, abs=1)  # no time of the clip is the first digit's own
    assert min(gaps) == 0
    assert max(gaps) == 8


def test_clips_in_order_and_scrambled_have_the_same_sets_of_frames():
    clips = [draw("coherence", label, speed=(1.2, 2.4)) for label in (0, 1)]
    frames = [[frame.tobytes() for frame in clip] for clip in clips]
    assert frames[0] != frames[1]
    assert sorted(frames[0]) == sorted(frames[1])
    steps = [np.abs(np.diff(clip.astype(float), axis=0)).mean() for clip in clips]
    assert steps[0] < 0.7 * steps[1]


def test_a_view_returns_or_changes_after_the_dark():
    """Up to the end of the dark the clips of both classes are the same."""
    clips = (draw("return", label, distractors=0, drift=0.1) for label in (0, 1))
    returns, changes = (clip.astype(float) for clip in clips)
    dark = returns.mean((1, 2, 3)) == 0
    first, last = np.flatnonzero(dark)[[0, -1]]
    assert dark[first : last + 1].all()
    assert dark.sum() >= 6  # beyond the reach of a window of 3 in two blocks
    assert first >= 4
    assert 16 - 1 - last >= 4
    assert np.array_equal(returns[: last + 1], changes[: last + 1])
    away = [np.abs(clip[last + 1] - clip[first - 1]).mean() for clip in (returns, changes)]
    assert away[0] < 0.5 * away[1]


def test_class_names():
    assert class_names("direction", 2) == ("left", "right")
    assert class_names("direction", 4) == ("left", "right", "up", "down")
    assert class_names("order", 2) == ("zero_then_one", "one_then_zero")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 33}, "size must be even"),
        ({"frames": 4}, "frames must be at least 8"),
        ({"task": "order", "classes": 4}, "classes must be 2"),
        ({"contrast": 1.0}, "contrast must be from 0 to 0.9, got 1.0"),
        ({"train": 0}, "train must be at least 1"),
        ({"speed_min": 2.0, "speed_max": 1.0}, "speed_min <= speed_max"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        ClipOptions(**changes)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = ClipOptions(size=32, frames=8, train=1, val=1)
    with pytest.raises(UserError, match="not empty"):
        write_clips(tmp_path, options)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    write_clips(tmp_path, options, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for name in ("train/mine.mp4", "train/00001_left.mp4"):
        (tmp_path / name).touch()
    write_clips(tmp_path, options, force=True)
    assert {p.name for p in (tmp_path / "train").iterdir()} == {"mine.mp4", "00000_left.mp4"}
    with pytest.raises(UserError, match="is not a folder"):
        write_clips(tmp_path / "notes.txt", options)


@pytest.mark.parametrize("name", ["train/00000_left.mp4", "val/notes.txt", "labels.txt"])
def test_force_replaces_nothing_that_make_clips_did_not_write(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"holds \S+, and no \.stat-clips that shows"):
        write_clips(tmp_path, ClipOptions(size=32, frames=8, train=1, val=1), force=True)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"
