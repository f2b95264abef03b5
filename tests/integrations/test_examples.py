"""The examples in a shortened form, and every Python block of two guides."""

import re
from pathlib import Path

import closeness
import cuda_graph
import finetune_timm
import loader_clips
import numpy as np
import order_clips
import pytest
import torch
import videomae_trainer
from integration_costs import COLUMNS, in_a_process, row

from stat_video.clips.make import write_mp4

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guides/integrations.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
TITLES = ("timm", "sizes", "transformers", "torchvision", "function", "layer", "sequence")


@pytest.mark.parametrize(("title", "block"), [*zip(TITLES, BLOCKS, strict=True)], ids=TITLES)
def test_documented_code_runs(title, block):
    names = {}
    exec(compile(block, f"docs/guides/integrations.md, {title}", "exec"), names)
    if title == "timm":
        assert names["video"](names["clips"]).shape == (2, 5)
        assert names["named"](names["clips"]).shape == (2, 5)
    if title == "sizes":
        assert names["logits"].shape == (2, 5)
    if title == "transformers":
        answers = [m.eval()(names["pixels"]).logits for m in map(names.get, ("model", "again"))]
        assert torch.equal(*answers)
    if title in ("function", "sequence"):
        assert names["y"].isfinite().all()


def test_the_guide_to_online_video():
    """Its blocks run one after the other, as a reader would; they compare with the whole clip."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/online.md").read_text(), re.S)
    names = {}
    for block in blocks:
        exec(compile(block, "docs/guides/online.md", "exec"), names)
    assert names["cache"].frames == 20


def test_a_fine_tuned_vit():
    found = finetune_timm.run(images=66, clips=4, held_out=6, image_steps=40, steps=3)
    assert found["images"] > 0.4  # chance is 1/3
    assert found["frame by frame"] == 0.5  # a clip and its reverse are one to it
    assert 0 <= found["joined"] <= 1


def test_only_joined_frames_tell_a_clip_from_its_reverse():
    torch.manual_seed(0)
    data = order_clips.order_clips("train", 1, 8)
    pairs = finetune_timm.pairs_of(data, torch.arange(1))
    vit = finetune_timm.small_vit()
    video = finetune_timm.to_video(vit, frames=8)
    for model, expected in ((finetune_timm.FrameByFrame(vit), 0.5), (video, 1.0)):
        finetune_timm.fit(model, data, finetune_timm.pairs_of, 2, 40, lr=1e-3, name="pairs")
        assert finetune_timm.accuracy(model, pairs) == expected


def test_the_trainer_of_transformers(tmp_path):
    found = videomae_trainer.run(clips=8, steps=2, folder=str(tmp_path))
    assert found["loss"] < 2
    assert found["off"] < 1e-6


def test_closeness():
    lines = closeness.run(images=6, image_steps=1, clips=3, frames=4)
    assert lines[0]["features"] < 1e-5
    assert lines[0]["same"] == 1
    assert all(0 < line["features"] < 2 for line in lines[1:])


def test_costs():
    """A real measurement in a process of its own, of the cheapest model: one frame."""
    found = in_a_process("timm vit_small_patch16_224", 1, 224, True, limit_gib=4.0)
    # the image model's: one frame adds none
    assert found.pop("gmac") == pytest.approx(4.6, abs=0.05)
    assert found.pop("mparams") == pytest.approx(21.82, abs=0.01)  # 400 classes
    assert found.keys() == {"forward_s", "forward_mib", "both_s", "both_mib"}
    assert 0 < found["forward_s"] < found["both_s"]
    assert 0 < found["forward_mib"] < 2048
    assert 0 < found["both_mib"] < 2048


def test_a_table_row():
    fits = {"gmac": 1234.56, "mparams": 2, "forward_s": 0.5, "forward_mib": 10}
    before = {"gmac": 1, "mparams": 2}
    assert row(["name", 128, 64], before, fits, [*COLUMNS], 8.0) == (
        "| name | 128 | 64 | 1.0 / 1,234.6 | 2.0 / 2.0 | over 8 GiB / 0.50 "
        "| over 8 GiB / over 8 GiB | over 8 GiB / 10 | over 8 GiB / over 8 GiB |"
    )


def test_files_to_measure_loading_with(tmp_path):
    """Landscape to portrait and more frames than there are: covered, cropped, to and fro."""
    video, out = tmp_path / "ramp.mp4", tmp_path / "out"
    levels = np.arange(40, 200, 20, dtype=np.uint8)  # eight flat frames
    write_mp4(video, np.broadcast_to(levels[:, None, None, None], (8, 32, 64, 3)), fps=8)
    loader_clips.write_loader_clips(out, [video], size=(48, 64), frames=20, copies=2)
    assert (out / "train.txt").read_text() == "ramp_00.mp4 0\nramp_01.mp4 0\n"
    assert (out / "labels.txt").read_text() == "ramp\n"
    frames = loader_clips.frames_of(out / "ramp_01.mp4", 48, 64)
    assert [frame.shape for frame in frames] == [(64, 48, 3)] * 20
    to_and_fro = [*range(8), *range(6, 0, -1), *range(6)]
    seen = [frame.mean() for frame in frames]
    assert np.allclose(seen, levels[to_and_fro], atol=6)


def test_the_step_of_a_cuda_graph():
    """Eagerly, on the CPU: an update at each call, on what the tensors then hold."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    clips, labels = torch.zeros(6, 3, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    step = cuda_graph.training_step(model, optimiser, clips, labels)
    clips.normal_()
    labels.copy_(torch.arange(6) % 3)
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")
def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(
        SystemExit, match="CUDA graphs need an NVIDIA GPU, and this machine has none"
    ):
        cuda_graph.main()
