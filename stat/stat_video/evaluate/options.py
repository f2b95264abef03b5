"""What an evaluation asks: see `data.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvalOptions:
    """Which question an evaluation asks.

    Args:
        reverse: show each clip backwards.
        shuffle_frames: show each clip's frames in a random order (a fixed one for each clip).
        seed: of the shuffled order.
        dir: folder for eval.json and confusion.png; empty stands for "eval" beside the model.
        device: "auto", "cpu", "cuda", ...
        bf16: forward under bfloat16 autocast.
    """

    reverse: bool = False
    shuffle_frames: bool = False
    seed: int = 0
    dir: str = ""
    device: str = "auto"
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.reverse and self.shuffle_frames:
            raise ValueError("eval.reverse and eval.shuffle_frames exclude each other")

    @property
    def frame_order(self) -> Literal["forward", "reverse", "shuffle"]:
        """The order in which the frames of a clip are shown."""
        return "reverse" if self.reverse else "shuffle" if self.shuffle_frames else "forward"
