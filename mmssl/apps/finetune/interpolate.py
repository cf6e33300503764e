"""Weights between those of two models (WiSE-FT, Wortsman et al. 2022)."""

import copy
from itertools import zip_longest

from torch import Tensor

from mmssl.apps.finetune.classifier import Classifier
from mmssl.errors import UserError
from mmssl.evaluate.classifiers.fine_tuning import mixed
from mmssl.inference import Model

_SHOWN = 3


def interpolate(first: Model, second: Model, alpha: float) -> Model:
    """The model with the weights (1 - alpha) * first + alpha * second; tokenizer and configuration are the first's.

    It is of use where both come from one pretrained model: between models that were trained apart, there is none.

    Raises:
        UserError: they differ in more than their weights; says in what.
    """
    differences = [*_settings(first, second), *_weights(first, second)]
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"these models are not of one kind, so nothing lies between them: {'; '.join(differences[:_SHOWN])}{more}"
        )
    encoder = copy.deepcopy(first.encoder)
    others = {name: tensor.to(first.device) for name, tensor in second.encoder.state_dict().items()}
    encoder.load_state_dict(mixed(first.encoder.state_dict(), others, alpha))
    notes = [f"(1 - {alpha:g}) * first + {alpha:g} * second"]
    return Model(encoder, first.tokenizer, first.config, notes)


def interpolate_classifiers(first: Classifier, second: Classifier, alpha: float) -> Classifier:
    """The classifier whose model and head lie between those of two with the same labels.

    Raises:
        UserError: the labels differ, or the models do in more than their weights.
    """
    if first.labels != second.labels:
        pairs = zip_longest(first.labels, second.labels)
        place, (one, two) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
        raise UserError(
            f"these classifiers have other labels, so nothing lies between them: label {place} is {one!r} in the "
            f"first, {two!r} in the second"
        )
    model = interpolate(first.model, second.model, alpha)
    weight, bias = ((1 - alpha) * a + alpha * b for a, b in ((first.weight, second.weight), (first.bias, second.bias)))
    return Classifier(model, first.labels, weight, bias, {"notes": model.notes})


def _weights(first: Model, second: Model) -> list[str]:
    """Weights that one of them lacks, or that have another shape."""
    one, two = first.encoder.state_dict(), second.encoder.state_dict()
    return [
        f"{name} is {_shape(one.get(name))} in the first, {_shape(two.get(name))} in the second"
        for name in sorted(one.keys() | two.keys())
        if _shape(one.get(name)) != _shape(two.get(name))
    ]


def _settings(first: Model, second: Model) -> list[str]:
    """What changes a model's meaning without changing a weight's shape."""
    one, two = ({**vars(m.view), "statistics": m.vision.statistics, "pooling": m.text.pooling} for m in (first, second))
    found = [f"{key} is {one[key]} in the first, {two[key]} in the second" for key in one if one[key] != two[key]]
    if first.tokenizer.vocabulary != second.tokenizer.vocabulary:
        found.append("the tokenizers have other vocabularies")
    return found


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
