"""Photographs and digits for the generated clips, read from installed packages.

Files are opened by path inside scikit-image and scikit-learn, never through a download function,
so making clips needs no network. Training and validation share no photograph and no digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stat_video.errors import UserError

# (package, file inside it). The right image of the stereo pair is left out: it would show the
# validation set a training photograph from another angle.
PHOTOS = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/brick.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/coins.png"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/retina.jpg"),
        ("skimage", "data/page.png"),
        ("sklearn", "datasets/images/china.jpg"),
    ),
    "val": (
        ("skimage", "data/camera.png"),
        ("skimage", "data/cell.png"),
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/gravel.png"),
        ("skimage", "data/moon.png"),
        ("skimage", "data/rocket.jpg"),
        ("skimage", "data/text.png"),
        ("sklearn", "datasets/images/flower.jpg"),
    ),
}


@dataclass(frozen=True)
class Materials:
    """The photographs and digits of one split.

    photos: RGB photographs, each (H, W, 3) float32 in [0, 1].
    digits: handwritten digits, (N, 8, 8) float32 in [0, 1].
    digit_classes: (N,) int, the value of each digit.
    """

    photos: tuple[np.ndarray, ...]
    digits: np.ndarray
    digit_classes: np.ndarray


def load_materials(split: str) -> Materials:
    """The photographs and digits of `split`, "train" or "val".

    Raises UserError when scikit-image or scikit-learn is missing or lacks one of the files.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"make-clips needs scikit-learn and scikit-image: {error}") from error
    bunch = load_digits()
    # Writers change along the file (43 of them), so halves share few hands, and never an image.
    half = len(bunch.images) * 3 // 4
    part = slice(0, half) if split == "train" else slice(half, None)
    digits = (bunch.images[part] / 16.0).astype(np.float32)
    photos = tuple(_read_photo(package, name) for package, name in PHOTOS[split])
    return Materials(photos, digits, np.asarray(bunch.target[part]))


def _read_photo(package: str, name: str) -> np.ndarray:
    """One photograph as (H, W, 3) float32 in [0, 1]; grey ones get three equal channels."""
    import importlib.util

    try:
        from skimage.io import imread
    except ImportError as error:
        raise UserError(f"make-clips needs scikit-image: {error}") from error
    spec: Any = importlib.util.find_spec(package)
    root = Path(spec.origin).parent
    path = root / name
    if not path.is_file():
        raise UserError(f"{path} is missing from the installed {package}; reinstall it")
    image = np.asarray(imread(path), dtype=np.float32) / 255.0
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
