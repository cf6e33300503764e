"""`mmssl towers check`: a table or JSON on towers by name, folder, model type or configuration."""

import json
from pathlib import Path

import pytest
import yaml

from mmssl.cli import main
from mmssl.models import TextTower
from mmssl.models.text_factory import build_text
from tests.helpers.tower_types import text_config, vision_config


def check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["towers", "check", *arguments])
    return int(exit_.value.code or 0), capsys.readouterr().out


def test_towers_of_every_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A timm name at a given size, a folder of a text model, and a configuration with its two towers; a tower that does
    not exist is a line of the table, and the exit code."""
    tower: TextTower = build_text(text_config("qwen3"), 300, 0)
    tower.encoder.save_pretrained(tmp_path / "text")
    model = {
        "vision": vision_config("ViT, rotary").model_dump(exclude_defaults=True),
        "text": text_config("roberta").model_dump(exclude_defaults=True),
        "embed_dim": 16,
    }
    record = {"run_dir": "r", "data": {"train": "x.tar"}, "train": {"steps": 1}, "model": model}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(record))
    names = ["timm:resnet10t", str(tmp_path / "text"), str(tmp_path / "mine.yaml")]
    code, out = check([*names, "--image-size", "32", "--json"], capsys)
    resnet, text, *mine = json.loads(out)
    assert code == 0
    assert (resnet["width"], resnet["subsets"], resnet["problem"]) == (512, False, None)
    assert text["remarks"][0] == "pooling eos"
    assert [report["width"] for report in mine] == [64, 64]
    assert mine[0]["subsets"]
    code, out = check(["timm:resnet10tt", "no_such_type", "--json"], capsys)
    assert code == 1
    assert "resnet10t" in json.loads(out)[0]["problem"]
    assert "no_such_type" in json.loads(out)[1]["problem"]


def test_the_table_names_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """One row for each tower, with the reason."""
    code, out = check(["timm:efficientformer_l1", "--image-size", "64"], capsys)
    assert code == 1
    assert "refused" in out
