"""`mmssl export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.apps.export import format_names
from mmssl.cli.common import Dim, ModelName, cut_model, load_model, open_datasets, verb
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.inference import Model


@verb(100)
def export(
    model: ModelName,
    kind: Annotated[
        str,
        typer.Option(
            "--format", help=f"Format to write: {', '.join(format_names())}, or your own module as PACKAGE.MODULE."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty or not exist.")],
    dim: Dim = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="With onnx: quantise weights to 8 bits, which is smaller and less exact.")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="With onnx: store weights and compute in 16 bits; inputs and features stay.")
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="With onnx: version of its operations, 18 to 23. Default: 20.")
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="With onnx: also write pixels.onnx, which resizes and crops images.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="With --int8 or --fp16: compare zero-shot accuracy before and after on this dataset; repeat."
        ),
    ] = None,
    hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/MODEL", help="Upload the folder to the Hugging Face hub."),
    ] = None,
) -> None:
    """Write a model for another library, load it there, and check that its features are the same.

    Example: mmssl export runs/mine --format open_clip --out mine-open-clip
    """
    from mmssl.apps.export import export as write
    from mmssl.apps.export import halve, push, quantize, write_classifier
    from mmssl.apps.finetune import is_classifier, load_classifier

    given = {"--int8": int8, "--fp16": fp16, "--opset": opset is not None, "--pixels": pixels}
    if kind != "onnx" and any(given.values()):
        raise UserError(f"{next(name for name, there in given.items() if there)} needs --format onnx")
    if int8 and fp16:
        raise UserError("--int8 and --fp16 are both given; give one")
    if data and not (int8 or fp16):
        raise UserError("--data measures the accuracy that --int8 or --fp16 costs; give one of them too")
    if dim is not None and kind == "timm":
        raise UserError("--format timm writes the tower without its projection, so --dim would change nothing")
    loaded = cut_model(load_model(model, "cpu", show_notes=True), dim)
    options = {} if kind != "onnx" else {"pixels": pixels, **({} if opset is None else {"opset": opset})}
    done = write(loaded, kind, out, **options)
    print(f"{done.folder}: {kind}, features differ by {done.difference:.1e} at most")
    if kind == "onnx" and is_classifier(model) and dim is None:
        difference = write_classifier(load_classifier(model), out)
        print(f"{out}/classifier.onnx: probabilities differ by {difference:.1e} at most; labels in labels.json")
    if int8 or fp16:
        print(f"{8 if int8 else 16}-bit weights: {quantize(out) if int8 else halve(out):.0%} of the size")
    for spec in data or ():
        _print_accuracies(loaded, out, spec, 8 if int8 else 16)
    print(done.usage)
    if hub is not None:
        print(f"pushed to {push(out, hub)}")


def _print_accuracies(model: "Model", folder: Path, spec: str, bits: int) -> None:
    """Zero-shot accuracy on a dataset, with full and with smaller weights."""
    from mmssl.apps.export import OnnxEncoder
    from mmssl.evaluate import suite

    for name, dataset in open_datasets([spec]).items():
        plan = {name: (dataset, ["zero_shot"])}
        accuracies = []
        for encoder in (model, OnnxEncoder(folder)):
            (metrics,) = suite.run(encoder, plan, None, suite.SuiteOptions(logit_scale=model.logit_scale)).values()
            accuracies.append(float(metrics["acc1"]))
        full, small = accuracies
        print(f"zero-shot accuracy on {name}: {full:.4f}, in {bits} bits {small:.4f} ({small - full:+.4f})")
