"""The comparison with OpenCLIP's trainer: equal towers, a test that is read rightly, an honest table."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmssl.config import load_config
from mmssl.models import build_dual_encoder
from scripts.bench import compare_openclip, openclip_trainer

ROOT = Path(__file__).parents[2]


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_towers_are_of_the_same_size(tmp_path: Path) -> None:
    """OpenCLIP gets our vision trunk to the parameter, and as many text layers of the same shape."""
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    for name, content in compare_openclip.peer_model(config, None).items():
        (tmp_path / name).write_text(json.dumps(content))
    openclip_trainer.add_models(str(tmp_path))
    theirs = open_clip.create_model(compare_openclip.MODEL)
    ours = build_dual_encoder(config.model, vocab_size=1000, pad_id=0)

    assert parameters(theirs.visual.trunk) == parameters(ours.vision.trunk)
    assert theirs.visual.image_size == (ours.vision.image_size, ours.vision.image_size)
    assert theirs.context_length == config.model.text.max_tokens
    text = config.model.text.config
    assert text is not None
    blocks = theirs.transformer.resblocks
    assert len(blocks) == text["num_hidden_layers"]
    for block in blocks:
        assert block.attn.num_heads == text["num_attention_heads"]
        assert block.mlp.c_fc.weight.shape == (text["intermediate_size"], text["hidden_size"])
    assert theirs.text_projection.shape[1] == config.model.embed_dim


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourModel(torch.nn.Module):
    """Knows colours perfectly; a caption's token is the number of its colour."""

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return pixels

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        return torch.eye(3)[tokens[:, 0]]


@pytest.mark.parametrize("named", [True, False], ids=["classnames", "json labels"])
def test_a_perfect_model_scores_as_many_as_are_labelled_rightly(tmp_path: Path, named: bool) -> None:
    """Labels, class names and templates are read as in both layouts: 3 of 4 images are right, one label is wrong."""
    order = ["blue", "red", "green"]
    (tmp_path / "classnames.txt").write_text("\n".join(order) + "\n")
    (tmp_path / "templates.txt").write_text("{c}\nthe {c} one\n")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, (shown, said) in enumerate([("red", "red"), ("green", "green"), ("blue", "blue"), ("red", "blue")]):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), COLOURS[shown]).save(image, "PNG")
            label = ("cls", str(order.index(said))) if named else ("json", json.dumps({"label": said}))
            for extension, content in (("png", image.getvalue()), (label[0], label[1].encode())):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def preprocess(x: Image.Image) -> Tensor:
        return torch.tensor(x.getpixel((0, 0)), dtype=torch.float32) / 255

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([[next(i for i, c in enumerate(COLOURS) if c in text)] for text in texts])

    test = {
        "shards": [str(tmp_path / "0.tar")],
        "classnames": str(tmp_path / "classnames.txt") if named else None,
        "templates": str(tmp_path / "templates.txt"),
    }
    assert openclip_trainer.accuracy(ColourModel(), preprocess, tokenizer, test) == 0.75


def test_the_table_shows_the_ratio_of_the_means(capsys: pytest.CaptureFixture[str]) -> None:
    """Means over the seeds that both sides finished, of OpenCLIP's best rate; a seed of one side alone is left out."""
    scores = {"mmssl-0": 0.3, "open_clip-0-0.001": 0.05, "open_clip-0-0.002": 0.1, "mmssl-1": 0.5, "mmssl-2": 0.9}
    cells: dict[str, dict[str, Any]] = {name: {"metrics": {"style": {"acc1": score}}} for name, score in scores.items()}
    cells["open_clip-1-0.002"] = {"metrics": {"style": {"acc1": 0.3}}}
    for name, cell in cells.items():
        if name.startswith("open_clip"):
            cell["lr"] = float(name.split("-")[-1])
    compare_openclip.report(cells, seeds=[0, 1, 2], tests=["style"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("style")]
    assert rows == [
        ["style", "acc1", "0", "0.3000", "0.1000", "3.00"],
        ["style", "acc1", "1", "0.5000", "0.3000", "1.67"],
        ["style", "acc1", "mean", "0.4000", "0.2000", "2.00"],
    ]


def test_retrieval_of_pairs() -> None:
    """A caption whose own image is sixth counts as found if an image with the same words is among five."""
    images = torch.eye(12)
    texts = images.clone()
    texts[0] = torch.nn.functional.normalize(torch.tensor([0.5, *[1.0] * 5, *[0.0] * 6]), dim=0)
    captions = [f"a {number}" for number in range(12)]
    alone = compare_openclip.retrieval_metrics({"images": images, "texts": texts, "captions": captions})
    assert alone["image_retrieval_recall@5"] == pytest.approx(11 / 12)
    captions[1] = captions[0]
    same = compare_openclip.retrieval_metrics({"images": images, "texts": texts, "captions": captions})
    assert same["image_retrieval_recall@5"] == 1
