"""Whether a machine and its shards are fit to train: what was found, and what to do about it.

`facts` and `shards` look, `checks` judges what they saw; nothing is written and nothing is sent.
"""

from mmssl.apps.doctor.checks import examine
from mmssl.apps.doctor.finding import Finding, State, worst
from mmssl.apps.doctor.shards import examine_shards
from mmssl.apps.doctor.system import SystemFacts, gather

__all__ = ["Finding", "State", "SystemFacts", "examine", "examine_shards", "gather", "worst"]
