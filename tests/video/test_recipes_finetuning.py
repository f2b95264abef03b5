"""Starting from another model: other classes, other frames, and what cannot be."""

from dataclasses import replace

import pytest
import torch

from stat_video.data.preprocess import Preprocess
from stat_video.errors import UserError
from stat_video.model.stat import STAT
from stat_video.train.finetuning import start_from
from tests.video.training import CALM

CONFIG = replace(CALM, frames=8, image_size=16, num_classes=3, class_names=("a", "b", "c"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and the folder that it was saved in."""
    torch.manual_seed(1)
    model, folder = STAT(CONFIG), tmp_path_factory.mktemp("k400")
    model.save_pretrained(folder)
    Preprocess(16, 18).save(folder)
    return model, str(folder)


def fresh(**changes):
    torch.manual_seed(2)
    return STAT(replace(CONFIG, **changes))


def differing(a, b):
    a, b = a.state_dict(), b.state_dict()
    return {n for n in a if a[n].shape != b[n].shape or not torch.equal(a[n], b[n])}


def test_the_same_classes_take_everything(saved):
    model = fresh(drop_path=0.3)
    assert start_from(model, saved[1]) == []
    assert not differing(model, saved[0])


@pytest.mark.parametrize("names", [("v", "w", "x", "y", "z"), ("c", "b", "a")])
def test_other_classes_leave_the_classifier_alone(saved, names):
    model = fresh(num_classes=len(names), class_names=names)
    before = model.head.weight.clone()
    (note,) = start_from(model, saved[1])
    assert note == f"the classifier starts anew: {len(names)} classes here, 3 there"
    assert differing(model, saved[0]) == {"head.weight", "head.bias"} - (
        {"head.bias"} if len(names) == 3 else set()
    )
    assert torch.equal(model.head.weight, before)
    video = torch.randn(2, 3, 8, 16, 16)
    torch.testing.assert_close(
        model.eval().forward_features(video), saved[0].eval().forward_features(video)
    )


def test_temporal_positions_are_stretched_and_windows_may_differ(saved):
    model = fresh(frames=16, window=5)
    assert start_from(model, saved[1]) == ["4 temporal positions are stretched to 8"]
    assert differing(model, saved[0]) == {"temporal_position"}
    old, new = saved[0].temporal_position, model.temporal_position
    torch.testing.assert_close(new[1:-1:2], 0.75 * old[:-1] + 0.25 * old[1:])
    torch.testing.assert_close(new[0], old[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (16, 64)}, r"is \(32.*\) there and \(64.*\) here"),
        ({"depths": (2, 1)}, r"stages\.0\.0\.skip\.bias is \(32,\) there and missing here"),
        ({"class_token": False, "long": "none"}, r"class_token is \(16,\) there and missing here"),
    ],
)
def test_what_does_not_fit_is_said(saved, changes, message):
    with pytest.raises(UserError, match="training cannot start from .*" + message):
        start_from(fresh(**changes), saved[1])


def test_a_missing_model_is_named():
    with pytest.raises(UserError, match="/nowhere does not exist"):
        start_from(fresh(), "/nowhere")
