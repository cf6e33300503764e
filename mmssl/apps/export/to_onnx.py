"""Both encoders as ONNX: image.onnx and text.onnx, for any number of images and captions of any length."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.apps.export.sample import CAPTIONS, images, largest, needs
from mmssl.data.transforms import EvalView, Tokenizer, load_tokenizer
from mmssl.inference import Model
from mmssl.models.dual_encoder import DualEncoder

IMAGE, TEXT, CONFIG = "image.onnx", "text.onnx", "config.json"
OPSET = 20
_SMALLER = ("MatMul", "Gemm", "Gather")
"""Operations whose weights are made 8-bit."""


def lines(folder: str) -> str:
    """How it is loaded."""
    return f"""import onnxruntime
image = onnxruntime.InferenceSession("{folder}/{IMAGE}")  # {{"images": uint8 [N, 3, S, S]}} -> unit vectors [N, D]
text = onnxruntime.InferenceSession("{folder}/{TEXT}")  # {{"tokens": int64 [N, L], "mask": int64 [N, L]}} -> [N, D]"""


def problems(model: Model) -> list[str]:
    """Nothing in a dual encoder is beyond ONNX."""
    return []


def write(model: Model, folder: Path) -> None:
    """image.onnx (images -> features), text.onnx (tokens, mask -> features), tokenizer/ and config.json."""
    encoder = copy.deepcopy(model.encoder).to("cpu").eval()
    length = model.tokenizer.max_tokens
    tokens, mask = model.tokenizer.encode(list(CAPTIONS))
    batch, words = torch.export.Dim("batch", min=1, max=2**16), torch.export.Dim("tokens", min=2, max=length)
    export_graph(_Image(encoder), (images(model),), ["images"], ({0: batch},), folder / IMAGE)
    shapes = ({0: batch, 1: words}, {0: batch, 1: words})
    export_graph(_Text(encoder), (tokens, mask.long()), ["tokens", "mask"], shapes, folder / TEXT)
    model.tokenizer.save(folder / "tokenizer")
    vision = model.self_contained().vision
    record = {
        "image_size": vision.image_size,
        "fit": vision.fit,
        "interpolation": vision.interpolation,
        "max_tokens": length,
        "logit_scale": model.logit_scale,
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=1), encoding="utf-8")


def difference(model: Model, folder: Path) -> float:
    """By onnxruntime, for batches and lengths other than those it was exported with."""
    theirs, pixels = OnnxEncoder(folder), images(model, 5)
    found = [largest(theirs.encode_rendered(pixels[:count]), model.encode_rendered(pixels[:count])) for count in (1, 5)]
    found += [largest(theirs.encode_text([text]), model.encode_text(text)) for text in CAPTIONS]
    return max(*found, largest(theirs.encode_text(CAPTIONS), model.encode_text(list(CAPTIONS))))


def quantize(folder: Path) -> float:
    """Replace the weights of matrix products by 8-bit ones; returns the size relative to what it was.

    Raises:
        UserError: onnxruntime is missing.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise needs("onnx and onnxruntime", error) from None
    before = after = 0
    for name in (IMAGE, TEXT):
        whole, small = folder / name, folder / f"int8-{name}"
        before += whole.stat().st_size
        # Convolutions stay as they are: onnxruntime's 8-bit ones are slower on most processors.
        graph = onnx.load(whole)
        # The exporter's inner shapes are those before its own rewriting; the quantiser infers them anew.
        del graph.graph.value_info[:]
        with _quiet():
            quantize_dynamic(graph, small, weight_type=QuantType.QInt8, op_types_to_quantize=list(_SMALLER))
        small.replace(whole)
        after += whole.stat().st_size
    return after / before


class OnnxEncoder:
    """The exported files as an encoder that `mmssl.evaluate` can judge."""

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError when onnxruntime is missing."""
        try:
            import onnxruntime
        except ImportError as error:
            raise needs("onnxruntime", error) from None
        place = Path(folder)
        record = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        self.tokenizer: Tokenizer = load_tokenizer(str(place / "tokenizer"), record["max_tokens"])
        self.view = EvalView(record["image_size"], record["fit"], interpolation=record["interpolation"])
        self.logit_scale = float(record["logit_scale"])
        providers = ["CPUExecutionProvider"]
        self._image = onnxruntime.InferenceSession(str(place / IMAGE), providers=providers)
        self._text = onnxruntime.InferenceSession(str(place / TEXT), providers=providers)

    def render(self, image: bytes) -> Tensor:
        """An encoded image -> uint8 [3, S, S]."""
        return self.view(image)

    def encode_rendered(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> unit vectors [N, D]."""
        return _run(self._image, {"images": pixels.numpy()})

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """Encoded images -> unit vectors [N, D]."""
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [N, D]."""
        tokens, mask = self.tokenizer.encode(list(texts))
        return _run(self._text, {"tokens": tokens.numpy(), "mask": mask.long().numpy()})


def _run(session: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(session.run(["features"], inputs)[0])


class _Image(nn.Module):
    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode_image(images)


class _Text(nn.Module):
    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.encoder.encode_text(tokens, mask.bool())


def export_graph(
    module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], shapes: Any, path: Path, output: str = "features"
) -> None:
    """Write a module as ONNX and check it.

    Args:
        inputs: an example. names: of the inputs. shapes: their sizes that vary. output: name of the result.

    Raises:
        UserError: a package is missing.
    """
    try:
        import onnx
        import onnxscript  # torch's exporter imports it later, deep inside
    except ImportError as error:
        raise needs("onnx and onnxscript", error) from None
    assert onnxscript is not None
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=names,
            output_names=[output],
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            optimize=True,
        )
    onnx.checker.check_model(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantiser speak of their own inner matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
