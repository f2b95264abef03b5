"""`stat-video eval`: score a saved model and write the results."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from stat_video.data.loader import Share
from stat_video.data.options import DataOptions
from stat_video.data.sources import open_source
from stat_video.distributed import World
from stat_video.errors import UserError
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.evaluation import Scores, evaluate, write_class_table
from stat_video.evaluate.loading import load_model
from stat_video.evaluate.options import EvalOptions
from stat_video.files import write_json
from stat_video.model.building import Config, frames_to_share


def score(
    model_path: str,
    data: DataOptions,
    options: EvalOptions,
    argv: list[str],
    world: World,
) -> tuple[Scores, tuple[str, ...], Path]:
    """Evaluate a model on `data.val` with `data.views`; write eval.json, per_class.csv and,
    where there are any, unusable.txt.

    world: the processes that share the videos. The main one writes.
    Returns the scores, the class names in label order, and the folder that was written to.
    Raises UserError.
    """
    loaded = load_model(model_path)
    config = loaded.model.config
    world, clip = world.share_clips(
        options.clip_parallel, frames_to_share(config), "eval.clip_parallel"
    )
    if not data.short_side:
        data = replace(data, short_side=loaded.preprocess.short_side)
    source = open_source(
        data,
        frames=config.frames,
        image_size=config.image_size,
        split="val",
        seed=options.seed,
        frame_order=options.frame_order,
        share=Share(world.data_rank, world.data_size),
        views=data.views,
    )
    _check_classes(config, source.class_names, data)
    check_backend(loaded.model, world.device)
    folder = options.folder(loaded.folder, data)
    report = folder / "unusable.txt"
    skips = source.new_skip_count(report if world.leads_clip else None)
    if world.is_main:
        report.unlink(missing_ok=True)
    scores = evaluate(
        loaded.model.to(world.device),
        source.loader,
        config.num_classes,
        world=world,
        skips=skips,
        bf16=options.bf16,
        clip=clip,
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
        "data": {"root": data.root, "val": data.val},
        "class_names": names,
        **asdict(scores),
        "confusion": scores.confusion.tolist(),
    }
    del record["class_top5"]  # in per_class.csv; JSON has no NaN
    write_json(folder / "eval.json", record)
    write_class_table(scores, names, folder / "per_class.csv")


def _check_classes(config: Config, names: tuple[str, ...], data: DataOptions) -> None:
    """Check that the class names agree with the model's. Raises UserError."""
    videos = f"the videos of data.val {Path(data.root, data.val)}"
    if len(names) != config.num_classes:
        raise UserError(f"the model has {config.num_classes} classes, {videos} have {len(names)}")
    pairs = enumerate(zip(config.class_names or names, names, strict=True))
    for label, (own, other) in pairs:
        if own != other:
            raise UserError(f"class {label} is {own!r} for the model, but {other!r} for {videos}")
