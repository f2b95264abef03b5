"""CUDA C++ on a CPU: an emulator of the execution model, and what builds and loads kernels."""
