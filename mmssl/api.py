"""The whole library in one class: train, predict, embed, search and evaluate."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmssl.apps.finetune import Classifier, is_classifier, load_classifier
from mmssl.config import Config, known_keys, read_tree
from mmssl.errors import UserError
from mmssl.evaluate import Metrics
from mmssl.inference import (
    Classify,
    ImageInput,
    Model,
    Prediction,
    as_image_list,
    list_images,
    load,
    predict,
    zero_shot,
)
from mmssl.models import TextTower, VisionTower

if TYPE_CHECKING:
    from mmssl.apps.autoconfig import Source
    from mmssl.apps.search import Hit, Index
    from mmssl.evaluate import datasets
    from mmssl.train import Finished

SECTIONS = ("data", "model", "optim", "train")
"""Sections searched for a setting given without its section, after the top of the configuration."""


class MMSSL:
    """A model from any source, with defaults for training, prediction, search and evaluation."""

    def __init__(self, source: str | Path | None = None, device: str | None = None) -> None:
        """Load a model; without a source, `train` builds one.

        Args:
            source: anything that `mmssl.load` reads (a run or model folder, `open_clip:MODEL/TAG`, `local-dir:FOLDER`,
                `transformers:NAME`), a fine-tuned classifier's folder, or a YAML configuration to train with.
                None: `train` chooses the towers.
            device: cpu, cuda, cuda:1 ... Default: a GPU if there is one.

        Raises:
            UserError: the model or file does not exist.
        """
        self.source = None if source is None else str(source)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._tree: Mapping[str, Any] | None = None
        self._model: Model | None = None
        self._classifier: Classifier | None = None
        if self.source is None:
            return
        if Path(self.source).suffix in (".yaml", ".yml"):
            self._tree = read_tree(self.source)
        elif is_classifier(self.source):
            self._classifier = load_classifier(self.source)
            self._model = self._classifier.model.to(self._device)
        else:
            self._model = load(self.source).to(self._device)

    @property
    def model(self) -> Model:
        """The loaded model, as exports, indexes and evaluations take it.

        Raises:
            UserError: no model is loaded or trained yet.
        """
        if self._model is None:
            raise UserError("this model has no weights yet: train it first, model.train(data=...)")
        return self._model

    @property
    def vision(self) -> VisionTower:
        """The vision tower, an nn.Module."""
        return self.model.vision

    @property
    def text(self) -> TextTower:
        """The text tower, an nn.Module."""
        return self.model.text

    def train(self, data: "Source | None" = None, run_dir: str | Path | None = None, **settings: Any) -> "Finished":
        """Train, and use the trained model from then on.

        A loaded model starts from its weights, and a configuration sets the training. Without either, the number of
        pairs and the hardware decide the towers. The chosen settings are printed with their reasons.

        Args:
            data: a folder of images with captions beside them, a CSV, TSV, JSONL or Parquet table, or shards: a
                pattern, a list of patterns, or a mixture, `[{"shards": "a/*.tar", "weight": 2}, ...]`. With a
                configuration, the default is its `data.train`.
            run_dir: folder of the run. Default: runs/NAME, by the name of the data.
            settings: keys of the configuration, in full (`**{"optim.lr": 1e-4}`) or by their last word (`epochs=5`).

        Returns:
            The run's folder, and `results`, the metrics of its evaluation.

        Raises:
            UserError: the data cannot be used, a setting is wrong, or the folder holds another run.
        """
        from mmssl.apps.autoconfig import start_from, train_on

        if data is None and ((self._tree or {}).get("data") or {}).get("train") is None:
            raise UserError("there is no training data; give a folder, a table or shards: model.train(data=...)")
        pinned = {full_key(name): value for name, value in settings.items()}
        finished = train_on(
            data,
            None if run_dir is None else Path(run_dir),
            start=None if self._model is None or self.source is None else start_from(self.source, self._model),
            tree=self._tree,
            pinned=pinned,
        )
        if finished.signal is None:
            self.source, self._tree, self._classifier = str(finished.run_dir), None, None
            self._model = load(finished.run_dir).to(self._device)
        return finished

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: str | Iterable[str] | None = None,
        templates: str | Iterable[str] = "{c}",
        save: bool | str | Path = False,
        bad_images: float = 0.1,
    ) -> list[Prediction]:
        """Probability of each label for one or several images.

        Args:
            images: files, folders of images, PIL images, open files, arrays or tensors; one or several. Images that
                cannot be read are left out and named in a warning.
            labels: may be left out for a fine-tuned classifier, which has its own.
            templates: one or several prompts with `{c}` for the label.
            save: True or a folder: draw each image with its probabilities to a PNG, beside the image or in the folder.
                `saved` of each prediction is its path.
            bad_images: largest fraction of images that may be left out; of fewer than 100, it is that of 100.

        Raises:
            UserError: no image can be read, too many cannot, or the labels or templates cannot be used.
        """
        given: list[ImageInput] = []
        for image in as_image_list(images):
            given += list_images([image]) if isinstance(image, str | Path) else [image]
        place = Path(save) if isinstance(save, str) else save
        return list(predict(given, self._classify(labels, templates), place, bad_images))

    def _classify(self, labels: str | Iterable[str] | None, templates: str | Iterable[str]) -> Classify:
        if labels is not None:
            return zero_shot(self.model, labels, (templates,) if isinstance(templates, str) else tuple(templates))
        if self._classifier is None:
            raise UserError("labels are missing; give them, for example labels=['a cat', 'a dog']")
        return self._classifier.predict

    def classify(self, image: ImageInput, labels: str | Iterable[str], template: str = "{c}") -> dict[str, float]:
        """Probability of each label for one image, highest first; of a calibrated model also `verdict`."""
        return self.model.classify(image, labels, template)

    def match(self, images: ImageInput | Iterable[ImageInput], texts: str | Iterable[str]) -> Tensor:
        """Probability that each image matches each text, float64 [N, M], if a match is as likely as not beforehand.

        Raises:
            UserError: the model is not calibrated, or an image cannot be used.
        """
        return self.model.match(images, texts)

    def calibrate(
        self,
        data: str | Path,
        by: Literal["labels", "captions"] | None = None,
        coverage: float = 0.9,
        **options: Any,
    ) -> Metrics:
        """Fit probabilities on half of held-out images, and measure them on the other half.

        `save` stores them with the model.

        Args:
            data: images with labels or captions, as `mmssl.evaluate.open_dataset` takes them.
            by: what images are compared with. Default: labels if there are class names, else captions.
            coverage: probability with which the thresholds let the right one pass.
            options: `classnames`, `templates` and `label` of `open_dataset`.

        Returns:
            Calibration errors, coverages and AUROC, with intervals.

        Raises:
            UserError: the data cannot be used, or are too few.
        """
        from mmssl.apps.calibrate import calibrate
        from mmssl.evaluate import datasets, open_dataset

        dataset = datasets.open_images(data, **options) or open_dataset(data, **options)
        found = calibrate(self.model, dataset, by=by, coverage=coverage, head=self._classifier)
        (self._classifier or self.model).calibration = found
        return found.metrics

    def encode_image(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 256, patches: bool = False
    ) -> Tensor:
        """Unit-length embeddings of images, [N, D], or of their patches, [N, rows, columns, D]; float32 on the CPU.

        Raises:
            UserError: an image cannot be used; or patches are asked for and the vision tower shows none.
        """
        return self.model.encode_image(images, batch_size, patches)

    def encode_text(self, texts: str | Iterable[str], batch_size: int = 256) -> Tensor:
        """Unit-length embeddings of one or several texts, float32 [N, D] on the CPU."""
        return self.model.encode_text(texts, batch_size)

    def embed(self, data: "Source", out: str | Path, batch_size: int = 256, bad_samples: float = 0.1) -> "Index":
        """Store the embedding of every image for search.

        A second call adds new shards, embeds changed ones again, and removes those that are gone.

        Args:
            data: shards; or a folder of images, with or without captions, or a table, which is packed into OUT/shards.
            bad_samples: largest fraction of samples that may be left out; of fewer than 100, it is that of 100.

        Raises:
            UserError: the folder holds another index, or the data cannot be used.
        """
        from mmssl.apps.autoconfig import resolve_shards
        from mmssl.apps.search import Index, embed_shards

        folder = Path(out)
        shards = resolve_shards(data, folder / "shards", need_captions=False)
        embed_shards(self.model, shards, folder, batch_size=batch_size, bad_samples=bad_samples)
        return Index(folder)

    def search(
        self,
        query: ImageInput,
        index: "str | Path | Index",
        count: int = 10,
        where: Sequence[str] = (),
        text: str | None = None,
        text_weight: float = 0.5,
    ) -> "list[Hit]":
        """The images of an index that are most similar to a text or an image, best first.

        Args:
            query: a text, the path of an image, or an image.
            where: conditions on the images, such as `style=noto` or `year>=1900`; all must be met.
            text: what should differ from the query: the sum of both unit vectors is searched.
            text_weight: share of the text in that sum, 0 to 1.

        Raises:
            UserError: the index or image does not exist, another model made the index, or a condition cannot be used.
        """
        from mmssl.apps.search import Index, encode_query

        stored = index if isinstance(index, Index) else Index(index)
        wanted = encode_query(stored.fit(self.model), query, text, text_weight)
        rows, similarities = stored.nearest(wanted, count, where=where)
        return stored.hits(rows[0].tolist(), similarities[0].tolist())

    def evaluate(
        self,
        data: "Source",
        task: str | Sequence[str] | None = None,
        out: str | Path | None = None,
        bad_samples: float = 0.1,
        **options: Any,
    ) -> dict[str, Metrics]:
        """Evaluate the model.

        Args:
            data: a dataset in CLIP_benchmark's layout, a folder of such datasets, shards, a folder of images per
                class, or pairs in any form that `train` takes. A table's labels are read if `task` or `label` ask so.
            task: zero_shot, retrieval, linear_probe ... Default: what each dataset is made for, retrieval for pairs.
            out: folder for tables and plots.
            bad_samples: largest fraction of samples that may be left out; of fewer than 100, it is that of 100.
            options: `classnames`, `templates`, `label`, `slice_by` as `mmssl.evaluate.open_dataset` has them.

        Returns:
            `DATASET/TASK` -> metrics.

        Raises:
            UserError: a dataset lacks something that a task needs.
        """
        from mmssl.apps.autoconfig import is_shards, resolve_shards
        from mmssl.evaluate import datasets, open_dataset, suite

        with TemporaryDirectory(prefix="mmssl-") as passing:
            path = None if isinstance(data, Sequence) and not isinstance(data, str) else Path(data)
            if path is not None and path.is_dir() and any(path.rglob("*.tar")):
                found = [
                    open_dataset(place, name=name, **options) for name, place in datasets.find_datasets(path).items()
                ]
            elif path is not None and (images := self._labelled(path, task, bad_samples, options)) is not None:
                found = [images]
            elif path is not None and not is_shards(path):
                task = task or "retrieval"
                found = [open_dataset(resolve_shards(path, Path(passing)), name=path.stem, **options)]
            else:
                shards = data if isinstance(data, str | Path) else resolve_shards(data, Path(passing))
                found = [open_dataset(shards, **options)]
            plan = {dataset.name: (dataset, task or suite.default_task(dataset)) for dataset in found}
            folder = None if out is None else Path(out)
            settings = suite.SuiteOptions(
                logit_scale=self.model.label_scale, logit_curve=self.model.label_curve, bad_samples=bad_samples
            )
            return suite.run(self.model, plan, folder, settings)

    def _labelled(
        self, path: Path, task: object, bad_samples: float, options: Mapping[str, Any]
    ) -> "datasets.Dataset | None":
        """A folder of images per class; a table if its labels are asked for, since it may also hold pairs."""
        from mmssl.evaluate import datasets

        asked = options.get("label") is not None or task not in (None, "retrieval", ["retrieval"])
        return datasets.open_images(path, bad_samples=bad_samples, **options) if path.is_dir() or asked else None

    def export(self, kind: str, out: str | Path, **options: Any) -> Path:
        """Write the model for another library: open_clip, transformers, sentence-transformers, onnx or timm.

        A fine-tuned classifier keeps its head.

        Args:
            options: of onnx: `opset`, and `pixels=True` for a graph that resizes and crops images.

        Raises:
            UserError: the library cannot represent this model, or the folder is not empty.
        """
        from mmssl.apps.export import export

        return export(self.model, kind, Path(out), classifier=self._classifier, **options).folder

    def save(self, folder: str | Path) -> None:
        """Write a model folder that `MMSSL(folder)` reads on any machine, without a network.

        Raises:
            UserError: the folder cannot be written.
        """
        if self._classifier is not None:
            self._classifier.save(folder)
        else:
            self.model.save(folder)

    def to(self, device: str) -> "MMSSL":
        """Move the weights to a device; returns itself."""
        self._device = device
        if self._model is not None:
            self._model.to(device)
        return self


def full_key(name: str) -> str:
    """A setting's dotted key: `epochs` is `train.epochs`.

    Raises:
        UserError: several sections have a setting of this name.
    """
    keys = set(known_keys(Config))
    if "." in name or name in keys:
        return name
    found = [f"{section}.{name}" for section in SECTIONS if f"{section}.{name}" in keys]
    if len(found) > 1:
        raise UserError(f"{name} is ambiguous: {' or '.join(found)}; give the full key: **{{'{found[0]}': ...}}")
    return found[0] if found else name
