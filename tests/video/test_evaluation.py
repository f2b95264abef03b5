"""Evaluation: views averaged by video, nothing counted twice, tables that add up."""

import csv
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from stat_video.cli import main
from stat_video.data.loader import Batch, SkipCount
from stat_video.data.options import DataOptions
from stat_video.data.preprocess import Preprocess
from stat_video.data.transforms import MEAN, STD, normalise
from stat_video.distributed import World, alone
from stat_video.errors import UserError
from stat_video.evaluate import scoring
from stat_video.evaluate.evaluation import evaluate, write_class_table
from stat_video.evaluate.options import EvalOptions
from stat_video.evaluate.tally import Tally
from stat_video.model.stat import STAT
from tests.video.clip_samples import clips
from tests.video.training import CALM

CPU = torch.device("cpu")
ALONE = alone("cpu")

# logits of five videos with two views each, classes 0, 1, 2, 2, 0
LABELS = (0, 1, 2, 2, 0)
LOGITS = torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(4))
LOGITS[[0, 3, 4], :, [0, 2, 0]] += 4  # three are told rightly


def batch_of(*clips, skipped=()):
    """The batch of (video, view) pairs; a clip is the pair, which `Lookup` answers with logits."""
    return Batch(
        clips=torch.tensor([[video, view] for video, view in clips], dtype=torch.uint8),
        labels=torch.tensor([LABELS[video] for video, _ in clips], dtype=torch.int64),
        indices=tuple(video for video, _ in clips),
        views=tuple(view for _, view in clips),
        skipped=tuple(skipped),
    )


class Lookup(torch.nn.Module):
    def part(self, clips, clip):
        return clips

    def forward(self, clips, clip=None):
        videos, views = ((clips * STD + MEAN) * 255).round().long().unbind(1)
        return LOGITS[videos, views]


def scores_of(*batches, model=None, world=ALONE, max_share=0.5):
    skips = SkipCount(5, max_share)
    return evaluate(model or Lookup(), list(batches), 6, skips=skips, world=world)


ALL = [(video, view) for video in range(5) for view in range(2)]


def check(scores):
    """Against the definitions, worked out here."""
    means = LOGITS.double().softmax(-1).mean(1)
    labels = torch.tensor(LABELS)
    order = means.argsort(1, descending=True)
    ranks = (order == labels[:, None]).int().argmax(1)
    assert scores.videos == 5
    assert scores.top1 == pytest.approx((ranks == 0).double().mean().item())
    assert scores.top5 == pytest.approx((ranks < 5).double().mean().item())
    nll = -LOGITS.double().log_softmax(-1)[torch.arange(5), :, labels]
    assert scores.loss == pytest.approx(nll.mean().item())
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (labels.numpy(), order[:, 0].numpy()), 1)
    assert (scores.confusion == confusion).all()
    for label in range(6):
        mine = (ranks < 5)[labels == label].double()
        assert scores.class_top5[label] == pytest.approx(mine.mean().item(), nan_ok=True)


@pytest.mark.parametrize(
    "batches",
    [
        [ALL],
        [ALL[::-1]],
        [ALL[:3], ALL[3:4], [], ALL[4:]],
        [ALL, ALL[2:7]],  # padding, as some samplers add it
        [[*ALL[:5], ALL[0], ALL[0]], ALL[5:]],
    ],
)
def test_views_are_averaged_and_count_once(batches):
    check(scores_of(*[batch_of(*part) for part in batches]))


def test_the_mean_of_views_is_not_the_vote_of_the_first():
    first = scores_of(batch_of(*[(video, 0) for video in range(5)]))
    assert first.loss != pytest.approx(scores_of(batch_of(*ALL)).loss)


def test_eval_mode_is_for_the_evaluation_only():
    seen = []

    class Watch(Lookup):
        def forward(self, clips, clip=None):
            seen.append(self.training)
            return super().forward(clips)

    model = Watch()
    scores_of(batch_of(*ALL), model=model)
    assert seen == [False]
    assert model.training


def test_unusable_videos_are_left_out_and_named():
    scores = scores_of(batch_of(*ALL[:8], skipped=[(4, "four is empty")]))
    assert scores.videos == 4
    assert scores.skipped == ("four is empty",)
    with pytest.raises(UserError, match="no video of the list can be used: four is empty"):
        scores_of(batch_of(skipped=[(4, "four is empty")]))
    with pytest.raises(UserError, match=r"more than data\.max_bad_share 0\.1 allows"):
        scores_of(batch_of(*ALL[:8], skipped=[(4, "four is empty")]), max_share=0.1)


# -- several processes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(World):
    """Gathers what this process has and what another one had."""

    other: object = None

    def gather(self, value):
        return [value, self.other]

    def max(self, values):
        return list(values)


def pair(other_clips=(), bad=None, failure=None):
    tally = Tally()
    if other_clips:
        batch = batch_of(*other_clips)
        tally.add(batch, Lookup()(normalise(batch.clips)))
    return Pair(0, 2, CPU, other=(tally, bad or {}, failure))


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        (ALL[:4], ALL[4:]),
        (ALL[:6], ALL[5:]),
        (ALL[:6], ALL[4:]),
        (ALL, ALL[:2]),
        (ALL[:5], ALL[4:]),
        (ALL[4:], ALL),
    ],
)
def test_what_two_processes_saw_counts_once(mine, others):
    check(scores_of(batch_of(*mine), world=pair(others)))


def test_unusable_videos_of_all_processes_are_told():
    scores = scores_of(
        batch_of(*ALL[:4], skipped=[(4, "four")]), world=pair(ALL[4:6], bad={3: "three"})
    )
    assert scores.skipped == ("three", "four")


def test_every_process_stops_when_one_does():
    with pytest.raises(UserError, match="over there"):
        scores_of(batch_of(*ALL), world=pair(ALL, failure="too many over there"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    names = {"num_classes": 2, "class_names": ("left", "right")}
    config = replace(CALM, image_size=24, backend="reference", **names)
    folder = tmp_path_factory.mktemp("model")
    STAT(config).save_pretrained(folder)
    Preprocess(24, 28).save(folder)
    return folder


def eval_arguments(model, out, root=None):
    root = ["--data.root", str(root or clips()), "--data.views", "[2, 3]"]
    return ["--model", str(model), *root, "--data.batch_size", "4", "--eval.dir", str(out)]


def read_result(folder):
    return json.loads((folder / "eval.json").read_text())


def test_a_process_goes_through_its_share_of_the_views(model_folder, tmp_path, monkeypatch):
    def record(model, loader, *args, **kwargs):
        indices = [i for batch in loader for i in batch.indices]
        views = [view for batch in loader for view in batch.views]
        assert sorted(set(indices)) == [1, 3, 5]
        assert sorted(views) == sorted([*range(6)] * 3)
        raise UserError("seen")

    monkeypatch.setattr(scoring, "evaluate", record)
    data = DataOptions(root=str(clips()), batch_size=8, views=(2, 3))
    options = EvalOptions(dir=str(tmp_path))
    with pytest.raises(UserError, match="seen"):
        scoring.score(str(model_folder), data, options, [], World(1, 2, CPU))


# -- what is written -------------------------------------------------------------------------------


def test_the_class_table_adds_up(tmp_path):
    scores = scores_of(batch_of(*ALL))
    write_class_table(scores, "abcdef", tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list("abcdef")
    assert [int(row["videos"]) for row in rows] == [2, 1, 2, 0, 0, 0]
    weighed = sum(float(row["top1"]) * int(row["videos"]) for row in rows if row["top1"])
    assert weighed / 5 == pytest.approx(scores.top1)
    weighed = sum(float(row["top5"]) * int(row["videos"]) for row in rows if row["top5"])
    assert weighed / 5 == pytest.approx(scores.top5, abs=1e-4)
    assert rows[3]["top1"] == rows[3]["taken_for"] == ""
    for label, row in enumerate(rows):
        wrong = scores.confusion[label].copy()
        wrong[label] = 0
        assert int(row["times"]) == wrong.max()
        if wrong.max():
            assert wrong["abcdef".index(row["taken_for"])] == wrong.max()


def test_eval_leaves_everything_in_its_folder(model_folder, tmp_path, capsys):
    argv = eval_arguments(model_folder, tmp_path)
    assert main(["eval", *argv]) == 0
    record = read_result(tmp_path)
    assert record["command"] == ["stat-video", "eval", *argv]
    assert record["views"] == {"temporal": 2, "spatial": 3}
    assert record["videos"] == 6
    assert (tmp_path / "confusion.png").is_file()
    assert (tmp_path / "per_class.csv").read_text().count("\n") == 3
    assert not (tmp_path / "unusable.txt").exists()


def test_eval_lists_unusable_videos(model_folder, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    (root / "labels.txt").write_text("left\nright\n")
    good = next((clips() / "val").glob("*_left.mp4"))
    (root / "val.txt").write_text(f"{good} 0\nnone.mp4 1\n")
    argv = eval_arguments(model_folder, tmp_path / "out", root)
    assert main(["eval", *argv, "--data.max_bad_share", "0.5"]) == 0
    assert "1 videos, 1 unusable" in capsys.readouterr().out
    report = (tmp_path / "out" / "unusable.txt").read_text()
    assert report == f"{root / 'none.mp4'} does not exist\n"
    assert main(["eval", *argv, "--data.max_bad_share", "0.1"]) == 2
    assert "all are listed in" in capsys.readouterr().err
