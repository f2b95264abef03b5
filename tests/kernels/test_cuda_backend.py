"""The CUDA backend's Python half, on a machine without a GPU: refusals, copies, what is launched.

The kernels themselves are proved in test_cuda_kernels.py, and on a GPU in test_gpu.py.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stat_kernels import backends, dispatch, explain, native, ops, shrinking_temporal_attention
from stat_kernels.backends import Reach, cuda
from stat_kernels.functional import explain_pooling
from stat_kernels.testing import Case, make_inputs

CASE = Case(B=2, T=3, Nq=5, H=2, D=64, Nc=3, Ns=2, L=3)
REACH = Reach(1, 1)
HOPPER = (9, 0)


class Driver:
    """A machine's GPUs as torch.cuda shows them; counts the questions."""

    def __init__(self, monkeypatch):
        self.gpus = [(HOPPER, 227 * 1024)]
        self.current, self.questions = 0, 0
        self.patch = monkeypatch
        self.patch.setattr(torch.cuda, "is_available", self.is_available)
        self.patch.setattr(torch.cuda, "current_device", lambda: self.current)
        self.patch.setattr(torch.cuda, "get_device_properties", self.properties)
        self.forget()

    def set(self, *gpus):
        """Replaces the GPUs, each a compute capability and a block's shared memory."""
        self.gpus = gpus
        self.forget()

    def forget(self):
        backends._has_gpus.cache_clear()
        backends._gpu.cache_clear()

    def is_available(self):
        self.questions += 1
        return bool(self.gpus)

    def properties(self, index):
        self.questions += 1
        (major, minor), shared = self.gpus[index]
        return SimpleNamespace(
            major=major,
            minor=minor,
            multi_processor_count=132,
            shared_memory_per_block_optin=shared,
        )


@pytest.fixture
def driver(monkeypatch):
    """A machine with a Hopper and a library built by default."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "cuda_problem", lambda: None)
    monkeypatch.setattr(native, "cuda_architectures", lambda: "8.0 9.0a 10.0+PTX")
    found = Driver(monkeypatch)
    yield found
    found.forget()


# ---- refusals


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("head_dim", cuda.HEAD_DIMS)
def test_what_it_takes(driver, dtype, head_dim):
    assert cuda.unsupported_reason("cuda", dtype, head_dim) is None


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.float16, 96, "it takes CUDA tensors, these are on cpu"),
        ("xpu:1", torch.float16, 96, "it takes CUDA tensors, these are on xpu:1"),
        ("cuda", torch.float32, 96, "it takes float16 and bfloat16, not float32"),
        ("cuda", torch.float16, 80, "it takes head dims 64, 96 and 128, not 80"),
    ],
)
def test_what_it_refuses(driver, device, dtype, head_dim, reason):
    assert cuda.unsupported_reason(device, dtype, head_dim) == reason


@pytest.mark.parametrize("head_dim", cuda.POOL_HEAD_DIMS)
def test_what_it_pools(driver, head_dim):
    for kernel, stride in (((1, 3, 3), 4), ((3, 7, 7), 1), ((1, 1, 1), 8)):
        call = ("cuda", torch.bfloat16, head_dim, kernel, stride)
        assert cuda.pool_unsupported_reason(*call) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "it takes CUDA tensors, these are on cpu"),
        ({"dtype": torch.float32}, "it takes float16 and bfloat16, not float32"),
        *(
            ({"head_dim": d}, f"it pools head dims that are multiples of 8 from 16 to 256, not {d}")
            for d in (8, 20, 264)
        ),
        ({"kernel": (5, 3, 3)}, "it takes pooling kernels up to (3, 7, 7), not (5, 3, 3)"),
        ({"kernel": (1, 3, 9)}, "it takes pooling kernels up to (3, 7, 7), not (1, 3, 9)"),
        ({"stride": 9}, "it takes pooling strides from 1 to 8, not 9"),
    ],
)
def test_what_it_does_not_pool(driver, changes, reason):
    call = {"device": "cuda", "dtype": torch.float16, "head_dim": 96, "kernel": (1, 3, 3)}
    assert cuda.pool_unsupported_reason(**(call | {"stride": 2} | changes)) == reason


def test_parameters_must_fit_in_shared_memory(driver):
    """Of smaller GPUs only the largest kernels at the largest head dims do not."""
    driver.set((HOPPER, 99 * 1024))
    call = ("cuda", torch.float16)
    assert cuda.pool_unsupported_reason(*call, 160, (3, 7, 7), 1) is None
    assert cuda.pool_unsupported_reason(*call, 256, (1, 7, 7), 1) is None
    assert cuda.pool_unsupported_reason(*call, 256, (3, 7, 7), 1) == (
        "a pooling kernel (3, 7, 7) at head dim 256 needs 156672 bytes of shared memory, "
        "this GPU offers 101376"
    )


def test_a_gpu_is_asked_once(driver):
    """Whichever calls follow; PyTorch takes microseconds for an answer."""
    for dtype in cuda.DTYPES:
        for head_dim in cuda.HEAD_DIMS:
            assert cuda.unsupported_reason("cuda:0", dtype, head_dim) is None
            assert cuda.pool_unsupported_reason("cuda", dtype, head_dim, (1, 3, 3), 4) is None
            assert dispatch.capability("cuda:0") == HOPPER
    assert driver.questions == 2  # is there a GPU, and which


def test_the_tensors_gpu_counts_and_not_the_current_one(driver):
    """Of a Turing and two kinds of Ampere; "cuda" is the current one, whichever that is by then."""
    driver.set(((7, 5), 64 * 1024), ((8, 0), 163 * 1024), ((8, 6), 99 * 1024))
    pooling = (256, (3, 7, 7), 1)
    assert "7.5" in cuda.unsupported_reason("cuda:0", torch.float16, 96)
    assert "7.5" in cuda.unsupported_reason("cuda", torch.float16, 96)
    assert "7.5" in cuda.pool_unsupported_reason("cuda", torch.float16, 64, (1, 3, 3), 2)
    assert cuda.unsupported_reason("cuda:1", torch.float16, 96) is None
    assert cuda.pool_unsupported_reason("cuda:1", torch.float16, *pooling) is None
    assert "offers 101376" in cuda.pool_unsupported_reason("cuda:2", torch.float16, *pooling)
    assert [dispatch.capability(f"cuda:{i}") for i in range(3)] == [(7, 5), (8, 0), (8, 6)]
    driver.current = 2
    assert cuda.unsupported_reason("cuda", torch.float16, 96) is None


@pytest.mark.parametrize("index", [0, 1])
def test_the_public_functions_name_the_tensors_gpu(index, monkeypatch):
    """Asked with fake tensors, which lie on a GPU that is not there."""
    asked = []
    monkeypatch.setattr(dispatch, "report", lambda device, *_, **__: asked.append(device) or "")
    monkeypatch.setattr(dispatch, "choose", lambda _, device, *__, **___: asked.append(device))
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, 2, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        weight = torch.empty(64, 1, 1, 3, 3, device=q.device)
    explain(q, q, q)
    explain_pooling(q, weight)
    with contextlib.suppress(Exception):
        shrinking_temporal_attention(q, q, q)
    assert asked == [f"cuda:{index}"] * 3


def test_the_machine_may_lack_something(driver, monkeypatch):
    def reason():
        return cuda.unsupported_reason("cuda", torch.float16, 96)

    monkeypatch.setattr(native, "cuda_architectures", lambda: "8.0 10.0+PTX")
    assert reason() == (
        "it was compiled for 8.0 10.0+PTX, which does not run on this GPU of compute capability "
        "9.0; build it with TORCH_CUDA_ARCH_LIST=9.0"
    )
    driver.set(((7, 5), 64 * 1024))
    assert reason() == "it needs compute capability 8.0 or newer, this GPU has 7.5"
    driver.set()
    assert reason() == "no NVIDIA driver with a GPU was found"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason() == "this PyTorch was built without CUDA"
    monkeypatch.setattr(native, "cuda_problem", lambda: "it was built without the CUDA kernels")
    assert reason() == "it was built without the CUDA kernels"


def test_a_library_without_the_kernels_says_how_to_build_them(monkeypatch):
    monkeypatch.setattr(native, "cuda_architectures", lambda: "")
    assert "was built without the CUDA kernels; install a CUDA toolkit" in native.cuda_problem()


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("8.0 9.0a 10.0+PTX", (12, 0), True),
        ("10.0+PTX", (9, 0), False),
    ],
)
def test_which_gpu_a_build_runs_on(built, gpu, runs):
    assert cuda.runs_on(built, gpu) == runs


def test_it_never_falls_back():
    inputs = make_inputs(CASE, torch.float16)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot take this call: it takes CUDA"):
        shrinking_temporal_attention(*inputs, window=3, backend="cuda")


# ---- copies


def test_whole_vectors_are_not_copied():
    q = torch.randn(2, 3, 5, 4, 64).half()
    views = (q, q.transpose(1, 2), q[:, :, 1:], q[..., 0:32], q[:, :1].expand(2, 3, 5, 4, 64))
    for x, same in zip(views, cuda.aligned(*views), strict=True):
        assert same is x


def test_anything_else_is_copied_once():
    q = torch.randn(2, 3, 5, 4, 72).half()
    flat = torch.randn(1 + 2 * 3 * 5 * 4 * 64).half()
    odd = (
        q[..., 3:67],  # starts between two vectors
        torch.randn(2, 3, 5, 4, 65).half()[..., :64],  # rows lie 130 bytes apart
        flat[1:].view(2, 3, 5, 4, 64),  # contiguous, but at an odd address
        torch.randn(2, 3, 5, 64, 4).half().transpose(3, 4),  # a last stride of 4
    )
    for x, copy in zip(odd, cuda.aligned(*odd), strict=True):
        assert torch.equal(x, copy)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
    assert cuda.aligned(None) == (None,)


# ---- what is launched: the library's own operators, with a CPU implementation that writes down


class Launches:
    """Stands in for the kernels: fills results with ones and keeps the calls."""

    WORKSPACE = 48

    def __init__(self) -> None:
        self.forward: list[tuple] = []
        self.backward: list[tuple] = []

    def run_forward(self, *arguments):
        self.forward.append(arguments)
        for result in arguments[-2:]:
            result.fill_(1)

    def run_backward(self, *arguments):
        self.backward.append(arguments)
        for gradient in arguments[-7:]:
            gradient.fill_(1)


@pytest.fixture
def launches() -> Iterator[Launches]:
    native.load()
    found, library = Launches(), torch.library.Library("stat_kernels", "IMPL")
    library.impl("cuda_forward", found.run_forward, "CPU")
    library.impl("cuda_backward", found.run_backward, "CPU")
    library.impl("cuda_workspace", lambda *_: found.WORKSPACE, "CPU")
    yield found
    library._destroy()


def both(inputs, grad_out, grad_lse=None):
    out, lse = cuda.forward(*inputs, REACH, 0.1)
    return out, lse, cuda.backward(grad_out, grad_lse, *inputs, out, lse, REACH, 0.1)


@pytest.mark.parametrize("case", [CASE, Case(D=64, Ns=0), Case(D=64, L=0)], ids=str)
def test_one_call_a_pass(launches, case):
    inputs = make_inputs(case, torch.bfloat16)
    out, lse, gradients = both(inputs, torch.ones_like(inputs[0]))
    fake_out, fake_lse = ops._forward_fake(*inputs, *REACH, 0.1, "cuda")
    assert (out.shape, out.dtype, out.stride()) == (
        fake_out.shape,
        fake_out.dtype,
        fake_out.stride(),
    )
    assert (lse.shape, lse.dtype) == (fake_lse.shape, fake_lse.dtype)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == ((0,) if x is None else x.shape)
        assert gradient.dtype == torch.bfloat16
    (forward,), (backward,) = launches.forward, launches.backward
    assert forward[7:12] == (*REACH, 0.1)
    assert backward[11:16] == (*REACH, 0.1)
    workspace = backward[16]
    assert (workspace.dtype, workspace.numel()) == (torch.uint8, Launches.WORKSPACE)


def test_kernels_see_whole_vectors_only(launches):
    inputs = tuple(
        None if x is None else torch.cat([x, x[..., :3]], -1)[..., 3:]
        for x in make_inputs(CASE, torch.float16)
    )
    grad = torch.randn(*inputs[0].shape[:-1], 65).half()[..., 1:]
    lse_grad = torch.randn(2, 3, 2, 5)
    both(inputs, grad, lse_grad)
    (forward,), (backward,) = launches.forward, launches.backward
    for seen, meant in zip(forward[:7], inputs, strict=True):
        assert cuda._whole_vectors(seen)
        assert torch.equal(seen, meant)
    for seen, meant in zip((backward[0], *backward[2:9]), (grad, *inputs), strict=True):
        assert cuda._whole_vectors(seen)
        assert torch.equal(seen, meant)
    assert backward[1] is lse_grad


def test_a_call_without_queries_launches_nothing(launches):
    inputs = list(make_inputs(CASE, torch.float16))
    inputs[0] = inputs[0][:, :, :0]
    out, lse, gradients = both(inputs, inputs[0])
    assert out.shape == (2, 3, 0, 2, 64)
    assert lse.shape == (2, 3, 2, 0)
    assert all((gradient == 0).all() for gradient in gradients)
    assert not launches.forward
    assert not launches.backward
