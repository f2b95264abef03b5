"""What an evaluation asks: see `data.options`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stat_video.data.options import DataOptions
from stat_video.errors import UserError
from stat_video.files import read_yaml
from stat_video.option_checks import MAX_SEED, at_least, within


@dataclass(frozen=True)
class EvalOptions:
    """Which question an evaluation asks.

    Args:
        reverse: show each clip backwards.
        shuffle_frames: show each clip's frames in a random order (a fixed one for each clip).
        seed: of the shuffled order.
        dir: folder for eval.json and confusion.png; empty stands for a folder beside the model that
            is named after the question: eval, eval_3x3_views, eval_reverse, eval_shuffle, and
            eval_ROOT_LIST for videos that are not the run's own validation list.
        device: "auto", "cpu", "cuda", ...
        bf16: forward under bfloat16 autocast.
        clip_parallel: processes that share each clip; the number of processes must be a multiple.
    """

    reverse: bool = False
    shuffle_frames: bool = False
    seed: int = 0
    dir: str = ""
    device: str = "auto"
    bf16: bool = False
    clip_parallel: int = 1

    def __post_init__(self) -> None:
        within("eval", self, 0, MAX_SEED, "seed")
        at_least("eval", self, 1, "clip_parallel")
        if self.reverse and self.shuffle_frames:
            raise ValueError("eval.reverse and eval.shuffle_frames exclude each other")

    @property
    def frame_order(self) -> Literal["forward", "reverse", "shuffle"]:
        """The order in which the frames of a clip are shown."""
        return "reverse" if self.reverse else "shuffle" if self.shuffle_frames else "forward"

    def folder(self, model: Path, data: DataOptions) -> Path:
        """Where the answer is written; model: the model's folder."""
        if self.dir:
            return Path(self.dir)
        own = data_defaults(str(model)).get("data", {})
        parts = ["eval"]
        if own and any(Path(own[n]) != Path(getattr(data, n)) for n in ("root", "val")):
            parts += [Path(data.root).resolve().name, Path(data.val).stem]
        if data.views != (1, 1):
            parts.append(f"{data.views[0]}x{data.views[1]}_views")
        if self.frame_order != "forward":
            parts.append(self.frame_order)
        return model / "_".join(parts)


def data_defaults(model: str | None) -> dict[str, dict[str, Any]]:
    """The data options of the run that a model came from, as a recipe for its evaluation.

    {} where there is no model or it is not in its run's folder. Raises UserError.
    """
    folders = () if model is None else (Path(model), *Path(model).parents[:2])
    path = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if path is None:
        return {}
    data = read_yaml(path).get("data")
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it must have the data options of a run")
    known = asdict(DataOptions()).keys() - {"cache_gib"}
    return {"data": {name: value for name, value in data.items() if name in known}}
