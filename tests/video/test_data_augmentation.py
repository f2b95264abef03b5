"""RandAugment, erasing and mixing: one draw for all frames, with the recipe's strengths."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import v2

from stat_video.data import transforms
from stat_video.data.options import DataOptions
from stat_video.data.transforms import normalise, train_transform
from stat_video.train import mixing

WHOLE = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}


def transform(**options):
    return train_transform(32, DataOptions(**WHOLE, **options))


def still(frames=5):
    """The same noisy picture in every frame."""
    return torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8).expand(frames, -1, -1, -1)


@pytest.mark.parametrize("options", [{"randaugment_ops": 4}, {"erasing": 1.0}])
def test_every_frame_is_augmented_alike(options):
    plain, changed = transform(), 0
    for seed in range(30):
        torch.manual_seed(seed)
        picture = still()
        clip = transform(**options)(picture)
        assert torch.equal(clip, clip[:, :1].expand_as(clip))
        changed += not torch.equal(clip, plain(picture))
    assert changed > 20


def test_frames_in_chunks_are_changed_as_all_at_once(monkeypatch):
    moving = torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8)
    augment, after = transform(randaugment_ops=4, erasing=0.5), []
    for seed in range(10):
        clips = []
        for chunk in (2, 7):
            monkeypatch.setattr(transforms, "_CHUNK", chunk)
            torch.manual_seed(seed)
            clips.append(augment(moving))
            after.append(torch.rand(()).item())
        assert torch.equal(*clips)
        assert after[-1] == after[-2]


@pytest.fixture
def operations(monkeypatch):
    """The arguments that torchvision's RandAugment is made with; it leaves the clip alone."""
    made = []

    def record(ops, magnitude, bins, **kwargs):
        made.append(SimpleNamespace(ops=ops, magnitude=magnitude, bins=bins, **kwargs))
        return lambda clip: clip

    monkeypatch.setattr(v2, "RandAugment", record)
    return made


def test_strengths_are_normal_about_the_recipes(operations):
    torch.manual_seed(0)
    augment, picture = transform(randaugment_ops=4), still(1)
    for _ in range(500):
        augment(picture)
    strengths = torch.tensor([10 * o.magnitude / (o.bins - 1) for o in operations])
    assert len(strengths) == pytest.approx(1000, abs=100)  # each of four with probability 1/2
    assert strengths.mean().item() == pytest.approx(7, abs=0.1)
    assert strengths.std().item() == pytest.approx(0.5, abs=0.05)
    assert {o.ops for o in operations} == {1}


def test_strengths_stay_within_the_scale(operations):
    for magnitude, end in ((0.0, 0), (10.0, 100)):
        operations.clear()
        options = {"randaugment_magnitude": magnitude, "randaugment_std": 3.0}
        for _ in range(30):
            transform(randaugment_ops=4, **options)(still(1))
        assert all(0 <= o.magnitude <= 100 for o in operations)
        assert end in {o.magnitude for o in operations}


def test_no_operations_draw_nothing(operations):
    transform()(still(1))
    assert not operations


def test_erasing_puts_noise_into_one_box():
    torch.manual_seed(3)
    picture = torch.full((4, 3, 32, 32), 115, dtype=torch.uint8)  # normalised: 0.004
    erased = normalise(transform(erasing=1.0)(picture))
    box = erased[0, 0].abs() > 0.01
    assert 0.02 * 0.5 < box.float().mean() < 0.4
    rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
    inside = erased[:, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert inside.std().item() == pytest.approx(1, abs=0.3)
    assert box.sum() == pytest.approx(inside[0].numel(), abs=0.03 * inside[0].numel() + 2)


@pytest.mark.parametrize(("probability", "low", "high"), [(0.25, 15, 36), (0.0, 0, 0)])
def test_erasing_happens_as_often_as_asked(probability, low, high):
    torch.manual_seed(0)
    picture, plain = still(1), transform()
    erase = transform(erasing=probability)
    times = sum(not torch.equal(erase(picture), plain(picture)) for _ in range(100))
    assert low <= times <= high


# -- Mixup and CutMix ------------------------------------------------------------------------------


def mixed(count=4, seed=0, **options):
    """Constant clips 0, 1, 2, ... of classes 0, 1, 2, ..., mixed."""
    torch.manual_seed(seed)
    labels = torch.arange(count)
    clips = labels.float().view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 16, 16).contiguous()
    mixer = mixing.build(DataOptions(**options), num_classes=count + 1)
    return mixer(clips, labels)


def test_nothing_is_built_where_nothing_is_mixed():
    assert mixing.build(DataOptions(), 3) is None
    assert mixing.build(DataOptions(mixup=0.8, mix_prob=0.0), 3) is None


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_clips_and_labels_with_one_share(seed):
    """Every pixel with the one in its place."""
    torch.manual_seed(seed)
    clips, mixer = torch.rand(3, 3, 4, 8, 8), mixing.build(DataOptions(mixup=0.8), 4)
    blended, targets = mixer(clips, torch.arange(3))
    share = targets[1, 1]
    assert 0 < share < 1
    for found, plain in ((targets, torch.eye(3, 4)), (blended, clips)):
        torch.testing.assert_close(found, share * plain + (1 - share) * plain.roll(1, 0))


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_one_box_into_all_frames(seed):
    clips, targets = mixed(seed=seed, cutmix=1.0)
    assert set(clips[2].unique().tolist()) <= {1.0, 2.0}
    for clip in clips:
        assert torch.equal(clip, clip[:1, :1].expand_as(clip))
    kept = (clips[2, 0, 0] == 2).float().mean()
    torch.testing.assert_close(targets[2, 2], kept)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixup_and_cutmix_take_turns():
    pasted = 0
    for seed in range(200):
        clips, _ = mixed(seed=seed, mixup=0.8, cutmix=1.0, mix_switch=0.3)
        pasted += bool((clips == clips.round()).all())
    assert 40 <= pasted <= 80


def test_shares_follow_the_beta_distribution():
    shares = torch.tensor([mixed(seed=s, mixup=0.8)[1][1, 1] for s in range(400)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.008)


def test_a_batch_is_mixed_as_often_as_asked():
    plain = torch.eye(4, 5)
    untouched = sum(
        torch.equal(mixed(seed=s, mixup=0.8, mix_prob=0.4)[1], plain) for s in range(200)
    )
    assert 95 <= untouched <= 145


def test_one_clip_alone_is_left_alone():
    clips, targets = mixed(count=1, mixup=0.8)
    assert targets.tolist() == [[1, 0]]
    assert not clips.any()


def test_the_draw_is_the_global_generators():
    a, b = mixed(seed=4, mixup=0.8, cutmix=1.0), mixed(seed=4, mixup=0.8, cutmix=1.0)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
