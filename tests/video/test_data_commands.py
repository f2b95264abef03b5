"""check-data and bench-data: what they find, what they measure, what they say."""

import json
import os
import re
import shutil
import time

import pytest
import torch

from stat_video.analysis import bench_data as bench_module
from stat_video.analysis.bench_data import BenchOptions, Figures, bench_data
from stat_video.cli import main
from stat_video.clips.make import write_mp4
from stat_video.data.dataset import ClipDataset
from stat_video.data.options import DataOptions
from stat_video.errors import UserError
from stat_video.model.config import STATConfig
from tests.video.clip_samples import clips, numbered, numbered_frames

SMALL = ["--model.frames", "4", "--model.image_size", "24"]


@pytest.fixture
def folder(tmp_path):
    """The generated clips, to be spoiled."""
    shutil.copytree(clips(), tmp_path / "data")
    return tmp_path / "data"


def check(folder, *more):
    out = folder.parent / "report"
    return main(["check-data", *more, "--data.root", str(folder), "--check.dir", str(out)])


def spoil(folder, count, split="val"):
    """Cut the first videos of a split short."""
    videos = sorted((folder / split).glob("*.mp4"))[:count]
    for video in videos:
        video.write_bytes(video.read_bytes()[:1500])
    return videos


# -- check-data ------------------------------------------------------------------------------------


def test_good_data_pass(folder, capsys):
    write_mp4(folder / "train" / "long.mp4", numbered_frames(36), fps=25, gop=12)
    with (folder / "train.txt").open("a") as file:
        file.write("train/long.mp4 1\n")
    assert check(folder) == 0
    out = capsys.readouterr().out
    assert "train: 13 videos, 2 classes, 0 unusable (0.0 %)" in out
    assert "least / median / most: 16 / 16 / 36" in out
    assert "picture sizes: 32x32 (12), 48x32 (1)" in out
    record = json.loads((folder.parent / "report" / "check.json").read_text())
    assert record["val"]["videos"] == 6
    assert record["train"]["sizes"] == {"32x32": 12, "48x32": 1}
    assert (folder.parent / "report" / "unusable_train.txt").read_text() == ""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unusable_videos_are_listed(folder, capsys, workers):
    bad = spoil(folder, 2)
    more = ["--data.max_bad_share", "0.5", "--data.workers", workers]
    assert check(folder, *more) == 0
    assert "val: 6 videos, 2 classes, 2 unusable (33.3 %)" in capsys.readouterr().out
    lines = (folder.parent / "report" / "unusable_val.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(str(path) in line for path, line in zip(bad, lines, strict=True))


def test_a_name_that_is_no_utf_8_is_listed(folder):
    for split in ("train", "val"):
        path = os.fsencode(folder / split / "class" / "caf") + b"\xe9.mp4"
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(b"no video" if split == "val" else numbered().read_bytes())
    more = ["--data.train", "train", "--data.val", "val", "--data.labels", "none"]
    assert check(folder, *more, "--data.max_bad_share", "1") == 0
    listed = (folder.parent / "report" / "unusable_val.txt").read_text(encoding="utf-8")
    assert r"/caf\udce9.mp4 cannot be decoded" in listed


def test_too_many_are_an_error(folder, capsys):
    spoil(folder, 2)
    assert check(folder) == 2
    err = capsys.readouterr().err
    assert "2 of 6 val videos are unusable, more than data.max_bad_share 0.1 allows" in err
    assert err.rstrip().endswith("unusable_val.txt")


def test_classes_without_videos_and_shared_videos_are_told(folder, capsys):
    (folder / "labels.txt").write_text("left\nright\nup\ndown\n")
    text = (folder / "train.txt").read_text()
    (folder / "val.txt").write_text(text.splitlines()[0] + "\n")
    assert check(folder) == 2
    out, err = capsys.readouterr()
    assert "2 classes have no usable video: up, down" in out
    assert "1 videos are both in data.train and in data.val" in err


def test_a_full_check_decodes_every_frame(folder, monkeypatch):
    """A damaged frame in between is met by nothing else."""
    from stat_video.data import check as check_module

    read, asked = check_module.read_video, set()

    def recording(video, choose, **kwargs):
        def remember(length):
            asked.update((video.path, int(i)) for i in choose(length))
            return choose(length)

        return read(video, remember, **kwargs)

    monkeypatch.setattr(check_module, "read_video", recording)
    monkeypatch.setattr(check_module, "_PIECE", 7)
    check(folder)
    assert len(asked) == 18 * 3
    check(folder, "--check.full", "true")
    assert len(asked) == 18 * 16


def test_a_recipe_s_other_groups_are_left_aside(folder):
    lists = ["--data.train", "train.txt", "--data.val", "val.txt", "--data.labels", "labels.txt"]
    more = ["--data.videos", "", "--data.workers", "0"]
    assert check(folder, "--config", "ssv2_b16", *more, *lists) == 0


# -- bench-data ------------------------------------------------------------------------------------


def slow(monkeypatch, decode_s, transform_s):
    """Reading and augmenting take a known time."""
    read, augment = ClipDataset.read, ClipDataset.augment

    def slow_read(self, *args):
        time.sleep(decode_s)
        return read(self, *args)

    def slow_augment(self, *args):
        time.sleep(transform_s)
        return augment(self, *args)

    monkeypatch.setattr(ClipDataset, "read", slow_read)
    monkeypatch.setattr(ClipDataset, "augment", slow_augment)


def measure(**options):
    data = {"root": str(clips()), **options.pop("data", {})}
    config = STATConfig(**{**vars(STATConfig.preset("stat_tiny")), "frames": 4, "image_size": 16})
    return bench_data(DataOptions(**data), config, BenchOptions(seconds=0.4, clips=4, **options))


def test_times_are_told_apart(monkeypatch):
    slow(monkeypatch, 0.1, 0.04)
    figures = measure(consumes=100.0)
    assert 100 < figures.decode_ms < 250
    assert 40 < figures.transform_ms < 95
    assert 0 < figures.collate_ms < 40
    assert figures.one_process == figures.loader < 1 / 0.14
    assert figures.model == 100


def test_repeats_share_the_decoding(monkeypatch):
    slow(monkeypatch, 0.1, 0)
    assert 50 < measure(data={"repeats": 2, "batch_size": 16}).decode_ms < 98


def test_the_loader_runs_in_workers(monkeypatch):
    slow(monkeypatch, 0.1, 0)
    figures = measure(data={"workers": 2})
    assert figures.workers == 2
    assert figures.loader > 1.3 * figures.one_process


def test_the_model_is_measured(monkeypatch):
    def step(model, batch):
        assert batch.shape == (4, 3, 4, 16, 16)
        time.sleep(0.05)

    assert measure().model == 0
    monkeypatch.setattr(bench_module, "_step", step)
    assert 40 < measure(steps=3).model < 80.1
    monkeypatch.undo()
    assert measure(steps=1).model > 0


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (2.0, "the loader gives 2.0 times what the model takes"),
        (40.0, "the model would wait for data 90 % of the time; about 16 workers"),
    ],
)
def test_the_verdict(model, text):
    figures = Figures(300.0, 90.0, 10.0, 2.5, 4.0, 2, 2, model)
    lines = figures.describe()
    assert text in lines
    assert re.search(r"decode +300\.0 +75\.0%", lines)


def test_bench_data_says_it_and_writes_it(tmp_path, capsys):
    file = tmp_path / "new" / "figures.json"
    argv = ["bench-data", "--data.root", str(clips()), *SMALL, "--bench.seconds", "0.2"]
    assert main([*argv, "--bench.clips", "2", "--bench.json", str(file)]) == 0
    assert "one process on one thread:" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["decode_ms"] > 0
    assert record["model"] == 0
    assert record["config"]["frames"] == 4


def test_unusable_videos_are_passed_over(tmp_path, monkeypatch, folder):
    spoil(folder, 3, "train")
    assert measure(data={"root": str(folder), "max_bad_share": 0.5}).decode_ms > 0
    spoil(folder, 12, "train")
    with pytest.raises(UserError, match="no video of the list can be used"):
        measure(data={"root": str(folder)})


def test_threads_are_given_back():
    before = torch.get_num_threads()
    measure()
    assert torch.get_num_threads() == before


def test_bench_options_are_checked():
    with pytest.raises(ValueError, match=r"bench\.clips at least 1"):
        BenchOptions(clips=0)
