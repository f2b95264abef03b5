"""The log of a run: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from stat_video.files import writing


class Journal:
    """Appends records to DIR/log.jsonl and scalars to DIR/tensorboard.

    step, epoch: global step and number of finished epochs that the run goes on from. Later records,
    written by a run that was killed after its last checkpoint, are dropped, so each step and each
    epoch is logged once. So are lines that are no records; their number is told.
    Raises UserError when log.jsonl cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0, epoch: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            records, unreadable = _read(self.path)
            kept = [r for r in records if 0 < r["step"] <= step and _finished(r) <= epoch]
            self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
            self._file = self.path.open("a", buffering=1)
        if unreadable:
            print(f"{self.path}: {unreadable} unreadable lines are dropped", file=sys.stderr)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Log `values` at `step`; kind is "step" or "epoch". JSON has no word for NaN: null."""
        known = {name: None if _is_odd(value) else value for name, value in values.items()}
        with writing(self.path):
            self._file.write(json.dumps({"kind": kind, "step": step, **known}) + "\n")
        with writing(self.path.with_name("tensorboard")):
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both logs."""
        self._file.close()
        self._board.close()


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl in order, without lines that are damaged or cut short."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many lines are none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = [r for r in map(_parse, lines) if r is not None]
    return records, len(lines) - len(records)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(record, dict) and record.get("kind") in ("step", "epoch")
    numbers: list[Any] = [v for name, v in record.items() if name != "kind"] if good else ["none"]
    good = all(v is None or (type(v) in (int, float) and abs(v) < 1e300) for v in numbers)
    return record if good and type(record.get("step")) is int else None


def _finished(record: dict[str, Any]) -> int:
    """The epoch whose end a record tells, 0 where it tells a step."""
    return (record.get("epoch") or 0) if record["kind"] == "epoch" else 0
