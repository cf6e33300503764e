"""Pretrained models beside the libraries that they come from."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import mmssl
from mmssl.apps.export import compare_with_source
from mmssl.cli import main
from mmssl.data.transforms import load_tokenizer
from mmssl.errors import UserError
from tests.cli.test_evaluate import refused, run
from tests.helpers.objective_batch import TEACHER
from tests.helpers.open_clip_folders import write_open_clip

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PROCESSOR = '{"image_processor_type": "%s", "size": %s, "crop_size": 32, "do_center_crop": %s, "resample": 3}'


def write_clip(folder: Path) -> None:
    """A tiny CLIPModel."""
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=dict(SIZES), vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    load_tokenizer("clip", 77).save(folder)
    processor = PROCESSOR % ("CLIPImageProcessor", '{"shortest_edge": 32}', "true")
    (folder / "preprocessor_config.json").write_text(processor)


def write_siglip(folder: Path) -> None:
    """A tiny SiglipModel."""
    text = {**SIZES, "vocab_size": 49408, "max_position_embeddings": 16, "projection_size": 32, "pad_token_id": 7}
    config = transformers.SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    theirs = transformers.SiglipModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    theirs.save_pretrained(folder)
    load_tokenizer("clip", 16).save(folder)
    processor = PROCESSOR % ("SiglipImageProcessor", '{"height": 32, "width": 32}', "false")
    (folder / "preprocessor_config.json").write_text(processor)


@pytest.fixture(params=["open_clip", "timm in open_clip", "clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of a pretrained model."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    path.mkdir()
    if request.param == "clip":
        write_clip(path)
    elif request.param == "siglip":
        write_siglip(path)
    else:
        write_open_clip(path, "timm-head" if "timm" in request.param else "vit")
    return path


def test_a_model_that_is_read_right_agrees_and_one_that_is_not_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read from its folder a model differs by rounding, and on a photo of another size hardly; with the weights of one
    layer changed after it was read, it differs by more than is allowed."""
    Image.radial_gradient("L").resize((90, 60)).convert("RGB").save(tmp_path / "photo.png")
    run("load-check", folder, tmp_path / "photo.png")
    printed = capsys.readouterr().out
    assert "as its own library has them" in printed
    assert float(printed.split("cosine of ")[1].split()[0]) > 0.99
    model = mmssl.load(folder)
    found = compare_with_source(str(folder), model)
    assert found.difference < 1e-5
    assert found.holds
    with torch.no_grad():
        next(model.encoder.vision.parameters()).mul_(1.5)
    assert not compare_with_source(str(folder), model).holds


def test_wrong_weights_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the embeddings differ, the exit code is 1, so that a script stops."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_clip(folder)
    whole = mmssl.load(folder)
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("mmssl.cli.load_check.load_model", lambda *_, **__: whole)
    with pytest.raises(SystemExit) as caught:
        main(["load-check", str(folder)])
    assert caught.value.code == 1


def test_a_model_without_another_library_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A model of our own, and random weights, have nothing to be compared with."""
    assert "no model of open_clip or transformers" in refused(capsys, "load-check", TEACHER)
    with pytest.raises(UserError, match="random weights; give open_clip:RN50/TAG"):
        compare_with_source("open_clip:RN50", mmssl.load(TEACHER))
