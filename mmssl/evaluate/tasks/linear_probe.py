"""A linear probe: logistic regression on frozen features."""

from mmssl.evaluate.classifiers import logistic_regression
from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.metrics.classification import evaluate_predictions, list_length
from mmssl.evaluate.task import Metrics, TaskContext
from mmssl.evaluate.tasks._classification import MAIN_METRICS, TrainedTask, report_classification

HELD_OUT = 0.2
"""Fraction of the training samples on which the regularisation is chosen."""


class LinearProbe(TrainedTask):
    """Logistic regression on all training samples."""

    name = "linear_probe"
    label = "linear probe"
    description = "Logistic regression on features, with the training split."
    main_metrics = MAIN_METRICS
    paired = True

    def run(self, context: TaskContext) -> Metrics:
        """Fit, and add the training samples and the chosen `c`."""
        train, train_labels, labels, names = context.labelled_training()
        rows = logistic_regression.hold_out(train_labels, HELD_OUT, seed=0)
        fitted, c = logistic_regression.probe(train.features, train_labels, rows, len(names))
        outcome = ranking.best_classes(fitted.scores(context.images.features), list_length(len(names)))
        metrics = report_classification(
            context,
            evaluate_predictions(outcome, labels, names),
            lambda features: fitted.scores(features).softmax(dim=1),
            probable=True,
        )
        return metrics | {"train_samples": len(train_labels), "c": c}
