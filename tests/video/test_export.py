"""Files for serving: the model's logits in every format, in programs that know less and less."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as images

from stat_kernels import native
from stat_video import STAT, cli, export
from stat_video.data.preprocess import Preprocess
from stat_video.data.sampling import sample_frames
from stat_video.data.transforms import normalise
from stat_video.evaluate.loading import LoadedModel, load_model
from stat_video.model.building import build_model
from stat_video.model.image_config import ImageModelConfig
from tests.video.training import CALM

EXAMPLE = Path(__file__).parents[2] / "examples/cpp/classify.cpp"
FORMATS = {"pt2": "model.pt2", "aoti": "aoti.pt2", "onnx": "model.onnx"}
CONFIG = replace(CALM, backend="cpu", num_classes=3, class_names=("fall", "rise", "turn"))
CLIPS = torch.randn(5, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and next to it whatever is exported."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    STAT(CONFIG).save_pretrained(folder / "saved")
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """The file of a format, written once."""

    def write(name):
        path = folder / FORMATS[name]
        if not path.exists():
            assert cli.main(["export", str(folder / "saved"), str(path), "--format", name]) == 0
        return path

    return write


def logits(folder, clips=CLIPS, dtype=torch.float32):
    with torch.no_grad():
        return STAT.from_pretrained(folder / "saved").to(dtype)(clips.to(dtype)).float()


def run_pt2(path, clips):
    return torch.export.load(path).module()(clips)


def run_aoti(path, clips):
    return torch._inductor.aoti_load_package(str(path))(clips)


def run_onnx(path, clips):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"video": clips.numpy()})[0])


@pytest.mark.parametrize(
    ("name", "run", "tolerance"),
    [("pt2", run_pt2, 1e-6), ("aoti", run_aoti, 1e-6), ("onnx", run_onnx, 1e-5)],
)
def test_the_models_logits_for_any_batch(name, run, tolerance, folder, exported):
    path = exported(name)
    for batch in (1, 2, 5):
        expected = logits(folder, CLIPS[:batch])
        got = run(path, CLIPS[:batch]).detach()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    backends = json.loads(export.description_path(path).read_text())["backends"]
    assert backends == ([] if name == "onnx" else ["cpu"])
    assert not list(folder.glob("*.part*"))


def test_another_dtype(folder, tmp_path):
    out = tmp_path / "model.pt2"
    assert cli.main(["export", str(folder / "saved"), str(out), "--dtype", "bfloat16"]) == 0
    got = run_pt2(out, CLIPS)
    assert got.dtype == torch.float32
    assert torch.equal(got, logits(folder, dtype=torch.bfloat16))


def test_a_model_that_insists_on_a_backend_gets_it_back():
    """After an export to ONNX, which has no operators of this project, whatever it asks for."""

    def asked():
        return [m.backend for m in model.modules() if hasattr(m, "backend")]

    model = STAT(CONFIG)
    before = asked()
    with export._plain_attention(model):
        assert set(asked()) == {None}
    assert asked() == before
    assert "cpu" in before


def test_an_image_model(tmp_path):
    """To ONNX, although it asks for a backend; the first two of its six blocks are enough."""
    torch.manual_seed(0)
    sizes = {"frames": 4, "image_size": 32, "num_classes": 3}
    model = build_model(ImageModelConfig("test_vit", **sizes, backend="cpu")).eval()
    del model.net.blocks[2:]
    out = tmp_path / "model.onnx"
    loaded = LoadedModel(model, tmp_path, Preprocess(32, 0))
    assert not export.export_model(loaded, out, export.ExportOptions("onnx"))["backends"]
    assert {block.attn.temporal.backend for block in model.net.blocks} == {"cpu"}
    with torch.no_grad():
        expected = model(CLIPS)
    torch.testing.assert_close(run_onnx(out, CLIPS), expected, rtol=1e-5, atol=1e-5)


def test_the_description_suffices_to_feed_the_file(folder, exported):
    """A video made ready by the description alone is what the model was trained on."""
    found = json.loads(export.description_path(exported("pt2")).read_text())
    assert found["classes"] == ["fall", "rise", "turn"]
    assert found["input"]["shape"] == ["batch", *CLIPS.shape[1:]]
    how = found["preprocessing"]
    frames, length = how["frames"], 37
    step = (length - 1) / frames
    edges = [(round(step * i), round(step * (i + 1))) for i in range(frames)]
    picked = [first + (last - first) // 2 for first, last in edges]
    assert np.array_equal(picked, sample_frames(length, frames))
    pixels = torch.randint(256, (frames, 3, 50, 70), dtype=torch.uint8)
    resized = images.resize(pixels, [how["short_side"]], antialias=True)
    cropped = images.center_crop(resized, [how["image_size"]] * 2).movedim(0, 1)
    by_hand = (cropped / 255 - how["mean"]) / how["std"]
    ready = normalise(load_model(folder / "saved").preprocess.transform()(pixels))
    torch.testing.assert_close(by_hand, ready)


ALONE = """
import sys, torch, torch._inductor
library, format, file, clips = sys.argv[1:]
torch.ops.load_library(library)
run = {
    "pt2": lambda: torch.export.load(file).module(),
    "aoti": lambda: torch._inductor.aoti_load_package(file),
    "torchscript": lambda: torch.jit.load(file),
}[format]()
with torch.inference_mode():
    torch.save(run(torch.load(clips)), clips)
assert "stat_kernels" not in sys.modules
"""


@pytest.fixture(scope="module")
def torchscript(folder):
    """A model as torch.jit.trace saves it."""
    path = folder / "model.pt"
    with torch.no_grad():
        torch.jit.trace(STAT.from_pretrained(folder / "saved"), CLIPS[:2]).save(path)
    return path


@pytest.mark.parametrize("name", ["pt2", "aoti", "torchscript"])
def test_the_operators_of_a_file(name, exported, torchscript):
    """Attention, GELU and residuals are this project's operators, whoever runs the file."""
    path = torchscript if name == "torchscript" else exported(name)
    with zipfile.ZipFile(path) as files:
        content = b"".join(files.read(entry) for entry in files.namelist())
    found = set(re.findall(rb"\b\w+_forward\b", content))
    assert {b"core_forward", b"bias_gelu_forward", b"bias_residual_forward"} <= found


@pytest.mark.parametrize("name", ["pt2", "aoti", "torchscript"])
def test_without_the_package(name, folder, exported, torchscript, tmp_path):
    """The library alone is enough."""
    path = torchscript if name == "torchscript" else exported(name)
    clips = tmp_path / "clips.pt"
    torch.save(CLIPS, clips)
    command = [sys.executable, "-c", ALONE, str(native.PATH), name, str(path), str(clips)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(clips), logits(folder), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def program(folder):
    """examples/cpp/classify.cpp, compiled as its comment says."""
    source = EXAMPLE.read_text()
    lines = source[source.index("//   TORCH=") : source.index("// Usage:")].splitlines()
    script = "\n".join(line.removeprefix("//") for line in lines).replace("python", sys.executable)
    script = script.replace("classify.cpp", str(EXAMPLE))
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True)
    return folder / "classify"


def test_the_cpp_example(program, folder, exported, torchscript, tmp_path):
    clips = tmp_path / "clips.bin"
    CLIPS.numpy().tofile(clips)
    expected = logits(folder)
    for path in (exported("aoti"), torchscript):
        command = [program, native.PATH, path, clips, "4", "32"]
        lines = subprocess.check_output(command, text=True).splitlines()
        labels, *columns = zip(*(map(float, line.split()) for line in lines), strict=True)
        torch.testing.assert_close(torch.tensor(columns).T, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.tensor(labels).long(), expected.argmax(-1))
    clips.write_bytes(b"1234")
    done = subprocess.run([*command[:3], clips, "4", "32"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not hold whole clips of 49152 bytes" in done.stderr


@pytest.mark.parametrize(
    ("out", "options", "sentence"),
    [
        ("model.pth", [], "OUT must end in .onnx or .pt2, got "),
        ("model.onnx", ["--format", "aoti"], "OUT must end in .pt2 for --format aoti, got "),
        ("model.pt2", ["--format", "tf"], "--format must be one of pt2, aoti, onnx, got 'tf'"),
        ("model.pt2", ["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, "),
        ("model.onnx", ["--dtype", "float16"], "an ONNX file is made on the CPU in float32"),
        ("model.pt2", ["--device", "tpu"], "device 'tpu' cannot be used here"),
        ("there.pt2", [], "there.pt2 exists; choose another name or remove it"),
        ("described.pt2", [], "described.pt2.json exists; choose another name or remove it"),
        ("there.pt2/model.pt2", [], "cannot write to "),
        ("model.pt2", ["--device", "meta"], "device 'meta' cannot be used here: it holds no"),
    ],
)
def test_refusals(out, options, sentence, folder, tmp_path, fails):
    for name in ("there.pt2", "described.pt2.json"):
        (tmp_path / name).write_text("mine")
    assert sentence in fails("export", str(folder / "saved"), str(tmp_path / out), *options)
    assert {f.name for f in tmp_path.iterdir()} == {"there.pt2", "described.pt2.json"}
    assert (tmp_path / "there.pt2").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").exists(), reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_folder_that_cannot_be_written_to(name, folder, fails, monkeypatch):
    """Told before the work begins; also to root, as nothing can be made in /proc."""
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: pytest.fail("too late"))
    assert f"cannot write to /proc/{name}: " in fails(
        "export", str(folder / "saved"), f"/proc/{name}"
    )


def test_no_model(tmp_path, fails):
    said = fails("export", str(tmp_path), str(tmp_path / "model.pt2"))
    assert "no model can be loaded from " in said


def test_without_the_extra(folder, tmp_path, monkeypatch, fails):
    find = importlib.util.find_spec
    missing = ("onnx", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    sentence = "ONNX needs onnx, onnxruntime, not installed; pip install 'stat-kernels[export]'"
    assert sentence in fails("export", str(folder / "saved"), str(tmp_path / "model.onnx"))


def test_without_a_compiler(folder, tmp_path, fails):
    import torch._inductor.config as config

    out = tmp_path / "model.pt2"
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):  # monkeypatch would delete the option
        said = fails("export", str(folder / "saved"), str(out), "--format", "aoti")
    assert "AOTInductor needs a working C++ compiler; set CXX to one" in said


def test_other_logits_are_not_written(folder, tmp_path, monkeypatch, fails):
    def write(program, path):
        run = export._write_pt2(program, path)
        return lambda clips: 1.001 * run(clips)

    monkeypatch.setitem(export._WRITERS, "pt2", write)
    said = fails("export", str(folder / "saved"), str(tmp_path / "model.pt2"))
    assert "its logits differ from the model's by 1.0e-03 of the largest" in said
    assert not list(tmp_path.iterdir())
