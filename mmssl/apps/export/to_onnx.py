"""Export of both encoders as ONNX, for any batch size and caption length; and of a fine-tuned classifier."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.apps.export import head
from mmssl.apps.export.onnx_files import CLASSIFIER, IMAGE, TEXT, quiet, write_pixels, write_script
from mmssl.apps.export.reader import CAPTIONS, images, missing_package, save_tokenizer
from mmssl.data.transforms import EvalView, Tokenizer, load_tokenizer
from mmssl.errors import UserError
from mmssl.inference import Model
from mmssl.models import DualEncoder

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

LABEL = "onnxruntime"
CONFIG = "config.json"
OPSET, OPSETS = 20, (18, 23)
"""Version of the operations; the lowest and the highest that can be chosen."""


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""import onnxruntime
image = onnxruntime.InferenceSession("{folder}/{IMAGE}")  # {{"images": uint8 [N, 3, S, S]}} -> unit vectors [N, D]
text = onnxruntime.InferenceSession("{folder}/{TEXT}")  # {{"tokens": int64 [N, L], "mask": int64 [N, L]}} -> [N, D]"""


def problems(model: Model) -> list[str]:
    """None: ONNX can store every dual encoder."""
    return []


def write(model: Model, folder: Path, opset: int = OPSET, pixels: bool = False) -> None:
    """Write image.onnx (images -> features), text.onnx (tokens, mask -> features), tokenizer/, config.json and run.py.

    Args:
        opset: version of ONNX's operations, one of `OPSETS`.
        pixels: also write pixels.onnx, which renders images of any size.

    Raises:
        UserError: the version is unknown, or a package is missing.
    """
    low, high = OPSETS
    if not low <= opset <= high:
        raise UserError(f"opset {opset} cannot be written; choose from {low} to {high}")
    encoder = copy.deepcopy(model.encoder).to("cpu").eval()
    length = model.tokenizer.max_tokens
    tokens, mask = model.tokenizer.encode(list(CAPTIONS))
    batch, words = torch.export.Dim("batch", min=1, max=2**16), torch.export.Dim("tokens", min=2, max=length)
    export_graph(_Image(encoder), (images(model, 3),), ["images"], ({0: batch},), folder / IMAGE, opset=opset)
    shapes = ({0: batch, 1: words}, {0: batch, 1: words})
    export_graph(_Text(encoder), (tokens, mask.long()), ["tokens", "mask"], shapes, folder / TEXT, opset=opset)
    save_tokenizer(model.tokenizer, folder / "tokenizer")
    vision = model.self_contained().vision
    record = {
        "image_size": vision.image_size,
        "fit": vision.fit,
        "interpolation": vision.interpolation,
        "max_tokens": length,
        "pad_id": model.tokenizer.pad_id,
        "logit_scale": model.label_scale,
        "logit_curve": model.label_curve,
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=1), encoding="utf-8")
    write_script(folder)
    if pixels:
        write_pixels(model, folder, opset)


def reader(model: Model, folder: Path) -> "OnnxEncoder":
    """onnxruntime."""
    return OnnxEncoder(folder)


def write_classifier(classifier: "Classifier", folder: Path) -> head.Classify:
    """Write classifier.onnx ("images", uint8 [N, 3, S, S] -> "probabilities" [N, C]) and labels.json, a list of C.

    Raises:
        UserError: a package is missing.
    """
    opset = _opset(folder)
    module = _Probabilities(classifier)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example = (images(classifier.model, 3),)
    export_graph(module, example, ["images"], ({0: batch},), folder / CLASSIFIER, "probabilities", opset)
    head.write_labels(classifier, folder)
    view = classifier.model.view

    def classify(files: Sequence[bytes]) -> Tensor:
        # Opened anew, as `shrink` may have replaced the file.
        return _run(_session(folder / CLASSIFIER), {"images": torch.stack([view(file) for file in files]).numpy()})

    return classify


def classifier_usage(folder: str) -> str:
    """Python code that classifies images."""
    return f"""import json, pathlib, onnxruntime
labels = json.loads(pathlib.Path("{folder}/{head.LABELS}").read_text("utf-8"))
session = onnxruntime.InferenceSession("{folder}/{CLASSIFIER}")  # {{"images": uint8 [N, 3, S, S]}} -> [N, labels]"""


class OnnxEncoder:
    """An exported folder as an encoder that `mmssl.evaluate` can evaluate."""

    def __init__(self, folder: Path | str) -> None:
        """Load the folder; raises UserError if onnxruntime is missing."""
        place = Path(folder)
        record = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        self.tokenizer: Tokenizer = load_tokenizer(str(place / "tokenizer"), record["max_tokens"])
        self.view = EvalView(record["image_size"], record["fit"], interpolation=record["interpolation"])
        self.logit_scale = float(record["logit_scale"])
        self._image, self._text = _session(place / IMAGE), _session(place / TEXT)

    def render(self, image: bytes) -> Tensor:
        """The bytes of an image file -> uint8 [3, S, S]."""
        return self.view(image)

    def encode_rendered(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> unit vectors [N, D]."""
        return _run(self._image, {"images": pixels.numpy()})

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """The bytes of image files -> unit vectors [N, D]."""
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [N, D]."""
        tokens, mask = self.tokenizer.encode(list(texts))
        return _run(self._text, {"tokens": tokens.numpy(), "mask": mask.long().numpy()})


def _session(graph: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", error) from None
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: dict[str, np.ndarray[Any, Any]]) -> Tensor:
    """The only output of a graph."""
    return torch.from_numpy(session.run(None, inputs)[0])


def _opset(folder: Path) -> int:
    """The version of the operations of an exported folder."""
    import onnx

    graph = onnx.load(folder / IMAGE, load_external_data=False)
    return next(int(entry.version) for entry in graph.opset_import if entry.domain == "")


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


class _Probabilities(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, classifier: "Classifier") -> None:
        super().__init__()
        self.encoder: DualEncoder = copy.deepcopy(classifier.model.encoder).to("cpu").eval()
        self.register_buffer("weight", classifier.weight)
        self.register_buffer("bias", classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return (self.encoder.encode_image(images) @ self.weight.T + self.bias).softmax(dim=1)


def export_graph(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    names: list[str],
    shapes: Any,
    path: Path,
    output: str = "features",
    opset: int = OPSET,
) -> None:
    """Write a module as ONNX and check it.

    Args:
        inputs: an example. names: names of the inputs. shapes: their variable sizes. output: name of the result.
        opset: version of ONNX's operations.

    Raises:
        UserError: a package is missing.
    """
    try:
        import onnx
        import onnxscript  # torch's exporter imports it later, deep inside
    except ImportError as error:
        raise missing_package("onnx and onnxscript", error) from None
    assert onnxscript is not None
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=names,
            output_names=[output],
            dynamic_shapes=shapes,
            dynamo=True,
            opset_version=opset,
            external_data=False,
            verbose=False,
            optimize=True,
        )
    onnx.checker.check_model(str(path))
