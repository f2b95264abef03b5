"""Each annotation format, found out by its content and not by its name."""

import json
import os

import pytest

from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.options import DataOptions
from stat_video.data.sources import list_videos
from stat_video.data.video import Video
from stat_video.errors import UserError

NAMES = ("Pushing something from left to right", "Throwing something")
RECORDS = [
    {"id": "7", "label": "pushing a cup from left to right", "template": NAMES[0]},
    {"id": "12", "label": "throwing a ball", "template": "Throwing [something]"},
]
FRAMES = """original_vido_id video_id frame_id path labels
7 0 1 7/7_000002.jpg {0}
7 0 0 7/7_000001.jpg {0}
12 1 0 12/12_000001.jpg {1}
"""


def read(tmp_path, content, name="list.csv"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_annotations(file, tmp_path / "videos", NAMES)


# -- Something-Something V2 ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.json", "train.txt"])
def test_records_with_templates(tmp_path, name):
    root = tmp_path / "videos"
    expected = [Video(root / "7.webm", 0), Video(root / "12.webm", 1)]
    assert read(tmp_path, RECORDS, name=name) == expected


@pytest.mark.parametrize(("made", "suffix", "frames"), [("12.mp4", ".mp4", None), ("7/", "", "")])
def test_what_holds_the_records_videos_is_looked_up(tmp_path, made, suffix, frames):
    root = tmp_path / "videos"
    (root / made).mkdir(parents=True) if made[-1] == "/" else root.mkdir()
    if made[-1] != "/":
        (root / made).touch()
    expected = [Video(root / f"7{suffix}", 0, frames), Video(root / f"12{suffix}", 1, frames)]
    assert read(tmp_path, RECORDS) == expected


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": "7"}], "entry 0: 'id' and 'template' are needed"),
        ([{"id": "7", "template": 5}], "entry 0: 'id' and 'template' are needed"),
        ([{"id": None, "template": NAMES[0]}], "entry 0: 'id' and 'template' are needed"),
        ([{"id": "7", "template": "Juggling"}], "entry 0: 'Juggling' is not among the class names"),
        ({"7": "x"}, "must be a JSON list of objects"),
        ("[{", r"list\.csv is damaged JSON"),
        ("[]", "lists no videos"),
    ],
)
def test_records_that_are_wrong(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, records)


def test_a_name_that_is_too_long_stops_nothing(tmp_path):
    records = [{"id": "7" * 300, "template": NAMES[0]}, *RECORDS]
    (tmp_path / "videos").mkdir()
    assert len(read(tmp_path, records)) == 3


@pytest.mark.parametrize(
    "content",
    [
        {NAMES[1]: "1", NAMES[0]: "0"},
        {f'"{NAMES[0]}"': 0, f'"{NAMES[1]}"': 1},  # Kinetics' file has quotes within the strings
        list(NAMES),
    ],
)
def test_class_names_in_json(tmp_path, content):
    (tmp_path / "labels").write_text(json.dumps(content))
    assert read_class_names(tmp_path / "labels") == NAMES


# -- a line a frame --------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_a_line_a_frame(tmp_path, separator):
    videos = read(tmp_path, FRAMES.format(0, '"1"').replace(" ", separator))
    root = tmp_path / "videos"
    assert videos == [
        Video(root / "7", 0, "7_000001.jpg\n7_000002.jpg"),
        Video(root / "12", 1, "12_000001.jpg"),
    ]


def test_empty_labels_come_from_the_json_beside(tmp_path):
    (tmp_path / "other.json").write_text('{"no": "list"}')
    (tmp_path / "numbers.json").write_text("[5]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "validation.json").write_text(json.dumps(RECORDS))
    assert [v.label for v in read(tmp_path, FRAMES.format('""', '""'))] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FRAMES.format("0", '""'), "video 12 must have one label, got ''"),
        (FRAMES.format("0", "1,2"), "video 12 must have one label, got '1,2'"),
        (FRAMES.format("0", "1 more"), "line 4: expected 'original_vido_id"),
        (FRAMES.format("0", "1" * 5000), "video 12 must have one label, got '111"),
        (FRAMES.format("0", "\u00b2"), "video 12 must have one label"),
        (FRAMES.format("0", "1") + f"7 0 {'2' * 5000} 8/x.jpg 0\n", "line 5: expected"),
        (FRAMES.format("0", "1") + "7 0 2 8/x.jpg 0\n", "frames of video 7 must lie in one folder"),
    ],
)
def test_frame_lists_that_are_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


# -- folders of frames, and paths that look like them ----------------------------------------------


def test_folder_frames_label(tmp_path):
    (tmp_path / "videos" / "a b").mkdir(parents=True)
    videos = read(tmp_path, "a b 30 1\nc 25 0\n")
    root = tmp_path / "videos"
    assert videos == [Video(root / "a b", 1, ""), Video(root / "c", 0, "")]


def test_a_path_that_ends_with_a_number_is_told_apart_by_the_disk(tmp_path):
    (tmp_path / "videos" / "clip 30").mkdir(parents=True)
    assert read(tmp_path, "clip 30 1\n") == [Video(tmp_path / "videos" / "clip 30", 1)]


def test_two_labels_a_video_are_refused(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    with pytest.raises(UserError, match="line 1: one label a video is wanted, got several"):
        read(tmp_path, "a.mp4 0 1\n")


def test_a_path_may_begin_with_a_bracket(tmp_path):
    assert read(tmp_path, "[x] a.mp4 1\n") == [Video(tmp_path / "videos" / "[x] a.mp4", 1)]


# -- a folder a class ------------------------------------------------------------------------------


@pytest.fixture
def class_folders(tmp_path):
    """A folder with the two classes of each split."""
    for split in ("train", "val"):
        for name in ("run", "walk"):
            (tmp_path / split / name / "frames of one").mkdir(parents=True)
            for file in ("b.MP4", "a.webm", "notes.txt", "._a.webm"):
                (tmp_path / split / name / file).touch()
            (tmp_path / split / name / "broken link.mp4").symlink_to("nowhere")
        (tmp_path / split / ".cache").mkdir()
    return tmp_path


def listed(root, split):
    return list_videos(DataOptions(root=str(root), train="train", val="val"), split)


def test_a_folder_a_class(class_folders):
    names, videos = listed(class_folders, "val")
    walk = class_folders / "val" / "walk"
    assert names == ("run", "walk")
    assert videos[4:] == [
        Video(walk / "a.webm", 1),
        Video(walk / "b.MP4", 1),
        Video(walk / "broken link.mp4", 1),
        Video(walk / "frames of one", 1, ""),
    ]


def test_a_folder_that_is_no_class(class_folders):
    (class_folders / "val" / "swim").mkdir()
    with pytest.raises(UserError, match=r"val/swim is no class: .* do not list 'swim'"):
        listed(class_folders, "val")


def test_missing_labels_are_told_with_the_way_out(class_folders):
    with pytest.raises(UserError, match=r"labels\.txt does not exist: .*") as caught:
        list_videos(DataOptions(root=str(class_folders)), "train")
    assert "(--data.train train --data.val val)" in str(caught.value)


def test_folders_that_are_no_names(class_folders):
    os.mkdir(os.fsencode(class_folders / "train") + b"/caf\xe9")
    with pytest.raises(UserError, match=r"'caf.*', number 0, is no name for a class"):
        listed(class_folders, "train")


def test_a_class_that_must_not_be_read(class_folders, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)  # the tests may run as root, who reads every folder
    with pytest.raises(UserError, match=r"cannot read .*: Permission denied"):
        listed(class_folders, "train")


def test_labels_order_the_folders(class_folders):
    (class_folders / "labels.txt").write_text("walk\nrun\n")
    names, videos = listed(class_folders, "train")
    assert names == ("walk", "run")
    assert {v.path.parent.name: v.label for v in videos} == {"walk": 0, "run": 1}


def test_paths_are_relative_to_the_folder_of_videos(tmp_path):
    (tmp_path / "train.txt").write_text("a.mp4 1\n")
    (tmp_path / "labels.txt").write_text("x\ny\n")
    _, videos = list_videos(DataOptions(root=str(tmp_path), videos="inner"), "train")
    assert videos == [Video(tmp_path / "inner" / "a.mp4", 1)]
