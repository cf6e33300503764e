"""The kernels against the matrix of logits in float64: in Triton's interpreter on a CPU, and as they are on a GPU.

`python -m tests.losses.test_triton_blocks FILE` writes what the kernels compute in all cases.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import SINGLE_PROCESS
from mmssl.errors import UserError
from mmssl.losses import blockwise, info_nce, nt_xent, siglip
from mmssl.losses.pairing import Diagonal
from tests.helpers.features import gradients, unit_rows

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from mmssl.losses import triton_blocks  # noqa: E402

BLOCK = 100, 130
"""Neither is a multiple of a tile, so that the borders of blocks and of tiles fall apart."""
SIZES = {"one": (1, 1, 16, 0), "many": (140, 140, 70, 0), "gathered": (75, 210, 40, 80)}
"""Rows, columns, dimensions, and the column of the first row's positive: behind another rank's, when gathered."""
NAMES = [
    *(f"{loss} {size}" for loss in ("info_nce", "siglip") for size in ("one", "many")),
    *(f"{loss} gathered" for loss in ("rows", "columns", "sigmoid", "ring sigmoid")),
    "nt_xent many",
]
BOUNDS = {True: (1e-5, 5e-3), False: (2e-3, 1e-2)}
"""Error of a loss, and of its gradients relative to their norm, with features that are bfloat16 already or not."""
CASES = [(name, rounded) for name in NAMES for rounded in BOUNDS if rounded or "many" in name]


def inputs(name: str, rounded: bool) -> list[Tensor]:
    """Left and right, which know a little of each other, scale and bias; `rounded` to bfloat16, or not."""
    rows, columns, width, offset = SIZES[name.rpartition(" ")[2]]
    left, right = (unit_rows(n, width, seed=n, dtype=torch.float32).detach() for n in (rows, columns + 1000))
    right = right[:columns]
    right[offset : offset + rows] = F.normalize(right[offset : offset + rows] + left / 2, dim=1)
    sides = [x.bfloat16().float() if rounded else x for x in (left, right)]
    return [x.requires_grad_() for x in (*sides, *torch.tensor([20.0, -10.0]))]


def by_kernels(name: str, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A loss by the kernels."""
    loss, _, size = name.rpartition(" ")
    pairing = Diagonal(SIZES[size][3])
    if loss == "info_nce":
        return info_nce(left, right, scale, form="triton")
    if loss == "siglip":
        return siglip(left, right, scale, bias, form="triton")
    if loss == "nt_xent":
        return nt_xent(left, right, 0.1, form="triton")
    if loss == "sigmoid":
        return 3 * blockwise.sigmoid_loss(left, right, scale, bias, pairing, form="triton") / len(left)
    if loss == "ring sigmoid":
        single: dict[str, Any] = {"form": "triton", "world": SINGLE_PROCESS}
        return 3 * blockwise.ring_sigmoid_loss(left, right, scale, bias, pairing, **single) / len(left)
    rows, columns, positives = blockwise.logsumexps(left, right, scale, pairing, form="triton")
    return (rows - positives).mean() if loss == "rows" else (columns * _weights(columns)).sum()


def by_matrix(name: str, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same loss by torch, from the matrix of logits."""
    loss, _, size = name.rpartition(" ")
    rows, columns, _, offset = SIZES[size]
    logits, own = scale * left @ right.T, torch.arange(rows) + offset
    if loss == "info_nce":
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    if loss == "rows":
        return F.cross_entropy(logits, own)
    if loss == "columns":
        return (logits.logsumexp(0) * _weights(logits[0])).sum()
    if loss == "nt_xent":
        both = torch.cat([left, right])
        others = (both @ both.T / 0.1).masked_fill(torch.eye(2 * rows, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(others, torch.arange(2 * rows).roll(rows))
    signs = 2 * F.one_hot(own, columns) - 1
    mean = -F.logsigmoid(signs * (logits + bias)).sum() / rows
    return mean if loss == "siglip" else 3 * mean


def _weights(x: Tensor) -> Tensor:
    return torch.arange(1.0, len(x) + 1, dtype=x.dtype, device=x.device).sin()


def _outcome(loss: Callable[..., Tensor], name: str, given: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients, of what it depends on."""
    wanted = given[: 4 if "sig" in name else 2 if "nt_xent" in name else 3]
    value = loss(name, *given)
    return [value.detach(), *gradients(value, wanted)]


def computed(device: str = "cpu") -> dict[str, Tensor]:
    """What the kernels compute in all cases."""
    found = {}
    with mock.patch.object(blockwise, "block_shape", return_value=BLOCK):
        for name, rounded in CASES:
            given = [x.detach().to(device).requires_grad_() for x in inputs(name, rounded)]
            for i, x in enumerate(_outcome(by_kernels, name, given)):
                found[f"{name}/{rounded}/{i}"] = x.cpu().contiguous()
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """By Triton's interpreter. It is chosen when Triton is imported, so in a process of its own."""
    file = tmp_path_factory.mktemp("triton") / "found.safetensors"
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "error", "-m", __name__, str(file)], env=environ, check=True)
    return load_file(file)


def _check(name: str, rounded: bool, found: dict[str, Tensor]) -> None:
    of_loss, of_gradients = BOUNDS[rounded]
    exact = [x.detach().double().requires_grad_() for x in inputs(name, rounded)]
    value, *wanted = _outcome(by_matrix, name, exact)
    torch.testing.assert_close(found[f"{name}/{rounded}/0"].double(), value, rtol=of_loss, atol=of_loss)
    for i, gradient in enumerate(wanted, 1):
        error = (found[f"{name}/{rounded}/{i}"] - gradient).norm()
        # Gradients of scale and bias are small differences of large sums.
        assert error <= of_gradients * max(gradient.norm(), gradient.ndim == 0) + 1e-6, i


@pytest.mark.parametrize(("name", "rounded"), CASES)
def test_the_kernels_are_the_losses_of_the_matrix(interpreted: dict[str, Tensor], name: str, rounded: bool) -> None:
    """Products are exact and sums float32's: from features that are bfloat16 already, the loss is float64's to 1e-5.
    From others it is so to 2e-3, and gradients to 1 % of their norm."""
    _check(name, rounded, interpreted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_on_a_gpu_are_the_losses_of_the_matrix() -> None:
    """The same on the device itself."""
    found = computed("cuda")
    for name, rounded in CASES:
        _check(name, rounded, found)


CONSTANTS = {"LEFT_OUT": False, "GRADIENT": True, "LEFT_COLUMN": 1, "RIGHT_COLUMN": 1, "COLUMN": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["_logsumexps", "_logsumexp_gradients", "_sigmoid_losses", "_add_product"])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile(kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For A100 and H100, without a GPU: machine code that keeps everything in registers, with the matrix units."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(triton_blocks, kernel)
    names = [parameter.name for parameter in function.params]
    kinds = dict.fromkeys(names, "*fp32") | dict.fromkeys(("left", "right", "out"), "*bf16") | {"diagonal": "i32"}
    kinds |= {name: "constexpr" if name in CONSTANTS else "i32" for name in names if name.isupper()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*CONSTANTS, "diagonal")}
    source = triton.compiler.ASTSource(
        function,
        {name: kinds[name] for name in names},
        {(names.index(name),): value for name, value in CONSTANTS.items() if name in names},
        aligned,
    )
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, check=True)
    assert b"STACK:0 " in done.stdout


def test_a_cpu_is_refused() -> None:
    """Without the interpreter, with what to do."""
    with pytest.raises(UserError, match="leave form at auto"):
        info_nce(unit_rows(2, 3, seed=0), unit_rows(2, 3, seed=1), torch.tensor(1.0), form="triton")


if __name__ == "__main__":
    save_file(computed(), Path(sys.argv[1]))
