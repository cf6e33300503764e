"""Linear probes on a few samples of each class."""

import numpy as np
from numpy.typing import NDArray

from mmssl.evaluate.classifiers import logistic_regression
from mmssl.evaluate.task import Metrics, TaskContext, list_intervals, write_outcomes
from mmssl.evaluate.tasks._classification import TrainedTask
from mmssl.stats import means

SEEDS = 5
"""Random draws of training samples."""


class FewShot(TrainedTask):
    """Logistic regression on k samples per class, for each k of 1, 2, 4, 8, 16 that every class has."""

    name = "few_shot"
    label = "linear probe with few labels"
    description = "Logistic regression on 1 to 16 samples per class of the training split."
    main_metrics = ("acc1@1",)
    paired = True

    def run(self, context: TaskContext) -> Metrics:
        """`acc1@k` is the mean over draws, `std@k` their spread."""
        train, train_labels, labels, names = context.labelled_training()
        right: dict[str, NDArray[np.float64]] = {}
        spread: dict[str, float] = {}
        for k in logistic_regression.available_shots(train_labels):
            draws = []
            for seed in range(SEEDS):
                if context.progress is not None:
                    context.progress(f"few-shot, {k} per class, draw", seed + 1)
                rows = logistic_regression.draw_shots(train_labels, k, seed)
                fitted, _ = logistic_regression.probe(train.features, train_labels, rows, len(names), refit=False)
                draws.append((fitted.scores(context.images.features).argmax(1) == labels).numpy())
            right[f"acc1@{k}"] = np.mean(draws, axis=0)
            spread[f"std@{k}"] = float(np.std([d.mean() for d in draws], ddof=1))
        write_outcomes(context, context.images.samples, right)
        metrics, intervals = means(right)
        counts = {"classes": len(names), "samples": len(labels), "draws": SEEDS}
        return metrics | spread | counts | list_intervals(intervals)
