"""timm's image transformers turned into video transformers, tried as a user would."""

import copy
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import (
    Attention,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.optim import create_optimizer_v2

from stat_kernels.integrations.timm import VideoVisionTransformer, to_video

FRAMES, SIZE = 3, 64
MODELS = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "AugReg, head dim 96": ("vit_tiny_patch16_224", {"num_heads": 2}),
    "DeiT": ("deit_tiny_patch16_224", {"drop_path_rate": 0.3}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT III": ("deit3_small_patch16_224", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "qk-norm, LayerScale": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.5}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {"embed_dim": 192, "num_heads": 3}),
    "CLIP": ("vit_base_patch32_clip_224", {"embed_dim": 192, "num_heads": 3}),
    "post-norm": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock, "init_values": 1.0}),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": ParallelThingsBlock}),
    "EVA02": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "EVA02 CLIP": ("eva02_base_patch16_clip_224", {"embed_dim": 192, "num_heads": 3}),
    "DINOv3": ("vit_small_patch16_dinov3", {"num_heads": 4}),
    "mixed RoPE": ("vit_small_patch16_rope_mixed_ape_224", {"embed_dim": 192, "num_heads": 3}),
    "RoPE, registers": ("vit_medium_patch16_rope_reg1_gap_256", {"num_heads": 4}),
    "grouped queries": ("vit_small_patch16_rope_224", {"qkv_fused": False, "num_kv_heads": 2}),
    "scaled norms": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "norm_layer": LayerNorm}),
}
NO_CLASS_TOKEN = {"no class token", "attention pooling", "RoPE, registers"}


def make(name="vit_tiny_patch16_224", **options):
    """A timm model of two blocks for small images, its parameters far from their special values."""
    options = {"img_size": SIZE, "depth": 2, "num_classes": 5, **options}
    vit = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return vit


def clips(vit, frames=FRAMES, count=2):
    return torch.randn(count, 3, frames, *vit.patch_embed.img_size)


def long_of(vit):
    return "mean" if vit.cls_token is None else "class"


@pytest.mark.parametrize("case", MODELS)
def test_without_joining_it_is_the_image_model(case):
    name, options = MODELS[case]
    vit = make(name, **options)
    video = to_video(vit, frames=FRAMES, window=1, long="none")
    x = clips(vit)
    frames = [x[:, :, i] for i in range(FRAMES)]
    expected = torch.stack([vit.forward_features(frame) for frame in frames], 1)
    torch.testing.assert_close(video.forward_features(x), expected, rtol=1e-5, atol=5e-5)
    expected = torch.stack([vit(frame) for frame in frames], 1).mean(1)
    torch.testing.assert_close(video(x), expected, rtol=1e-5, atol=1e-5)


def test_a_gated_attention():
    vit = make()
    vit.blocks[0].attn = Attention(192, num_heads=3, qkv_bias=True, gated=True).eval()
    x = clips(vit, 1)
    torch.testing.assert_close(to_video(vit, frames=1)(x), vit(x[:, :, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", sorted(MODELS.keys() - NO_CLASS_TOKEN))
def test_one_frame_is_the_image(case):
    """No key counts twice: with the long-term keys on, a clip of one frame is still the image."""
    name, options = MODELS[case]
    vit = make(name, **options)
    x = clips(vit, 1)
    expected = vit(x[:, :, 0])
    torch.testing.assert_close(to_video(vit, frames=1)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["ViT", "DINOv2 with registers", "no class token", "DINOv3"])
def test_joined_frames(case):
    """Each frame sees the others, its window more closely, and the image's answer is near."""
    name, options = MODELS[case]
    vit = make(name, **options)
    x = clips(vit, 6)
    image = to_video(vit, frames=6, window=1, long="none").forward_features(x)
    joined = to_video(vit, frames=6, window=3, long=long_of(vit))
    apart = to_video(vit, frames=6, window=3, long="none")
    one_block = to_video(make(name, depth=1, **options), frames=6, window=3, long="none")
    far = x.clone()
    far[:, :, 5] += 1
    changed = lambda model: (model.forward_features(far) - model.forward_features(x)).abs()  # noqa: E731
    assert (changed(joined).amax((0, 2, 3)) > 1e-5).all()
    assert changed(apart)[:, :3].max() == 0  # two blocks reach two frames far
    assert changed(one_block)[:, :4].max() == 0 < changed(one_block)[:, 4].max()
    start = joined.forward_features(x)
    assert start.isfinite().all()
    assert 1e-4 < (start - image).norm() / image.norm() < 0.3


def test_time_is_told_by_the_temporal_embedding():
    video = to_video(make(), frames=4)
    assert not video.temporal_embed.any()
    x = clips(video, 4)
    turned = video(x.flip(2))
    torch.testing.assert_close(turned, video(x))  # zero at the start: a reversed clip is the same
    torch.nn.init.normal_(video.temporal_embed)
    assert (video(x.flip(2)) - video(x)).abs().max() > 1e-3


def test_keys_may_be_pooled():
    vit = make()
    x = clips(vit)
    full, half = (to_video(vit, frames=FRAMES, kv_stride=s).forward_features(x) for s in (1, 2))
    assert 1e-4 < (full - half).norm() / full.norm() < 0.5


def test_the_image_model_stays_and_its_checkpoint_fits():
    vit = make()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    video = to_video(vit, frames=FRAMES)
    torch.nn.init.normal_(video.temporal_embed)
    assert type(vit) is VisionTransformer
    assert all(torch.equal(before[name], value) for name, value in vit.state_dict().items())

    fresh = to_video(make(), frames=FRAMES)
    missing = fresh.load_state_dict(vit.state_dict(), strict=False)
    assert missing.missing_keys == ["temporal_embed"]
    assert not missing.unexpected_keys
    fresh.load_state_dict(video.state_dict())
    x = clips(vit)
    torch.testing.assert_close(fresh(x), video(x))


def test_copies():
    video = to_video(make(), frames=FRAMES)
    x = clips(video)
    for twin in (copy.deepcopy(video), pickle.loads(pickle.dumps(video))):
        assert type(twin) is VideoVisionTransformer
        assert torch.equal(twin(x), video(x))


def test_a_name_is_enough():
    video = to_video("vit_tiny_patch16_224", frames=2, img_size=32, depth=1, num_classes=7)
    assert video.forward_features(torch.randn(1, 3, 2, 32, 32)).shape == (1, 2, 5, 192)
    assert video(torch.randn(1, 3, 2, 32, 32)).shape == (1, 7)


def test_the_image_models_methods():
    video = to_video(make(drop_path_rate=0.2), frames=FRAMES)
    x = clips(video)
    tokens, inner = video.forward_intermediates(x, 2, norm=True)
    assert tokens.shape == (2, FRAMES, 17, 192)
    assert [i.shape for i in inner] == [(2, FRAMES, 192, 4, 4)] * 2
    torch.testing.assert_close(inner[1].flatten(3).transpose(2, 3), tokens[:, :, 1:])
    assert video.forward_head(tokens, pre_logits=True).shape == (2, 192)
    assert "temporal_embed" in video.no_weight_decay()
    groups = create_optimizer_v2(video, "adamw", lr=1e-3, layer_decay=0.7).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(video.parameters()))
    video.reset_classifier(3)
    assert video(x).shape == (2, 3)
    video.set_input_size((96, 64))
    assert video(torch.randn(1, 3, FRAMES, 96, 64)).shape == (1, 3)


def test_gradient_checkpointing_changes_nothing():
    video = to_video(make(), frames=FRAMES).train()
    x = clips(video)
    expected = gradients(video, video, x)
    video.set_grad_checkpointing()
    for a, b in zip(gradients(video, video, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_stochastic_depth_drops_whole_clips():
    video = to_video(make(drop_path_rate=0.5), frames=8).train()
    tokens = torch.randn(6, 8, 17, 192)
    block = video.blocks[1]
    torch.nn.init.zeros_(block.mlp.fc2.weight), torch.nn.init.zeros_(block.mlp.fc2.bias)
    changed = (block(tokens) != tokens).flatten(1).float().mean(1)
    assert set(changed.round(decimals=2).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("case", ["ViT", "DINOv3"])
def test_shorter_and_longer_clips_and_other_sizes(case):
    name, options = MODELS[case]
    video = to_video(make(name, **options), frames=4, window=1, long="none")
    torch.nn.init.normal_(video.temporal_embed)
    x = clips(video, 4)
    full, short = video.forward_features(x), video.forward_features(x[:, :, :2])
    torch.testing.assert_close(short, full[:, :2], rtol=1e-5, atol=1e-5)

    old = video.temporal_embed[0, :, 0]
    video.set_input_size(frames=8)
    new = video.temporal_embed[0, :, 0]
    torch.testing.assert_close(new[1::2][:3], 0.75 * old[:3] + 0.25 * old[1:])
    torch.testing.assert_close(new[2::2], 0.25 * old[:3] + 0.75 * old[1:])
    assert video(clips(video, 8)).shape == (2, 5)

    vit = make(name, **options)
    video = to_video(vit, frames=2, window=1, long="none")
    for model in (vit, video):
        model.set_input_size((48, 80))
    x = torch.randn(1, 3, 2, 48, 80)
    expected = torch.stack([vit.forward_features(x[:, :, i]) for i in range(2)], 1)
    torch.testing.assert_close(video.forward_features(x), expected, rtol=1e-5, atol=1e-5)
    maps = video.forward_intermediates(x, [0], intermediates_only=True, stop_early=True)
    assert [m.shape for m in maps] == [(1, 2, vit.embed_dim, 3, 5)]


def gradients(module, run, x):
    module.zero_grad()
    run(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("case", ["qk-norm, LayerScale", "DINOv3"])
def test_compile_in_one_graph(case):
    torch._dynamo.reset()
    name, options = MODELS[case]
    video = to_video(make(name, **options), frames=FRAMES)
    x = clips(video)
    compiled = torch.compile(video, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(video, compiled, x), gradients(video, video, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_export_with_any_batch():
    video = to_video(make(), frames=FRAMES)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(video, (clips(video),), dynamic_shapes=shapes)
    nodes = [str(node.target) for node in program.graph.nodes]
    assert nodes.count("stat_kernels.sta_forward.default") == 2
    other = clips(video, count=5)
    torch.testing.assert_close(program.module()(other), video(other))


def test_autocast():
    video = to_video(make(qk_norm=True), frames=FRAMES).train()
    x = clips(video)
    expected = video(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = video(x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() / expected.norm() < 0.03
    found.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in video.parameters())


DDP = """
import os, torch, torch.distributed as dist, timm
from torch.nn.parallel import DistributedDataParallel
from stat_kernels.integrations.timm import to_video

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
video = to_video("vit_tiny_patch16_224", frames=3, img_size=32, depth=2, num_classes=5)
x = torch.randn(4, 3, 3, 32, 32)
alone = torch.autograd.grad(video(x).square().mean(), list(video.parameters()))
shared = DistributedDataParallel(video)
shared(x[2 * rank : 2 * rank + 2]).square().mean().backward()
for a, p in zip(alone, video.parameters()):
    torch.testing.assert_close(p.grad, a, rtol=1e-4, atol=1e-6)
print("same gradients on rank", rank)
"""


def test_two_processes_share_a_batch(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same gradients on rank") == 2


@pytest.mark.parametrize(
    ("make_model", "options", "error", "message"),
    [
        (lambda: timm.create_model("resnet18"), {}, TypeError, "got ResNet"),
        (
            partial(make, "eva02_tiny_patch14_224", attn_drop_rate=0.1, img_size=56),
            {},
            ValueError,
            "without attn_drop",
        ),
        (lambda: timm.create_model("resmlp_12_224"), {}, TypeError, "got MlpMixer"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), {}, TypeError, "got Swin"),
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "VisionTransformerDistilled .* got Linear"),
        (lambda: to_video(make(), frames=2), {}, TypeError, r"converted already \(for 2 frames\)"),
        (partial(make, block_fn=ParallelScalingBlock), {}, ValueError, "got blocks ParallelScal"),
        (partial(make, attn_layer="diff"), {}, ValueError, "got blocks Block with DiffAttention"),
        (partial(make, attn_drop_rate=0.1), {}, ValueError, "without attn_drop_rate"),
        (partial(make, patch_drop_rate=0.1), {}, ValueError, "without patch_drop_rate"),
        (
            partial(make, class_token=False, global_pool="avg"),
            {},
            ValueError,
            "long='mean' or 'none' work",
        ),
        (make, {"frames": 0}, ValueError, "frames must be an int of at least 1, got 0"),
        (make, {"window": 2}, ValueError, "window must be odd, got 2"),
        (make, {"kv_stride": 3}, ValueError, r"divide the 4 x 4 grid of tokens \(1, 2, 4 would\)"),
        (make, {"num_classes": 3}, TypeError, "num_classes with a model's name only"),
    ],
)
def test_what_cannot_be_converted(make_model, options, error, message):
    with pytest.raises(error, match=message):
        to_video(make_model(), **options)


def test_wrong_clips():
    video = to_video(make(), frames=FRAMES)
    for shape in [(2, 3, FRAMES + 1, SIZE, SIZE), (2, 3, FRAMES, SIZE, 32), (2, 3, SIZE, SIZE)]:
        with pytest.raises(ValueError, match=r"x must be clips \(B, C, T, 64, 64\) .* from 1 to 3"):
            video(torch.randn(shape))
    with pytest.raises(ValueError, match="frames must be an int of at least 1, got 0"):
        video.set_input_size(frames=0)
    with pytest.raises(ValueError, match="is_causal must be left out"):
        video(clips(video), is_causal=True)


def test_a_missing_library_is_one_sentence():
    libraries = ("timm", "transformers", "torchvision")
    code = (
        "import importlib, sys\n"
        "import stat_kernels.integrations\n"
        f"for library in {libraries}:\n"
        "    sys.modules[library] = None\n"
        "    try: importlib.import_module('stat_kernels.integrations.' + library)\n"
        "    except ImportError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert len(done.stdout.splitlines()) == 3, done.stderr
    for library, line in zip(libraries, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"stat_kernels.integrations.{library} needs {library} ")
        assert line.endswith("pip install 'stat-kernels[integrations]'")
