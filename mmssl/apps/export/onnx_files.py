"""Files beside the ONNX encoders: a graph that renders images, a script without PyTorch, and smaller weights."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.apps.export.reader import missing_package
from mmssl.inference import Model

IMAGE, TEXT, CLASSIFIER = "image.onnx", "text.onnx", "classifier.onnx"
PIXELS, SCRIPT = "pixels.onnx", "run.py"
_SMALLER = ("MatMul", "Gemm", "Gather")
"""Operations whose weights are quantised."""
_MODES = {"bicubic": "cubic", "bilinear": "linear"}
CODE = '''"""Classify an image: python run.py photo.jpg "a cat" "a dog"  (pip install onnxruntime tokenizers pillow)"""
import json, sys
from pathlib import Path
import numpy as np, onnxruntime, tokenizers
from PIL import Image, ImageOps

here, (path, *labels) = Path(__file__).parent, sys.argv[1:]
config = json.loads((here / "config.json").read_text(encoding="utf-8"))

def run(name, **inputs):
    session = onnxruntime.InferenceSession(str(here / name), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]

image, side = ImageOps.exif_transpose(Image.open(path)).convert("RGB"), config["image_size"]
if (here / "pixels.onnx").exists():
    pixels = run("pixels.onnx", image=np.asarray(image))
else:
    fit = config["fit"] == "shortest"
    size = [side * length // min(image.size) for length in image.size] if fit else [side, side]
    left, top = (round((length - side) / 2) for length in size)
    image = image.resize(size, Image.Resampling[config["interpolation"].upper()])
    pixels = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)[None]
if labels:
    tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_truncation(config["max_tokens"])
    tokenizer.enable_padding(pad_id=config["pad_id"])
    rows = tokenizer.encode_batch(labels)
    tokens, mask = (np.array([getattr(row, kind) for row in rows], np.int64) for kind in ("ids", "attention_mask"))
    similarities = run("image.onnx", images=pixels)[0] @ run("text.onnx", tokens=tokens, mask=mask).T
    curve, logits = config["logit_curve"], similarities.astype(np.float64)
    logits = config["logit_scale"] * (np.expm1(curve * logits) / curve if curve else logits)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
else:  # the labels of a fine-tuned classifier
    labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))
    chances = run("classifier.onnx", images=pixels)[0]
print(json.dumps(dict(sorted(zip(labels, chances.tolist()), key=lambda pair: -pair[1])), ensure_ascii=False))
if sys.argv[2:] and (here / "calibration.json").exists():  # no label fits; each by itself
    c = json.loads((here / "calibration.json").read_text(encoding="utf-8"))
    sigmoid = lambda kind, x: (0.5 + 0.5 * np.tanh((c[kind + "_scale"] * x + c[kind + "_bias"]) / 2)).tolist()
    familiarity = (logits.max() + np.log(np.exp(logits - logits.max()).mean())) / c["label_scale"]
    matches = dict(zip(labels, sigmoid("match", similarities.astype(np.float64))))
    print(json.dumps({"none_of_these": 1 - sigmoid("known", familiarity), "matches": matches}, ensure_ascii=False))
'''
"""run.py: the probability of each label as JSON, with neither PyTorch nor this package; of a calibrated model also
those of a match and of no label, in a second line."""


def write_script(folder: Path) -> None:
    """Write run.py."""
    (folder / SCRIPT).write_text(CODE, encoding="utf-8")


def write_pixels(model: Model, folder: Path, opset: int) -> None:
    """Write pixels.onnx: an RGB image of any size, uint8 [H, W, 3] -> as the model sees it, uint8 [1, 3, S, S].

    The integers are those of `EvalView`; resized values may differ by 1, seldom by 2, as other code rounds them.

    Raises:
        UserError: a package is missing.
    """
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise missing_package("onnx", error) from None
    side = model.vision.image_size
    constants = {
        "side": np.array([side, side]),
        "begin": np.array([1, 3]),
        "first": np.array([0]),
        "one_index": np.array([1]),
        "two": np.array(2, np.float32),
        "low": np.array(0, np.float32),
        "high": np.array(255, np.float32),
        "planes": np.array([2, 3]),
    }

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs.split(" "), [output], **attributes)

    nodes = [
        node("Cast", "image", "floats", to=TensorProto.FLOAT),
        node("Transpose", "floats", "channels", perm=[2, 0, 1]),
        node("Unsqueeze", "channels first", "one"),
        node("Shape", "image", "lengths", end=2),
    ]
    if model.config.vision.fit == "shortest":
        nodes += [
            node("ReduceMin", "lengths", "short", keepdims=1),
            node("Mul", "lengths side", "product"),
            node("Div", "product short", "new"),
        ]
    else:
        nodes.append(node("Identity", "side", "new"))
    # As PyTorch and Pillow do for bytes: along the rows, rounded, then along the columns.
    settings = {"mode": _MODES[model.config.vision.interpolation], "cubic_coeff_a": -0.5}
    settings |= {"antialias": 1, "exclude_outside": 1, "coordinate_transformation_mode": "half_pixel"}
    nodes += [
        node("Shape", "image", "old_height", end=1),
        node("Gather", "new one_index", "new_width", axis=0),
        node("Concat", "begin old_height new_width", "wide", axis=0),
        helper.make_node("Resize", ["one", "", "", "wide"], ["rows"], **settings),
        node("Round", "rows", "rows_rounded"),
        node("Clip", "rows_rounded low high", "rows_bounded"),
        node("Concat", "begin new", "shape", axis=0),
        helper.make_node("Resize", ["rows_bounded", "", "", "shape"], ["resized"], **settings),
        node("Sub", "new side", "spare"),
        node("Cast", "spare", "spare_floats", to=TensorProto.FLOAT),
        node("Div", "spare_floats two", "half"),
        node("Round", "half", "whole"),
        node("Cast", "whole", "start", to=TensorProto.INT64),
        node("Add", "start side", "end"),
        node("Slice", "resized start end planes", "cut"),
        node("Round", "cut", "rounded"),
        node("Clip", "rounded low high", "bounded"),
        node("Cast", "bounded", "pixels", to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])],
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [1, 3, side, side])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(found)
    onnx.save(found, folder / PIXELS)


def shrink(folder: Path, bits: int) -> float:
    """Store the weights of the encoders and of a classifier in fewer bits; returns the size relative to before.

    Args:
        bits: 8: those of matrix products and embeddings. Convolutions stay as they are: onnxruntime's 8-bit ones are
            slower on most processors. 16: all, and computations too; inputs and features stay as they are.

    Raises:
        UserError: a package is missing.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers.float16 import convert_float_to_float16
    except ImportError as error:
        raise missing_package("onnx and onnxruntime", error) from None
    before = after = 0
    for name in filter(lambda name: (folder / name).exists(), (IMAGE, TEXT, CLASSIFIER)):
        # torch's exporter writes weights from 1.5 GB on to a file beside the graph.
        full, weights, small = folder / name, folder / f"{name}.data", folder / f"small-{name}"
        before += full.stat().st_size + (weights.stat().st_size if weights.exists() else 0)
        graph = onnx.load(full)
        # The exporter leaves inner shapes from before its own rewriting; the converters infer the right ones.
        del graph.graph.value_info[:]
        with quiet():
            if bits == 8:
                quantize_dynamic(graph, small, weight_type=QuantType.QInt8, op_types_to_quantize=list(_SMALLER))
            else:
                onnx.save(convert_float_to_float16(graph, keep_io_types=True, disable_shape_infer=False), small)
        small.replace(full)
        weights.unlink(missing_ok=True)
        after += full.stat().st_size
    return after / before


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and the converters, whose warnings concern their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
