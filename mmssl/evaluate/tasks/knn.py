"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4)."""

import torch
from torch import Tensor

from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.metrics.classification import evaluate_predictions, list_length
from mmssl.evaluate.task import Metrics, TaskContext
from mmssl.evaluate.tasks._classification import MAIN_METRICS, TrainedTask, report_classification

NEIGHBOURS = 20
TEMPERATURE = 0.07


class NearestNeighbours(TrainedTask):
    """Votes of the nearest training images."""

    name = "knn"
    label = "nearest neighbours"
    description = "Votes of the 20 nearest images of the training split."
    main_metrics = MAIN_METRICS
    paired = True

    def run(self, context: TaskContext) -> Metrics:
        """Classify, and add the training samples and the number of neighbours `k`."""
        train, train_labels, labels, names = context.labelled_training()
        k = min(NEIGHBOURS, len(train_labels))

        def scores(features: Tensor) -> Tensor:
            votes = knn_scores(features, train.features, train_labels, len(names), k=k)
            return votes / votes.sum(dim=1, keepdim=True)

        outcome = ranking.best_classes(scores(context.images.features), list_length(len(names)))
        found = evaluate_predictions(outcome, labels, names)
        metrics = report_classification(context, found, scores, probable=True)
        return metrics | {"train_samples": len(train_labels), "k": k}


def knn_scores(
    features: Tensor,
    train: Tensor,
    labels: Tensor,
    classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Votes for each class, [N, C]: each of the k most similar training rows votes exp(similarity / temperature).

    Args:
        features: unit vectors, [N, D]. train: unit vectors, [M, D].
        labels: of the training rows, int64 [M].
        k: at most M.
    """
    assert 1 <= k <= len(train)
    votes = []
    for block in ranking.blocks(features, len(train)):
        nearest = (block @ train.T).topk(k, dim=1)
        # Relative to the nearest: the same order without overflow.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(block), classes).scatter_add_(1, labels[nearest.indices], weights))
    return torch.cat(votes)
