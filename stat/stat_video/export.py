"""Writing a trained model for programs that serve it: torch.export, AOTInductor or ONNX."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import stat_kernels
from stat_video.devices import prepare_device
from stat_video.errors import UserError
from stat_video.evaluate.backend import check_backend
from stat_video.evaluate.loading import LoadedModel
from stat_video.files import write_json, writing

SUFFIXES = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}  # by format; the first of a suffix wins
# The largest allowed difference to the model's own logits, of the largest of these.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
SAMPLING = (
    "step = (length - 1) / frames; of each i from 0 to frames - 1 the frame "
    "first + (last - first) // 2 with first = round(step * i) and last = round(step * (i + 1))"
)
RESIZING = "bilinear with antialiasing until the shorter side has short_side pixels, centre crop"


@dataclass(frozen=True)
class ExportOptions:
    """What is written: a key of SUFFIXES, where the graph runs, and a key of DTYPES."""

    format: str
    device: str = "cpu"
    dtype: str = "float32"


class Served(nn.Module):
    """A model in a dtype of its own that takes and returns float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, video: Tensor) -> Tensor:
        return self.model(video.to(self.dtype)).float()


def choose_format(out: Path, asked: str | None) -> str:
    """The format of a file, ``asked`` or by its suffix.

    Raises UserError if they do not fit each other, if libraries are missing, or if `out` or the
    description beside it exists.
    """
    fitting = [name for name, suffix in SUFFIXES.items() if suffix == out.suffix]
    if asked is not None and asked not in SUFFIXES:
        raise UserError(f"--format must be one of {', '.join(SUFFIXES)}, got {asked!r}")
    if asked is not None and asked not in fitting:
        raise UserError(f"OUT must end in {SUFFIXES[asked]} for --format {asked}, got {out}")
    if not fitting:
        raise UserError(f"OUT must end in {' or '.join(sorted(set(SUFFIXES.values())))}, got {out}")
    chosen = asked or fitting[0]
    missing = [name for name in ONNX_LIBRARIES if importlib.util.find_spec(name) is None]
    if chosen == "onnx" and missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, not installed; pip install 'stat-kernels[export]'"
        )
    for path in (out, description_path(out)):
        if path.exists():
            raise UserError(f"{path} exists; choose another name or remove it")
    return chosen


def description_path(out: Path) -> Path:
    return out.with_name(out.name + ".json")


def export_model(loaded: LoadedModel, out: Path, options: ExportOptions) -> dict[str, Any]:
    """Write `out` for clips in batches of any size, and its description beside it.

    Nothing is written if the file gives other logits than the model; see TOLERANCES. The model is
    moved to the device and cast to the dtype.

    Returns:
        The description, with the backends that the graph names in "backends" and what the check
        found in "difference".

    Raises:
        UserError: an option does not fit, or the file cannot be written.
    """
    served, device = _prepare(loaded, options)
    config = loaded.model.config
    shape = (2, config.in_channels, config.frames, config.image_size, config.image_size)
    video = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    with writing(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own internals
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()  # fails before the work where the folder cannot be written to
        try:
            with _plain_attention(served) if options.format == "onnx" else nullcontext():
                program = torch.export.export(served, (video,), dynamic_shapes=({0: Dim("batch")},))
            run = _WRITERS[options.format](program, part)
            difference = _difference(run, served, video)
            tolerance = TOLERANCES[served.dtype]
            if not difference <= tolerance:
                raise UserError(
                    f"{out} is not written: its logits differ from the model's by {difference:.1e} "
                    f"of the largest, more than {tolerance:.0e}"
                )
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    description = _describe(loaded, options, _backends(program)) | {"difference": difference}
    write_json(description_path(out), description)
    return description


def _prepare(loaded: LoadedModel, options: ExportOptions) -> tuple[Served, torch.device]:
    """The model in its dtype and on its device."""
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    device, model = prepare_device(options.device), loaded.model
    if options.format == "onnx" and (device.type != "cpu" or options.dtype != "float32"):
        raise UserError("an ONNX file is made on the CPU in float32, whatever it will run on")
    check_backend(model, device)
    return Served(model.to(device), DTYPES[options.dtype]).eval(), device


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention in PyTorch's own operators, which ONNX has, whatever backend was chosen."""
    asked: list[tuple[Any, str, Any]] = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("backend", "temporal")
        if hasattr(module, name)
    ]
    variable = os.environ.get("STAT_BACKEND")
    for module, name, value in asked:
        config = name == "temporal"  # an image model's attention has a dataclass of that name
        setattr(module, name, replace(value, backend=None) if config else None)
    os.environ["STAT_BACKEND"] = "reference"
    try:
        yield
    finally:
        del os.environ["STAT_BACKEND"]
        if variable is not None:
            os.environ["STAT_BACKEND"] = variable
        for module, name, value in asked:
            setattr(module, name, value)


Run = Callable[[Tensor], Tensor]


def _write_pt2(program: ExportedProgram, path: Path) -> Run:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_aoti(program: ExportedProgram, path: Path) -> Run:
    import torch._inductor as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("AOTInductor needs a working C++ compiler; set CXX to one") from error
    with torch.no_grad():
        inductor.aoti_compile_and_package(program, package_path=str(path))
    return inductor.aoti_load_package(str(path))


def _write_onnx(program: ExportedProgram, path: Path) -> Run:
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["video"], "output_names": ["logits"]}
    graph: Any = torch.onnx.export(program, **names, opset_version=OPSET, verbose=False)
    graph.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda video: torch.from_numpy(session.run(None, {"video": video.numpy()})[0])


_WRITERS = {"pt2": _write_pt2, "aoti": _write_aoti, "onnx": _write_onnx}


@torch.no_grad()
def _difference(run: Run, model: Served, video: Tensor) -> float:
    """The largest difference in logits over the largest logit, of batches of 1 to 3 clips.

    Raises UserError where the model's logits are not finite.
    """
    shares = []
    for batch in (video[:1], video, torch.cat((video, video[:1]))):
        expected = model(batch)
        if not expected.isfinite().all():
            raise UserError("the model's logits are not finite; its weights may be damaged")
        shares.append((run(batch) - expected).abs().max() / expected.abs().max())
    return torch.stack(shares).max().item()


def _backends(program: ExportedProgram) -> list[str]:
    """The backends that the graph names, which are the last arguments of this project's nodes."""
    nodes = [node for node in program.graph.nodes if "stat_kernels." in str(node.target)]
    return sorted({str(node.args[-1]) for node in nodes})


def _describe(loaded: LoadedModel, options: ExportOptions, backends: list[str]) -> dict[str, Any]:
    """What a program has to know that feeds the file, for JSON."""
    config, preprocess = loaded.model.config, loaded.preprocess
    size = config.image_size
    return {
        "format": options.format,
        "input": {
            "name": "video",
            "axes": ["batch", "red, green, blue", "frame", "height", "width"],
            "shape": ["batch", config.in_channels, config.frames, size, size],
            "dtype": "float32",
        },
        "output": {"name": "logits", "shape": ["batch", config.num_classes], "dtype": "float32"},
        "classes": list(config.class_names),
        "preprocessing": {
            "frames": config.frames,
            "sampling": SAMPLING,
            **asdict(preprocess),
            "short_side": preprocess.short_side or round(size * 256 / 224),
            "resizing": RESIZING,
            "normalisation": "(pixel / 255 - mean) / std, pixel from 0 to 255",
        },
        "computed_in": options.dtype,
        "device": options.device,
        "backends": backends,
        "versions": {"stat-kernels": stat_kernels.__version__, "torch": torch.__version__},
    }
