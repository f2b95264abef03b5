"""Counting of bytes and launches: by hand on small ops, and the figure of the whole step."""

import torch

from benchmarks import traffic


def counted(call):
    counter = traffic.Counter(1e9, 1e9)
    with counter:
        call()
    return counter


def test_ops_by_hand():
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 2, device="meta")
    product = counted(lambda: a @ b).by_op["aten::mm"]
    assert (product.bytes, product.launches) == (4 * (32 + 16 + 8), 1)
    assert product.flops == 2 * 4 * 8 * 2
    assert product.seconds == product.bytes / 1e9
    assert counted(lambda: a.transpose(0, 1).reshape(8, 4)).total.launches == 0
    assert counted(lambda: a + a[:1].expand(4, 8)).total.bytes == 4 * (32 + 8 + 32)
    assert counted(lambda: a.add_(1.0)).total.bytes == 4 * (32 + 32)
    assert counted(lambda: a.to(torch.bfloat16)).by_kind["copy, cast"].bytes == 4 * 32 + 2 * 32


def test_the_step_stays_below_its_bound(capsys, monkeypatch):
    """The bound is the figure in docs/benchmarks.md; raise neither without a reason there."""
    counters, real = {}, traffic.count_step

    def kept(*args):
        counters[args[-2]] = args[-1]
        real(*args)

    monkeypatch.setattr(traffic, "count_step", kept)
    assert traffic.main([]) == 0
    assert counters["ours"].total.bytes < 99.5e9
    assert counters["ours"].total.launches <= 640
    assert "total" in capsys.readouterr().out


def test_autocast_follows_cuda():
    counter = traffic.Counter(3e12, 7e14)
    traffic.count_step("stat_tiny", 1, torch.bfloat16, True, "reference", counter)
    norms, casts = counter.by_op["aten::native_layer_norm"], counter.by_op["aten::_to_copy"]
    assert norms.launches > 0
    assert casts.launches > norms.launches
