"""`mmssl calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmssl.cli.common import (
    BadSamples,
    BatchSize,
    Cache,
    Classnames,
    Device,
    JsonFile,
    Label,
    ModelName,
    NoCache,
    Precision,
    Templates,
    load_model,
    make_folder,
    open_cache,
    open_datasets,
    print_results,
    status,
    verb,
    write_json,
    writing,
)
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier
    from mmssl.inference import Model, probabilities


@verb(35)
def calibrate(
    model: ModelName,
    data: Annotated[
        str,
        typer.Argument(
            help="Held-out images with labels or captions, which the model was not trained on: a folder in "
            "CLIP_benchmark's layout, a shard pattern, a folder of images per class, or a table with a label column."
        ),
    ],
    by: Annotated[
        Literal["labels", "captions"] | None,
        typer.Option(
            help="What images are compared with: all class names, or their caption and up to 99 others. Default: "
            "labels if there are class names, else captions."
        ),
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(min=0.5, max=0.99, help="Probability with which the stored thresholds let the right one pass."),
    ] = 0.9,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the model with its calibration to this folder. Default: into the folder of MODEL."),
    ] = None,
    classnames: Classnames = None,
    templates: Templates = None,
    label: Label = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the halves to fit and to measure on.")] = 0,
    halves: Annotated[
        int,
        typer.Option(
            min=1,
            help="Random halves to measure on. With more than one, a second table has the mean over them and the range "
            "of 95 % of them; the first one is stored.",
        ),
    ] = 1,
    json_file: JsonFile = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    bad_samples: BadSamples = 0.1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Fit probabilities on held-out pairs: is this a match, does none of the labels fit, which labels are likely.

    Half of the images fit them, the other half measures them. predict and serve then use the calibration.json in the
    model's folder; of a fine-tuned classifier, predict uses its head_calibration.json. docs/calibration.md explains the
    metrics.

    Example: mmssl calibrate runs/mine /data/held-out
    """
    from mmssl.apps.calibrate import calibrate as run
    from mmssl.apps.finetune import is_classifier, load_classifier
    from mmssl.evaluate import suite

    head = load_classifier(model) if is_classifier(model) else None
    loaded = load_model(model, device, precision)
    if out is None and loaded.folder is None:
        raise UserError(f"{model} is no folder of mmssl, so its calibration needs a place: --out FOLDER")
    if out is not None:
        make_folder(out, empty=True)
    options = {"classnames": classnames, "templates": templates, "label": label}
    datasets = list(open_datasets([data], bad_samples=bad_samples, **options).values())
    if len(datasets) > 1:
        raise UserError(f"{data} holds {len(datasets)} datasets; calibrate on one: {data}/{datasets[0].name}")
    with status("calibrating") as spinner:
        settings = suite.SuiteOptions(
            batch_size=batch_size,
            bad_samples=bad_samples,
            cache=open_cache(loaded, cache, no_cache),
            progress=lambda what, done: spinner.update(f"{what}: {done:,}"),
        )
        found = run(
            loaded, datasets[0], by=by, coverage=coverage, seed=seed, halves=halves, options=settings, head=head
        )
    place = _store(loaded, found, out) if head is None else _store_head(head, Path(model), found, out)
    print_results({f"{datasets[0].name}/calibration": found.metrics})
    if halves > 1:
        print_results({f"{datasets[0].name}/calibration, mean over {halves} halves": found.metrics["halves"]})
    if json_file is not None:
        write_json(json_file, found.model_dump(mode="json"))
    what = "an image and a text match from a similarity" if head is None else "an image has a label from a logit"
    print(f"{place}: {what} of {found.match_threshold:.3f} on ({coverage:.0%} of the right pairs pass)")


def _store(model: "Model", found: "probabilities.Calibration", out: Path | None) -> Path:
    """Write the calibration beside the weights, or both to a new folder; returns the file."""
    from mmssl.inference import probabilities

    model.calibration = found
    if out is not None:
        model.save(out)
        return out / probabilities.FILE
    assert model.folder is not None
    with writing(model.folder, "the model folder", "give a place: --out FOLDER"):
        probabilities.write_calibration(model.folder, found)
    return model.folder / probabilities.FILE


def _store_head(classifier: "Classifier", folder: Path, found: "probabilities.Calibration", out: Path | None) -> Path:
    """Write the calibration into the classifier's folder, or the classifier to a new folder; returns the file."""
    from mmssl.inference import probabilities

    classifier.calibration = found
    if out is not None:
        classifier.save(out)
        return out / probabilities.HEAD_FILE
    with writing(folder, "the classifier's folder", "give a place: --out FOLDER"):
        probabilities.write_calibration(folder, found, probabilities.HEAD_FILE)
    return folder / probabilities.HEAD_FILE
