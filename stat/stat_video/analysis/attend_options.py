"""What `stat-video attend` was asked for, checked against the model, and the files it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stat_video.analysis.attend import Attention, Weights, shares, shares_table
from stat_video.analysis.attend_plots import Choice, plot_shares, save_figure, save_film
from stat_video.errors import UserError
from stat_video.files import write_json, writing

CLASS, CENTRE = "class", "centre"


def choose(
    attention: Attention, *, layer: int, frame: int | None, queries: Sequence[str], head: int | None
) -> Choice:
    """What to show; negative layers, frames and heads count from the end, as in Python.

    layer: over all stages. frame: of the token frames; None is the middle one. queries: "class",
    "centre" or "ROW,COLUMN" in the layer's grid. head: None is the mean of all.
    Raises UserError naming the option and what there is.
    """
    layer = _index("--layer", layer, len(attention.layers), "layers")
    weights = attention.layers[layer]
    frames, heads = weights.current.shape[:2]
    frame = _index("--frame", frames // 2 if frame is None else frame, frames, "token frames")
    head = None if head is None else _index("--head", head, heads, f"heads in layer {layer}")
    if not queries:
        raise UserError("--queries must name at least one of class, centre or ROW,COLUMN")
    return Choice(layer, frame, tuple(_query(text, weights) for text in queries), head)


def write(attention: Attention, choice: Choice, folder: Path, *, film: bool, video: str) -> str:
    """Writes figure, film, shares; returns the shares' table and where the files are.

    Raises UserError when the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(attention, choice, folder / "attention.png")
        if film:
            frames = range(len(attention.images))
            choices = [replace(choice, frame=frame) for frame in frames]
            save_film(attention, choices, folder / "attention.mp4")
        records = shares(attention)
        plot_shares(records, folder / "shares.png")
    name, probability = attention.guess
    content = {"video": video, "class": name, "probability": probability, "layers": records}
    write_json(folder / "shares.json", content)
    names = ["attention.png", *["attention.mp4"][: int(film)], "shares.png", "shares.json"]
    return f"{shares_table(records)}\n{', '.join(names)} are in {folder}"


def _index(option: str, index: int, count: int, what: str) -> int:
    if not -count <= index < count:
        raise UserError(
            f"{option} must be {-count} to {count - 1}, there are {count} {what}; got {index}"
        )
    return index % count


def _query(text: str, weights: Weights) -> tuple[int, int] | None:
    height, width = weights.query_grid
    if text == CLASS:
        if not weights.prefix:
            raise UserError("--queries class needs class tokens, this model has none")
        return None
    if text == CENTRE:
        return height // 2, width // 2
    try:
        row, column = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--queries must be class, centre or ROW,COLUMN, got {text!r}") from error
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f"--queries {text} is outside the layer's grid of {height} rows and {width} columns"
        )
    return row, column
