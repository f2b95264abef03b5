"""Segment sampling against the formula of the recipe."""

import numpy as np
import pytest

from stat_video.data.sampling import sample_frames, segment_bounds


def test_bounds_are_the_rounded_multiples_of_the_segment_length():
    first, last = segment_bounds(250, 16)
    seg = 249 / 16
    assert first.tolist() == [round(seg * i) for i in range(16)]
    assert last.tolist() == [round(seg * (i + 1)) for i in range(16)]


def test_test_sampling_takes_the_middles():
    assert sample_frames(9, 4).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(("length", "frames"), [(1, 4), (3, 16), (16, 16), (33, 16), (300, 64)])
def test_training_sampling_stays_in_the_segments(length, frames):
    first, last = segment_bounds(length, frames)
    rng = np.random.default_rng(0)
    seen = np.array([sample_frames(length, frames, rng.random(frames)) for _ in range(300)])
    assert (seen >= first).all()
    assert (seen <= last).all()
    assert (np.diff(seen, axis=1) >= 0).all()
    assert last[-1] == length - 1


def test_training_sampling_reaches_both_ends_of_a_segment():
    first, last = segment_bounds(65, 16)
    assert (sample_frames(65, 16, np.zeros(16)) == first).all()
    assert (sample_frames(65, 16, np.full(16, np.nextafter(1, 0))) == last).all()


def test_default_clips_are_sampled_alike_forwards_and_backwards():
    """The generated benchmark's claim about order-blind models rests on this."""
    middles = sample_frames(32, 16)
    assert (middles == 31 - middles[::-1]).all()


def test_an_empty_video_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        segment_bounds(0, 16)
