"""The choice of a backend: the best usable one, no fall-back once insisted, reasons are told."""

from pathlib import Path

import pytest
import torch

from stat_kernels import dispatch, explain, native, shrinking_temporal_attention
from stat_kernels.testing import Case, make_inputs

CASE = Case(T=2, Nq=3, H=1, D=16, Nc=2, Ns=2, L=2)


@pytest.fixture
def without_library(monkeypatch, tmp_path):
    """A machine on which the native library was never built."""
    monkeypatch.setattr(native, "PATH", tmp_path / "libstat_kernels.so")
    native.problem.cache_clear()
    yield
    native.problem.cache_clear()


def ran(inputs, **options):
    """The kernels that a call ran, by their operators' names."""
    with torch.profiler.profile() as profile:
        shrinking_temporal_attention(*inputs, window=3, **options)
    names = {event.key for event in profile.key_averages()}
    return {n for n in names if n.startswith("stat_kernels::")}


def test_the_kernel_is_the_default():
    assert "stat_kernels::cpu_forward" in ran(make_inputs(CASE))


def test_the_reference_by_passes_the_operator():
    assert not ran(make_inputs(CASE), backend="reference")


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("STAT_BACKEND", "reference")
    assert not ran(make_inputs(CASE))
    assert "stat_kernels::cpu_forward" in ran(make_inputs(CASE), backend="cpu")
    monkeypatch.setenv("STAT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"STAT_BACKEND must be one of .* got 'nonsense'"):
        ran(make_inputs(CASE))


def test_without_the_library_the_reference_serves(without_library):
    assert not ran(make_inputs(CASE))


def test_an_insisted_backend_never_falls_back(without_library):
    with pytest.raises(
        RuntimeError,
        match=r"backend='cpu' cannot take this call: .*(not built|without the native library)",
    ):
        shrinking_temporal_attention(*make_inputs(CASE), backend="cpu")


def test_an_unloadable_library_is_a_reason(without_library):
    native.PATH.write_text("no library")
    assert "does not load" in explain(*make_inputs(CASE))


def test_explain_says_why_not(without_library):
    text = explain(*make_inputs(CASE), window=3)
    reason = "the native library libstat_kernels.so was not built"
    assert f"cpu        not usable: {reason}" in text or "without the native library" in text
    assert "reference  usable" in text


def test_explain_where_all_is_well(monkeypatch):
    monkeypatch.delenv("STAT_BACKEND", raising=False)
    lines = explain(*make_inputs(CASE), window=3).splitlines()
    assert lines[0] == "cpu        usable, chosen"
    assert lines[1] == "cuda       not usable: it takes CUDA tensors, these are on cpu"
    assert lines[-1] == "reference  usable, but cpu comes first"
    monkeypatch.setenv("STAT_BACKEND", "reference")
    lines = explain(*make_inputs(CASE), window=3).splitlines()
    assert lines[0] == "cpu        usable"
    assert lines[-1] == "reference  usable, insisted on by STAT_BACKEND"
    with pytest.raises(ValueError, match="window"):
        explain(*make_inputs(CASE), window=2)


@pytest.mark.parametrize("name", dispatch.names())
def test_meta_tensors_run_no_kernel(name):
    inputs = make_inputs(CASE, device="meta")
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = shrinking_temporal_attention(*leaves, window=3, backend=name, return_lse=True)
    assert out.shape == inputs[0].shape
    assert lse.shape == (1, 2, 1, 3)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)


# ---- the order on a GPU


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with a Hopper on which cuda and triton take what they are made for."""
    monkeypatch.delenv("STAT_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "capability", lambda device: (9, 0))

    def unsupported_reason(name, device, dtype, head_dim, pooling=None):
        if name == "cpu":
            return "it takes CPU tensors"
        if name == "cuda" and (dtype == torch.float32 or head_dim not in (64, 96, 128)):
            return "it takes something else"
        return None

    monkeypatch.setattr(dispatch, "unsupported_reason", unsupported_reason)


def chosen(dtype=torch.bfloat16, head_dim=96, queries=50):
    return dispatch.choose(None, "cuda", dtype, head_dim, dispatch.size_class("cuda", queries))


def test_undecided_cuda_takes_what_it_alone_does_without_padding(a_gpu, monkeypatch):
    monkeypatch.setattr(
        dispatch, "GPU_PREFERENCES", dispatch.GPU_PREFERENCES[-2:]
    )  # what holds until a GPU has decided
    assert [chosen(head_dim=d) for d in (64, 96, 128)] == ["triton", "cuda", "triton"]
    assert chosen(dtype=torch.float32) == "triton"
    assert chosen(head_dim=72) == "triton"


def test_every_entry_cites_what_decided_it():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for entry in dispatch.GPU_PREFERENCES:
        assert entry.first in dispatch.GPU
        if not entry.because.startswith(dispatch.UNDECIDED):
            assert (results / entry.because).is_file(), entry


def test_every_ranking_has_every_backend():
    for first, ranking in dispatch.GPU_RANKINGS.items():
        assert ranking[0] == first
        assert sorted(ranking) == sorted(dispatch.names())
        assert ranking[-1] == dispatch.REFERENCE


def test_every_entry_can_be_reached():
    """None stands behind one that fits all that it fits; the last fits every call."""

    def asked(entry):
        return (entry.architecture, entry.dtype, entry.head_dim, entry.queries)

    for i, entry in enumerate(dispatch.GPU_PREFERENCES):
        for before in dispatch.GPU_PREFERENCES[:i]:
            covers = zip(asked(before), asked(entry), strict=True)
            assert not all(b is dispatch.ANY or b == e for b, e in covers), (before, entry)
    assert set(asked(dispatch.GPU_PREFERENCES[-1])) == {dispatch.ANY}


def test_an_entry_may_ask_for_anything(a_gpu, monkeypatch):
    table = (
        dispatch.Preference("cuda", "a", architecture=90, head_dim=64, queries="few"),
        dispatch.Preference("cuda", "b", architecture=80),
        dispatch.Preference("cuda", "c", dtype=torch.float16),
        dispatch.Preference("triton", "d"),
    )
    monkeypatch.setattr(dispatch, "GPU_PREFERENCES", table)
    assert chosen(head_dim=64, queries=dispatch.FEW) == "cuda"
    assert chosen(head_dim=64, queries=dispatch.FEW + 1) == "triton"
    assert chosen(dtype=torch.float16) == "cuda"
    assert chosen() == "triton"
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 6))
    assert chosen() == "cuda"
    monkeypatch.setattr(dispatch, "capability", lambda device: (12, 0))
    assert chosen() == "triton"


def test_explain_says_why_the_first_comes_first(a_gpu, monkeypatch):
    entry = dispatch.Preference("cuda", "nvidia-h100/2027-01-01.json")
    monkeypatch.setattr(dispatch, "GPU_PREFERENCES", (entry,))
    lines = dispatch.report("cuda", torch.bfloat16, 96).splitlines()
    assert lines[0] == "cuda       usable, chosen (nvidia-h100/2027-01-01.json)"
    assert lines[1] == "triton     usable, but cuda comes first"
    assert lines[2] == "cpu        not usable: it takes CPU tensors"
    lines = dispatch.report("cuda", torch.float32, 96).splitlines()
    assert lines[0] == "cuda       not usable: it takes something else"
    assert lines[1] == "triton     usable, chosen (cuda comes first where it can)"


@pytest.mark.parametrize("ask", [dispatch.ANY, "few"])
def test_the_choice_by_size_is_traced(a_gpu, monkeypatch, ask):
    """With free sizes: one graph for all where no entry asks, one for each side where one does."""
    monkeypatch.setattr(
        dispatch,
        "GPU_PREFERENCES",
        (dispatch.Preference("cuda", "", queries=ask), dispatch.GPU_PREFERENCES[-1]),
    )
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    def attend(q):
        name = dispatch.choose(
            None, "cuda", torch.bfloat16, 96, dispatch.size_class("cuda", q.shape[2])
        )
        return q * (2 if name == "cuda" else 3)

    traced = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for queries, factor in ((7, 2), (20, 2), (100, 3 if ask else 2)):
        assert (traced(torch.ones(1, 2, queries, 1)) == factor).all()
    assert len(compiled) == (2 if ask else 1)
