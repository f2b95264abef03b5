"""A timm image model as a video classifier: the same data, checkpoints and commands as STAT."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file

from stat_video.analysis.attend import record
from stat_video.cli import main
from stat_video.data.transforms import normalise
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.model.building import build_model
from stat_video.model.flops import count_training_flops
from stat_video.model.image import ImageModel
from stat_video.model.image_config import ImageModelConfig
from stat_video.model.stat import STAT
from stat_video.train.finetuning import start_from
from stat_video.train.optim import initialise
from stat_video.train.signals import Interrupted
from tests.video.clip_samples import clips
from tests.video.training import CALM, ONE, assert_same_run, make, same, trained, weights

# 64 channels, 6 blocks, patches of 16 x 16: timm's own model for tests
SMALL = ImageModelConfig("test_vit", frames=4, image_size=32, num_classes=2, drop_path=0.1)
ALONE = replace(SMALL, window=1, long="none", drop_path=0.0)
IMAGE_OPTIM = replace(ONE, warmup_epochs=0.0, temporal_lr=100.0)
ARGV = [f"--model.{n}={getattr(SMALL, n)}" for n in ("image_model", "frames", "image_size")]


def image_model(**options):
    torch.manual_seed(3)
    return timm.create_model("test_vit", **{"img_size": 32, "num_classes": 2, **options}).eval()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_image_weights_give_the_image_model_frame_by_frame(tmp_path, suffix):
    """Also from pixels: the model undoes the clips' normalisation and applies its own."""
    image, path = image_model(), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": image.state_dict()}, path)
    else:
        save_file(image.state_dict(), path)
    model = build_model(ALONE).eval()
    assert start_from(model, str(path)) == []
    pixels = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    known = timm.get_pretrained_cfg("test_vit")
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (known.mean, known.std))
    frames = ((pixels / 255 - mean) / std).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        expected = image(frames).unflatten(0, (2, 4)).mean(1)
        torch.testing.assert_close(model(normalise(pixels)), expected, rtol=1e-4, atol=1e-5)


def test_other_classes_and_another_grid_are_fitted(tmp_path):
    image = image_model(img_size=64, num_classes=5)
    torch.save(image.state_dict(), tmp_path / "weights.pth")
    model = build_model(SMALL)
    assert start_from(model, str(tmp_path / "weights.pth")) == ["the classifier starts anew"]
    assert torch.equal(model.net.blocks[0].mlp.fc1.weight, image.blocks[0].mlp.fc1.weight)
    assert model.net.pos_embed.shape[1] == 1 + 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of the Hugging Face hub's cache for test_vit, empty, and no network."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    name = timm.get_pretrained_cfg("test_vit").hf_hub_id.rstrip("/").replace("/", "--")
    return tmp_path / "hub" / f"models--{name}"


def test_pretrained_weights_as_timm_downloads_them(hub):
    """For other classes and another grid, and for those that they were trained for."""
    image = image_model(img_size=160, num_classes=1000)
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(image.state_dict(), hub / "snapshots" / ("0" * 40) / "model.safetensors")

    model = build_model(SMALL)
    assert start_from(model, "pretrained") == ["the classifier starts anew"]
    assert torch.equal(model.net.blocks[5].mlp.fc2.weight, image.blocks[5].mlp.fc2.weight)
    assert model.net.pos_embed.shape[1] == 1 + 2 * 2
    same = build_model(replace(ALONE, image_size=160, num_classes=1000)).eval()
    assert start_from(same, "pretrained") == []
    frames = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        found = same.net(frames[None].transpose(1, 2))
        torch.testing.assert_close(found, image(frames).mean(0)[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "hf-hub:timm/test_vit.r160_in1k"])
def test_pretrained_weights_without_a_network(name, hub, tmp_path, capsys):
    """One sentence, whether weights or the model's very configuration would be downloaded."""
    argv = ["train", *ARGV, "--model.image_model", name, "--run.init", "pretrained"]
    argv += ["--data.root", str(clips()), "--run.dir", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if name == "test_vit":
        assert "error: run.init: the weights of test_vit cannot be downloaded (" in said
        assert said.endswith("); without a network, name a file of them\n")
    else:
        assert f"error: model.image_model {name} cannot be read: " in said


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path, model = tmp_path / "weights.pth", build_model(SMALL)
    before = weights(SimpleNamespace(model=model))
    for content, said in (
        ({"fc.weight": torch.zeros(2)}, "does not hold the weights of test_vit: blocks.0"),
        (SimpleNamespace(), "cannot be read: weights_only=True blocked"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=said):
            start_from(model, str(path))
    path.write_text("words")
    with pytest.raises(UserError, match=r"run\.init: image weights .* cannot be read"):
        start_from(model, str(path))
    with pytest.raises(UserError, match=r"optim\.init_gain and optim\.stem_gain must be 0"):
        initialise(model, 0.7)
    assert same(before, weights(SimpleNamespace(model=model)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_model": "vit_abacus"}, "must name a VisionTransformer of timm, got vit_abacus"),
        ({"image_model": "test_resnet"}, "must name a VisionTransformer of timm, got test_resnet"),
        ({"kv_stride": 3}, r"model\.kv_stride must divide the 2 x 2 grid"),
        ({"image_size": 8}, r"model\.image_size must be at least a patch of test_vit, got 8"),
        ({"image_model": "local-dir:/nowhere"}, r"model\.image_model local-dir:/nowhere cannot be"),
    ],
)
def test_models_that_cannot_be_built(change, said):
    with pytest.raises(UserError, match=said):
        build_model(replace(SMALL, **change))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, interrupt):
    optim = replace(IMAGE_OPTIM, ema=0.9)
    whole = trained(tmp_path / "whole", optim, SMALL)
    interrupt(1)
    with pytest.raises(Interrupted):
        make(tmp_path / "cut", optim, SMALL).fit()
    resumed = trained(tmp_path / "cut", optim, SMALL)
    assert_same_run(whole, resumed)
    rates = {len(group["params"]): group["lr"] for group in whole.optimizer.param_groups}
    assert rates[1] == pytest.approx(100 * min(rates.values()))
    assert whole.model.net.temporal_embed.abs().max() > 0.05
    checkpoint = load_model(resumed.folder / "checkpoints" / resumed.state.name)
    kept = load_model(resumed.folder)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(checkpoint.model(clip), kept.model(clip))
    assert checkpoint.preprocess == kept.preprocess


def test_switches_of_training(tmp_path):
    """Recomputed activations give the same bits; blocks are what is compiled or cut."""
    calm = replace(SMALL, drop_path=0.0)
    plain = trained(tmp_path / "a", ONE, calm)
    other = trained(tmp_path / "b", ONE, calm, checkpointing=True)
    assert same(weights(plain), weights(other))
    assert plain.model.blocks == list(plain.model.net.blocks)
    tokens = 1 + 2 * 2
    products = 6 * 12 * 64 * 64 * tokens  # qkv, projection and MLP of six blocks, a frame
    assert count_training_flops(calm) == pytest.approx(6 * 4 * products, rel=0.15)


def test_another_run_s_weights_and_more_frames(tmp_path):
    trained(tmp_path / "first", IMAGE_OPTIM, SMALL)
    longer = build_model(replace(SMALL, frames=8, class_names=("left", "right")))
    notes = start_from(longer, str(tmp_path / "first"))
    assert notes == ["4 temporal positions are stretched to 8"]
    own = load_model(tmp_path / "first").model.net.temporal_embed
    assert longer.net.temporal_embed.shape == (1, 8, 1, 64)
    torch.testing.assert_close(longer.net.temporal_embed[:, 0], own[:, 0])
    STAT(CALM).save_pretrained(tmp_path / "stat")
    with pytest.raises(UserError, match="training cannot start from"):
        start_from(build_model(ALONE), str(tmp_path / "stat"))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])  # without and with a register token
def test_recorded_weights_are_the_softmax_of_the_layer(name):
    model = build_model(replace(ALONE, image_model=name)).eval()
    seen, attn = [], model.net.blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad(), record(model) as found:
        model(clip)
        x = seen[0].reshape(4, -1, 64)
        q, k, _ = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        scores = torch.einsum("tqhd,tkhd->thqk", attn.q_norm(q), attn.k_norm(k)) * attn.scale
    assert len(found) == len(model.blocks)
    torch.testing.assert_close(found[0].current, scores.softmax(-1), rtol=1e-4, atol=1e-5)
    prefix = model.net.num_prefix_tokens
    assert (found[0].prefix, found[0].extras) == (prefix, prefix)
    with torch.no_grad():
        model(clip)
    assert len(found) == len(model.blocks)  # nobody listens any more


def test_every_command_takes_an_image_model(tmp_path, capsys):
    run, image = tmp_path / "run", tmp_path / "image.pth"
    torch.save(image_model(num_classes=7).state_dict(), image)
    argv = [*ARGV, "--data.root", str(clips()), "--run.dir", str(run), "--run.init", str(image)]
    more = ["--optim.epochs", "1", "--optim.warmup_epochs", "0", "--data.batch_size", "4"]
    assert main(["train", *argv, *more, "--run.threads", "1"]) == 0
    assert "the classifier starts anew" in capsys.readouterr().out
    assert isinstance(load_model(run).model, ImageModel)
    assert json.loads((run / "best" / "config.json").read_text())["image_model"] == "test_vit"

    video = str(next((clips() / "val").glob("*.mp4")))
    assert main(["eval", "--model", str(run)]) == 0
    assert main(["predict", video, "--model", str(run), "--views", "2,3"]) == 0
    out = tmp_path / "looks"
    assert main(["attend", video, "--model", str(run), "--out", str(out), "--layer", "2"]) == 0
    shares = json.loads((out / "shares.json").read_text())["layers"]
    assert len(shares) == 6
    for layer in shares:
        assert sum(layer["all"].values()) == pytest.approx(1, abs=1e-5)
    capsys.readouterr()
    assert main(["info", *ARGV]) == 0
    said = capsys.readouterr().out
    assert "tokens           4 x (1 + 2 x 2)" in said
    assert "keys of a query  2 x 2 + 2 x (1 x 1) + 4" in said
    assert main(["info", *ARGV, "--model.depths", "[1]"]) == 2  # an option of STAT
    assert "--model.depths" in capsys.readouterr().err
