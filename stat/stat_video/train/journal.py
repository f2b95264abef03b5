"""The log of a run: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Journal:
    """Appends records to DIR/log.jsonl and scalars to DIR/tensorboard.

    step: global step that the run goes on from. Records of later steps, written by a run that was
    killed after its last checkpoint, are dropped, so each step is logged once.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        kept = [r for r in read_journal(self.path) if r["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Log `values` at `step`; kind is "step" or "epoch". JSON has no word for NaN: null."""
        known = {name: None if _is_odd(value) else value for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **known}) + "\n")
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
    """The records of a log.jsonl in order; a last line cut short by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
