"""The console script `stat-video`: one function per subcommand; errors are one sentence.

Exit codes: 0 for success, 2 for an error the user can fix, 128 + signal when interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

from stat_video.data.options import DataOptions
from stat_video.errors import UserError, VideoError, named, printable
from stat_video.evaluate.options import EvalOptions, data_defaults
from stat_video.files import os_error, reason
from stat_video.model.config import STATConfig
from stat_video.option_checks import check_views
from stat_video.settings import last_value, model_options, read_options
from stat_video.train.options import OptimOptions, RunOptions

VIDEO = {"type": str, "metavar": "VIDEO", "help": "any video file"}
MODEL = {
    "type": str,
    "required": True,
    "help": "folder of a saved model or of a run, or a checkpoint",
}
# Any of these tells OpenMP how long a thread spins while it waits for the others. By default it is
# milliseconds, which on busy cores are taken from the very thread that is waited for.
SPINNING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
DEVICE = {"type": str, "default": "auto", "help": "auto, cpu, cuda, ..."}


def main(argv: list[str] | None = None) -> int:
    """Run `stat-video ARGV...` and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8
    if not os.environ.keys() & SPINNING:  # before torch, whose OpenMP reads it, is loaded
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["MPLBACKEND"] = "agg"  # importing matplotlib fails for one that is not installed
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    command = COMMANDS.get(argv[0])
    try:
        if command is None:
            raise UserError(f"unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}")
        return command(argv[1:])
    except BrokenPipeError:  # the reader of a pipe, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("stat-video: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"stat-video: error: {printable(' '.join(sentence.split()))}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str | None:
    """One sentence about an error that the user can fix; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "stat_").startswith("stat_"):
        return f"{error.name} is not installed; pip install 'stat-kernels[train]'"
    if refusal := os_error(error):
        path = refusal.filename
        return f"{path}: {reason(refusal, path)}" if path else str(refusal)
    text = str(error)
    if type(error).__name__ == "ProcessLost":
        return text
    if type(error).__name__ == "DistBackendError" or "/gloo/" in text:
        return f"another process of the run has stopped or does not answer: {text.splitlines()[0]}"
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't" in text:
        return f"out of memory, a smaller model or fewer clips at once need less: {text}"
    return text if text.startswith("DataLoader worker") else None  # killed, or no shared memory


def make_clips(argv: list[str]) -> int:
    """write the generated benchmark: MP4 files and annotation lists"""
    from stat_video.clips.make import ClipOptions, write_clips

    arguments: dict[str, dict[str, Any]] = {
        "out": {"type": str, "metavar": "OUT", "help": "folder to write to"},
        "--force": {
            "action": "store_true",
            "help": "replace the clips that make-clips wrote to OUT",
        },
    }
    groups = {"": ClipOptions}
    given = read_options("make-clips", make_clips.__doc__, groups, argv, arguments=arguments)
    if not given.out:
        raise UserError("OUT must name a folder, got ''")
    try:
        options = ClipOptions(**{f.name: given[f.name] for f in fields(ClipOptions)})
    except ValueError as error:
        raise UserError(str(error)) from error
    sheet = write_clips(Path(given.out), options, force=given.force)
    print(f"{options.train} training and {options.val} validation clips of the task", end=" ")
    print(f"{options.task!r} are in {given.out}; look at {sheet}")
    return 0


def check_data(argv: list[str]) -> int:
    """read every video of a data set once and report what is unusable"""
    from stat_video.data.check import CheckOptions
    from stat_video.data.check import check_data as check

    groups = {"data": DataOptions, "check": CheckOptions}
    options = read_options("check-data", check_data.__doc__, groups, argv)
    check(options.data, options.check)
    print(f"details are in {options.check.dir}")
    return 0


def bench_data(argv: list[str]) -> int:
    """measure decoding and the loader against what a model takes"""
    from stat_video.analysis.bench_data import BenchOptions
    from stat_video.analysis.bench_data import bench_data as bench

    groups = {"data": DataOptions, "model": model_options(argv), "bench": BenchOptions}
    options = read_options("bench-data", bench_data.__doc__, groups, argv)
    print(bench(options.data, options.model, options.bench).describe())
    return 0


def train(argv: list[str]) -> int:
    """train a STAT, or with --model.image_model NAME a timm image model, on videos"""
    groups = {"data": DataOptions, "optim": OptimOptions, "run": RunOptions}
    groups["model"] = model_options(argv)
    options = read_options("train", train.__doc__, groups, argv)
    from stat_video.analysis.plots import plot_run
    from stat_video.distributed import joined
    from stat_video.train.signals import Interrupted
    from stat_video.train.trainer import Trainer

    with joined(options.run.device) as world:
        trainer = Trainer(options.data, options.model, options.optim, options.run, world)
        try:
            scores = trainer.fit()
        except Interrupted as stop:
            again = argv if options.run.resume == "auto" else [*argv, "--run.resume", "auto"]
            command = shlex.join(["stat-video", "train", *again])
            if world.is_main:
                print(f"{stop}; to go on from {stop.path}: {command}", file=sys.stderr)
            return 128 + stop.signum
    if not world.is_main:
        return 0
    plot_run(trainer.folder, scores, trainer.config.class_names)
    best = trainer.progress.best_top1
    print(f"validation top-1 {_percent(scores.top1)} at the end, {_percent(best)} at best")
    print(f"best model, logs and plots are in {trainer.folder}")
    return 0


def evaluate(argv: list[str]) -> int:
    """score a trained model on an annotation list of videos"""
    groups, arguments = {"data": DataOptions, "eval": EvalOptions}, {"--model": MODEL}
    base = data_defaults(last_value(argv, "--model"))
    options = read_options("eval", evaluate.__doc__, groups, argv, arguments=arguments, base=base)
    from stat_video.analysis.plots import plot_confusion
    from stat_video.distributed import joined
    from stat_video.evaluate.scoring import score

    with joined(options.eval.device) as world:
        scores, names, folder = score(options.model, options.data, options.eval, argv, world)
    if not world.is_main:
        return 0
    plot_confusion(scores.confusion, names, folder / "confusion.png")
    print(f"top-1 {_percent(scores.top1)}, top-5 {_percent(scores.top5)}, loss {scores.loss:.4f}")
    print(f"{scores.videos} videos, {len(scores.skipped)} unusable; details are in {folder}")
    return 0


def predict(argv: list[str]) -> int:
    """classify videos"""
    what = "video files, folders of videos (searched with their subfolders) or folders of frames"
    arguments: dict[str, dict[str, Any]] = {
        "videos": {"type": str, "nargs": "+", "metavar": "VIDEO", "help": what},
        "--model": MODEL,
        "--top": {"type": int, "default": 5, "help": "number of classes to print"},
        "--views": {
            "type": tuple[int, int],
            "default": (1, 1),
            "help": "clips in time and crops (1 or 3) that are averaged, as 3,3",
        },
        "--json": {"action": "store_true", "help": "print one JSON object per video and line"},
        "--device": DEVICE,
        "--clip_parallel": {"type": int, "default": 1, "help": "processes that share the frames"},
    }
    options = read_options("predict", predict.__doc__, {}, argv, arguments=arguments)
    if options.top < 1:
        raise UserError(f"--top must be at least 1, got {options.top}")
    check_views("--views", options.views)
    if options.clip_parallel < 1:
        raise UserError(f"--clip_parallel must be at least 1, got {options.clip_parallel}")
    from stat_video.distributed import joined
    from stat_video.evaluate.loading import load_model
    from stat_video.evaluate.predict import find_videos
    from stat_video.evaluate.predict import predict as classify

    videos, loaded, failed = find_videos(options.videos), load_model(options.model), False
    choice = {name: getattr(options, name) for name in ("top", "views", "clip_parallel")}
    with joined(options.device) as world:
        for video, found in classify(videos, loaded, world=world, **choice):
            failed |= isinstance(found, VideoError)
            if world.is_main:
                _print_prediction(video.path, found, options.json, alone=len(videos) == 1)
    return 2 if failed else 0


def _print_prediction(path: Path, found: Any, as_json: bool, *, alone: bool) -> None:
    """A video's classes, or the reason why it has none; `alone`: as the command's only video."""
    bad = isinstance(found, VideoError)
    if as_json:
        outcome = {"error": str(found)} if bad else {"classes": [asdict(guess) for guess in found]}
        print(json.dumps({"video": str(path), **outcome}), flush=True)
        return
    if bad:
        print(f"stat-video: error: {printable(' '.join(str(found).split()))}", file=sys.stderr)
        return
    if not alone:
        print(printable(str(path)))
    for guess in found:
        print(f"{guess.probability:7.2%}  {printable(guess.name)}", flush=True)


def export(argv: list[str]) -> int:
    """write a model for programs that serve it: torch.export, AOTInductor or ONNX"""
    arguments: dict[str, dict[str, Any]] = {
        "model": {key: value for key, value in MODEL.items() if key != "required"},
        "out": {"type": str, "metavar": "OUT", "help": "file to write, .pt2 or .onnx"},
        "--format": {
            "type": str | None,
            "default": None,
            "help": "pt2 (torch.export), aoti (AOTInductor, also .pt2) or onnx; default: by suffix",
        },
        "--dtype": {"type": str, "default": "float32", "help": "float32, float16 or bfloat16"},
        "--device": DEVICE | {"default": "cpu"},
    }
    options = read_options("export", export.__doc__, {}, argv, arguments=arguments)
    from stat_video.evaluate.loading import load_model
    from stat_video.export import ExportOptions, choose_format, description_path, export_model

    out = Path(*named("OUT", options.out))
    wanted = ExportOptions(choose_format(out, options.format), options.device, options.dtype)
    found = export_model(load_model(options.model), out, wanted)
    print(f"{out} gives the model's logits, to {found['difference']:.1e} of the largest", end="; ")
    print(f"what feeds it is in {description_path(out)}")
    if found["backends"]:
        print(f"it runs kernels of stat_kernels, backend {', '.join(found['backends'])}")
    return 0


def attend(argv: list[str]) -> int:
    """show what a model looks at in a video: pictures, and shares by layer"""
    queries = "class, centre, or ROW,COLUMN in the layer's grid of tokens"
    number = {"type": int | None, "default": None}
    arguments: dict[str, dict[str, Any]] = {
        "video": VIDEO,
        "--model": MODEL,
        "--layer": {"type": int, "default": -1, "help": "of all stages, from 0; -1 is the last"},
        "--frame": {**number, "help": "of the token frames; middle one"},
        "--queries": {"type": str, "nargs": "+", "default": ["class", "centre"], "help": queries},
        "--head": {**number, "help": "from 0; default: mean of all"},
        "--mp4": {"action": "store_true", "help": "also a film over all frames"},
        "--out": {"type": str, "default": "attend", "help": "folder for pictures and JSON"},
        "--device": DEVICE,
    }
    options = read_options("attend", attend.__doc__, {}, argv, arguments=arguments)
    out = Path(*named("--out", options.out))
    from stat_video.analysis.attend import watch
    from stat_video.analysis.attend_options import choose, write
    from stat_video.evaluate.loading import load_model

    attention = watch(options.video, load_model(options.model), device=options.device)
    names = ("layer", "frame", "queries", "head")
    choice = choose(attention, **{name: getattr(options, name) for name in names})
    print(write(attention, choice, out, film=options.mp4, video=options.video))
    return 0


def ablate(argv: list[str]) -> int:
    """train small variants of STAT on generated clips: a table and a plot of what sees time"""
    from stat_video.analysis.ablate import AblateOptions, Ablation
    from stat_video.clips.make import ClipOptions

    groups = {"ablate": AblateOptions, "clips": ClipOptions, "data": DataOptions}
    groups |= {"model": STATConfig, "optim": OptimOptions, "run": RunOptions}
    argv = ["--config", "ablation", *argv]
    skip = {"clips": {"task"}}  # ablate.tasks says it
    options = read_options("ablate", ablate.__doc__, groups, argv, skip=skip)
    from stat_video.analysis.ablate import estimate_seconds, make_clips
    from stat_video.analysis.ablate_jobs import train_all
    from stat_video.analysis.ablate_report import write_report
    from stat_video.train.signals import Interrupted

    ablation = Ablation(
        options.ablate, options.clips, options.data, options.model, options.optim, options.run
    )
    runs = list(ablation.runs())
    if ablation.ablate.estimate:
        seconds = estimate_seconds(ablation)
        for variant, estimate in seconds.items():
            print(f"{variant:26}{estimate:8.0f} s a run")
        minutes = sum(seconds[run.variant] for run in runs) / ablation.jobs / 60
        print(f"all {len(runs)} runs, {ablation.jobs} at a time: about {minutes:.0f} minutes")
        return 0
    make_clips(ablation)
    try:
        train_all(ablation, [run for run in runs if ablation.result(run) is None])
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from {stop.path}", file=sys.stderr)
        return 128 + stop.signum
    results = cast(list[dict[str, Any]], [ablation.result(run) for run in runs])  # all are there
    print(write_report(results, ablation.folder))
    print(f"table, plot and the runs' results are in {ablation.folder}")
    return 0


def info(argv: list[str]) -> int:
    """print a model's parameters, multiply-adds and grids"""
    options = read_options("info", info.__doc__, {"model": model_options(argv)}, argv)
    from stat_video.model.info import describe

    print(describe(options.model))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "make-clips": make_clips,
    "check-data": check_data,
    "bench-data": bench_data,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "export": export,
    "attend": attend,
    "ablate": ablate,
    "info": info,
}


def _usage() -> str:
    lines = [f"  {name:12}{command.__doc__}" for name, command in COMMANDS.items()]
    head = "usage: stat-video COMMAND ... (stat-video COMMAND --help lists its options)"
    return "\n".join([head, "", "commands:", *lines])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
