"""From an image model to a video model: a timm ViT learns which of two digits comes first.

1. Train a small ViT on single images: a zero, a one, or neither. (You would normally take
   ``pretrained=True``; this example needs no download.)
2. Fine-tune it on clips, frame by frame with averaged logits. It stays at chance, because single
   frames do not reveal their order.
3. Convert it with ``to_video`` and fine-tune it the same way: the fused layer connects the frames.

    python examples/finetune_timm.py    # a few minutes on one core
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from order_clips import digit_images, order_clips
from torch import Tensor, nn

from stat_kernels.integrations.timm import to_video

FRAMES = 16


class FrameByFrame(nn.Module):
    """The image model on every frame, logits averaged: the model before the conversion."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, clips: Tensor) -> Tensor:
        logits = self.vit(clips.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (-1, clips.shape[2])).mean(1)


def small_vit() -> nn.Module:
    """A ViT of 4 blocks of 96 channels on 64 x 64 images: 4 x 4 patches and a class token."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=96, depth=4, num_heads=2, num_classes=3
    )
    for module in vit.modules():  # timm's 0.02 is for wide models; narrow ones wait on a plateau
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.7 * module.in_features**-0.5)
    return vit


def images_of(data: tuple[Tensor, Tensor], picked: Tensor) -> tuple[Tensor, Tensor]:
    """A batch as it is."""
    return data[0][picked], data[1][picked]


def pairs_of(data: tuple[Tensor, Tensor], picked: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of clips, and the same clips played backwards, which are the other class."""
    clips, labels = images_of(data, picked)
    return torch.cat((clips, clips.flip(2))), torch.cat((labels, 1 - labels))


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; the temporal position embedding starts at zero and learns 100 times as fast."""
    new = [p for name, p in model.named_parameters() if name == "temporal_embed"]
    old = [p for name, p in model.named_parameters() if name != "temporal_embed"]
    groups = [{"params": old, "lr": lr}, {"params": new, "lr": 100 * lr, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.05)


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    batch_of: Callable,
    picks: int,
    steps: int,
    lr: float,
    name: str,
) -> None:
    """A one-cycle learning rate over ``steps`` batches of ``picks``; prints the loss."""
    optimizer = optimizer_of(model, lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    generator, start, losses = torch.Generator().manual_seed(0), time.perf_counter(), []
    model.train()
    for step in range(1, steps + 1):
        picked = torch.randint(len(data[0]), (picks,), generator=generator)
        inputs, labels = batch_of(data, picked)
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 6) == 0:
            recent = sum(losses[-20:]) / len(losses[-20:])
            spent = time.perf_counter() - start
            print(f"{name}: step {step}/{steps}, loss {recent:.3f}, {spent:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    model.eval()
    inputs, labels = data
    found = torch.cat([model(part).argmax(1) for part in inputs.split(32)])
    return (found == labels).float().mean().item()


def run(images: int, clips: int, held_out: int, image_steps: int, steps: int) -> dict[str, float]:
    """All three steps; returns the accuracies on photographs and digits not trained on."""
    torch.manual_seed(0)
    vit = small_vit()
    fit(vit, digit_images("train", images), images_of, 64, image_steps, lr=1e-3, name="images")
    found = {"images": accuracy(vit, digit_images("val", held_out))}
    print(f"images: {found['images']:.0%} right (chance 33 %)")

    train = order_clips("train", clips, FRAMES)
    val = pairs_of(order_clips("val", held_out, FRAMES), torch.arange(held_out))
    vit.reset_classifier(2)
    video = to_video(vit, frames=FRAMES, window=3, long="class")
    for name, model in (("frame by frame", FrameByFrame(vit)), ("joined", video)):
        fit(model, train, pairs_of, 4, steps, lr=5e-4, name=name)
        found[name] = accuracy(model, val)
        print(f"{name}: {found[name]:.1%} right (chance 50 %)")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2400, help="training images")
    parser.add_argument("--clips", type=int, default=400, help="training clips")
    parser.add_argument("--held-out", type=int, default=150, help="images and clips to test on")
    parser.add_argument("--image-steps", type=int, default=375)
    parser.add_argument("--steps", type=int, default=500, help="for each of the two video models")
    run(**vars(parser.parse_args()))
