"""The preprocessing of a model's clips, saved with its weights so that prediction repeats it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from stat_video.data.transforms import MEAN, STD, Transform, eval_transform
from stat_video.errors import UserError
from stat_video.files import read_json, write_json

FILE = "preprocess.json"
LARGEST_SIDE = 16384  # pixels


@dataclass(frozen=True)
class Preprocess:
    """image_size, short_side: pixels; mean, std: of the normalisation, for readers of the file.

    Raises ValueError for sizes that do not fit together and for any other normalisation.
    """

    image_size: int
    short_side: int
    mean: float = MEAN
    std: float = STD

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("short_side", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= LARGEST_SIDE:
                wanted = f"an int from {least} to {LARGEST_SIDE}"
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if 0 < self.short_side < self.image_size:
            raise ValueError(
                f"short_side must be 0 or at least image_size {self.image_size}, "
                f"got {self.short_side}"
            )
        if (self.mean, self.std) != (MEAN, STD):
            raise ValueError(
                f"mean and std must be {MEAN} and {STD}, got {self.mean!r} and {self.std!r}"
            )

    @classmethod
    def load(cls, folder: Path, image_size: int) -> Preprocess:
        """The saved preprocessing, or the default for a model saved without one.

        image_size: of the model. Raises UserError for a file that is damaged or does not fit the
        model.
        """
        path = folder / FILE
        if not path.exists():
            return cls(image_size, 0)
        try:
            found = cls(**read_json(path))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if found.image_size != image_size:
            raise UserError(
                f"{path} is for images of {found.image_size} pixels, the model takes {image_size}"
            )
        return found

    def save(self, folder: Path) -> None:
        """Write preprocess.json into the folder of a saved model."""
        write_json(folder / FILE, asdict(self))

    def transform(self) -> Transform:
        """(T, 3, H, W) uint8 -> (3, T, S, S) uint8; `normalise` makes it the model's input."""
        return eval_transform(self.image_size, self.short_side)
