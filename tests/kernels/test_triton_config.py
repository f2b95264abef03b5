"""The Triton backend's host side: refusals, the table of tiles, kernel arguments, autotuning."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stat_kernels import backends, dispatch, shrinking_temporal_attention
from stat_kernels.backends import Reach
from stat_kernels.backends import triton as backend
from stat_kernels.testing import Case, make_inputs

config = pytest.importorskip("stat_kernels.backends.triton.config")
launch = pytest.importorskip("stat_kernels.backends.triton.launch")
autotune = pytest.importorskip("stat_kernels.backends.triton.autotune")

ROOT = Path(__file__).parents[2]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_kernels_are_imported_by_the_first_call_only():
    """Torch may import triton for itself, so what is looked for is our own import of it."""
    code = (
        "import sys, torch, stat_kernels\n"
        "from stat_kernels.backends import triton\n"
        "print(triton.unsupported_reason('cpu', torch.float32, 96))\n"
        "assert 'stat_kernels.backends.triton.launch' not in sys.modules"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "TRITON_INTERPRET=1 was set before Python started" in done.stdout


def test_the_interpreter_must_be_chosen_before_the_import():
    code = (
        "import os, torch\n"
        "from stat_kernels.backends import triton\n"
        "from stat_kernels.backends.triton import launch\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "print(triton.unsupported_reason('cpu', torch.float32, 96))"
    )
    assert "only after its kernels had been imported" in python(code, TRITON_INTERPRET="0").stdout


def test_cpu_tensors_prefer_the_cpu_kernel_even_to_the_interpreter():
    code = (
        "import torch\n"
        "from stat_kernels import dispatch\n"
        "print(dispatch.report('cpu', torch.float32, 96))\n"
        "print('chosen', dispatch.choose(None, 'cpu', torch.float32, 96))"
    )
    out = python(code, TRITON_INTERPRET="1", STAT_BACKEND="").stdout
    assert "triton     usable" in out
    assert "chosen cpu" in out


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "sentence"),
    [
        ("cuda", torch.float64, 96, "it has no float64 kernel"),
        ("cuda", torch.bfloat16, 20, "multiples of 8 from 16 to 256, not 20"),
        ("cuda", torch.bfloat16, 264, "multiples of 8 from 16 to 256, not 264"),
        ("xpu", torch.bfloat16, 96, "it takes CUDA tensors, these are on xpu"),
    ],
)
def test_a_refusal_is_one_sentence(device, dtype, head_dim, sentence):
    assert sentence in backend.unsupported_reason(device, dtype, head_dim)


@pytest.mark.parametrize(
    ("dtype", "kernel", "stride", "sentence"),
    [
        (torch.bfloat16, (5, 3, 3), 2, "kernels up to (3, 7, 7), not (5, 3, 3)"),
        (torch.bfloat16, (1, 9, 3), 2, "kernels up to (3, 7, 7), not (1, 9, 3)"),
        (torch.bfloat16, (3, 7, 7), 9, "strides from 1 to 8, not 9"),
        (torch.float64, (3, 7, 7), 8, "it has no float64 kernel"),
    ],
)
def test_a_refused_pooling_is_one_sentence(dtype, kernel, stride, sentence):
    assert sentence in backend.pool_unsupported_reason("cuda", dtype, 96, kernel, stride)


@pytest.fixture
def gpu(monkeypatch):
    """A function that fakes a GPU of some compute capability, or AMD's ``amd``; None for no GPU."""

    def fake(capability, cuda="13.0", amd=None, hip=None):
        found = capability and backends.Gpu(capability, 132, 227 * 1024, amd)
        monkeypatch.setattr(backends, "gpu", lambda device: found)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        backend._capability_problem.cache_clear()

    yield fake
    backend._capability_problem.cache_clear()


def test_a_missing_driver_is_a_reason(gpu):
    gpu(None)
    assert "no NVIDIA driver" in backend.unsupported_reason("cuda", torch.float16, 64)
    gpu(None, cuda=None)
    assert "without CUDA" in backend.unsupported_reason("cuda", torch.float16, 64)
    gpu(None, cuda=None, hip="7.2")
    assert "no AMD driver" in backend.unsupported_reason("cuda", torch.float16, 64)


NEVER_RAN = "its kernels compile for gfx942 but have never run there"


def test_an_amd_gpu_is_used_only_if_insisted_on(gpu, monkeypatch):
    monkeypatch.delenv("STAT_BACKEND", raising=False)
    gpu((9, 4), cuda=None, amd="gfx942", hip="7.2")
    call = ("cuda:0", torch.bfloat16, 96)
    pooling = ((1, 3, 3), 4)
    assert backend.unsupported_reason(*call) is None
    assert backend.pool_unsupported_reason(*call, *pooling) is None
    assert backend.untested_reason("cuda:0") == NEVER_RAN
    for options in ({}, {"pooling": pooling}):
        assert dispatch.choose(None, *call, **options) == "reference"
        assert dispatch.choose("triton", *call, **options) == "triton"
        lines = dispatch.report(*call, **options).splitlines()
        assert f"triton     usable if insisted on: {NEVER_RAN}" in lines
        assert "reference  usable, chosen" in lines
    mlp = ("cuda:0", torch.bfloat16, torch.float32)
    assert dispatch.choose_mlp(None, *mlp) == "reference"
    assert f"triton     usable if insisted on: {NEVER_RAN}" in dispatch.mlp_report(*mlp)
    assert dispatch.choose_mlp("triton", *mlp) == "triton"
    monkeypatch.setenv("STAT_BACKEND", "triton")
    assert dispatch.choose(None, *call) == "triton"
    assert dispatch.choose_mlp(None, *mlp) == "triton"
    assert "triton     usable, insisted on by STAT_BACKEND" in dispatch.report(*call)


def test_an_nvidia_gpu_needs_no_insisting(gpu):
    gpu((9, 0))
    assert backend.untested_reason("cuda:0") is None
    assert dispatch.choose(None, "cuda:0", torch.bfloat16, 64) == "triton"


def test_another_amd_gpu_is_a_reason(gpu):
    gpu((11, 0), cuda=None, amd="gfx1100", hip="7.2")
    found = backend.unsupported_reason("cuda", torch.float16, 64)
    assert found == "it has no tiles for gfx1100, of AMD GPUs only for gfx942"


def test_what_rocm_says_of_a_gpu(monkeypatch):
    """Its properties have no shared memory of a block that opts in."""
    properties = types.SimpleNamespace(
        major=9, minor=4, multi_processor_count=304, gcnArchName="gfx942:sramecc+:xnack-"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert backends._gpu.__wrapped__(0) == ((9, 4), 304, 0, "gfx942")


def test_an_amd_gpu_gets_tiles_of_its_own(gpu):
    gpu((9, 4), cuda=None, amd="gfx942", hip="7.2")
    launch.architecture.cache_clear()
    try:
        assert launch.architecture(torch.device("cuda:0")) == 942
    finally:
        launch.architecture.cache_clear()
    for numbers in ("half", "single"):
        for d in backend.HEAD_DIMS:
            entry = config.TABLE[config.key(942, numbers, d, 50)]
            assert not any("maxnreg" in tile.options for tile in vars(entry).values())
            for kernel in config.POOL_TILES:
                assert "maxnreg" not in config.pool_tile(kernel, 942, numbers, d).options
    assert "maxnreg" in config.pool_tile("forward", 90, "half", 96).options


def test_an_old_gpu_is_a_reason(gpu):
    gpu((7, 5))
    found = backend.unsupported_reason("cuda", torch.float16, 64)
    assert found == "it needs compute capability 8.0 or newer, this GPU has 7.5"
    gpu((9, 0))
    assert backend.unsupported_reason("cuda:1", torch.float16, 64) is None


@pytest.mark.parametrize(
    ("version", "capability", "first_good"),
    [("3.6.0", (10, 0), "3.7"), ("3.6.0+git1234", (10, 3), "3.7"), ("3.7.1", (10, 3), "3.8"),
     ("3.7.0", (10, 0), None), ("3.10.0", (10, 3), None), ("3.6.0", (9, 0), None),
     ("3.6.0", (12, 0), None)],
)  # fmt: skip
def test_a_compiler_known_to_be_wrong_is_a_reason(
    monkeypatch, gpu, version, capability, first_good
):
    import triton

    gpu(capability)
    monkeypatch.setattr(triton, "__version__", version)
    found = backend.unsupported_reason("cuda", torch.float16, 96)
    if first_good is None:
        assert found is None
    else:
        assert found.startswith(f"triton {version} compiles it wrongly for compute capability 10.")
        assert "triton-lang/triton#" in found
        assert found.endswith(f"triton {first_good} is the first without it")


def test_a_missing_triton_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in backend.unsupported_reason("cuda", torch.float16, 64)


def test_an_insisted_backend_raises_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot take this call: it takes CPU"):
        shrinking_temporal_attention(*make_inputs(Case()), backend="triton")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100),
     ((12, 0), 80)],
)  # fmt: skip
@pytest.mark.parametrize("numbers", ["half", "single"])
def test_every_call_has_an_entry(capability, architecture, numbers):
    for head_dim in backend.HEAD_DIMS:
        for queries in (1, 50, 64, 65, 785):
            key = config.key(config.family(capability), numbers, head_dim, queries)
            assert key in config.TABLE
            assert key.architecture == architecture
            assert key.head_dim >= head_dim
            assert key.queries == ("few" if queries <= 64 else "many")


def test_the_entry_is_the_narrowest():
    found = {d: config.key(90, "half", d, 50).head_dim for d in (16, 64, 72, 96, 104, 128, 136)}
    assert found == {16: 64, 64: 64, 72: 96, 96: 96, 104: 128, 128: 128, 136: 256}


def test_tiles_are_powers_of_two_that_the_matrix_units_take():
    for entry in config.TABLE.values():
        for tile in vars(entry).values():
            for value in (tile.block_q, tile.block_k, tile.num_warps):
                assert value & (value - 1) == 0
            assert min(tile.block_q, tile.block_k) >= 16


def test_a_head_dim_is_two_chunks():
    assert launch.chunks(96) == (64, 32)
    assert launch.chunks(64) == (64, 0)
    assert launch.chunks(256) == (128, 128)
    for d in backend.HEAD_DIMS:
        first, second = launch.chunks(d)
        assert first <= d <= first + second
        assert second == 0 or second >= 16


def test_strides_are_counted_in_vectors_where_they_allow_it():
    q, *others = make_inputs(Case(T=3, Nq=5, H=2, D=40), torch.bfloat16)
    call = launch.Call((q, *others), Reach(1, 1), 1.0)
    assert call.unit == 8
    assert call.strides_of(call.q) == [0, 5 * 2 * 5, 2 * 5, 5]  # one clip: no step is ever taken
    rows_of_43 = torch.cat([q, q[..., :3]], dim=-1)[..., :40]
    odd = launch.Call((rows_of_43, *others), Reach(1, 1), 1.0)
    assert odd.unit == 1
    assert odd.strides_of(odd.q) == [0, 5 * 2 * 43, 2 * 43, 43]


def test_a_missing_part_is_a_length_of_zero():
    call = launch.Call(make_inputs(Case(T=4, Ns=0, L=0)), Reach(3, 3), 1.0)
    names = dict(zip(launch.SIZES, call.sizes, strict=True))
    assert (names["LEFT"], names["RIGHT"], names["L"]) == (0, 0, 0)
    assert all(x is not None for x in call.inputs)
    wide = dict(
        zip(launch.SIZES, launch.Call(make_inputs(Case(T=4)), Reach(99, 2), 1.0).sizes, strict=True)
    )
    assert (wide["LEFT"], wide["RIGHT"]) == (3, 2)


@pytest.mark.parametrize(("switch", "value"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_tf32_only_where_torch_allows_it(switch, value):
    code = (
        "import torch\n"
        "from stat_kernels.backends.triton.launch import Call\n"
        "from stat_kernels.backends import Reach\n"
        "from stat_kernels.testing import Case, make_inputs\n"
        "def precision(dtype):\n"
        "    return Call(make_inputs(Case(), dtype), Reach(1, 1), 1.0).constants['PRECISION']\n"
        "before = precision(torch.float32)\n"
        f"torch.backends.cuda.matmul.{switch} = {value!r}\n"
        "print(before, precision(torch.float32), precision(torch.bfloat16))"
    )
    done = python(code)
    assert done.stdout.split() == ["ieee", "tf32", "ieee"], done.stderr


def test_autotuning_measures_once_and_keeps_the_fastest(monkeypatch):
    monkeypatch.setattr(autotune, "_fastest", {})
    tiles = config.candidates(90, "half", "forward")
    assert len(tiles) == len(set(tiles)) > 2
    launched = []

    def measure(run):
        run()
        return abs(tiles.index(launched[-1]) - 1)

    for _ in range(2):
        assert autotune.fastest("a shape", tiles, launched.append, measure) == tiles[1]
    assert launched == tiles


def test_autotuning_passes_over_what_does_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(autotune, "_fastest", {})
    tiles = config.candidates(80, "half", "grad_short")

    def launch_all_but_the_first(tile):
        if tile == tiles[0]:
            raise OutOfResources(200, 100, "shared memory")

    found = autotune.fastest("k", tiles, launch_all_but_the_first, lambda run: run() or 1.0)
    assert found == tiles[1]


def test_autotuning_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("STAT_AUTOTUNE", raising=False)
    assert not autotune.enabled()
    monkeypatch.setenv("STAT_AUTOTUNE", "1")
    assert autotune.enabled()


def test_a_kernel_is_found_once_and_then_launched_at_once():
    """The stand-in for a driver sees as many launches; Triton's own look-up is asked no more."""
    code = """
import torch
from unittest import mock
from triton.runtime.jit import JITFunction
from stat_kernels.backends.triton import launch
from tools.triton_overhead import measure

found = measure(calls=1, rounds=1)
assert [launches for launches, _ in found.values()] == [1, 5], found
assert len(launch._compiled) == 6  # the sums of two parts are one kernel; forward and 4 backward
with mock.patch.object(JITFunction, "run", side_effect=AssertionError("looked up again")):
    measure(calls=1, rounds=1)
"""
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


def test_a_kept_kernel_is_launched_only_for_what_it_was_compiled_for():
    """A call that differs in dtype, device or one compile-time argument looks its kernel up."""
    code = """
import torch
from unittest import mock
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from stat_kernels.backends import Reach
from stat_kernels.backends import triton as backend
from stat_kernels.backends.triton import launch
from stat_kernels.testing import Case, make_inputs
from tools.triton_overhead import NoLaunch

driver.set_active(NoLaunch(90))
looked_up = []
run = JITFunction.run
def look_up(kernel, *arguments, **options):
    looked_up.append(kernel)
    return run(kernel, *arguments, **options)

def forward(dtype=torch.bfloat16, D=32, causal=False, odd=False):
    looked_up.clear()
    q, *others = make_inputs(Case(T=2, Nq=9, H=1, D=D, Nc=4, Ns=2, L=2), dtype)
    if odd:  # strides that no vector fits
        q = torch.cat([q, q[..., :3]], dim=-1)[..., :D]
    backend.forward(q, *others, Reach(1, 1, 0, causal), 1.0)
    return len(looked_up)

with mock.patch.object(JITFunction, "run", look_up):
    kinds = ({}, {"dtype": torch.float16}, {"dtype": torch.float32}, {"D": 48}, {"causal": True},
             {"odd": True}, {"dtype": torch.float16, "odd": True})
    for kind in kinds:
        assert forward(**kind) == 1, kind
    for kind in kinds:
        assert forward(**kind) == 0, kind
    there = torch.device("cuda:1")
    launch._compiled = {
        tuple(there if type(x) is torch.device else x for x in key): kernel
        for key, kernel in launch._compiled.items()
    }
    assert forward() == 1
    torch.backends.cuda.matmul.allow_tf32 = True
    assert forward(dtype=torch.float32) == 1
"""
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [((torch.empty(64), 5, 0.5), True), ((torch.empty(64)[1:], 5), False),
     ((torch.empty(64), 2**31), False), ((torch.empty(0), 2**31 - 1), True)],
)  # fmt: skip
def test_only_aligned_pointers_and_small_integers_take_the_short_way(arguments, wanted):
    assert launch._as_compiled(arguments) is wanted


def test_keys_of_one_buffer_are_recognised():
    case = Case(T=4, Nq=5, H=2, D=16, Nc=3, Ns=2, L=4)
    q = make_inputs(case)[0]
    buffer = torch.zeros(2, 1, 4, 6, 2, 16)

    def pooled(buffer, frame_offset=0):
        long, cur, short = buffer.split((1, 3, 2), dim=3)
        views = (*cur, *short, *long[:, :, :, 0])
        return launch.Call((q, *views), Reach(1, 1, frame_offset), 1.0).pooled

    assert pooled(buffer) == (3, -1)
    assert pooled(buffer.transpose(1, 2).contiguous().transpose(1, 2)) == (3, -1)
    assert pooled(buffer, frame_offset=1) is None
    plain = launch.Call(make_inputs(case), Reach(1, 1), 1.0)
    assert plain.pooled is None
