"""STAT_AUTOTUNE=1: the first call of a shape times the table's tiles and keeps the fastest."""

import os
from collections.abc import Callable, Hashable, Iterable

import triton

from stat_kernels.backends.triton.config import Tile

Launch = Callable[[Tile], None]

_fastest: dict[Hashable, Tile] = {}


def enabled() -> bool:
    """Whether STAT_AUTOTUNE=1 is in the environment."""
    return os.environ.get("STAT_AUTOTUNE") == "1"


def median_ms(launch: Callable[[], None]) -> float:
    """Device time of one launch, in milliseconds."""
    return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")


def fastest(
    key: Hashable, tiles: Iterable[Tile], launch: Launch, measure: Callable = median_ms
) -> Tile:
    """The tile with which ``launch`` is fastest; measured once for a key, then remembered.

    Args:
        key: everything that the answer depends on.
        tiles: to choose from; one that needs more than the GPU has is passed over.
        launch: runs the kernel with a tile; every kernel may be run any number of times.
        measure: time of a function without arguments.
    """
    if key not in _fastest:
        times: dict[Tile, float] = {}
        for tile in tiles:
            try:
                times[tile] = measure(lambda tile=tile: launch(tile))
            except triton.runtime.errors.OutOfResources:
                continue
        _fastest[key] = min(times, key=times.__getitem__)
    return _fastest[key]
