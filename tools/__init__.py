"""Tools for maintainers: finding nvcc, and reports on the compiled kernels."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
