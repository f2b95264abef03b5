"""Benchmarks of the kernels, the layer and the model; run from the repository's root.

    python -m benchmarks.attention     kernels against the fastest equivalents in PyTorch
    python -m benchmarks.layer         one block, part by part
    python -m benchmarks.train_step    a whole optimiser step of the model
    python -m benchmarks.traffic       bytes and launches of a step, counted; needs no GPU
    python -m benchmarks.report        results -> tables in README.md, plots

They need the `bench` extra. `pytest benchmarks` times the same candidates with pytest-benchmark,
which compares runs (`--benchmark-autosave`, then `--benchmark-compare`).
"""
