"""STAT: what goes in and out, what each option changes, saving and loading, PyTorch's tools."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stat_video import STAT, STATConfig
from stat_video.model.blocks import DropPath, STABlock
from stat_video.model.stem import ConvStem

TINY = replace(
    STATConfig.preset("stat_tiny"),
    frames=8,
    image_size=32,
    num_classes=5,
    stem_channels=(8, 8),
    depths=(1, 2),
    dims=(16, 32),
    num_heads=(1, 2),
)


def make(**changes):
    config = replace(TINY, **changes)
    return STAT(config).eval(), torch.randn(
        2, 3, config.frames, config.image_size, config.image_size
    )


VARIANTS = {
    "current": {"short": False, "long": "none"},
    "current and short": {"long": "none"},
    "current and long": {"short": False},
    "mean beside class tokens": {"long": "mean"},
    "no class tokens": {"long": "mean", "class_token": False},
    "averaged class tokens": {"aggregation_layers": 0},
    "four aggregation layers": {"aggregation_layers": 4},
    "one convolution": {
        "stem_channels": (),
        "stem_strides": ((2, 4, 4),),
        "stem_spatial_kernel": 7,
    },
    "five convolutions": {
        "stem_channels": (8, 8, 8, 8),
        "stem_strides": ((2, 2, 2), (1, 2, 2), (1, 2, 2), (2, 1, 1), (1, 1, 1)),
    },
    "pooling over time": {"pool_kernel": (3, 3, 3)},
    "no temporal position": {"temporal_position": False},
    "odd sizes": {"frames": 5, "image_size": 36},
    "one stage": {"depths": (2,), "dims": (16,), "num_heads": (2,), "kv_strides": (1,)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_row_of_the_paper_trains(changes):
    model, video = make(**changes)
    logits = model.train()(video)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of all scores of a query alike: softmax does not see it. Nothing else may be silent.
    assert silent == [n for n in silent if n.endswith("pool_k.norm.bias")]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    model = STAT(STATConfig.preset("stat_tiny"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert not module.bias.any(), name
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-6, name
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
    for parameter in (model.class_token, model.video_token, model.spatial_position):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.spatial_position.shape == (65, 64)
    assert model.temporal_position.shape == (8, 64)


def test_drop_path_rises_with_depth():
    model = STAT(replace(TINY, depths=(2, 3), drop_path=0.4))
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_drops_clips_and_keeps_the_mean():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    factors = drop(x)
    assert factors.shape == (4000,)
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert factors.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is None


def test_dropout_and_drop_path_only_in_training():
    model, video = make(dropout=0.5, drop_path=0.5)
    assert torch.equal(model(video), model(video))
    model.train()
    assert not torch.equal(model(video), model(video))


def test_stem():
    stem = ConvStem((3, 8, 16), kernel=(3, 3, 3), strides=((2, 2, 2), (1, 2, 2)))
    video = torch.randn(2, 3, 6, 8, 12)
    x = stem.convs[0](video)
    x = torch.nn.functional.layer_norm(
        x.movedim(1, -1), (8,), stem.norms[0].weight, stem.norms[0].bias, 1e-6
    )
    x = stem.convs[1](torch.nn.functional.gelu(x).movedim(-1, 1))  # (B, C, T, H, W)
    expected = x.flatten(3).permute(0, 2, 3, 1)
    torch.testing.assert_close(stem(video), expected)
    assert stem(video).shape == (2, 3, 2 * 3, 16)


@pytest.mark.parametrize(
    ("frames", "kernel", "strides"),
    [(8, 3, (2, 1, 1)), (9, 5, (2, 2)), (7, 1, (1, 3)), (6, 7, (1, 2, 1))],
)
def test_stem_of_some_frames_of_a_shared_clip(frames, kernel, strides):
    """Every part equals the whole clip's, from the frames it reads and no more."""
    channels = (3, *[4] * len(strides))
    stem = ConvStem(channels, (kernel, 3, 3), tuple((s, 2, 2) for s in strides)).double()
    video = torch.randn(1, 3, frames, 16, 16, dtype=torch.float64)
    whole = stem(video)
    for start in range(whole.shape[1]):
        for stop in range(start + 1, whole.shape[1] + 1):
            reads = stem.reads(frames, slice(start, stop))
            part = stem(video[:, :, reads[0]], reads)
            torch.testing.assert_close(part, whole[:, start:stop])
            for end in {reads[0].start, reads[0].stop - 1}:
                other = video.clone()
                other[:, :, end] += 1
                assert not torch.equal(stem(other)[:, start:stop], whole[:, start:stop])


def test_block_skips():
    """With both branches silenced, a block is its skips: max pooling, then the linear layer."""
    block = STABlock(TINY, stage=1, first=True, dim_out=24, drop_path=0.0)
    for silenced in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(silenced.weight)
        torch.nn.init.zeros_(silenced.bias)
    x = torch.randn(2, 3, 1 + 4 * 6, 32)
    y, grid = block(x, (4, 6))
    assert grid == (2, 3)
    pooled = torch.stack(
        [
            x[:, :, 1:]
            .unflatten(2, (4, 6))[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            .amax((2, 3))
            for i in (0, 2)
            for j in (0, 2, 4)
        ],
        dim=2,
    )
    skipped = torch.cat((x[:, :, :1], pooled), dim=2)
    torch.testing.assert_close(y, block.skip(block.norm2(skipped)))


@pytest.mark.parametrize(
    ("changes", "sum_up"),
    [
        ({"class_token": True}, lambda tokens: tokens[:, :, 0]),
        ({"class_token": False, "long": "mean"}, lambda tokens: tokens.mean(2)),
    ],
)
def test_what_stands_for_a_frame(changes, sum_up):
    seen = []
    model, video = make(aggregation_layers=0, **changes)
    model.stages[-1][-1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    logits = model(video)
    expected = model.head(model.norm(sum_up(seen[0]).mean(1)))
    torch.testing.assert_close(logits, expected)


def test_video_token_attends_to_the_frames():
    """The aggregation layer, written out for the one query whose result is used."""
    seen = []
    model, video = make()
    model.stages[-1][-1].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    logits = model(video)
    (layer,) = model.aggregation
    x = torch.cat((model.video_token.expand(2, 1, 32), seen[0][:, :, 0]), 1)
    q, k, v = layer.qkv(layer.norm1(x)).unflatten(-1, (3, 2, 16)).unbind(2)  # (B, 1 + T, H, D)
    weights = torch.einsum("bhd,bthd->bht", q[:, 0], k).div(4).softmax(-1)
    x = x[:, 0] + layer.proj(torch.einsum("bht,bthd->bhd", weights, v).flatten(1))
    x = layer.mlp(layer.norm2(x), x)
    torch.testing.assert_close(logits, model.head(model.norm(x)))


@pytest.mark.parametrize(
    "shape", [(2, 3, 9, 32, 32), (2, 3, 8, 32, 40), (2, 1, 8, 32, 32), (3, 8, 32, 32)]
)
def test_wrong_clip(shape):
    model, _ = make()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        model(torch.randn(shape))
    assert str(error.value) == (
        "video must be (B, 3, T, 32, 32) with T from 1 to 8, or any T, H, W where "
        f"interpolate=True, got {shape}"
    )


def test_clips_of_other_lengths_and_sizes():
    """As a model of that size, whose positions are the first ones or the interpolated ones."""
    model, video = make()
    assert torch.equal(model(video, interpolate=True), model(video))

    short, _ = make(frames=4)
    state = {**model.state_dict(), "temporal_position": model.temporal_position[:2]}
    short.load_state_dict(state)
    torch.testing.assert_close(model(video[:, :, :4]), short(video[:, :, :4]))

    large, video = make(frames=16, image_size=48)
    time, slope = torch.arange(8.0), torch.randn(16)
    with torch.no_grad():  # constant over the grid, a ramp over time
        model.spatial_position[1:] = model.spatial_position[1].clone()
        model.temporal_position[:] = torch.arange(4.0)[:, None] * slope
    state = model.state_dict()
    spatial = model.spatial_position[1].expand(36, -1)
    state["spatial_position"] = torch.cat((model.spatial_position[:1], spatial))
    state["temporal_position"] = ((time - 0.5) / 2).clamp(0, 3)[:, None] * slope
    large.load_state_dict(state)
    torch.testing.assert_close(model(video, interpolate=True), large(video))
    assert model(video[..., :20, :], interpolate=True).shape == (2, 5)


def test_config_must_be_one():
    with pytest.raises(TypeError, match="config must be a STATConfig, got dict"):
        STAT({"frames": 8})


def gradients(model, run, video):
    model.zero_grad()
    run(video).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_compile_in_one_graph():
    torch._dynamo.reset()
    model, video = make(depths=(1, 1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(video), model(video))
    expected = gradients(model, model, video)
    for a, b in zip(gradients(model, compiled, video), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast():
    model, video = make()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(video)
    torch.testing.assert_close(logits.float(), model(video), rtol=0.1, atol=0.02)


def test_float64_and_copies():
    model, video = make()
    exact = copy.deepcopy(model).double()(video.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), model(video), rtol=1e-4, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(model))(video), model(video))


def test_channels_last_video_and_model():
    model, video = make()
    expected = model(video)
    model.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(
        model(video.contiguous(memory_format=torch.channels_last_3d)), expected
    )


@pytest.fixture
def saved(tmp_path):
    model, video = make(num_classes=3, class_names=("up", "down", "left"))
    model.save_pretrained(tmp_path / "model")
    return model, video, tmp_path / "model"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("stat_video.model.pretrained.hf_hub_download", refuse)


def test_save_and_load(saved):
    model, video, directory = saved
    assert {file.name for file in directory.iterdir()} >= {"config.json", "model.safetensors"}
    again = STAT.from_pretrained(directory)
    assert again.config == model.config
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert torch.equal(again(video), model(video))
    again.save_pretrained(directory.parent / "twice")
    assert STAT.from_pretrained(str(directory.parent / "twice")).config == model.config


def test_load_with_another_configuration(saved):
    model, video, directory = saved
    config = replace(model.config, backend="reference", drop_path=0.3)
    again = STAT.from_pretrained(directory, config=config)
    assert again.config == config
    torch.testing.assert_close(again(video), model(video), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "nothing", "a/b/c", "~/nothing"])
def test_load_from_nowhere(name):
    with pytest.raises(
        FileNotFoundError, match=f"{name} is no directory; .* save_pretrained wrote"
    ):
        STAT.from_pretrained(name)


def test_load_from_the_hub_asks_the_hub():
    with pytest.raises(AssertionError, match="the network was asked for"):
        STAT.from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_load_from_an_incomplete_directory(saved, name):
    (saved[2] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; a model directory holds"):
        STAT.from_pretrained(saved[2])


def edit_config(directory, text=None, **changes):
    file = directory / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, **changes}) if text is None else text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"text": "{"}, "must be a STATConfig in JSON, but is not JSON"),
        ({"text": "[1]"}, "must be a JSON object, got list"),
        ({"text": "[" * 100_000}, "must be a STATConfig in JSON, but is not JSON: maximum rec"),
        ({"text": '{"window": ' + "1" * 5000 + "}"}, "must be a STATConfig in JSON, but is not"),
        ({"depths": [10**8, 1]}, "is not a STATConfig: depths must be 256 in all at most"),
        ({"stem_spatial_kernel": 2**31 - 1}, "asks for too large a tensor: Storage size"),
        ({"mlp_ratio": 1e300}, "asks for too large a tensor: "),
        ({"colour": 1}, "must have the fields of a STATConfig only, got colour"),
        ({"window": 4}, "is not a STATConfig: window must be an odd int of at least 1, got 4"),
    ],
)
def test_load_a_broken_configuration(saved, edit, message):
    edit_config(saved[2], **edit)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        STAT.from_pretrained(saved[2])


def test_load_weights_of_another_shape(saved):
    edit_config(saved[2], num_classes=7, class_names=[])
    with pytest.raises(
        ValueError, match=r"head.weight must be \(7, 32\), got \(3, 32\), and 1 more"
    ):
        STAT.from_pretrained(saved[2])


def test_load_too_few_and_too_many_weights(saved):
    file = saved[2] / "model.safetensors"
    weights = load_file(file)
    save_file({name: w for name, w in weights.items() if name != "class_token"}, file)
    with pytest.raises(ValueError, match="it lacks class_token"):
        STAT.from_pretrained(saved[2])
    save_file({**weights, "stranger": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="besides the configuration's parameters, stranger"):
        STAT.from_pretrained(saved[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_weights_of_another_precision(saved, dtype):
    model, video, directory = saved
    model.to(dtype).save_pretrained(directory)
    again = STAT.from_pretrained(directory)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again(video), model.float()(video))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e5m2])
def test_load_weights_that_are_no_floats(saved, dtype):
    file = saved[2] / "model.safetensors"
    save_file({n: w.to(dtype) if n == "head.bias" else w for n, w in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=f"torch.float64, got {dtype} for head.bias"):
        STAT.from_pretrained(saved[2])


def test_load_a_file_that_is_no_safetensors(saved):
    (saved[2] / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        STAT.from_pretrained(saved[2])
