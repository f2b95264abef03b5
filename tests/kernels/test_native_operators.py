"""The operators in a program without stat_kernels: the library defines them and has kernels."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stat_kernels import native, pool_tokens, shrinking_temporal_attention
from stat_kernels.schemas import SCHEMAS
from stat_kernels.testing import INPUTS, Case, make_inputs
from tests.kernels.mlp_cases import CASES, MlpCase, make_mlp_inputs, run_mlp
from tests.layer.test_core import GRID, LAYERS, make

ALONE = """
import sys, torch
library, file = sys.argv[1:]
torch.ops.load_library(library)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
def run(name, arguments):
    try:
        return getattr(torch.ops.stat_kernels, name)(*arguments)
    except RuntimeError as error:
        return str(error)
torch.save([run(*call) for call in torch.load(file)], file)
assert "stat_kernels" not in sys.modules
"""


def run_alone(calls, file):
    """What (name, arguments) pairs give in a process that knows the library only."""
    torch.save(calls, file)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, native.PATH, file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


class Recorder(TorchDispatchMode):
    """The calls of this project's operators, with copies of what they returned."""

    def __enter__(self):
        self.calls, self.results = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("stat_kernels::")
        if name in SCHEMAS:
            self.calls.append((name, args))
            self.results.append(result)
        return result


def attend_and_pool(dtype):
    """Attention with and without its parts, and pooling, of tensors as a user might pass them."""
    for lengths in ({}, {"Ns": 0}, {"L": 0}, {"S": 5, "L": 5, "frame_offset": 1}):
        case = Case(
            **{"B": 2, "T": 3, "Nq": 5, "H": 2, "D": 16, "Nc": 4, "Ns": 2, "L": 3} | lengths
        )
        inputs = [None if x is None else x.requires_grad_() for x in make_inputs(case, dtype)]
        out, lse = shrinking_temporal_attention(
            *inputs, window=3, frame_offset=case.frame_offset, return_lse=True
        )
        (out.sin().sum() + lse.cos().sum()).backward()
    strided = [x.detach().movedim(-1, 0).contiguous().movedim(0, -1) for x in inputs]
    shrinking_temporal_attention(*(x.requires_grad_() for x in strided))[..., ::2].sum().backward()
    tokens = torch.randn(2, 3, 2, 16, 21).to(dtype).transpose(2, 4)  # the last stride is not 1
    parameters = (torch.randn(2, 1, 1, 3, 3), torch.randn(2), torch.randn(2))
    tokens, *parameters = (x.requires_grad_() for x in (tokens, *parameters))
    parts = pool_tokens(tokens, *parameters, grid=(4, 5), stride=2)
    sum(part.sin().sum() for part in parts).backward()


def call_layers(dtype):
    for options in LAYERS.values():
        layer, x = make(dtype=dtype, **options)
        layer(x, GRID)[0].sin().sum().backward()


def add_biases(dtype):
    """GELU and residuals with and without factors, of dense and of strided tensors."""
    for case in (*CASES, *(MlpCase((2, 0, 8), skip) for skip in (None, "same"))):
        inputs, grad_out = make_mlp_inputs(case, dtype)
        run_mlp(inputs, grad_out, "cpu")
        strided = [x if x is None else x.movedim(-1, 0).contiguous().movedim(0, -1) for x in inputs]
        run_mlp(strided, torch.ones((), dtype=grad_out.dtype).expand(case.shape), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("use", "kinds"),
    [(attend_and_pool, {"sta", "pool"}), (call_layers, {"core"}), (add_biases, {"bias"})],
)
def test_the_same_bits_without_python(use, kinds, dtype, tmp_path):
    with Recorder() as recorder:
        use(dtype)
    alone = run_alone(recorder.calls, tmp_path / "calls.pt")
    for (name, _), got, expected in zip(recorder.calls, alone, recorder.results, strict=True):
        assert not isinstance(got, str), got
        for a, b in zip(tensors(got), tensors(expected), strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name
            assert torch.equal(a, b), name
    seen = {name for name, _ in recorder.calls}
    assert seen == {name for name in SCHEMAS if name.partition("_")[0] in kinds}


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def test_refusals_without_python(tmp_path):
    case = Case(B=2, T=3, Nq=5, H=2, D=16, Nc=4, Ns=2, L=3)
    inputs = dict(zip(INPUTS, make_inputs(case), strict=True))

    def call(backend, **changed):
        return "sta_forward", (*(inputs | changed).values(), *case.reach, 0.25, backend)

    x, bias = torch.ones(2, 3), torch.ones(3)
    calls = {
        "backend 'triton' needs Python with stat_kernels imported": call("triton"),
        "made with backend 'cuda', its tensors are on cpu; make it on": call("cuda"),
        "q must have 5 axes, got 4": call("cpu", q=inputs["q"][0]),
        "k_cur must have the sizes (2, 3, *, 2, 16), got (1, 3, 4, 2, 16)": call(
            "cpu", k_cur=inputs["k_cur"][:1]
        ),
        "made with backend 'cuda', its": ("bias_gelu_forward", (x, bias, "cuda")),
        "a matrix must have rows and columns": ("bias_gelu_forward", (x[0, 0], bias, "cpu")),
        "bias must be contiguous and hold 3 elements, it holds 2": (
            "bias_residual_forward", (x, x, bias[:2], None, "cpu"),
        ),
        "the residual must have the dtype of x, or float32": (
            "bias_residual_backward", (x.double(), None, torch.float32, "cpu"),
        ),
    }  # fmt: skip
    for sentence, error in zip(calls, run_alone([*calls.values()], tmp_path / "c.pt"), strict=True):
        assert sentence in error


SHOW = """
import sys, torch
if sys.argv[1:]:
    def fail(path): raise OSError("no such library")
    torch.ops.load_library = fail
import stat_kernels
from stat_kernels.schemas import SCHEMAS
print("loaded" if stat_kernels.native.problem() is None else "not loaded")
for name in SCHEMAS:
    print(getattr(torch.ops.stat_kernels, name).default._schema)
"""


def test_python_defines_the_same_schemas():
    shown = {}
    for arguments in ([], ["without"]):
        command = [sys.executable, "-c", SHOW, *arguments]
        state, *lines = subprocess.check_output(command, text=True).splitlines()
        shown[state] = lines
    assert shown["loaded"] == shown["not loaded"]
    assert shown["loaded"] == [f"stat_kernels::{name}{text}" for name, text in SCHEMAS.items()]
