"""Fine-tuning and the weights between zero-shot and fine-tuned."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.tasks.fine_tune import ALPHAS
from mmssl.rng import torch_generator
from tests.helpers.evaluation_ranks import on_ranks
from tests.helpers.random_towers import Tower
from tests.helpers.toy_encoder import pack


class Colours:
    """An encoder that can be trained; its words are random directions, so zero-shot is near chance."""

    logit_scale = 20.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.tower = Tower().eval()

    def render(self, image: bytes) -> Tensor:
        return torch.tensor(list(Image.open(io.BytesIO(image)).resize((1, 1)).getpixel((0, 0)))).byte()[:, None, None]

    def encode_rendered(self, images: Tensor) -> Tensor:
        features: Tensor = self.tower(images)
        return features

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.stack([torch.randn(8, generator=torch_generator(text)) for text in texts]), dim=-1)

    def image_module(self) -> nn.Module:
        copy = Tower()
        copy.load_state_dict(self.tower.state_dict())
        return copy


def painted(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Red, green and blue images of many shades: 60 to train on, 36 to judge."""
    home = tmp_path / "colours"
    for split, count in (("train", 60), ("test", 36)):
        records = []
        for i in range(count):
            shade = [20 + 3 * (i % 17), 30 + i % 23, 25 + i % 11]
            shade[i % 3] = 255 - i
            records.append({"png": painted((shade[0], shade[1], shade[2])), "cls": i % 3})
        pack(home / split / "0.tar", records)
        (home / split / "nshards.txt").write_text("1")
    (home / "classnames.txt").write_text("red\ngreen\nblue\n")
    return home


def test_the_ends_are_the_two_models(colours: Path, tmp_path: Path) -> None:
    """Alpha 0 is the zero-shot task exactly; fine-tuning on separable colours is better; the table agrees."""
    results = suite.run(
        Colours(), {"c": (colours, ["zero_shot", "fine_tune"])}, tmp_path / "out", suite.SuiteOptions(draw=False)
    )
    found = results["c/fine_tune"]
    assert found["acc1@0"] == results["c/zero_shot"]["acc1"]
    assert found["acc1@1"] > found["acc1@0"] + 0.2
    assert (found["shots"], found["train_samples"], found["classes"], found["samples"]) == (16, 48, 3, 36)
    for alpha in ALPHAS:
        low, high = found["intervals"][f"acc1@{alpha:g}"]
        assert low <= found[f"acc1@{alpha:g}"] <= high
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "c" / "fine_tune" / "alphas.csv").read_text())))
    assert [float(row["alpha"]) for row in rows] == list(ALPHAS)
    assert [float(row["acc1"]) for row in rows] == [found[f"acc1@{alpha:g}"] for alpha in ALPHAS]
    assert suite.run(Colours(), {"c": (colours, "fine_tune")})["c/fine_tune"] == found


def test_two_processes_equal_one(colours: Path) -> None:
    """Rank 0 trains, both judge, and both end with the figures of one process."""
    data = {"c": (colours, "fine_tune")}
    alone = suite.run(Colours(), data, options=suite.SuiteOptions(batch_size=8))
    assert [results for results, _ in on_ranks(2, Colours, data, batch_size=8)] == [alone] * 2


def test_the_model_is_left_as_it_was(colours: Path) -> None:
    """A copy is trained; the encoder's own weights keep every bit."""
    encoder = Colours()
    before = {name: value.clone() for name, value in encoder.tower.state_dict().items()}
    suite.run(encoder, {"c": (colours, "fine_tune")})
    assert all(torch.equal(value, before[name]) for name, value in encoder.tower.state_dict().items())


def test_an_encoder_without_weights_is_refused(colours: Path) -> None:
    """An encoder that gives no module to train is told so."""

    class Frozen(Colours):
        image_module = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="trains the model's image tower"):
        suite.run(Frozen(), {"c": (colours, "fine_tune")})
