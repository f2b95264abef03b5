"""Several clips of one video: repeats in training and views in evaluation, each decoded once."""

import numpy as np
import pytest
import torch

from stat_video.data import dataset as dataset_module
from stat_video.data.dataset import ClipDataset
from stat_video.data.loader import EpochBatches, Share
from stat_video.data.options import DataOptions
from stat_video.data.sampling import sample_frames
from stat_video.data.sources import open_source
from stat_video.data.transforms import crops_transform
from stat_video.data.video import Video
from tests.video.clip_samples import clips, numbered

CLIP = {"frames": 4, "image_size": 24}


@pytest.fixture
def decoded(monkeypatch):
    """How many times a video is decoded."""
    calls, real = [], dataset_module.read_video

    def counting(video, *args, **kwargs):
        calls.append(video.path)
        return real(video, *args, **kwargs)

    monkeypatch.setattr(dataset_module, "read_video", counting)
    return calls


def grey_levels(clips):
    """The brightness of each frame of clips (V, 3, T, H, W): which frames they are."""
    return clips.float().mean((1, 3, 4))


# -- repeats ---------------------------------------------------------------------------------------


def repeated(repeats, batch_size=8, **options):
    data = DataOptions(root=str(clips()), batch_size=batch_size, repeats=repeats, **options)
    return open_source(data, **CLIP, split="train")


def test_repeats_share_a_decoded_clip_but_not_its_augmentation(decoded):
    sample = repeated(2).dataset[0, 3]
    assert sample.clips.shape == (2, 3, 4, 24, 24)
    assert sample.views == (0, 1)
    assert len(decoded) == 1
    assert not torch.equal(sample.clips[0], sample.clips[1])


def test_repeats_show_the_same_frames():
    """On a video whose brightness tells the frame, every crop of it does."""
    options = {"repeats": 3, "frames": 4, "training": True}
    crop = crops_transform(24, 24, 1)
    dataset = ClipDataset([Video(numbered(), 0)], lambda clip: crop(clip)[0], **options)
    levels = grey_levels(dataset[5, 0].clips)
    torch.testing.assert_close(levels[0], levels[1])
    torch.testing.assert_close(levels[0], levels[2])
    assert not torch.allclose(levels[0], grey_levels(dataset[6, 0].clips)[0])


def test_a_batch_of_repeats_has_as_many_clips_as_it_says_and_an_epoch_every_video():
    source = repeated(2)
    batches = list(source.loader)
    assert [len(b.labels) for b in batches] == [8, 8, 8]
    assert sorted(i for b in batches for i in b.indices) == sorted([*range(12), *range(12)])
    for batch in batches:  # neighbours, which mixing mixes, are different videos
        assert batch.indices[:4] == batch.indices[4:]
        assert len(set(batch.indices[:4])) == 4
        assert batch.views == (0,) * 4 + (1,) * 4
        assert batch.labels.tolist() == [i % 2 for i in batch.indices]


def test_the_first_repeat_is_what_one_alone_would_be():
    assert torch.equal(repeated(1).dataset[2, 3].clips[0], repeated(2).dataset[2, 3].clips[0])


def test_repeats_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"multiple of data\.repeats 3, got 8"):
        DataOptions(batch_size=8, repeats=3)


# -- views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "expected"),
    [((0, 1), [1, 3]), ((0, 2), [0, 2]), ((1, 2), [1, 3]), ((0, 5), [0, 2]), ((4, 5), [1, 3])],
)
def test_a_view_is_a_place_in_every_segment(view, expected):
    """Five frames in two segments, 0 to 2 and 2 to 4."""
    assert sample_frames(5, 2, view=view).tolist() == expected


def test_views_are_spread_evenly_about_the_middle():
    first = [sample_frames(101, 4, view=(v, 5))[0] for v in range(5)]
    assert first == [2, 7, 12, 17, 22]
    assert np.array_equal(sample_frames(101, 4, view=(2, 5)), sample_frames(101, 4))


def viewed(views, batch_size=16):
    data = DataOptions(root=str(clips()), batch_size=batch_size)
    return open_source(data, **CLIP, split="val", views=views)


def test_all_views_of_a_video_are_decoded_once(decoded):
    sample = viewed((5, 3)).dataset[0, 1]
    assert sample.clips.shape == (15, 3, 4, 24, 24)
    assert sample.views == tuple(range(15))
    assert len(decoded) == 1


def test_a_view_is_a_crop_of_a_clip():
    """View v is crop v % 3 of clip v // 3, each made here by hand."""
    dataset = viewed((2, 3)).dataset
    views = dataset[0, 0].clips
    crops = crops_transform(24, 0, 3)
    for time in (0, 1):
        frames = dataset_module.read_video(
            dataset.videos[0], lambda n, t=time: sample_frames(n, 4, view=(t, 2))
        )
        expected = crops(torch.from_numpy(frames).permute(0, 3, 1, 2))
        torch.testing.assert_close(views[3 * time : 3 * time + 3], expected)


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (2, 4), (3, 6), (4, 5), (0, 6)])
def test_a_part_of_the_views_is_that_part_of_all(first, stop):
    dataset = viewed((2, 3)).dataset
    part = dataset[0, 2, first, stop]
    assert part.views == tuple(range(first, stop))
    assert torch.equal(part.clips, dataset[0, 2].clips[first:stop])


def test_one_view_is_what_validation_sees():
    assert torch.equal(viewed((1, 1)).dataset[0, 0].clips, viewed((3, 3)).dataset[0, 0, 4, 5].clips)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32)])
def test_crops_reach_from_end_to_end(height, width):
    """On a ramp along the long side, the crops' own middles are a third apart."""
    ramp = torch.linspace(0, 255, 64).round().byte()
    picture = ramp.expand(height, 64) if width == 64 else ramp[:, None].expand(64, width)
    crops = crops_transform(32, 32, 3)(picture.expand(2, 3, height, width))
    middles = crops.float().mean((1, 2, 3, 4)) / 255 * 63
    torch.testing.assert_close(middles, torch.tensor([15.5, 31.5, 47.5]), atol=0.3, rtol=0)
    along = crops[:, 0, 0].int().diff(dim=-1 if width == 64 else -2)
    assert (along > 0).all()


# -- who gets which --------------------------------------------------------------------------------


def keys_of(**options):
    return list(EpochBatches(5, shuffle=False, **options))


def test_lists_hold_whole_videos_or_parts_of_one():
    assert keys_of(batch_size=7, views=3) == [
        [(0, 0, 0, 3), (0, 1, 0, 3)],
        [(0, 2, 0, 3), (0, 3, 0, 3)],
        [(0, 4, 0, 3)],
    ]
    lists = keys_of(batch_size=2, views=3)
    assert lists[:3] == [[(0, 0, 0, 2)], [(0, 0, 2, 3)], [(0, 1, 0, 2)]]
    assert len(lists) == len(EpochBatches(5, 2, shuffle=False, views=3)) == 10


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [2, 9])
def test_every_view_of_every_video_goes_to_one_process_once(world, batch_size):
    seen = []
    for rank in range(world):
        for part in keys_of(batch_size=batch_size, views=3, share=Share(rank, world)):
            seen += [(i, view) for _, i, first, stop in part for view in range(first, stop)]
    assert sorted(seen) == [(i, view) for i in range(5) for view in range(3)]


def test_a_batch_of_views_and_its_numbers():
    batch = next(iter(viewed((1, 3), batch_size=6).loader))
    assert batch.clips.shape == (6, 3, 4, 24, 24)
    assert batch.indices == (0, 1) * 3
    assert batch.views == (0, 0, 1, 1, 2, 2)


def test_views_are_checked():
    with pytest.raises(ValueError, match=r"1 or 3 crops, got 5 and 2"):
        DataOptions(views=(5, 2))
