"""What an ONNX export writes beside the encoders: rendering, a script, smaller weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import mmssl
from mmssl.apps.export import OnnxEncoder, export, shrink
from mmssl.apps.export.onnx_files import write_pixels
from mmssl.cli import main
from mmssl.data.transforms import EvalView
from mmssl.errors import UserError
from tests.helpers.export_models import own, some_calibration
from tests.helpers.images import photo

LABELS = ["red", "a green square", "blue"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[mmssl.Model, Path]:
    """A calibrated model, and its export with rendering."""
    model, folder = own(), tmp_path_factory.mktemp("onnx") / "out"
    model.calibration = some_calibration()
    export(model, "onnx", folder, pixels=True, opset=18)
    return model, folder


@pytest.mark.parametrize("fit", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_rendering_is_ours(fit: str, interpolation: str, tmp_path: Path) -> None:
    """Photos of any size, larger, smaller, odd and of the model's own size, become the view's pixels: 99 of 100
    values differ by 1 at most and none by more than 2, where other code rounds."""
    model = own()
    vision = model.config.vision.model_copy(update={"fit": fit, "interpolation": interpolation})
    model.config = model.config.model_copy(update={"vision": vision})
    view = EvalView(32, fit, interpolation=interpolation)  # type: ignore[arg-type]
    write_pixels(model, tmp_path, 18)
    session = onnxruntime.InferenceSession(str(tmp_path / "pixels.onnx"), providers=["CPUExecutionProvider"])
    for size in ((90, 60), (31, 77), (32, 32), (20, 25), (301, 303)):
        image = photo(*size)
        (found,) = session.run(None, {"image": np.asarray(image)})
        assert found.shape == (1, 3, 32, 32)
        difference = np.abs(found[0].astype(int) - view(image).numpy().astype(int))
        print(size, difference.max(), (difference > 1).mean(), difference.mean())
        assert difference.max() <= 2, size
        assert (difference > 1).mean() < 0.01, size
        assert difference.mean() < 0.1, size


@pytest.mark.parametrize("inside", [True, False])
def test_the_script_needs_no_pytorch(exported: tuple[mmssl.Model, Path], inside: bool, tmp_path: Path) -> None:
    """run.py classifies a photo as `classify` does, to 0.002, in a process that can import neither PyTorch,
    transformers nor mmssl; with the rendering graph and with Pillow's, with the calibration and without."""
    model, folder = exported
    place = tmp_path / "copy"
    place.mkdir()
    for path in folder.iterdir():
        if path.name not in ("pixels.onnx", "calibration.json") or inside:
            (place / path.name).symlink_to(path)
    photo(90, 60).save(tmp_path / "a.png")
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'mmssl')));"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(place / "run.py"), str(tmp_path / "a.png"), *LABELS]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    expected = model.classify(tmp_path / "a.png", LABELS)
    assert json.loads(lines[0]) == pytest.approx(dict(expected), abs=2e-3)
    assert len(lines) == (2 if inside else 1)
    if inside:
        found, verdict = json.loads(lines[1]), expected.verdict
        assert verdict is not None
        assert found["none_of_these"] == pytest.approx(verdict.none, abs=2e-3)
        assert found["matches"] == pytest.approx(verdict.matches, abs=2e-3)
    assert len((folder / "run.py").read_text().splitlines()) < 45


def test_operations_have_the_chosen_version(exported: tuple[mmssl.Model, Path], tmp_path: Path) -> None:
    """All graphs have the version asked for; unknown ones are refused before anything is written."""
    _, folder = exported
    for name in ("image.onnx", "text.onnx", "pixels.onnx"):
        assert {entry.version for entry in onnx.load(folder / name).opset_import if entry.domain == ""} == {18}
    with pytest.raises(UserError, match="opset 7 cannot be written; choose from 18 to 23"):
        export(own(), "onnx", tmp_path / "out", opset=7)
    assert not (tmp_path / "out").exists()


def test_half_precision_stays_near(tmp_path: Path) -> None:
    """With 16-bit weights the files are about half as large, inputs and features are as before, and features have a
    cosine of 0.999 with the model's."""
    model = own()
    export(model, "onnx", tmp_path / "out")
    assert shrink(tmp_path / "out", 16) < 0.7
    theirs, pixels = (
        OnnxEncoder(tmp_path / "out"),
        torch.stack([model.render(photo(40, 40)), model.render(photo(9, 9))]),
    )
    images, texts = theirs.encode_rendered(pixels), theirs.encode_text(LABELS)
    assert images.dtype == texts.dtype == torch.float32
    for found, expected in ((images, model.encode_rendered(pixels)), (texts, model.encode_text(LABELS))):
        assert float((torch.nn.functional.normalize(found, dim=1) * expected).sum(1).min()) > 0.999


def test_the_command_names_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of ONNX are refused with other formats, and two precisions at once."""
    own().save(tmp_path / "m")
    for options, words in (
        (["--format", "timm", "--fp16"], "--fp16 needs --format onnx"),
        (["--format", "timm", "--opset", "19"], "--opset needs --format onnx"),
        (["--format", "onnx", "--fp16", "--int8"], "give one"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path / "m"), *options, "--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().err
