"""The emulator's small kernels on a GPU: fragments, matrix loads, copies and rounding.

What the emulator takes from the PTX ISA's text is checked here against the device itself, with the
same source (cuda_emulator/probes.cu), compiled by nvcc. Not collected where there is no GPU.
"""

import ctypes
import subprocess

import numpy as np
import pytest
import torch

from tests.kernels.cuda_emulator.build import HERE
from tests.kernels.test_cuda_emulator import (
    CONVERTED,
    accumulators,
    fragments,
    many_floats,
    rounded,
)
from tools import toolkit
from tools.cuda_compile import nvcc_command


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    major, minor = torch.cuda.get_device_capability()
    path = tmp_path_factory.mktemp("probes") / "probes.so"
    command = nvcc_command(HERE / "probes.cu", path, f"{major}.{minor}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture
def probe(library):
    """Runs a kernel of probes.cu on numpy arrays; the output's array is filled and returned."""

    def on_device(array):
        return None if array is None else torch.from_numpy(array.view(np.uint8)).cuda()

    def call(name, inputs=None, out=None, others=None, *, count=0, variant=0, threads=32, shared=0):
        tensors = [on_device(x) for x in (inputs, others, out)]
        pointers = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in tensors]
        torch.cuda.synchronize()  # the kernel runs on the default stream
        code = library.probe(
            name.encode(), *pointers, count, variant, ctypes.c_int64(1), threads, shared
        )
        assert code == 0, code
        torch.cuda.synchronize()
        out.view(np.uint8)[...] = tensors[2].cpu().numpy()
        return out

    return call


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(probe, transposed):
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, 4), np.uint32)
    probe("load_transposed" if transposed else "load", rows, out, count=16, shared=32 * 16)
    for lane in range(32):
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            row, column = lane // 4, 2 * (lane % 4)
            assert out[lane, m] == int(matrix[row, column]) | int(matrix[row, column + 1]) << 16


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_matrix_product(probe, dtype):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    c = rng.integers(-100, 100, (16, 8)).astype(np.float32)

    def bits(x):
        return rounded(x) if dtype == "bfloat16" else x.astype(np.float16).view(np.uint16)

    out = probe(f"multiply_{dtype}", fragments(bits(a), bits(b)), accumulators(c))
    np.testing.assert_array_equal(out, accumulators((c + a @ b).astype(np.float32)))


def test_copies_and_barriers_in_a_pipeline(probe):
    """64 x 16 of 16 steps through two stages, as the kernels stream their keys."""
    rng = np.random.default_rng(1)
    depth = 256
    x, y = rng.integers(-4, 5, (64, depth)), rng.integers(-4, 5, (16, depth))
    out = np.zeros((64, 16), np.float32)
    probe("pipeline", rounded(x), out, rounded(y), count=depth, threads=128, shared=2 * 80 * 48)
    np.testing.assert_array_equal(out, (x @ y.T).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_two_bytes(probe, dtype):
    values = many_floats()
    out = np.zeros(len(values) // 2, CONVERTED)
    probe(
        f"convert_{'half' if dtype == torch.float16 else 'bfloat16'}", values, out, count=len(out)
    )
    wanted = torch.from_numpy(values).to(dtype)
    found = np.ascontiguousarray(out["pair"]).view(np.uint16)
    np.testing.assert_array_equal(found, wanted.view(torch.int16).numpy().view(np.uint16))
    back = np.stack([out["low"], out["high"]], 1).ravel()
    np.testing.assert_array_equal(back, wanted.float().numpy())


@pytest.mark.parametrize("mask", [1, 2, 16, 31])
def test_shuffle(probe, mask):
    values = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    out = probe("shuffle", values, np.zeros(32, np.float32), variant=mask)
    np.testing.assert_array_equal(out, values[np.arange(32) ^ mask])


def test_exponential_and_logarithm(probe):
    values = np.linspace(-125, 100, 4001, dtype=np.float32)
    values = np.concatenate([values, np.array([-np.inf, -200, 0], np.float32)])
    out = np.zeros((len(values), 2), np.float32)
    probe("logarithms", values, out, count=len(values))
    np.testing.assert_allclose(out[:, 0], np.exp2(values.astype(np.float64)), rtol=5e-7, atol=1e-37)
    positive = values > 0
    wanted = np.log2(values[positive].astype(np.float64))
    np.testing.assert_allclose(out[positive, 1], wanted, rtol=3e-7, atol=3e-7)


def test_the_toolkit_is_the_one_of_the_library():
    """Otherwise what is proved here is another compiler's work."""
    from stat_kernels import native

    assert native.cuda_problem() is None
    assert native.introspection().build_information()["nvcc"] == toolkit.find().version
