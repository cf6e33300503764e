"""Zero-shot classification with an ensemble of prompts per class (Radford et al. 2021, section 3.1.4)."""

from torch import Tensor

from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.metrics import calibration, classification, ranking
from mmssl.evaluate.task import Metrics, Task, TaskContext
from mmssl.evaluate.tasks._classification import MAIN_METRICS, report_classification
from mmssl.types import Sample


class ZeroShot(Task):
    """Classify images by the class names."""

    name = "zero_shot"
    label = "zero-shot classification"
    description = "Classification by prompts of the class names, without training."
    main_metrics = MAIN_METRICS
    paired = True

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Classify; with a logit scale, also measure the calibration error of the probabilities."""
        scale, curve = context.logit_scale, context.logit_curve
        names, labels = class_indices(context.dataset, context.images.samples)
        weights = context.class_weights(names)
        found = classify(context.images.features, weights, labels, names, scale, curve)

        def scores(features: Tensor) -> Tensor:
            similarity = features @ weights.T
            return similarity if scale is None else (scale * calibration.bend(similarity, curve)).softmax(dim=1)

        return report_classification(context, found, scores, probable=scale is not None)


def classify(
    features: Tensor,
    weights: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    logit_scale: float | None = None,
    logit_curve: float = 0.0,
) -> classification.Classification:
    """Classify features [N, D] by the class vectors [C, D], and compare with the labels, int64 [N].

    Args:
        logit_scale: factor from similarities to logits, for the calibration error. None: leave that out.
        logit_curve: of calibrated logits.
    """
    outcome = ranking.top_k(features, weights, classification.list_length(len(weights)))
    confidence = None if logit_scale is None else ranking.confidence(features, weights, logit_scale, logit_curve)
    return classification.evaluate_predictions(outcome, labels, names, confidence)
