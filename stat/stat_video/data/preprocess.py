"""How clips were prepared for a model, kept beside its weights so that prediction repeats it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from stat_video.data.text_files import parse_json, read_text
from stat_video.data.transforms import MEAN, STD, Transform, eval_transform
from stat_video.errors import UserError

FILE = "preprocess.json"


@dataclass(frozen=True)
class Preprocess:
    """image_size, short_side: pixels; mean, std: of the normalisation, for people to read."""

    image_size: int
    short_side: int
    mean: float = MEAN
    std: float = STD

    def __post_init__(self) -> None:
        size, side = self.image_size, self.short_side
        whole = isinstance(size, int) and isinstance(side, int)
        if not whole or not 0 < size <= (side or size):
            raise ValueError(
                "image_size must be a number of pixels and short_side 0 or at least as many, "
                f"got {size!r} and {side!r}"
            )

    @classmethod
    def load(cls, folder: Path, image_size: int) -> Preprocess:
        """The saved one, or the default where a model came without. Raises UserError."""
        path = folder / FILE
        if not path.exists():
            return cls(image_size, 0)
        try:
            return cls(**parse_json(path, read_text(path)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def save(self, folder: Path) -> None:
        """Write preprocess.json into the folder of a saved model."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def transform(self) -> Transform:
        """(T, 3, H, W) uint8 -> (3, T, S, S) float32."""
        return eval_transform(self.image_size, self.short_side)
