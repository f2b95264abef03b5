"""What the benchmark commands share: cases, peers, timing, memory, results, tables."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
