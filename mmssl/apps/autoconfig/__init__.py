"""Training on data in any form: it is packed, settings are chosen for it and the machine, and the model is trained."""

from mmssl.apps.autoconfig.choices import Choice, choose
from mmssl.apps.autoconfig.inputs import Machine, Pairs, Start
from mmssl.apps.autoconfig.preparation import Source, is_shards, resolve_shards
from mmssl.apps.autoconfig.training import after_training, next_commands, start_from, train_on

__all__ = [
    "Choice",
    "Machine",
    "Pairs",
    "Source",
    "Start",
    "after_training",
    "choose",
    "is_shards",
    "next_commands",
    "resolve_shards",
    "start_from",
    "train_on",
]
