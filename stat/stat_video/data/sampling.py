"""Segment sampling as in TSN: which frames of a video make up a clip."""

from __future__ import annotations

import numpy as np


def segment_bounds(length: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of each of the `frames` segments of a video of `length` frames.

    seg = (length - 1) / frames; segment i goes from round(seg i) to round(seg (i + 1)), both ends
    included, so that neighbouring segments share a frame. A video shorter than the clip repeats
    frames.
    """
    if length < 1 or frames < 1:
        raise ValueError(f"length and frames must be at least 1, got {length} and {frames}")
    edges = np.round((length - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def sample_frames(
    length: int, frames: int, draws: np.ndarray | None = None, *, view: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """Indices of the frames of a clip, (frames,) int64, never decreasing.

    draws: (frames,) uniform in [0, 1), one per segment, to pick a random frame of it (training).
    None picks the same position in every segment (test). These are draws rather than a generator so
    that the choice can be repeated when the true length differs from that in the file's header.
    view: (v, n), the v-th of n test clips: n positions spread evenly over each segment; the middle
    if there is only one.
    """
    first, last = segment_bounds(length, frames)
    if draws is None:
        number, total = view
        return first + (last - first) * (2 * number + 1) // (2 * total)
    return first + np.floor(draws * (last - first + 1)).astype(np.int64)
