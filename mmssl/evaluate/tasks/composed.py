"""Composed image retrieval: an image and a text that says what should differ (Liu et al. 2021)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmssl.errors import UserError
from mmssl.evaluate.datasets import QUERIES_FILE, Dataset
from mmssl.evaluate.metrics import composed
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.stats import means
from mmssl.types import Sample

RECALL_AT = (1, 5, 10, 50)
WEIGHTS = (0.0, 0.25, composed.HALF, 0.75, 1.0)
"""Weights of the text in weights.csv; at 0 the image searches alone, at 1 the text."""
REFERENCE, TARGET, TEXT = ("reference", "candidate"), ("target", "target_hard"), ("txt", "caption", "captions")
"""Names of the entries of a query: ours or CIRR's, FashionIQ's."""


@dataclass(frozen=True)
class Query:
    """Keys of two images, and how the second differs from the first."""

    reference: str
    target: str
    text: str


class Composed(Task):
    """Search by an image and a text."""

    name = "composed"
    label = "composed image retrieval"
    description = "Search of images by an image and a text that says how the wanted one differs."
    main_metrics = ("recall@10", "recall@5", "recall@1")

    def ready(self, dataset: Dataset) -> None:
        """Require queries."""
        _queries_of(dataset)

    def run(self, context: TaskContext) -> Metrics:
        """Search with the sum of both unit vectors among all images but the reference, as CIRR does.

        Raises:
            UserError: a query is malformed, or none has both of its images.
        """
        queries = _queries_of(context.dataset)
        rows = rows_by_key(context.images.samples)
        usable = [q for q in queries if q.reference in rows and q.target in rows and q.reference != q.target]
        if not usable:
            raise UserError(
                f"no query of {context.dataset.queries} has both images in dataset {context.name!r}, such as "
                f"{queries[0].reference!r} and {queries[0].target!r}; write the keys of the samples"
            )
        reference, target = (
            torch.tensor([rows[key] for key in keys])
            for keys in ([q.reference for q in usable], [q.target for q in usable])
        )
        gallery, texts = context.images.features, context.encode_texts([q.text for q in usable])
        ranks = {
            weight: composed.target_ranks(
                composed.compose(gallery[reference], texts, weight), gallery, target, reference
            ).numpy()
            for weight in WEIGHTS
        }
        depths = [k for k in RECALL_AT if k < len(gallery)]
        values = {f"recall@{k}": (ranks[composed.HALF] <= k).astype(np.float64) for k in depths}
        metrics, intervals = means(values)
        alone = {
            f"recall@{k}_{side}": float((ranks[weight] <= k).mean())
            for side, weight in (("image", 0.0), ("text", 1.0))
            for k in depths
        }
        if context.folder is not None:
            found = zip(usable, *(ranks[weight].tolist() for weight in WEIGHTS), strict=True)
            header = ("reference", "target", "text", *(f"rank@{weight}" for weight in WEIGHTS))
            write_csv(context.folder / "ranks.csv", header, ((q.reference, q.target, q.text, *r) for q, *r in found))
            recalls = ((w, *(float((ranks[w] <= k).mean()) for k in depths)) for w in WEIGHTS)
            write_csv(context.folder / "weights.csv", ("text_weight", *values), recalls)
        left_out = {"queries_without_image": len(queries) - len(usable)} if len(usable) < len(queries) else {}
        chance = {f"recall@{k}": {"chance": k / (len(gallery) - 1)} for k in depths}
        counts = {"queries": len(usable), "images": len(gallery), **left_out}
        return {**metrics, **alone, **counts, **list_intervals(intervals), **list_baselines(chance)}


def rows_by_key(samples: Sequence[Sample]) -> dict[str, int]:
    """The row of each key, and of its last part where that is no other's: `dev-1` for `images/dev-1`."""
    whole = {sample.key: row for row, sample in enumerate(samples)}
    ends: dict[str, list[int]] = {}
    for key, row in whole.items():
        ends.setdefault(key.rpartition("/")[2], []).append(row)
    return {**{end: found[0] for end, found in ends.items() if len(found) == 1}, **whole}


def _queries_of(dataset: Dataset) -> list[Query]:
    if dataset.queries is None:
        raise UserError(
            f"task 'composed' of dataset {dataset.name!r} needs queries; write {QUERIES_FILE} beside the shards, a "
            'list of {"reference": KEY, "target": KEY, "txt": WORDS}; the files of CIRR and FashionIQ are read too'
        )
    return read_queries(dataset.queries)


def read_queries(path: Path) -> list[Query]:
    """The queries of a JSON file.

    Raises:
        UserError: it is no list of objects with a reference, a target and a text.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, list) or not tree:
        raise UserError(
            f"{path} must be a list of queries, found {'nothing in it' if tree == [] else 'something else'}"
        )
    return [_query(entry, f"query {number} of {path}") for number, entry in enumerate(tree, start=1)]


def _query(entry: Any, place: str) -> Query:
    if not isinstance(entry, Mapping):
        raise UserError(f"{place} is no object; write reference, target and txt")
    words = []
    for names in (REFERENCE, TARGET, TEXT):
        value = next((entry[name] for name in names if name in entry), None)
        # FashionIQ has two captions of each pair, which its benchmark joins.
        joined = " and ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        if not isinstance(joined, str) or not joined.strip():
            raise UserError(f"{place} has no {' or '.join(names)} that is a text; write one")
        words.append(joined)
    return Query(*words)
