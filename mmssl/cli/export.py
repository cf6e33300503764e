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
    data: Annotated[
        list[str] | None,
        typer.Option(help="With --int8: compare zero-shot accuracy before and after on this dataset; repeat."),
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
    from mmssl.apps.export import push, quantize, write_classifier
    from mmssl.apps.finetune import is_classifier, load_classifier

    if int8 and kind != "onnx":
        raise UserError("--int8 needs --format onnx")
    if data and not int8:
        raise UserError("--data measures the accuracy that --int8 costs; give both")
    if dim is not None and kind == "timm":
        raise UserError("--format timm writes the tower without its projection, so --dim would change nothing")
    loaded = cut_model(load_model(model, "cpu", show_notes=True), dim)
    done = write(loaded, kind, out)
    print(f"{done.folder}: {kind}, features differ by {done.difference:.1e} at most")
    if kind == "onnx" and is_classifier(model) and dim is None:
        difference = write_classifier(load_classifier(model), out)
        print(f"{out}/classifier.onnx: probabilities differ by {difference:.1e} at most; labels in labels.json")
    if int8:
        print(f"8-bit weights: {quantize(out):.0%} of the size")
    for spec in data or ():
        _print_accuracies(loaded, out, spec)
    print(done.usage)
    if hub is not None:
        print(f"pushed to {push(out, hub)}")


def _print_accuracies(model: "Model", folder: Path, spec: str) -> None:
    """Zero-shot accuracy on a dataset, with full and with 8-bit weights."""
    from mmssl.apps.export import OnnxEncoder
    from mmssl.evaluate import suite

    for name, dataset in open_datasets([spec]).items():
        plan = {name: (dataset, ["zero_shot"])}
        accuracies = []
        for encoder in (model, OnnxEncoder(folder)):
            (metrics,) = suite.run(encoder, plan, None, suite.SuiteOptions(logit_scale=model.logit_scale)).values()
            accuracies.append(float(metrics["acc1"]))
        full, small = accuracies
        print(f"zero-shot accuracy on {name}: {full:.4f}, in 8 bits {small:.4f} ({small - full:+.4f})")
