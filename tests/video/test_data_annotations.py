"""The Kinetics list format in its variants, lists of class names, and mistakes in both."""

import os
import time

import pytest

from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.video import Video
from stat_video.errors import UserError

NAMES = [f"class {number}" for number in range(20)]


def read(tmp_path, text, names=NAMES):
    file = tmp_path / "list.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_annotations(file, tmp_path, names)


def read_names(tmp_path, text):
    file = tmp_path / "labels.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_class_names(file)


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
        ("\ufeffa.mp4 1", "a.mp4", 1),
        ("'a.mp4\" 1", "'a.mp4\"", 1),
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
        ("a.mp4 " + "1" * 5000, r"line 1: expected 'path label', got 'a.mp4 1+\.\.\.'$"),
        ("a.mp4 \u00b2", "expected 'path label'"),
        ("a.mp4 0\0\n", "must be UTF-8 text, but holds NUL bytes"),
        ("a.mp4 0\n".encode("utf-16"), "must be UTF-8 text: invalid start byte at byte 0"),
        ("[" * 100_000, "is damaged JSON: it is nested too deeply"),
        (f'[{{"id": {"1" * 5000}}}]', "is damaged JSON: Exceeds the limit"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text, NAMES[:2])
    assert len(str(caught.value)) < 400


def test_a_line_of_blanks_takes_no_time(tmp_path):
    start = time.perf_counter()
    with pytest.raises(UserError, match="expected 'path label'"):
        read(tmp_path, "a" + " " * 1600 + "b\n")
    assert read(tmp_path, "a" + " " * 1600 + "3\n") == [Video(tmp_path / "a", 3)]
    assert time.perf_counter() - start < 1


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt is not a file"):
        read_annotations(tmp_path / "list.txt", tmp_path, NAMES)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        read_annotations(tmp_path / "nowhere.txt", tmp_path, NAMES)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_class_names_keep_their_spaces(tmp_path, mark):
    text = mark + "abseiling\nair drumming\n\n"
    assert read_names(tmp_path, text) == ("abseiling", "air drumming")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run\nwalk\nrun\n", "names class 'run' twice, as number 0 and 2"),
        ("run\n\x1b[31mwalk\n", r"'\\x1b\[31mwalk', number 1, is no name for a class"),
        ('["", "run"]', "'', number 0, is no name for a class"),
        ('["run", null]', "must be a list of class names, or map class names to numbers"),
        ('{"run": 0, "walk": 1.5}', "must map class names to numbers"),
        ('{"run": 0, "walk": Infinity}', "must map class names to numbers"),
        ('{"run": 0, "run": 1}', "must number the classes from 0 to 0, each once"),
        ('{"run": 0, "walk": 2}', "must number the classes from 0 to 1, each once"),
        ('{"run": 0, "walk": 0}', "must number the classes from 0 to 1, each once"),
        ('{"run": "x"}', "must map class names to numbers"),
        ('["run", [' + "[" * 100_000, "is damaged JSON: it is nested too deeply"),
        ("\n", "names no classes"),
        (b"r\0u\0n\0", "holds NUL bytes"),
    ],
)
def test_class_names_that_are_wrong(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_names(tmp_path, text)
