"""The Kinetics list format in its variants."""

import pytest

from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.video import Video
from stat_video.errors import UserError


def read(tmp_path, text, classes=None):
    file = tmp_path / "list.txt"
    file.write_text(text, encoding="utf-8")
    return read_annotations(file, tmp_path, classes)


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 0", "a.mp4", 0),
        ("sub/a.mp4,12", "sub/a.mp4", 12),
        ("a.mp4, 3", "a.mp4", 3),
        ("a.mp4\t3", "a.mp4", 3),
        ("playing chess/my video 2.mp4 7", "playing chess/my video 2.mp4", 7),
        ("one, two/b.mp4,5", "one, two/b.mp4", 5),
        ('"with quotes.mp4" 4', "with quotes.mp4", 4),
        ("naïve.mp4 1  ", "naïve.mp4", 1),
    ],
)
def test_a_line(tmp_path, line, path, label):
    assert read(tmp_path, line + "\n") == [Video(tmp_path / path, label)]


def test_blank_lines_are_passed_over_and_absolute_paths_kept(tmp_path):
    videos = read(tmp_path, "\na.mp4 0\n\n/else/b.mp4 1\n")
    assert [str(v.path) for v in videos] == [str(tmp_path / "a.mp4"), "/else/b.mp4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4 zero\n", "line 2: expected 'path label', got 'b.mp4 zero'"),
        ("a.mp4 2\n", r"label 2 of .*a\.mp4 is not below the number of classes 2"),
        ("\n\n", "lists no videos"),
        ("7\n", "expected 'path label'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, classes=2)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        read_annotations(tmp_path / "nowhere.txt", tmp_path)


def test_class_names_keep_their_spaces(tmp_path):
    (tmp_path / "labels.txt").write_text("abseiling\nair drumming\n\n")
    assert read_class_names(tmp_path / "labels.txt") == ("abseiling", "air drumming")
