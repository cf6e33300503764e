"""From similarities to probabilities: softmax over labels, and more with the calibration.json of a model folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.metrics import calibration as metrics
from mmssl.files import write_json

FILE = "calibration.json"
HEAD_FILE = "head_calibration.json"
"""The calibration of a fine-tuned classifier, beside that of its model."""
Positive = Annotated[float, Field(gt=0)]


class Calibration(BaseModel):
    """From cosine similarities, or the logits of a classifier, to probabilities. `mmssl calibrate` fits it.

    The probabilities of a match and of no label suppose that it is as likely as not beforehand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    data: str
    """Name of the held-out data."""
    samples: Annotated[int, Field(ge=1)]
    """Samples that it was fitted on."""
    label_scale: Positive
    """Factor from similarities, bent by `label_curve`, to the logits of labels."""
    label_curve: Annotated[float, Field(ge=metrics.CURVES[0], le=metrics.CURVES[1])] = 0.0
    """Steepness at high similarities; 0 is temperature scaling."""
    match_scale: float
    match_bias: float
    """An image and a text match with probability sigmoid(match_scale * similarity + match_bias)."""
    known_scale: float
    known_bias: float
    """One of the labels fits with probability sigmoid(known_scale * familiarity + known_bias)."""
    coverage: Annotated[float, Field(gt=0, lt=1)]
    """Probability with which the thresholds let the right one pass."""
    match_threshold: float
    """Similarity that an image and its text reach with probability `coverage`."""
    label_threshold: float
    """Probability among the labels that the right one reaches with probability `coverage`."""
    metrics: dict[str, Any]
    """Measured on other samples than it was fitted on."""

    def label_probabilities(self, similarities: Tensor) -> Tensor:
        """Probabilities among the labels, given that one fits, float64 [N, C]; each row sums to 1."""
        return self.label_logits(similarities).softmax(dim=1)

    def label_logits(self, similarities: Tensor) -> Tensor:
        """Logits of the labels, float64 [N, C]."""
        return self.label_scale * metrics.bend(similarities.double(), self.label_curve)

    def none_probability(self, similarities: Tensor) -> Tensor:
        """Probability that none of the labels fits, float64 [N], from similarities [N, C]."""
        familiarity = metrics.familiarity(metrics.bend(similarities.double(), self.label_curve), self.label_scale)
        return 1 - metrics.Sigmoid(self.known_scale, self.known_bias)(familiarity)

    def match_probability(self, similarities: Tensor) -> Tensor:
        """Probability that an image and a text match, float64 of the same shape."""
        return metrics.Sigmoid(self.match_scale, self.match_bias)(similarities)


@dataclass(frozen=True)
class Verdict:
    """What a calibrated model says beyond the probabilities among the labels."""

    none: float
    """Probability that none of the labels fits, if that is as likely as not beforehand."""
    matches: dict[str, float]
    """Label -> probability that the image matches it, whatever the other labels are; if that is as likely as not
    beforehand."""
    likely: list[str]
    """The labels that hold the right one with probability `coverage`, if one of them is right."""
    coverage: float


class LabelProbabilities(dict[str, float]):
    """Label -> probability among the labels, highest first."""

    verdict: Verdict | None = None
    """None if the model is not calibrated."""


def decide(
    labels: Sequence[str], similarities: Tensor, logit_scale: float, calibration: Calibration | None
) -> list[LabelProbabilities]:
    """For each row of similarities [N, C] label -> probability, with a verdict if the model is calibrated.

    Args:
        logit_scale: the model's factor from similarities to logits; a calibration has its own.
    """
    if calibration is None:
        return label_probabilities(labels, logit_scale * similarities)
    found = label_probabilities(labels, calibration.label_logits(similarities))
    nones, matches = calibration.none_probability(similarities), calibration.match_probability(similarities)
    for probabilities, none, row in zip(found, nones.tolist(), matches.tolist(), strict=True):
        by_label = dict(zip(labels, row, strict=True))
        probabilities.verdict = Verdict(
            none=none,
            matches={label: by_label[label] for label in probabilities},
            likely=[label for label, p in probabilities.items() if p >= calibration.label_threshold],
            coverage=calibration.coverage,
        )
    return found


def label_probabilities(labels: Sequence[str], logits: Tensor) -> list[LabelProbabilities]:
    """For each row of logits [N, C], label -> probability, highest first."""
    return [
        LabelProbabilities(
            {labels[index]: float(row[index]) for index in row.argsort(descending=True, stable=True).tolist()}
        )
        for row in logits.double().softmax(dim=1)
    ]


def read_calibration(folder: Path, name: str = FILE) -> Calibration | None:
    """The calibration in a model folder, in the file of this name; None without one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / name
    if not path.is_file():
        return None
    try:
        return Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        place = "" if first is None else f"{'.'.join(map(str, first['loc']))}: "
        reason = str(error) if first is None else first["msg"]
        raise UserError(
            f"{path} is damaged ({place}{' '.join(reason.split())[:100]}); remove it, and run: mmssl calibrate"
        ) from None


def write_calibration(folder: Path, found: Calibration | None, name: str = FILE) -> None:
    """Write a calibration into a model folder; None removes that of earlier weights."""
    if found is None:
        (folder / name).unlink(missing_ok=True)
    else:
        write_json(folder / name, found.model_dump(mode="json"))
