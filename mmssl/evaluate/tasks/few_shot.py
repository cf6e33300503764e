"""Linear probes on a few samples of each class."""

import numpy as np
from numpy.typing import NDArray

from mmssl.evaluate.classifiers import logistic_regression
from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.task import DRAWS, Metrics, TaskContext, list_baselines, list_intervals, write_outcomes
from mmssl.evaluate.tasks._classification import TrainedTask
from mmssl.files import write_csv
from mmssl.stats import means, over_draws

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
        by_draw: dict[str, list[float]] = {}
        for k in logistic_regression.available_shots(train_labels):
            draws = []
            for seed in range(SEEDS):
                if context.progress is not None:
                    context.progress(f"few-shot, {k} per class, draw", seed + 1)
                rows = logistic_regression.draw_shots(train_labels, k, seed)
                fitted, _ = logistic_regression.probe(train.features, train_labels, rows, len(names), refit=False)
                draws.append((fitted.scores(context.images.features).argmax(1) == labels).numpy())
            right[f"acc1@{k}"] = np.mean(draws, axis=0)
            by_draw[f"acc1@{k}"] = [float(draw.mean()) for draw in draws]
        write_outcomes(context, context.images.samples, right)
        if context.folder is not None:
            table = zip(range(SEEDS), *by_draw.values(), strict=True)
            write_csv(context.folder / DRAWS, ("draw", *by_draw), table)
        metrics, over_samples = means(right, labels.numpy())
        intervals = {name: over_draws(over_samples[name], draws, (0, 1)) for name, draws in by_draw.items()}
        spread = {name.replace("acc1", "std"): float(np.std(draws, ddof=1)) for name, draws in by_draw.items()}
        counts = {"classes": len(names), "samples": len(labels), "draws": SEEDS}
        known = list_baselines(baselines.of_classes(labels, list(metrics)))
        return metrics | spread | counts | list_intervals(intervals) | known
