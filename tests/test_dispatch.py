"""The choice of a backend: the best usable one, no fall-back once insisted, reasons are told."""

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
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot take this call: .* not built"):
        shrinking_temporal_attention(*make_inputs(CASE), backend="cpu")


def test_an_unloadable_library_is_a_reason(without_library):
    native.PATH.write_text("no library")
    assert "does not load" in explain(*make_inputs(CASE))


def test_explain_says_why_not(without_library):
    text = explain(*make_inputs(CASE), window=3)
    assert "cpu        not usable: the native library libstat_kernels.so was not built" in text
    assert "reference  usable" in text


def test_explain_where_all_is_well():
    assert "cpu        usable" in explain(*make_inputs(CASE), window=3)
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
