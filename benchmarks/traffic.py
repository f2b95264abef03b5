"""Bytes and kernel launches of a training step, counted op by op without running anything.

    python -m benchmarks.traffic                      stat_b64, 8 clips, a model in bfloat16
    python -m benchmarks.traffic --autocast           a float32 model under bfloat16 autocast
    python -m benchmarks.traffic --ops                operator by operator

It needs no GPU: fake tensors have shapes, dtypes and strides but no memory, and every operator that
PyTorch would launch is seen with them. An op reads its inputs once and writes its outputs once;
views cost nothing. Forward pass, loss and backward pass count, the optimiser does not. Autocast
follows CUDA's rules. The roofline time of an op is the larger of its
bytes over --gbytes-per-s and its FLOPs over --tflops; the table adds these up. It is a lower bound
for eager execution, not a measurement.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.harness import models, results
from benchmarks.harness.tables import text_table

PATHS = ("ours", "reference")
H100_GBYTES_PER_S, H100_TFLOPS = 3000.0, 700.0
# What an op is for, by the beginning of its name; the first match counts.
KINDS = (
    ("attention", ("stat_kernels::sta_",)),
    ("layer core", ("stat_kernels::core_",)),
    ("MLP parts", ("stat_kernels::bias_",)),
    ("pooling", ("stat_kernels::pool_", "aten::avg_pool", "aten::max_pool")),
    ("linear", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")),
    ("convolution", ("aten::convolution", "aten::_convolution")),
    ("norm", ("aten::native_layer_norm",)),
    ("activation", ("aten::gelu", "aten::_softmax", "aten::softmax", "aten::_log_softmax")),
    ("joining", ("aten::cat", "aten::stack", "aten::split", "aten::slice_", "aten::select_")),
    ("reduction", ("aten::sum", "aten::mean", "aten::logsumexp", "aten::amax")),
    ("copy, cast", ("aten::_to_copy", "aten::copy_", "aten::clone", "aten::expand")),
    ("elementwise", ("aten::",)),
    ("other", ("",)),
)

# Ops that move nothing besides views: questions about a tensor, allocations, new names for memory.
FREE = ("prim::", "aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")


@dataclass
class Traffic:
    """What ops did: bytes moved, launches, and the roofline seconds that follow."""

    bytes: int = 0
    launches: int = 0
    flops: int = 0
    seconds: float = 0.0


@dataclass
class Counter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        bytes_per_s, flops_per_s: the roofs.
        by_kind: what was counted, by the kinds of KINDS.
        by_op: the same by operator name.
    """

    bytes_per_s: float
    flops_per_s: float
    by_kind: dict[str, Traffic] = field(default_factory=dict)
    by_op: dict[str, Traffic] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written = _moved_bytes(func, args, kwargs, out)
        if read + written:
            self._add(func, read + written, _flops(func, args, kwargs, out))
        return out

    def _add(self, func: Any, moved: int, flops: int) -> None:
        name = func._schema.name
        kind = next(kind for kind, starts in KINDS if name.startswith(starts))
        seconds = max(moved / self.bytes_per_s, flops / self.flops_per_s)
        for key, table in ((kind, self.by_kind), (name, self.by_op)):
            entry = table.setdefault(key, Traffic())
            entry.bytes += moved
            entry.launches += 1
            entry.flops += flops
            entry.seconds += seconds

    @property
    def total(self) -> Traffic:
        found = self.by_kind.values()
        return Traffic(
            sum(t.bytes for t in found),
            sum(t.launches for t in found),
            sum(t.flops for t in found),
            sum(t.seconds for t in found),
        )


def _moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Bytes that an op reads and writes; (0, 0) for a view and for an allocation.

    A tensor counts with its elements, not with its storage: an expanded one is read once per
    distinct element.
    """
    name = func._schema.name
    if func.is_view or name.startswith(FREE):
        return 0, 0
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if func._schema.is_mutable:  # written in place: aliases of inputs come back, or nothing
        written_args = _mutated(func, args, kwargs)
        return sum(map(_nbytes, inputs)), sum(map(_nbytes, written_args))
    if name == "aten::_to_copy" and inputs[0].dtype == outputs[0].dtype:
        same = inputs[0].stride() == outputs[0].stride()
        return (0, 0) if same and inputs[0] is outputs[0] else (_nbytes(inputs[0]),) * 2
    return sum(map(_nbytes, inputs)), sum(map(_nbytes, outputs))


def _mutated(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _nbytes(x: Tensor) -> int:
    """Of the distinct elements: a stride of 0 repeats one."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride or size == 0 else 1
    return elements * x.element_size()


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


class CudaAutocastPolicy(TorchFunctionMode):
    """LayerNorm in float32 and convolutions in 16 bits, as under autocast on CUDA.

    Fake tensors follow the CPU's rules, on which the stem stays in float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        elif func is F.conv3d:
            args = [x.to(self.dtype) if isinstance(x, Tensor) else x for x in args]
        return func(*args, **kwargs)


def count_step(
    preset: str, batch: int, dtype: torch.dtype, autocast: bool, path: str, counter: Counter
) -> None:
    """Counts the forward pass, the loss and the backward pass of one step.

    Args:
        preset: of the model.
        batch: clips.
        dtype: of the model, or of autocast over a float32 model.
        autocast: which of the two.
        path: "ours", or "reference" for plain PyTorch operations.
        counter: counts into itself.
    """
    model = models.make_model(preset, "meta", "reference" if path == "reference" else None)
    weights = torch.float32 if autocast else dtype
    size = (batch, model.config.in_channels, model.config.frames, *2 * (model.config.image_size,))
    with FakeTensorMode():
        model._apply(lambda x: torch.empty(x.shape, dtype=weights))
        clips, labels = torch.empty(size, dtype=weights), torch.zeros(batch, dtype=torch.long)
        with counter:
            policy = CudaAutocastPolicy(dtype) if autocast else nullcontext()
            with torch.autocast("cpu", dtype, enabled=autocast), policy:
                loss = F.cross_entropy(model(clips).float(), labels)
            torch.autograd.grad(loss, list(model.parameters()))


def count(
    preset: str, batch: int, dtype_name: str, autocast: bool, roofs: tuple[float, float]
) -> dict[str, Any]:
    """One entry of a result file: the counts of every path.

    Args:
        preset, batch, autocast: as in `count_step`.
        dtype_name: "bfloat16", "float16" or "float32".
        roofs: GB/s and TFLOP/s.
    """
    entry: dict[str, Any] = {
        "case": preset,
        "dtype": dtype_name,
        "about": f"{batch} clips{', autocast' if autocast else ''}",
    }
    entry["rows"] = []
    for path in PATHS:
        counter = Counter(roofs[0] * 1e9, roofs[1] * 1e12)
        count_step(preset, batch, getattr(torch, dtype_name), autocast, path, counter)
        kinds = {
            kind: asdict(counter.by_kind[kind]) for kind, _ in KINDS if kind in counter.by_kind
        }
        ops = {name: asdict(t) for name, t in counter.by_op.items()}
        row = {"candidate": path, "kind": "count", "status": "ok", "total": asdict(counter.total)}
        entry["rows"].append(row | {"by_kind": kinds, "by_op": ops})
    return entry


def table(entry: dict[str, Any], make: Callable[..., str] = text_table) -> str:
    """Gigabytes, launches and roofline milliseconds by kind of op, a pair of columns for a path."""
    head = [""] + [f"{path} {what}" for path in PATHS for what in ("GB", "launches", "ms")]
    rows = []
    for kind in (*(kind for kind, _ in KINDS), "total"):
        cells = [kind]
        for row in entry["rows"]:
            found = row["total"] if kind == "total" else row["by_kind"].get(kind)
            cells += ["-"] * 3 if found is None else _cells(**found)
        if any(cell != "-" for cell in cells[1:]):
            rows.append(cells)
    return make(head, rows)


def _cells(bytes: int, launches: int, flops: int, seconds: float) -> list[str]:
    return [f"{bytes / 1e9:.1f}", str(launches), f"{seconds * 1e3:.1f}"]


def _op_table(row: dict[str, Any]) -> str:
    ops = sorted(row["by_op"].items(), key=lambda item: -item[1]["bytes"])
    return text_table(
        (row["candidate"], "GB", "launches", "ms"), [[n, *_cells(**t)] for n, t in ops]
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 2 for options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=["stat_b64"])
    add("--batch", type=int, default=8, help="clips a step")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--autocast", action="store_true", help="of a float32 model; default: a model in --dtype")
    add("--gbytes-per-s", type=float, default=H100_GBYTES_PER_S, help="default: %(default)s, H100")
    add("--tflops", type=float, default=H100_TFLOPS, help="default: %(default)s, H100 in bfloat16")
    add("--ops", action="store_true", help="also list every operator")
    add("--out", type=Path, help="folder for a result file; default: none is written")
    options = parser.parse_args(arguments)
    try:
        models.check_names(options.presets, None, options.dtype)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    roofs = (options.gbytes_per_s, options.tflops)
    entries = [
        count(preset, options.batch, options.dtype, options.autocast, roofs)
        for preset in options.presets
    ]
    for entry in entries:
        print(f"{entry['case']}, {entry['dtype']}, {entry['about']}, one training step\n")
        print(table(entry) + "\n")
        for row in entry["rows"] if options.ops else ():
            print(_op_table(row) + "\n")
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "ops")}
        result = results.new_result("traffic", "cpu", settings) | {"cases": entries}
        print(f"written: {results.save(result | {'complete': True}, options.out).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
