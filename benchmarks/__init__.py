"""Benchmarks of the kernels, the layer and the model; run from the repository's root.

    python -m benchmarks.attention     kernels against PyTorch's strongest ways to compute the same
    python -m benchmarks.layer         one block, part by part
    python -m benchmarks.train_step    a whole optimiser step of the model
    python -m benchmarks.report        results -> tables in README.md, plots
    python -m benchmarks.compare       two result files: what became slower

The kernel benchmarks need torch and numpy only.
"""
