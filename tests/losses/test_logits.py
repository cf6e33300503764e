"""Choice of the form of the logits."""

import pytest
import torch

from mmssl.losses.logits import Form, choose_form


@pytest.mark.parametrize(
    ("form", "rows", "columns", "device", "chosen"),
    [
        ("plain", 10**6, 10**6, "cpu", "plain"),
        ("blocked", 2, 2, "cpu", "blocked"),
        ("auto", 1024, 1024, "cpu", "plain"),
        ("auto", 2048, 2048, "cpu", "blocked"),
        ("auto", 64, 65536, "cpu", "blocked"),
        ("auto", 2048, 2048, "cuda", "plain"),
        ("auto", 8192, 8192, "cuda", "blocked"),
    ],
)
def test_auto_goes_by_the_number_of_logits(form: Form, rows: int, columns: int, device: str, chosen: Form) -> None:
    """A named form is obeyed; `auto` is plain for small matrices, and on a GPU for larger ones too."""
    assert choose_form(form, rows, columns, torch.device(device)) == chosen
