"""Measure how close a converted model is to its image model before fine-tuning.

A small ViT is trained on single generated images (a zero, a one, or neither) and converted with
several settings. On clips in which the digit drifts, it is then compared, frame by frame, with the
image model: the relative difference of the class token's features, the share of frames with the
same prediction, and the accuracy on clips (logits averaged over the frames).

    python examples/closeness.py    # a minute on one core
"""

import argparse

import torch
from finetune_timm import fit, images_of, small_vit
from order_clips import digit_clips, digit_images
from torch import Tensor, nn

from stat_kernels.integrations.timm import to_video

SETTINGS = (
    {"window": 1, "long": "none"},
    {"window": 3, "long": "none"},
    {"window": 3, "long": "mean"},
    {"window": 3, "long": "class"},
    {"window": 7, "long": "class"},
    {"window": 3, "long": "class", "kv_stride": 2},
    {"window": 7, "long": "class", "kv_stride": 2},
)


@torch.no_grad()
def compare(vit: nn.Module, clips: Tensor, labels: Tensor, settings: dict) -> dict[str, float]:
    """One line of the table."""
    frames = clips.shape[2]
    image = to_video(vit, frames=frames, window=1, long="none").eval()
    video = to_video(vit, frames=frames, **settings).eval()
    tokens = [
        torch.cat([m.forward_features(part) for part in clips.split(16)]) for m in (image, video)
    ]
    features = [t[:, :, 0] for t in tokens]
    logits = [vit.forward_head(t.flatten(0, 1)).unflatten(0, (-1, frames)) for t in tokens]
    answers = [scores.argmax(-1) for scores in logits]
    right = [(scores.mean(1).argmax(-1) == labels).float().mean().item() for scores in logits]
    return {
        "features": ((features[1] - features[0]).norm() / features[0].norm()).item(),
        "same": (answers[1] == answers[0]).float().mean().item(),
        "image": right[0],
        "video": right[1],
    }


def run(images: int, image_steps: int, clips: int, frames: int) -> list[dict[str, float]]:
    """Trains the image model, prints the table."""
    torch.manual_seed(0)
    vit = small_vit()
    fit(vit, digit_images("train", images), images_of, 64, image_steps, lr=1e-3, name="images")
    vit.eval()
    data = digit_clips("val", clips, frames, seed=2)
    print("| settings | features differ by | frames answered alike | clips right, image / video |")
    print("| :-- | --: | --: | --: |")
    found = []
    for settings in SETTINGS:
        line = compare(vit, *data, settings)
        name = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        print(
            f"| `{name}` | {line['features']:.1%} | {line['same']:.1%} "
            f"| {line['image']:.1%} / {line['video']:.1%} |",
            flush=True,
        )
        found.append(line)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--image-steps", type=int, default=375)
    parser.add_argument("--clips", type=int, default=150)
    parser.add_argument("--frames", type=int, default=16)
    run(**vars(parser.parse_args()))
