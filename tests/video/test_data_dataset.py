"""The data set and its loader: what the randomness depends on, and what becomes of bad videos."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stat_video.data.dataset import ClipDataset
from stat_video.data.loader import Batch, EpochBatches, Share, SkipCount, collate, make_loader
from stat_video.data.options import DataOptions
from stat_video.data.sources import open_source
from stat_video.data.transforms import MEAN, STD, eval_transform, normalise, train_transform
from stat_video.data.video import Video
from stat_video.errors import UserError
from tests.video.clip_samples import clips, numbered

CLIP = {"frames": 4, "image_size": 32}


def source(split="train", **options):
    order = {k: options.pop(k) for k in ("frame_order", "seed", "share") if k in options}
    data = DataOptions(root=str(clips()), batch_size=5, crop_area=(0.3, 1.0), **options)
    return open_source(data, **CLIP, split=split, **order)


def epoch_of(opened, epoch, start=0):
    opened.batches.set_position(epoch, start)
    return list(opened.loader)


def test_a_batch_has_the_documented_shapes():
    batch = epoch_of(source(), 0)[0]
    assert batch.clips.shape == (5, 3, 4, 32, 32)
    assert batch.clips.dtype == torch.uint8
    assert batch.labels.tolist() == [index % 2 for index in batch.indices]


@pytest.mark.parametrize("options", [{"workers": 2}, {"cache_gib": 1.0}])
def test_batches_do_not_depend_on_workers_or_cache(options):
    plain, other = source(), source(**options)
    other.preload("cache")
    for epoch in (0, 1):
        for a, b in zip(epoch_of(plain, epoch), epoch_of(other, epoch), strict=True):
            assert a.indices == b.indices
            assert torch.equal(a.clips, b.clips)


def test_epochs_and_seeds_differ_and_repeat():
    a, b, c = epoch_of(source(), 0), epoch_of(source(), 1), epoch_of(source(seed=1), 0)
    again = epoch_of(source(), 0)
    assert [x.indices for x in a] == [x.indices for x in again]
    assert torch.equal(a[1].clips, again[1].clips)
    assert [x.indices for x in a] != [x.indices for x in b]
    assert [x.indices for x in a] != [x.indices for x in c]


def test_the_same_video_is_cropped_anew_in_another_epoch():
    dataset = source().dataset
    first, second = dataset[0, 3], dataset[1, 3]
    assert first.index == second.index == 3
    assert not torch.equal(first.clips, second.clips)
    assert torch.equal(first.clips, dataset[0, 3].clips)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch_of(source(), 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_resumed_epoch_is_the_rest_of_it():
    whole, rest = epoch_of(source(), 2), epoch_of(source(), 2, start=1)
    assert [x.indices for x in rest] == [x.indices for x in whole[1:]]
    assert torch.equal(rest[0].clips, whole[1].clips)


def test_training_drops_the_rest_and_evaluation_does_not():
    assert [len(b.labels) for b in epoch_of(source(), 0)] == [5, 5]
    assert [len(b.labels) for b in epoch_of(source("val"), 0)] == [5, 1]
    assert len(EpochBatches(3, 8, shuffle=True)) == 1


def test_frame_orders():
    forward, backward, shuffled = (
        epoch_of(source("val", frame_order=order), 0)[0].clips
        for order in ("forward", "reverse", "shuffle")
    )
    assert torch.equal(forward.flip(2), backward)
    assert not torch.equal(forward, shuffled)
    for mixed, plain in zip(shuffled, forward, strict=True):
        sums = [sorted(x.sum((0, 2, 3)).tolist()) for x in (mixed, plain)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_all_frames_of_a_clip_get_the_same_crop_and_flip():
    torch.manual_seed(0)
    options = DataOptions(crop_area=(0.2, 0.6), flip=0.5)
    still = torch.randint(0, 255, (1, 3, 40, 40), dtype=torch.uint8).expand(6, -1, -1, -1)
    for _ in range(5):
        clip = train_transform(24, options)(still)
        assert clip.shape == (3, 6, 24, 24)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_a_flip_of_zero_never_flips():
    options = DataOptions(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    ramp = torch.arange(32, dtype=torch.uint8).expand(2, 3, 32, 32)
    for _ in range(10):
        assert train_transform(32, options)(ramp)[0, 0, 0].diff().gt(0).all()


def test_evaluation_scales_and_crops_the_middle():
    frames = torch.zeros(2, 3, 64, 128, dtype=torch.uint8)
    frames[..., 32:96] = 255
    clip = eval_transform(32, short_side=32)(frames)
    assert clip.shape == (3, 2, 32, 32)
    assert clip[..., 2:-2].eq(255).all()
    with pytest.raises(
        UserError, match=r"short_side must be at least model\.image_size 32, got 16"
    ):
        eval_transform(32, short_side=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_normalised_and_rounded_once(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).view(2, 1, 4, 4, 8)
    wanted = (pixels.double() / 255 - MEAN) / STD
    found = normalise(pixels, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps / 2, atol=4e-7)


# -- bad videos ------------------------------------------------------------------------------


def with_bad(bad, training, total=8):
    """`total` videos, those at the indices `bad` missing."""
    videos = [Video(Path("/nowhere.mp4") if i in bad else numbered(), i % 2) for i in range(total)]
    return ClipDataset(videos, eval_transform(32), frames=4, training=training)


def test_training_replaces_a_bad_video_deterministically():
    dataset = with_bad({2}, training=True)
    sample = dataset[0, 2]
    assert sample.clips is not None
    assert sample.index != 2
    assert sample.label == sample.index % 2
    assert sample.skipped == ((2, "/nowhere.mp4 does not exist"),)
    assert dataset[0, 2].index == sample.index
    assert len({dataset[epoch, 2].index for epoch in range(12)}) > 1


def test_evaluation_leaves_a_bad_video_out():
    dataset = with_bad({2}, training=False)
    loader = make_loader(dataset, EpochBatches(8, 3, shuffle=False), workers=0)
    batches = list(loader)
    assert [b.indices for b in batches] == [(0, 1), (3, 4, 5), (6, 7)]
    assert [len(b.skipped) for b in batches] == [1, 0, 0]


def test_a_batch_may_be_empty():
    batch = collate([with_bad({0}, training=False, total=1)[0, 0]])
    assert len(batch.labels) == 0
    assert batch.skipped[0][0] == 0


def met(good, bad):
    return Batch(
        torch.empty(0), torch.empty(0), tuple(good), (), tuple((i, f"{i} bad") for i in bad)
    )


def test_too_many_bad_videos_stop_the_run():
    count = SkipCount(total=1000, max_share=0.1)
    count.update(met(range(10), range(10, 20)))  # ten bad ones are within 10 % of a hundred
    with pytest.raises(UserError, match=r"11 of the 21 videos .*max_bad_share 0\.1 .*: 10 bad"):
        count.update(met([], [20]))


def test_a_bad_video_counts_once_however_often_it_is_met():
    count = SkipCount(total=20, max_share=0.1)
    for _ in range(50):
        count.update(met([1], [0]))
    assert len(count.bad) == 1


def test_the_count_goes_through_a_checkpoint():
    count = SkipCount(total=1000, max_share=0.1)
    count.update(met(range(500), range(500, 540)))
    other = SkipCount(total=1000, max_share=0.1)
    other.restore(count.state())
    assert (other.bad, other.seen) == (count.bad, count.seen)
    other.update(met([600], []))


def test_each_bad_video_is_listed_once(tmp_path):
    report = tmp_path / "run" / "unusable.txt"
    report.parent.mkdir()
    report.write_text("of an earlier run\n")
    count = SkipCount(1000, 0.1, report)
    for indices in ((3, 4), (4,), (3, 9)):
        count.update(met([], indices))
    assert report.read_text() == "3 bad\n4 bad\n9 bad\n"
    report.unlink()
    again = SkipCount(1000, 0.1, report)
    again.restore(count.state())
    again.update(met([], [11]))
    assert report.read_text() == "3 bad\n4 bad\n9 bad\n11 bad\n"


def test_a_run_that_stops_names_the_report(tmp_path):
    report = tmp_path / "unusable.txt"
    with pytest.raises(UserError, match=r"\(all are listed in .*unusable\.txt\)"):
        SkipCount(100, 0.02, report).update(met([], [1, 2, 3]))
    assert len(report.read_text().splitlines()) == 3


def test_processes_have_reports_of_their_own(tmp_path):
    opened = source("val", share=Share(1, 2), max_bad_share=1.0)
    count = opened.new_skip_count(tmp_path / "bad.txt")
    assert count.report == tmp_path / "bad.1.txt"
    count.update(met([], ["caf\udce9"]))  # a name that is no UTF-8
    assert count.report.read_text(encoding="utf-8") == "caf\\udce9 bad\n"


def test_missing_folders_and_lists_are_named(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_source(DataOptions(root=str(tmp_path / "no")), **CLIP, split="train")
    with pytest.raises(UserError, match=r"labels\.txt does not exist"):
        open_source(DataOptions(root=str(tmp_path)), **CLIP, split="train")


def test_the_cache_stops_at_its_limit():
    opened = source()
    one_clip_gib = 16 * 32 * 32 * 3 / 2**30
    opened.dataset.preload(3.5 * one_clip_gib, "cache")
    assert len(opened.dataset._cache) == 3
    assert np.prod(opened.dataset._cache[0].shape) == 16 * 32 * 32 * 3
