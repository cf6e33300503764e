"""`mmssl export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.apps.export import format_names
from mmssl.cli.common import Dim, ModelName, cut_model, load_model, open_datasets, progress_bar, verb
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.evaluate import datasets

FIRST = 1000
"""Samples of the run's first suite that an export is measured on."""


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
            help="Evaluate the export and the model on this dataset; repeat. Default: the first 1,000 samples of the "
            "run's first suite."
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
    from mmssl.apps.export import measure, measure_classifier, push, shrink
    from mmssl.apps.finetune import is_classifier, load_classifier
    from mmssl.evaluate import suite

    given = {"--int8": int8, "--fp16": fp16, "--opset": opset is not None, "--pixels": pixels}
    if kind != "onnx" and any(given.values()):
        raise UserError(f"{next(name for name, there in given.items() if there)} needs --format onnx")
    if int8 and fp16:
        raise UserError("--int8 and --fp16 are both given; give one")
    if dim is not None and kind == "timm":
        raise UserError("--format timm writes the tower without its projection, so --dim would change nothing")
    sets = list(open_datasets(data).values()) if data else _first_suite(Path(model))
    loaded = cut_model(load_model(model, "cpu", show_notes=True), dim)
    options = {} if kind != "onnx" else {"pixels": pixels, **({} if opset is None else {"opset": opset})}
    classifier = load_classifier(model) if is_classifier(model) and dim is None else None
    done = write(loaded, kind, out, classifier=classifier, **options)
    compared = "features" if classifier is None else "features and probabilities"
    print(f"{done.folder}: {kind}, {compared} differ by {done.difference:.1e} at most")
    if int8 or fp16:
        bits = 8 if int8 else 16
        print(f"{bits}-bit weights: {shrink(out, bits):.0%} of the size")
    results = []
    with progress_bar("samples", text="evaluating") as bar:
        settings = suite.SuiteOptions(limit=None if data else FIRST, progress=bar.describe)
        for dataset in sets:
            try:
                if classifier is None:
                    results.append(measure(loaded, kind, out, dataset, settings).line())
                else:
                    results.append(measure_classifier(classifier, done, dataset, settings).line())
            except UserError as error:
                if data:
                    raise
                results.append(_not_evaluated(dataset.name, error))
    print(*results, sep="\n", end="\n" if results else "")
    print(done.usage)
    if hub is not None:
        print(f"pushed to {push(out, hub)}")


def _first_suite(run: Path) -> "list[datasets.Dataset]":
    """The first evaluation dataset of a run; none if the model is no run, has none, or the dataset is not here."""
    from mmssl.config import load_config
    from mmssl.evaluate import open_dataset

    if not (run / "config.yaml").is_file():
        return []
    for name, entry in load_config(run / "config.yaml").evaluate.suites.items():
        try:
            # Without the suite's own tasks, whose modules nobody has trusted.
            return [open_dataset(entry.data, name=name, slice_by=entry.slice_by)]
        except UserError as error:
            print(_not_evaluated(name, error))
            break
    return []


def _not_evaluated(name: str, error: UserError) -> str:
    return f"not evaluated on {name}: {error}; --data names another dataset"
