"""The choice of the number format, by made-up and by real measurements."""

import pytest
import torch

from mmssl import precision
from mmssl.cli.common import set_precision
from mmssl.precision import Precision, PrecisionChoice, choose_precision, emulation_warning, product_milliseconds
from tests.helpers.export_models import own

MACHINES = [
    ("a CPU with AMX", "cpu", {"fp32": 1.0, "bf16": 0.2, "fp16": 5.0}, "bf16"),
    ("a CPU with AVX2 alone", "cpu", {"fp32": 3.0, "bf16": 200.0, "fp16": 300.0}, "fp32"),
    ("a GPU of Ampere or later", "cuda", {"fp32": 0.1, "bf16": 0.01, "fp16": 0.01}, "bf16"),
    ("a GPU of Volta", "cuda", {"fp32": 0.1, "bf16": 0.3, "fp16": 0.02}, "fp16"),
    ("a GPU without bf16", "cuda", {"fp32": 0.1, "bf16": None, "fp16": 0.02}, "fp16"),
    ("an Apple GPU that multiplies bf16 faster", "mps", {"fp32": 1.0, "bf16": 0.6, "fp16": 0.6}, "bf16"),
    ("an Apple GPU without bf16", "mps", {"fp32": 1.0, "bf16": None, "fp16": 0.6}, "fp32"),
]


@pytest.mark.parametrize(("machine", "device", "times", "expected"), MACHINES, ids=[m[0] for m in MACHINES])
def test_the_fastest_usable_format_is_chosen(
    machine: str, device: str, times: dict[str, float | None], expected: str
) -> None:
    """bf16 where it is faster than fp32, else fp16 on CUDA devices, else fp32; the reason names the device."""
    choice = choose_precision(device, lambda _, precision: times[precision])
    assert choice.precision == expected
    assert ("GPU" if expected == "fp16" else device) in choice.reason


def test_an_emulated_format_is_warned_of_with_its_factor() -> None:
    """bf16 at 66 times the time of fp32 gives a line with the factor and the remedy; a fast one gives none."""

    def measured(_: str, precision: Precision) -> float:
        return {"fp32": 3.0, "bf16": 198.0, "fp16": 3.0}[precision]

    warning = emulation_warning("bf16", "cpu", measured)
    assert warning is not None
    assert "66 times" in warning
    assert "train.precision=fp32" in warning
    assert emulation_warning("fp32", "cpu", measured) is None
    assert emulation_warning("fp16", "cpu", measured) is None


def test_this_machine_is_measured_once() -> None:
    """A real measurement gives a positive time, and the same one again without measuring."""
    first = product_milliseconds("cpu", "fp32")
    assert first is not None
    assert first > 0
    assert product_milliseconds("cpu", "fp32") == first
    assert choose_precision("cpu") == choose_precision("cpu")


def test_a_model_computes_in_its_precision() -> None:
    """Embeddings in bf16 are those of the encoder under PyTorch's own autocast, bit for bit; weights and results stay
    float32; the fingerprint tells the precisions apart."""
    model = own()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact, name = model.encode_rendered(images), model.fingerprint()
    model.precision = "bf16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.encoder.encode_image(images)
    found = model.encode_rendered(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())
    assert not torch.equal(found, exact)
    assert model.fingerprint() != name
    assert torch.equal(model.image_module().eval()(images), found)


def test_a_verb_takes_the_measured_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--precision auto` lets the model compute in what the measurement chooses; a given one is taken as it is."""
    model = own()
    monkeypatch.setattr(precision, "choose_precision", lambda device: PrecisionChoice("bf16", f"{device} is fast"))
    set_precision(model, "auto")
    assert model.precision == "bf16"
    set_precision(model, "fp32")
    assert model.precision == "fp32"
