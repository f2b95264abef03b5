"""Attention weights are those of the layer, and are drawn where they belong."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stat_video import STAT, STATConfig
from stat_video.analysis import attend as attention_of
from stat_video.analysis.attend import PARTS, Attention, Weights
from stat_video.analysis.attend_options import choose
from stat_video.analysis.attend_plots import Choice, draw_attention, save_film
from stat_video.cli import main
from stat_video.clips.make import write_mp4
from stat_video.data.decode import read_clip
from stat_video.data.preprocess import Preprocess
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from tests.video.clip_samples import clips

TINY = replace(
    STATConfig.preset("stat_tiny"), image_size=32, frames=8, dims=(32, 64), stem_channels=(8, 16)
)
VARIANTS = {
    "all": TINY,
    "a window wider than the clip": replace(TINY, window=9),
    "no short": replace(TINY, short=False),
    "no long": replace(TINY, long="none"),
    "mean tokens": replace(TINY, long="mean", class_token=False),
    "current alone": replace(TINY, short=False, long="none"),
}


def _model(config):
    torch.manual_seed(0)
    model = STAT(config).eval()
    for block in (b for stage in model.stages for b in stage):
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)  # far from equal weights
    return model


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_weights_times_values_are_what_the_layer_gives(config):
    """In every layer: rows sum to one, and with the layer's own values they give its own output."""
    model = _model(config)
    layers = [block.attn for stage in model.stages for block in stage]
    inputs, outputs = [], []
    for attn in layers:
        attn.register_forward_pre_hook(lambda m, args: inputs.append(args))
        attn.proj.register_forward_pre_hook(lambda m, args: outputs.append(args[0]))
    clip = torch.randn(1, 3, config.frames, 32, 32)
    with torch.no_grad(), attention_of.record(model) as found:
        model(clip)
    assert len(found) == len(layers) == 4
    frames = config.token_frames
    for attn, weights, (x, grid), out in zip(layers, found, inputs, outputs, strict=True):
        assert sum(weights.masses().values()) == pytest.approx(1.0, abs=1e-6)
        v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))[:, :, :, 2]
        args = (attn.pool_v, grid, config.class_token)
        v_cur, v_short, v_long = attn._shrunk(v, *args)
        expected = torch.einsum("thqk,tkhd->tqhd", weights.current, v_cur[0])
        for i, offset in enumerate(weights.offsets if config.short else ()):
            for t in range(frames):
                part = weights.short[t, :, :, i]
                if 0 <= t + offset < frames:
                    expected[t] += torch.einsum("hqk,khd->qhd", part, v_short[0, t + offset])
                else:
                    assert part.abs().max() == 0
        if v_long is not None:
            expected += torch.einsum("thql,lhd->tqhd", weights.long, v_long[0])
        given = out[0].unflatten(-1, expected.shape[2:])
        torch.testing.assert_close(expected, given, rtol=1e-5, atol=1e-5 * given.abs().max().item())
        assert weights.current.std() > 1e-3
        assert (weights.prefix, weights.extras) == (config.class_token, 0)  # so grids fit tokens
        if config.short:
            assert math.prod(weights.short_grid) == weights.short.shape[-1]


def test_hooks_are_gone_afterwards():
    model = _model(TINY)
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad(), attention_of.record(model) as found:
        model(clip)
    with torch.no_grad():
        model(clip)
    assert len(found) == 4


def test_equal_weights_are_the_shares_of_the_keys():
    q = torch.zeros(4, 5, 2, 8)
    k_cur, k_short, k_long = torch.randn(4, 6, 2, 8), torch.randn(4, 2, 2, 8), torch.randn(4, 2, 8)
    parts = attention_of.weigh(q, k_cur, k_short, k_long, 3, 1.0)
    weights = Weights(*parts, (2, 2), (2, 3), (1, 2), True, attention_of.neighbours(4, 3))
    # frames 0 and 3 have one neighbour: 6 + 2 + 4 keys; the others two: 6 + 4 + 4
    expected = {"current": (6 / 12 + 6 / 14) / 2, "short": (2 / 12 + 4 / 14) / 2}
    expected["long"] = 1 - sum(expected.values())
    assert weights.uniform() == pytest.approx(expected)
    assert {p: m.mean().item() for p, m in weights.masses().items()} == pytest.approx(expected)


def _one_hot():
    """3 frames, window 3, 2 heads, 1 class token and a 2 x 2 grid of queries: hand-made weights."""
    current, short = torch.zeros(3, 2, 5, 16), torch.zeros(3, 2, 5, 2, 4)
    long = torch.zeros(3, 2, 5, 3)
    current[1, 0, 0, 3] = 0.6  # head 0, class token: its own frame's upper right corner
    short[1, 0, 0, 0, 2] = 0.3  # the frame before: its lower left quarter
    long[1, 0, 0, 2] = 0.1
    current[1, 1, 3, 12] = 1.0  # head 1, query 1,0: the lower left corner
    weights = Weights(current, short, long, (2, 2), (4, 4), (2, 2), True, (-1, 1))
    images = torch.arange(3 * 8 * 8 * 3).view(3, 8, 8, 3).byte()
    return Attention(images, [weights], [0], "class", ("up", 0.75))


def _heat(ax):
    """The drawn weights, a value per cell of the keys' grid, over the frame in colour."""
    frame, cells = ax.images
    assert frame.get_array().shape == (8, 8, 3)
    assert frame.get_extent() == cells.get_extent() == [0, 8, 8, 0]
    assert cells.get_interpolation() == "nearest"
    return np.asarray(cells.get_array())


def test_weights_are_drawn_where_they_belong():
    figure = draw_attention(_one_hot(), Choice(0, 1, (None, (1, 0)), 0))
    before, own, after, bars = figure.axes[:4]
    titles = ["frame 0: 30 %", "frame 1: 60 %", "frame 2: 0 %", "every frame's class token: 10 %"]
    assert [ax.get_title() for ax in (before, own, after, bars)] == titles
    assert np.argwhere(_heat(own)).tolist() == [[0, 3]]
    assert np.argwhere(_heat(before)).tolist() == [[1, 0]]
    assert _heat(after).max() == 0
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0, 0, 10])
    assert "layer 0, frame 1, head 0; seen as up (75%)" in figure.get_suptitle()
    assert all("0 %" in ax.get_title() for ax in figure.axes[4:])  # head 1's query, not head 0's


def test_heads_are_averaged_and_a_query_is_found_in_its_grid():
    figure = draw_attention(_one_hot(), Choice(0, 1, (None, (1, 0)), None))
    own = figure.axes[5]
    assert own.get_title() == "frame 1: 50 %"
    assert np.argwhere(_heat(own)).tolist() == [[3, 0]]
    (box,) = own.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((0, 4), 4, 4)


def test_a_neighbour_outside_the_clip_stays_empty():
    figure = draw_attention(_one_hot(), Choice(0, 0, (None,), None))
    assert [text.get_text() for text in figure.axes[0].texts] == ["outside\nthe clip"]
    assert not figure.axes[0].images
    assert figure.axes[1].get_title() == "frame 0: 0 %"


def test_a_film_has_a_picture_a_frame(tmp_path):
    choices = [Choice(0, frame, (None,), None) for frame in range(3)]
    save_film(_one_hot(), choices, tmp_path / "film.mp4")
    frames = read_clip(tmp_path / "film.mp4", lambda length: np.arange(length))
    assert len(frames) == 3
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"layer": 1}, "--layer must be -1 to 0, there are 1 layers; got 1"),
        ({"frame": -4}, "--frame must be -3 to 2, there are 3 token frames; got -4"),
        ({"head": 2}, "--head must be -2 to 1, there are 2 heads in layer 0; got 2"),
        ({"queries": ["2,0"]}, "--queries 2,0 is outside the layer's grid of 2 rows and 2 columns"),
        ({"queries": ["0"]}, "--queries must be class, centre or ROW,COLUMN, got '0'"),
        ({"queries": ["a,b"]}, "--queries must be class, centre or ROW,COLUMN, got 'a,b'"),
        ({"queries": []}, "--queries must name at least one"),
    ],
)
def test_what_is_not_there_is_an_error(wrong, sentence):
    options = {"layer": 0, "frame": None, "queries": ["class"], "head": None}
    with pytest.raises(UserError) as error:
        choose(_one_hot(), **options | wrong)
    assert str(error.value).startswith(sentence)


def test_choices_count_from_the_end_too():
    choice = choose(_one_hot(), layer=-1, frame=None, queries=["class", "centre", "0,1"], head=-1)
    assert choice == Choice(layer=0, frame=1, queries=(None, (1, 1), (0, 1)), head=1)


def test_no_class_token_no_class_query():
    attention = _one_hot()
    attention.layers[0] = replace(attention.layers[0], prefix=0)
    with pytest.raises(UserError, match="--queries class needs class tokens, this model has none"):
        choose(attention, layer=0, frame=0, queries=["class"], head=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    _model(replace(TINY, num_classes=2, class_names=("left", "right"))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("short_side", [32, 64, 0])
def test_the_original_frame_is_shown_as_the_model_sees_it(saved, tmp_path, short_side):
    """What is cropped from the large frames is, scaled down, the model's own input."""
    ramp = np.linspace(40, 200, 192).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (8, 128, 192, 3)).copy()
    write_mp4(tmp_path / "wide.mp4", frames, fps=8)
    loaded = replace(load_model(saved), preprocess=Preprocess(32, short_side))
    images = attention_of.watch(tmp_path / "wide.mp4", loaded).images
    side = round(128 * 32 / (short_side or 37))
    assert images.shape == (4, side, side, 3)
    clip = loaded.preprocess.transform()(torch.from_numpy(frames).permute(0, 3, 1, 2))
    shown = images.permute(0, 3, 1, 2).float()
    scaled = torch.nn.functional.interpolate(shown, (32, 32), mode="area")
    torch.testing.assert_close(scaled[0], clip[:, 0].float(), rtol=0, atol=8)


def test_the_command_writes_pictures_and_shares(saved, tmp_path, capsys):
    video = str(next((clips() / "val").glob("*.mp4")))
    out = tmp_path / "looks"
    assert main(["attend", video, "--model", str(saved), "--out", str(out), "--mp4"]) == 0
    names = {"attention.png", "attention.mp4", "shares.png", "shares.json"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_clip(out / "attention.mp4", lambda length: np.arange(length))) == 4
    found = json.loads((out / "shares.json").read_text())
    assert found["class"] in ("left", "right")
    assert [(layer["layer"], layer["stage"]) for layer in found["layers"]] == [
        (0, 0), (1, 0), (2, 1), (3, 1),
    ]  # fmt: skip
    for layer in found["layers"]:
        for who in (layer["all"], layer["class_token"], layer["uniform"], *layer["heads"]):
            assert sum(who.values()) == pytest.approx(1.0, abs=1e-5)
        means = {p: np.mean([head[p] for head in layer["heads"]]) for p in PARTS}
        assert means == pytest.approx(layer["all"], abs=1e-5)
    printed = capsys.readouterr().out
    assert "layer  stage  CA %" in printed
    assert str(out) in printed


def test_the_commands_errors_are_one_sentence(saved, tmp_path, fails):
    model = ["--model", str(saved), "--out", str(tmp_path / "out")]
    video = str(next((clips() / "val").glob("*.mp4")))
    (tmp_path / "file").write_text("")
    for argv, sentence in (
        ([str(tmp_path / "none.mp4"), *model], "none.mp4 does not exist"),
        ([video, *model, "--layer", "9"], "--layer must be -4 to 3"),
        ([video, *model, "--queries", "class", "9,9"], "--queries 9,9 is outside"),
        ([video, *model[:2], "--out", str(tmp_path / "file")], "cannot write to"),
    ):
        assert sentence in fails("attend", *argv)
