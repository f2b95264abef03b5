"""VideoMAE with the fused attention, fine-tuned by the transformers library's own Trainer.

The model is small and starts from random weights, so nothing is downloaded; with a checkpoint you
would write ``VideoMAEForVideoClassification.from_pretrained(NAME)`` and keep the rest. It is
converted, trained for a few steps on the generated clips, saved, loaded, and run again.

    python examples/videomae_trainer.py    # about a minute on one core
"""

import argparse
import tempfile

import torch
from order_clips import order_clips
from torch.utils.data import Dataset
from transformers import (
    Trainer,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)

from stat_kernels.integrations.transformers import convert, load

FRAMES = 16


class Clips(Dataset):
    """Clips as VideoMAE expects them: pixel_values (T, 3, H, W) and a label."""

    def __init__(self, split: str, count: int) -> None:
        self.clips, self.labels = order_clips(split, count, FRAMES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        pixels = self.clips[index].transpose(0, 1)
        return {"pixel_values": pixels, "labels": int(self.labels[index])}


def small_videomae() -> VideoMAEForVideoClassification:
    """4 layers of 96 channels on 16 frames of 64 x 64: 8 token frames of 4 x 4."""
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=384,
            image_size=64,
            num_frames=FRAMES,
            num_labels=2,
        )
    )


def run(clips: int, steps: int, folder: str) -> dict[str, float]:
    """Trains, saves, loads; returns the last loss and how far the loaded model's logits are off."""
    torch.manual_seed(0)
    model = convert(small_videomae(), window=3, long="mean")
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Clips("train", clips))
    result = trainer.train()
    trainer.save_model(folder)

    again = load(VideoMAEForVideoClassification, folder).eval()
    pixels = torch.stack([item["pixel_values"] for item in Clips("val", 4)])
    with torch.no_grad():
        off = (again(pixels).logits - model.eval()(pixels).logits).abs().max().item()
    print(f"loss {result.training_loss:.3f}; loaded again, the logits differ by {off:.1g}")
    return {"loss": result.training_loss, "off": off}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(options.clips, options.steps, folder)
