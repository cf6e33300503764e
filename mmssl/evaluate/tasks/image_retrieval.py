"""Search of images by images of the same class (Musgrave et al. 2020)."""

import numpy as np
import torch

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.metrics import neighbours
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals, write_outcomes
from mmssl.stats import means
from mmssl.types import Sample


class ImageRetrieval(Task):
    """Each image searches the others: those of its class should come first."""

    name = "image_retrieval"
    label = "image retrieval by class"
    description = "Search of images by images: the nearest ones should have the same class."
    main_metrics = ("recall@1", "map@r")
    paired = True

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Search every image whose class has others.

        Raises:
            UserError: no two images share a class.
        """
        _, labels = class_indices(context.dataset, context.images.samples)
        if int(labels.bincount().max()) < 2:
            raise UserError(
                f"task 'image_retrieval' of dataset {context.name!r} needs a class with two images; no two share one"
            )
        found = neighbours.search_same_label(context.images.features, labels)
        values = {"recall@1": found.first.double().numpy(), "map@r": found.average_precision.numpy()}
        metrics, intervals = means(values, strata=labels[found.queries].numpy().astype(np.int64))
        first, mean = neighbours.precision_by_chance(found.right, len(labels) - 1)
        write_outcomes(context, [context.images.samples[row] for row in found.queries.tolist()], values)
        return {
            **metrics,
            "queries": len(found.queries),
            "samples": len(labels),
            "classes": len(torch.unique(labels)),
            **list_intervals(intervals),
            **list_baselines({"recall@1": {"chance": first}, "map@r": {"chance": mean}}),
        }
