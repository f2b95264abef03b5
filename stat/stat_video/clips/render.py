"""Rendering one clip: everything moves uniformly on a torus, so time can be reversed.

A clip is a stack of layers. Each is a periodic image with an opacity that moves by a sub-pixel
amount per frame, at constant velocity, and wraps around; start positions are uniform. Hence a
reversed clip is exactly as likely as a clip of the opposite class, and a model that ignores the
order of the frames is at chance between opposite classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stat_video.clips.materials import Materials

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx)
ORDERS = ("zero_then_one", "one_then_zero")
COHERENCE = ("in_order", "scrambled")
RETURNS = ("returns", "changes")


@dataclass(frozen=True)
class Layer:
    """A periodic image that moves at constant velocity.

    colour: (S, S, 3) float32; alpha: (S, S, 1) float32, both in [0, 1].
    start, velocity: (y, x) in pixels and pixels per frame.
    first, last: the layer is visible in the frames first <= t < last.
    """

    colour: np.ndarray
    alpha: np.ndarray
    start: tuple[float, float]
    velocity: tuple[float, float]
    first: int = 0
    last: int = 1 << 30


def class_names(task: str, classes: int) -> tuple[str, ...]:
    """Names of the classes in label order. task: "direction" (2 or 4 classes), "order" (2),
    "coherence" (2) or "return" (2)."""
    others = {"order": ORDERS, "coherence": COHERENCE, "return": RETURNS}
    return others.get(task, tuple(DIRECTIONS)[:classes])


def render_clip(
    rng: np.random.Generator,
    materials: Materials,
    task: str,
    label: int,
    *,
    size: int,
    frames: int,
    speed: tuple[float, float],
    distractors: int,
    drift: float,
    contrast: float = 0.6,
) -> np.ndarray:
    """Render one clip of class `label`.

    speed: slowest and fastest motion of the patch in pixels per frame (direction and coherence).
    drift: fastest motion of the photograph in pixels per frame; the distractors' is twice that.
    contrast: largest brightness that the photograph behind the digits adds to a base of 0.1.
    Returns (frames, size, size, 3) uint8.
    """
    if task == "return":
        layers = _views(rng, materials, label, size, frames, drift)
    else:
        layers = [_background(rng, materials, size, drift, contrast)]
    layers += [_distractor(rng, materials, size, 2 * drift) for _ in range(distractors)]
    times = np.arange(frames)
    if task == "order":
        layers.extend(_pair(rng, materials, label, size, frames))
    elif task == "coherence":
        # Both classes have the same sets of frames; only which one is next to which differs.
        layers.append(_mover(rng, materials, int(rng.integers(len(DIRECTIONS))), size, speed))
        times = rng.permutation(frames) if label else times
    elif task == "direction":
        layers.append(_mover(rng, materials, label, size, speed))
    return np.stack([_compose(layers, t, size) for t in times])


def _compose(layers: list[Layer], t: np.integer, size: int) -> np.ndarray:
    """Blend the visible layers of frame t, the first at the bottom. Returns (size, size, 3) u8."""
    frame = np.zeros((size, size, 3), np.float32)
    for layer in layers:
        if not layer.first <= t < layer.last:
            continue
        offset = [s + v * t for s, v in zip(layer.start, layer.velocity, strict=True)]
        alpha = _shift(layer.alpha, *offset)[:size, :size]
        frame = frame * (1 - alpha) + _shift(layer.colour, *offset)[:size, :size] * alpha
    return (frame.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _shift(image: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """Move a periodic (S, S, C) image by a fraction of a pixel, bilinearly."""
    for axis, move in ((0, dy), (1, dx)):
        whole = int(np.floor(move))
        part = np.float32(move - whole)
        near = np.roll(image, whole, axis)
        image = near * (1 - part) + np.roll(near, 1, axis) * part
    return image


def _background(
    rng: np.random.Generator, materials: Materials, size: int, fastest: float, contrast: float
) -> Layer:
    """A drifting piece of a photograph, mirrored in both axes so that it tiles the torus."""
    colour = _photo_piece(rng, materials, size, zoom=(1.0, 2.5))
    colour = np.concatenate([colour, colour[::-1]], 0)
    colour = np.concatenate([colour, colour[:, ::-1]], 1)
    colour = 0.1 + contrast * colour  # leaves the patch brighter than most of what it moves over
    start = rng.uniform(0, 2 * size, 2)
    return Layer(colour, np.ones_like(colour[..., :1]), tuple(start), _velocity(rng, fastest))


def _views(
    rng: np.random.Generator,
    materials: Materials,
    label: int,
    size: int,
    frames: int,
    fastest: float,
) -> list[Layer]:
    """A view, darkness, and then either the same view, still drifting, or another photograph.

    The lengths of the views, a quarter to a third of the frames, do not depend on the class.
    """
    lead, rest = rng.integers(frames // 4, frames // 3 + 1, 2)
    picked = rng.choice(len(materials.photos), 2, replace=False)
    view, other = (
        _background(rng, replace(materials, photos=(materials.photos[i],)), size, fastest, 0.6)
        for i in picked
    )
    return [
        replace(view, last=int(lead)),
        replace(other if label else view, first=frames - int(rest)),
    ]


def _distractor(rng: np.random.Generator, materials: Materials, size: int, fastest: float) -> Layer:
    """A round piece of another photograph that drifts in any direction."""
    diameter = size // 5
    piece = _photo_piece(rng, materials, diameter, zoom=(1.0, 2.0))
    y, x = np.mgrid[:diameter, :diameter] - (diameter - 1) / 2
    alpha = (diameter / 2 - np.hypot(y, x)).clip(0, 1).astype(np.float32)
    return _placed(rng, piece, alpha[..., None], size, _velocity(rng, fastest))


def _mover(
    rng: np.random.Generator,
    materials: Materials,
    label: int,
    size: int,
    speed: tuple[float, float],
) -> Layer:
    """The bright digit whose direction is the class."""
    pace = rng.uniform(*speed)
    dy, dx = tuple(DIRECTIONS.values())[label]
    digit = materials.digits[rng.integers(len(materials.digits))]
    colour, alpha = _glyph(rng, digit, size)
    return _placed(rng, colour, alpha, size, (dy * pace, dx * pace))


def _pair(
    rng: np.random.Generator, materials: Materials, label: int, size: int, frames: int
) -> list[Layer]:
    """A zero and a one, shown one after the other; the class says which comes first.

    The durations belong to the digits, not to first and second, and the remaining frames are split
    at random before and after, so that a reversed clip is a clip of the other class.
    """
    durations = rng.integers(max(2, frames // 5), max(3, frames // 3) + 1, 2)
    gap = int(rng.integers(0, frames // 4 + 1))
    lead = int(rng.integers(0, frames - gap - durations.sum() + 1))
    layers, t = [], lead
    for digit_class in (0, 1) if label == 0 else (1, 0):
        pool = materials.digits[materials.digit_classes == digit_class]
        colour, alpha = _glyph(rng, pool[rng.integers(len(pool))], size)
        layer = _placed(rng, colour, alpha, size, _velocity(rng, 0.6))
        end = t + int(durations[digit_class])
        layers.append(Layer(layer.colour, layer.alpha, layer.start, layer.velocity, t, end))
        t = end + gap
    return layers


def _placed(
    rng: np.random.Generator,
    piece: np.ndarray,
    alpha: np.ndarray,
    size: int,
    velocity: tuple[float, float],
) -> Layer:
    """Place a small piece (h, w, 3) with alpha (h, w, 1) at random on an empty torus."""
    height, width = alpha.shape[:2]
    colour = np.zeros((size, size, 3), np.float32) + piece.reshape(-1, 3).mean(0)
    opacity = np.zeros((size, size, 1), np.float32)
    colour[:height, :width] = piece
    opacity[:height, :width] = alpha
    return Layer(colour, opacity, tuple(rng.uniform(0, size, 2)), velocity)


def _glyph(rng: np.random.Generator, digit: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An enlarged digit (8, 8): colour (h, w, 3) and alpha (h, w, 1), about 3/8 of the frame."""
    from skimage.transform import resize

    side = int(size * rng.uniform(0.32, 0.42))
    ink = resize(np.pad(digit, 1), (side, side), order=1).astype(np.float32)[..., None]
    tint = 1 - 0.25 * rng.random(3, dtype=np.float32)
    return np.broadcast_to(tint, (side, side, 3)), (2 * ink).clip(0, 1)


def _photo_piece(
    rng: np.random.Generator, materials: Materials, size: int, zoom: tuple[float, float]
) -> np.ndarray:
    """A random square of a random photograph, scaled to (size, size, 3) float32.

    zoom: range of the number of source pixels per output pixel.
    """
    from skimage.transform import resize

    photo = materials.photos[rng.integers(len(materials.photos))]
    side = min(int(size * rng.uniform(*zoom)), *photo.shape[:2])
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = photo[y : y + side, x : x + side]
    return resize(crop, (size, size), order=1, anti_aliasing=side > size).astype(np.float32)


def _velocity(rng: np.random.Generator, fastest: float) -> tuple[float, float]:
    """A velocity in a random direction, (y, x) in pixels per frame."""
    angle, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0, fastest)
    return float(pace * np.sin(angle)), float(pace * np.cos(angle))
