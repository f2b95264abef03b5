"""What Inductor compiles of the models gives the eager outputs and gradients.

Other tests trace with ``aot_eager``, which runs PyTorch's own kernels. Inductor chooses layouts and
writes kernels of its own, and has had errors there that only whole models showed. It is slow, so
each model is as small as can be, and is compiled once.
"""

import pytest
import timm
import torch
import transformers
from torchvision.models.video import MViT
from torchvision.models.video.mvit import MSBlockConfig

import stat_kernels.integrations.transformers as hf
from stat_kernels.integrations.timm import to_video
from stat_kernels.integrations.torchvision import convert as convert_mvit
from stat_video.model.config import STATConfig
from stat_video.model.stat import STAT

FRAMES = 4
SIZE = 24  # of a frame, 3 x 3 patches: average pooling by 2 cuts windows at the edge
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "image_size": SIZE,
    "num_labels": 3,
}


def vit():
    image = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=3
    )
    return to_video(image, frames=FRAMES), (3, FRAMES, SIZE, SIZE)


def videomae():
    config = transformers.VideoMAEConfig(**SIZES, patch_size=8, num_frames=2 * FRAMES)
    return hf.convert(transformers.VideoMAEForVideoClassification(config)), clip(2 * FRAMES)


def vivit():
    config = transformers.VivitConfig(**SIZES, tubelet_size=[2, 8, 8], num_frames=2 * FRAMES)
    return hf.convert(transformers.VivitForVideoClassification(config)), clip(2 * FRAMES)


def timesformer():
    config = transformers.TimesformerConfig(**SIZES, patch_size=8, num_frames=FRAMES)
    return hf.convert(transformers.TimesformerForVideoClassification(config)), clip(FRAMES)


def clip(frames):
    return frames, 3, SIZE, SIZE


def logits(output):
    return getattr(output, "logits", output)


def perturbed(build):
    """A model, its parameters far from their special values, and a batch of two clips."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, shape = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval(), torch.randn(2, *shape)


def gradients(model, run, x):
    model.zero_grad()
    output = logits(run(x))
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def stat():
    config = STATConfig(
        frames=FRAMES, image_size=12, num_classes=3, stem_channels=(), stem_strides=((2, 2, 2),),
        depths=(1, 1), dims=(16, 16), num_heads=(1, 1), kv_strides=(2, 1),
    )  # fmt: skip
    return STAT(config), (3, FRAMES, 12, 12)


@pytest.mark.parametrize("build", [vit, videomae, vivit, timesformer, stat])
def test_outputs_and_gradients(build):
    model, x = perturbed(build)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(gradients(model, compiled, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def mvit():
    """Two attentions, one with pooled queries: the first one's output feeds the second."""
    kernels = [[3] * 3] * 2
    blocks = [
        MSBlockConfig(1, 16, 16, *kernels, [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(1, 16, 16, *kernels, [1, 1, 1], [1, 2, 2]),
    ]
    options = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True}
    model = MViT((32, 32), 4, blocks, num_classes=3, proj_after_attn=True, **options)
    return convert_mvit(model), (3, 4, 32, 32)


@torch.no_grad()
def test_outputs_of_mvit():
    """torch 2.11 does not compile torchvision's own MViT for training either."""
    model, x = perturbed(mvit)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
