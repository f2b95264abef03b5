"""`stat-video eval`: score a saved model and write the result down."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stat_video.data.loader import Share
from stat_video.data.options import DataOptions
from stat_video.data.sources import open_source
from stat_video.distributed import World, alone
from stat_video.errors import UserError
from stat_video.evaluate.evaluation import Scores, evaluate, write_class_table
from stat_video.evaluate.loading import load_model, run_options
from stat_video.evaluate.options import EvalOptions


def data_defaults(model_path: str) -> dict[str, Any]:
    """The data options of the run that a model came from, as defaults for its evaluation."""
    import yaml

    path = run_options(Path(model_path))
    if path is None:
        return {}
    try:
        data = yaml.safe_load(path.read_text())["data"]
        known = {name: data[name] for name in asdict(DataOptions()) if name in data}
    except (yaml.YAMLError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return {f"data.{name}": value for name, value in known.items() if name != "cache_gib"}


def score(
    model_path: str,
    data: DataOptions,
    options: EvalOptions,
    argv: list[str],
    world: World | None = None,
) -> tuple[Scores, tuple[str, ...], Path]:
    """Evaluate a model on `data.val` with `data.views`; write eval.json, per_class.csv and,
    where there are any, unusable.txt.

    world: the processes that share the videos; None for this one alone. The main one writes.
    Returns the scores, the class names in label order, and the folder that was written to.
    Raises UserError.
    """
    world = alone(options.device) if world is None else world
    loaded = load_model(model_path)
    config = loaded.model.config
    if not data.short_side:
        data = replace(data, short_side=loaded.preprocess.short_side)
    source = open_source(
        data,
        frames=config.frames,
        image_size=config.image_size,
        split="val",
        seed=options.seed,
        frame_order=options.frame_order,
        share=Share(world.rank, world.size),
        views=data.views,
    )
    if len(source.class_names) != config.num_classes:
        raise UserError(
            f"the model has {config.num_classes} classes, {data.labels} in {data.root} names "
            f"{len(source.class_names)}"
        )
    folder = Path(options.dir) if options.dir else loaded.folder / "eval"
    skips = source.new_skip_count(folder / "unusable.txt")
    if world.is_main:
        skips.report.unlink(missing_ok=True)
    scores = evaluate(
        loaded.model.to(world.device),
        source.loader,
        world.device,
        config.num_classes,
        skips=skips,
        bf16=options.bf16,
        world=world,
    )
    if world.is_main:
        _write(folder, scores, source.class_names, data, options, argv)
    return scores, source.class_names, folder


def _write(
    folder: Path,
    scores: Scores,
    names: tuple[str, ...],
    data: DataOptions,
    options: EvalOptions,
    argv: list[str],
) -> None:
    record = {
        "command": ["stat-video", "eval", *argv],
        "frame_order": options.frame_order,
        "views": {"temporal": data.views[0], "spatial": data.views[1]},
        "class_names": names,
        **asdict(scores),
        "confusion": scores.confusion.tolist(),
    }
    del record["class_top5"]  # in per_class.csv; JSON has no NaN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval.json").write_text(json.dumps(record, indent=2) + "\n")
        write_class_table(scores, names, folder / "per_class.csv")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
