"""K-means on embeddings: the agreement of its clusters with the classes."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.metrics import clustering
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.rng import generator
from mmssl.stats import Interval, Rows, bootstrap
from mmssl.types import Sample

STARTS = 10
"""Random starts of k-means; the one with the smallest distances is kept."""
SHUFFLES = 20
"""Random orders of the clusters, whose mean V-measure is that of chance."""


class Clustering(Task):
    """As many clusters as classes, found without labels."""

    name = "clustering"
    label = "clustering"
    description = "K-means with as many clusters as classes, compared with the classes."
    main_metrics = ("v_measure", "adjusted_rand")

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Cluster, and write clusters.csv.

        Raises:
            UserError: there is one class only, or scikit-learn is missing.
        """
        names, targets = class_indices(context.dataset, context.images.samples)
        present, labels = np.unique(targets.numpy(), return_inverse=True)
        if len(present) < 2:
            raise UserError(f"task 'clustering' of dataset {context.name!r} needs two classes; it has one")
        clusters = find_clusters(context.images.features, len(present))
        shape = len(present), len(present)

        def measure(rows: Rows) -> dict[str, float]:
            counts = clustering.count_table(labels[rows], clusters[rows], shape)
            return {"v_measure": clustering.v_measure(counts), "adjusted_rand": clustering.adjusted_rand(counts)}

        if context.folder is not None:
            rows = zip(context.images.samples, targets.tolist(), clusters.tolist(), strict=True)
            lines = ((sample.shard, sample.key, names[label], cluster) for sample, label, cluster in rows)
            write_csv(context.folder / "clusters.csv", ("shard", "key", "label", "cluster"), lines)
        rng = generator(0, "clusters")
        shuffled = [clustering.count_table(labels, rng.permutation(clusters), shape) for _ in range(SHUFFLES)]
        by_chance = float(np.mean([clustering.v_measure(counts) for counts in shuffled]))
        found = measure(np.arange(len(labels)))
        return {
            **found,
            "samples": len(labels),
            "classes": len(present),
            **list_intervals(_centred(found, bootstrap(measure, len(labels), strata=labels.astype(np.int64)))),
            **list_baselines({"v_measure": {"chance": by_chance}, "adjusted_rand": {"chance": 0.0}}),
        }


def _centred(found: dict[str, float], intervals: dict[str, Interval]) -> dict[str, Interval]:
    """Intervals of the same widths around the values.

    Samples that a resample repeats fall into one cluster, so resamples agree more than the samples do: the percentiles
    lie too high, by more than their width where there are many clusters.
    """
    halves = {name: (high - low) / 2 for name, (low, high) in intervals.items()}
    return {name: (found[name] - half, found[name] + half) for name, half in halves.items()}


def find_clusters(features: Tensor, count: int, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of each row, int64 [N], by scikit-learn's k-means.

    Args:
        features: unit vectors, [N, D].

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError("task 'clustering' needs scikit-learn: pip install 'mmssl[report]'") from None
    found = KMeans(count, n_init=STARTS, random_state=seed).fit_predict(features.numpy())
    return np.asarray(found, dtype=np.int64)
