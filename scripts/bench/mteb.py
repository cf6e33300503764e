"""One dataset evaluated by mteb and by mmssl: the same model, and tasks of mteb made from the dataset."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTaskClusteringLegacy, AbsTaskRetrieval, AbsTaskZeroShotClassification
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image
from sklearn.cluster import MiniBatchKMeans

import mmssl
from mmssl.apps.mteb import MtebEncoder
from mmssl.data.transforms import decoding
from mmssl.errors import UserError
from mmssl.evaluate import Task, suite
from mmssl.evaluate.datasets import Dataset, class_templates, read
from mmssl.evaluate.labels import class_indices, image_captions
from mmssl.evaluate.metrics import clustering
from mmssl.evaluate.prompts import fill
from mmssl.evaluate.tasks import find_task
from mmssl.evaluate.tasks.composed import read_queries, rows_by_key
from mmssl.evaluate.tasks.retrieval import same_words
from mmssl.types import Sample

RECALL_AT = (1, 5, 10)
BATCH, SEED = 500, 42
"""Of mteb's k-means."""


@dataclass(frozen=True)
class Agreement:
    """One metric of both."""

    task: str
    metric: str
    ours: float
    theirs: float


def bench_mteb(model: mmssl.Model, dataset: Dataset, tasks: Sequence[str]) -> list[Agreement]:
    """Evaluate by both, task by task.

    Args:
        tasks: names among those of MAKERS.
    """
    samples = list(read(dataset))
    encoder = MtebEncoder(model)
    return [row for task in tasks for row in MAKERS[task](model, encoder, dataset, samples)]


def _zero_shot(model: Any, encoder: MtebEncoder, dataset: Dataset, samples: list[Sample]) -> Iterator[Agreement]:
    # mteb has one text for each class.
    templates = class_templates(dataset)
    single = replace(dataset, templates=templates[:1]) if isinstance(templates, tuple) else dataset
    names, labels = class_indices(single, samples)
    task = _made(AbsTaskZeroShotClassification, "ZeroShotClassification", "accuracy", ["image", "text"], "i2t")
    prompts = [texts[0] for texts in fill(names, class_templates(single))]
    task.get_candidate_labels = lambda: prompts
    task.dataset = datasets.DatasetDict({"test": _images(samples).add_column("label", labels.tolist())})
    found = _ours(model, single, "zero_shot")
    yield Agreement("zero_shot", "acc1", found["acc1"], _theirs(encoder, task)["accuracy"])


def _retrieval(model: Any, encoder: MtebEncoder, dataset: Dataset, samples: list[Sample]) -> Iterator[Agreement]:
    captions = [image_captions(sample)[0] for sample in samples]
    words = same_words(captions).tolist()
    texts = datasets.Dataset.from_dict({"id": [f"t{n}" for n in range(len(samples))], "text": captions})
    images = _images(samples).add_column("id", [f"i{n}" for n in range(len(samples))])
    groups: dict[int, list[int]] = {}
    for row, word in enumerate(words):
        groups.setdefault(word, []).append(row)
    found = _ours(model, dataset, "retrieval")
    for side, query, corpus, (asked, answers) in (
        ("image", texts, images, ("t", "i")),
        ("text", images, texts, ("i", "t")),
    ):
        right = {f"{asked}{n}": {f"{answers}{m}": 1 for m in groups[word]} for n, word in enumerate(words)}
        task = _search(query, corpus, right, f"{asked}2{answers}")
        scores = _theirs(encoder, task)
        for k in RECALL_AT:
            name = f"{side}_retrieval_recall@{k}"
            yield Agreement("retrieval", name, found[name], scores[f"hit_rate_at_{k}"])


def _image_retrieval(model: Any, encoder: MtebEncoder, dataset: Dataset, samples: list[Sample]) -> Iterator[Agreement]:
    _, labels = class_indices(dataset, samples)
    images = _images(samples).add_column("id", [f"i{n}" for n in range(len(samples))])
    rows = {label: (labels == label).nonzero()[:, 0].tolist() for label in labels.unique().tolist()}
    right = {
        f"i{n}": {f"i{m}": 1 for m in rows[label] if m != n}
        for n, label in enumerate(labels.tolist())
        if len(rows[label]) > 1
    }
    asked = images.select([int(name[1:]) for name in right])
    task = _search(asked, images, right, "i2i")
    task.ignore_identical_ids = True  # an image does not find itself
    found = _ours(model, dataset, "image_retrieval")
    yield Agreement("image_retrieval", "recall@1", found["recall@1"], _theirs(encoder, task)["precision_at_1"])


def _clustering(model: Any, encoder: MtebEncoder, dataset: Dataset, samples: list[Sample]) -> Iterator[Agreement]:
    """mteb's clusters come from k-means on batches, ours from k-means on all; the measure is compared on the former."""
    _, labels = class_indices(dataset, samples)
    task = _made(AbsTaskClusteringLegacy, "ImageClustering", "v_measure", ["image"], "i2c")
    task.input_column_name, task.label_column_name = "image", "label"
    task.dataset = datasets.DatasetDict({"test": _images(samples).add_column("label", labels.tolist())})
    scores = _theirs(encoder, task)
    classes, numbers = np.unique(labels.numpy(), return_inverse=True)
    kmeans = MiniBatchKMeans(len(classes), batch_size=BATCH, n_init="auto", random_state=SEED)
    images = [Image.fromarray(decoding.decode(sample.image)) for sample in samples]  # as mteb has them
    clusters = kmeans.fit(model.encode_image(images).numpy()).labels_
    shape = len(classes), len(classes)
    counts = clustering.count_table(numbers, clusters.astype(np.int64), shape)
    yield Agreement("clustering", "v_measure", clustering.v_measure(counts), scores["v_measure"])


def _composed(model: Any, encoder: MtebEncoder, dataset: Dataset, samples: list[Sample]) -> Iterator[Agreement]:
    assert dataset.queries is not None
    queries, rows = read_queries(dataset.queries), rows_by_key(samples)
    right = {f"i{rows[query.reference]}": {f"i{rows[query.target]}": 1} for query in queries}
    if len(right) < len(queries):
        raise UserError(
            "an image is the reference of two queries; mteb leaves references out by the number of the query"
        )
    images = _images(samples).add_column("id", [f"i{n}" for n in range(len(samples))])
    asked = images.select([rows[query.reference] for query in queries])
    task = _search(asked.add_column("text", [query.text for query in queries]), images, right, "it2i")
    task.ignore_identical_ids = True  # the reference does not compete
    found, scores = _ours(model, dataset, "composed"), _theirs(encoder, task)
    for k in RECALL_AT:
        yield Agreement("composed", f"recall@{k}", found[f"recall@{k}"], scores[f"hit_rate_at_{k}"])


MAKERS = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "image_retrieval": _image_retrieval,
    "clustering": _clustering,
    "composed": _composed,
}


def suitable_tasks(dataset: Dataset) -> list[str]:
    """The tasks that the first sample allows."""
    first = next(read(dataset), None)
    if first is None:
        raise UserError(f"{dataset.name} has no usable sample")
    return [task for task in MAKERS if _allows(find_task(task), dataset, first)]


def _allows(task: Task, dataset: Dataset, sample: Sample) -> bool:
    try:
        task.ready(dataset)
        task.check(dataset, sample)
    except UserError:
        return False
    return True


def _ours(model: Any, dataset: Dataset, task: str) -> dict[str, Any]:
    (found,) = suite.run(model, {"x": (dataset, task)}, None, suite.SuiteOptions(draw=False)).values()
    return found


def _theirs(encoder: MtebEncoder, task: Any) -> dict[str, Any]:
    task.data_loaded = True
    result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False, co2_tracker=False)
    return dict(result.task_results[0].scores["test"][0])


def _images(samples: Sequence[Sample]) -> datasets.Dataset:
    """The images as our models see them: mteb would show the colours behind transparent pixels."""
    files = []
    for sample in samples:
        file = io.BytesIO()
        Image.fromarray(decoding.decode(sample.image)).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))


def _search(queries: Any, corpus: Any, right: dict[str, dict[str, int]], category: str) -> Any:
    kinds = {"i": "image", "t": "text"}
    modalities = [kinds[letter] for letter in "it" if letter in category]
    task = _made(AbsTaskRetrieval, "Any2AnyRetrieval", "hit_rate_at_1", modalities, category)
    data = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=right, top_ranked=None)
    task.dataset = {"default": {"test": data}}
    return task


def _made(base: type, kind: str, score: str, modalities: list[str], category: str) -> Any:
    """A task of mteb without data."""
    metadata = TaskMetadata(
        name=f"Made{kind}{category}",
        type=kind,
        main_score=score,
        modalities=modalities,
        category=category,
        description="Made from a dataset of mmssl.",
        reference=None,
        dataset={"path": "made", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )
    made = type(metadata.name, (base,), {"metadata": metadata, "load_data": lambda self, **options: None})
    return made()
