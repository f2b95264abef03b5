"""Damaged files of every kind that is read: one sentence or success, soon, and nothing else.

By hand, longer: ``python -m tests.video.test_fuzz CASES [SEED] [KIND ...]``
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from stat_video.analysis.plots import plot_curves
from stat_video.data.annotations import read_annotations, read_class_names
from stat_video.data.options import DataOptions
from stat_video.data.reading import read_video
from stat_video.data.video import Video
from stat_video.errors import UserError
from stat_video.evaluate.loading import load_model
from stat_video.evaluate.options import data_defaults
from stat_video.model.config import STATConfig
from stat_video.settings import read_options, recipe_path
from stat_video.train.journal import Journal, read_journal
from stat_video.train.options import OptimOptions, RunOptions
from stat_video.train.trainer import Trainer
from tests.video.clip_samples import clips
from tests.video.training import CALM, ONE, make

LIMIT_S = 20
GROUPS = {"data": DataOptions, "model": STATConfig, "optim": OptimOptions, "run": RunOptions}
TEMPLATES = '[{"id": "1", "template": "[left]"}, {"id": "2", "template": "right"}]'
TOKENS = [
    *b"[ ] { } , : / ../ *a &a - !!set 0 -1 1.5 1e999 NaN null {} [] 9999999999 \\ud800".split(),
    *(b'"', b"", b"\0", b"\n", b" " * 1600, b"1" * 5000, b"[" * 5000, b"\0" * 64, b"\xff" * 8),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[", b"\x7f" + b"\xff" * 7),
]


class Kind(NamedTuple):
    """A file below the working folder, what is in it (None: what is there), and who reads it."""

    file: str
    read: Callable[[Path], object]
    content: str | None = None
    cases: int = 60


def _annotations(path: Path) -> object:
    return read_annotations(path, path.parent, ("left", "right"))


def _first(length: int) -> np.ndarray:
    return np.array([0, length - 1])


def _resume(path: Path) -> None:
    trainer().state.restore(path.parent)


def _journal(path: Path) -> None:
    plot_curves(read_journal(path), path.with_name("curves.png"))
    Journal(path.parent, 3).close()


CHECKPOINT = "run/checkpoints/epoch_0001_step_00000003"
KINDS = {
    "paths": Kind("val.txt", _annotations, "a b.mp4 0\n'c.mp4', 1\nd.mp4 1\n"),
    "records": Kind("val.json", _annotations, TEMPLATES),
    "frame list": Kind(
        "val.csv",
        _annotations,
        "original_vido_id video_id frame_id path labels\na 1 0 a/1.jpg 0\na 1 1 a/2.jpg 0\n",
    ),
    "frame folders": Kind("folders.txt", _annotations, "frames 2 0\nframes 2 1\n"),
    "labels": Kind("labels.txt", read_class_names, "left\nright\n"),
    "numbers": Kind("labels.json", read_class_names, '{"left": "0", "right": 1}'),
    "recipe": Kind(
        "recipe.yaml",
        lambda path: read_options("train", "", GROUPS, ["--config", str(path)]),
        recipe_path("clips_tiny").read_text(),
    ),
    "config.yaml": Kind("run/config.yaml", lambda path: data_defaults(str(path.parent))),
    "config.json": Kind("run/best/config.json", lambda path: load_model(path.parent)),
    "preprocess.json": Kind("run/best/preprocess.json", lambda path: load_model(path.parent)),
    "safetensors": Kind("run/best/model.safetensors", lambda path: load_model(path.parent)),
    "state.json": Kind(f"{CHECKPOINT}/state.json", lambda path: load_model(path.parent)),
    "state.json, resumed": Kind(f"{CHECKPOINT}/state.json", _resume),
    ".metadata": Kind(f"{CHECKPOINT}/.metadata", lambda path: load_model(path.parent)),
    ".distcp": Kind(f"{CHECKPOINT}/__0_0.distcp", _resume),
    "log.jsonl": Kind("run/log.jsonl", _journal, cases=10),
    "mp4": Kind("video.mp4", lambda path: read_video(Video(path, 0), _first)),
    "jpg": Kind("frames/1.jpg", lambda path: read_video(Video(path.parent, 0, ""), _first)),
}


@cache
def trainer() -> Trainer:
    """Of a tiny run that has been trained."""
    folder = tempfile.mkdtemp(prefix="stat-video-fuzz-")
    return make(f"{folder}/run", ONE, CALM, {"batch_size": 4})


@pytest.fixture(scope="module")
def folder():
    path = prepare()
    yield path
    shutil.rmtree(path)


def prepare() -> Path:
    """A folder with an intact file of every kind."""
    from PIL import Image

    with quiet():
        trainer().fit()
    path = Path(trainer().folder).parent
    shutil.copy(next((clips() / "val").iterdir()), path / "video.mp4")
    (path / "frames").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)).save(
            path / "frames" / name
        )
    for kind in KINDS.values():
        if kind.content is not None:
            (path / kind.file).write_text(kind.content)
    return path


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four damages: bits, tokens, pieces that are gone, doubled, or elsewhere."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + int(2 ** rng.uniform(0, 8)))
        action = rng.randrange(6)
        if action == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[start:end] = rng.choice(TOKENS)
        elif action == 2:
            data[start:start] = rng.choice(TOKENS)
        elif action == 3:
            data[start:end] = b""
        elif action == 4:
            data[end:end] = data[start:end]
        else:
            data[start:] = data[start:end] if rng.random() < 0.5 else b""
    return bytes(data)


class Hang(BaseException):
    """Not an Exception, so that no reader takes it for its own."""


@contextmanager
def quiet():
    """No output and no warnings."""
    with open(os.devnull, "w") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stdout(null), redirect_stderr(null):
            yield


def fuzz(folder: Path, name: str, cases: int, seed: int = 0) -> list[str]:
    """What went wrong in `cases` damaged files of a kind."""

    def stop(*_):
        raise Hang(f"no answer within {LIMIT_S} s")

    kind, rng, wrong = KINDS[name], random.Random(f"{name} {seed}"), []
    path = folder / kind.file
    intact = path.read_bytes()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with quiet():
            kind.read(path)
        for case in range(cases):
            path.write_bytes(content := mutated(intact, rng))
            signal.alarm(LIMIT_S)
            try:
                with quiet():
                    kind.read(path)
            except UserError:
                pass
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{last.filename}:{last.lineno}"
                wrong.append(f"case {case}: {error!r} at {where}, of {content[:80]!r}")
            finally:
                signal.alarm(0)
    finally:
        path.write_bytes(intact)
        signal.signal(signal.SIGALRM, before)
    return wrong


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_told_in_one_sentence(folder, name):
    assert fuzz(folder, name, KINDS[name].cases) == []


if __name__ == "__main__":
    place, count = prepare(), int(sys.argv[1])
    for chosen in sys.argv[3:] or KINDS:
        print(chosen, flush=True)
        for text in fuzz(place, chosen, count, int(sys.argv[2]) if len(sys.argv) > 2 else 0):
            print("   ", text, flush=True)
    shutil.rmtree(place)
