"""One image and one caption: words, neighbours, the drawing and the command."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmssl.apps.explain import Neighbour, draw_explanation, explain, nearest, word_scores
from mmssl.cli import main
from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.data import iter_samples
from mmssl.data.transforms import train_tokenizer
from mmssl.data.transforms.decoding import decode
from mmssl.errors import UserError
from mmssl.inference import Model
from mmssl.models import build_dual_encoder
from scripts.bench.__main__ import app as bench_app
from tests.helpers.models import TINY_TEXT
from tests.helpers.tiny_runs import write_pairs
from tests.helpers.toy_encoder import pack, paint

CAPTION = "a red square 7"


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red green blue white square 0 1 2 3 4 5 6 7"] * 8, 200, 16)
    config = ModelConfig(
        vision=VisionConfig(name="timm:resnet10t", image_size=32, options={"channels": [8, 16, 24, 32]}),
        text=TextConfig(config=TINY_TEXT, tokenizer="train", pooling="mean", max_tokens=16),
        embed_dim=16,
    )
    return Model(build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id).eval(), tokenizer, config)


def test_word_scores_are_what_leaving_them_out_costs(model: Model) -> None:
    """Each score is the similarity of the whole caption less that of the caption written without the word."""
    image = torch.nn.functional.normalize(torch.randn(16), dim=0)

    def similarity(text: str) -> float:
        return float(model.encode_text(text)[0] @ image)

    found = word_scores(model, CAPTION, image)
    assert [word for word, _ in found] == CAPTION.split()
    assert found[1][1] == pytest.approx(similarity(CAPTION) - similarity("a square 7"), abs=1e-6)
    assert found[3][1] == pytest.approx(similarity(CAPTION) - similarity("a red square"), abs=1e-6)


def test_a_pair_is_its_own_nearest(model: Model, tmp_path: Path) -> None:
    """Searched by a training image or caption, that pair comes first with similarity 1, and the order falls."""
    shards = str(write_pairs(tmp_path) / "*.tar")
    sample = list(iter_samples([str(tmp_path / "1.tar")]))[5]
    by_image = nearest(model, model.encode_image(sample.image)[0], shards, count=4)
    by_caption = nearest(model, model.encode_text(sample.fields["txt"])[0], shards, by="caption", count=4)
    assert (by_image[0].key, by_image[0].image) == (sample.key, sample.image)
    # The other shard has the same caption.
    assert by_caption[0].caption == by_image[0].caption == sample.fields["txt"]
    for found in (by_image, by_caption):
        assert found[0].similarity == pytest.approx(1, abs=1e-5)
        similarities = [pair.similarity for pair in found]
        assert similarities == sorted(similarities, reverse=True)


def test_captions_are_searched_without_images(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find a caption no image is encoded; a blank caption is no pair's; shards without captions are refused."""
    records = [{"png": paint(9 * i), "txt": text} for i, text in enumerate(("a red square", "  ", "a blue square"))]
    shard = str(pack(tmp_path / "p.tar", records))
    query = model.encode_text("a red square")[0]
    assert [pair.key for pair in nearest(model, query, shard)] != []
    monkeypatch.setattr(model, "encode_rendered", pytest.fail)
    found = nearest(model, query, shard, by="caption")
    assert [(pair.key, pair.caption) for pair in found] == [("00000", "a red square"), ("00002", "a blue square")]
    assert found[0].image == records[0]["png"]
    blank = str(pack(tmp_path / "blank.tar", records[1:2]))
    with pytest.raises(UserError, match=r"no pair in .*blank\.tar"):
        nearest(model, query, blank, by="caption")


def test_a_broken_neighbour_is_drawn_as_such(model: Model, tmp_path: Path) -> None:
    """A caption may belong to an image that cannot be decoded; the others are drawn all the same."""
    found = explain(model, Image.new("RGB", (8, 8), "red"), CAPTION)
    pairs = [Neighbour(0.5, "0.tar", str(i), "a caption", image=image) for i, image in enumerate((b"broken", paint(3)))]
    draw_explanation(tmp_path / "e.png", found, [("nearest", pairs)])
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_commands_refuse(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no PNG, a file that is no image, and a device that is not there, are told in a line."""
    model.save(tmp_path / "run" / "model")
    run = str(tmp_path / "run")
    (tmp_path / "one.png").write_bytes(paint(3))
    for command, told in (
        (["explain", run, str(tmp_path / "one.png"), "red", "--out", str(tmp_path / "e.jpg")], "ends in .png"),
        (["explain", run, __file__, "red", "--out", str(tmp_path / "e.png")], "is not a usable image"),
        (["report", run, "--device", "cuda:77"], "--device cuda:77"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_explain_gives_what_the_model_says(model: Model) -> None:
    """Similarity and image are the model's own, the heat has the image's size, and the model is left as it was."""
    image = Image.linear_gradient("L").convert("RGB")
    found = explain(model, image, CAPTION)
    own = float(model.encode_image(image)[0] @ model.encode_text(CAPTION)[0])
    assert found.similarity == pytest.approx(own, abs=1e-6)
    assert found.image.shape == (3, 32, 32)
    assert found.heat.shape == (32, 32)
    assert 0 <= float(found.heat.min()) <= float(found.heat.max()) <= 1
    assert not model.encoder.training


def test_an_empty_caption_is_refused(model: Model) -> None:
    """There must be something to look for."""
    with pytest.raises(UserError, match="empty"):
        explain(model, Image.new("RGB", (8, 8)), "  ")


def test_the_commands_write_images(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl explain` and `python -m scripts.bench explain` on a saved model: PNGs, words and a table."""
    shards = write_pairs(tmp_path)
    model.save(tmp_path / "run" / "model")
    sample = next(iter_samples([str(tmp_path / "0.tar")]))
    Image.fromarray(decode(sample.image)).save(tmp_path / "one.png")
    out = tmp_path / "out" / "explained.png"
    run = str(tmp_path / "run")
    main_ok(
        [
            "explain",
            run,
            str(tmp_path / "one.png"),
            "<b>$red</b> square",
            "--out",
            str(out),
            "--train",
            str(shards / "*.tar"),
        ]
    )
    printed = capsys.readouterr().out
    assert "<b>$red</b>" in printed
    assert "nearest training captions" in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    bench = ["explain", run, str(shards / "*.tar"), "--out", str(tmp_path / "sane"), "--images", "6"]
    bench_app(bench, standalone_mode=False)
    assert "random order" in capsys.readouterr().out
    assert (tmp_path / "sane" / "sanity.json").is_file()
    assert (tmp_path / "sane" / "deletion.png").read_bytes().startswith(b"\x89PNG")


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
