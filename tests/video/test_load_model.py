"""Finding a model in a folder, and the sentences about one whose files are damaged."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from stat_video.checkpoint import save_checkpoint
from stat_video.data.options import DataOptions
from stat_video.data.preprocess import Preprocess
from stat_video.distributed import alone
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.model.stat import STAT
from tests.video.training import TINY


@pytest.fixture
def saved(tmp_path):
    """A model's folder."""
    STAT(TINY).save_pretrained(tmp_path / "model")
    Preprocess(32, 40).save(tmp_path / "model")
    return tmp_path / "model"


def save(folder, tensors, **options):
    """A checkpoint of these tensors."""
    state = {"model": asdict(TINY), "data": asdict(DataOptions()), "optim": {"ema": 0}, **options}
    return save_checkpoint(
        folder, "epoch_0001_step_00000001", tensors, {"options": state}, alone("cpu")
    )


def test_a_checkpoint_gives_its_weights(tmp_path):
    """All of them, in eval mode, without anything of an initialisation."""
    models = {kind: STAT(TINY) for kind in ("model", "average")}
    tensors = {kind: model.state_dict() for kind, model in models.items()}
    for ema, kind in ((0, "model"), (0.9, "average")):
        data = asdict(DataOptions(short_side=48))
        path = save(tmp_path / kind, tensors, optim={"ema": ema}, data=data)
        loaded = load_model(path)
        assert not loaded.model.training
        assert loaded.preprocess == Preprocess(32, 48)
        found = loaded.model.state_dict()
        assert found.keys() == tensors[kind].keys()
        assert all(torch.equal(value, found[name]) for name, value in tensors[kind].items())


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"depths": [10**8, 1]}},
        {"model": {**asdict(TINY), "image_size": 2**31 - 1}},  # 10**18 tokens
        {"model": {**asdict(TINY), "colour": 1}},
        {"model": []},
        {"optim": None},
        {"optim": {}},
        {"data": {"short_side": "x"}},
        {"data": {}},
        {"data": {"short_side": 24}},  # pixels, below the model's 32
    ],
)
def test_a_checkpoint_of_other_options_is_refused(tmp_path, options):
    path = save(tmp_path, {"model": STAT(TINY).state_dict()}, **options)
    with pytest.raises(
        UserError, match="epoch_0001_step_00000001 does not fit this version of the model: "
    ):
        load_model(path)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    """Whatever the options say: the tensors decide, before memory is taken for them."""
    path = save(tmp_path, {"model": STAT(TINY).state_dict()}, model=asdict(replace(TINY, frames=8)))
    with pytest.raises(UserError, match="not a readable checkpoint: Size mismatch between saved"):
        load_model(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged JSON: "),
        ("[]", "is damaged: "),
        ("[" * 100_000, "is damaged JSON: it is nested too deeply"),
        ("1" * 5000, "is damaged JSON: "),
        ("\udcff", "must be UTF-8 text"),
        ("\0", "must be UTF-8 text"),
        ("{}", "is damaged: .*missing 2 required"),
        ({"colour": 1}, "is damaged: .*unexpected keyword argument 'colour'"),
        ({"image_size": "32"}, "is damaged: image_size must be an int from 1 to 16384, got '32'"),
        ({"short_side": 10**9}, "short_side must be an int from 0 to 16384, got 1000000000"),
        ({"short_side": 24}, "short_side must be 0 or at least image_size 32, got 24"),
        ({"mean": 0.5}, r"mean and std must be 0\.45 and 0\.225, got 0\.5 and 0\.225"),
        ({"image_size": 24}, "is for images of 24 pixels, the model takes 32"),
    ],
)
def test_a_damaged_preprocess_is_refused(saved, text, message):
    file = saved / "preprocess.json"
    if isinstance(text, dict):
        text = json.dumps({**json.loads(file.read_text()), **text})
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"preprocess\.json.*{message}"):
        load_model(saved)


def test_what_holds_no_model_is_refused(saved, tmp_path):
    assert load_model(saved).preprocess == Preprocess(32, 40)
    (saved / "config.json").unlink()
    for path, message in (
        (saved, "it has no config.json, no best/config.json and no state.json; it must be"),
        (saved / "model.safetensors", "is not a folder"),
        (tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path)
