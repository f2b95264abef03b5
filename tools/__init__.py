"""For maintainers: finding nvcc, and reports on the compiled kernels."""
