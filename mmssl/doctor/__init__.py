"""Whether a machine and its shards are fit to train: what was found, and what to do about it.

`facts` and `shards` look, `checks` judges what they saw; nothing is written and nothing is sent.
"""

from mmssl.doctor.checks import examine
from mmssl.doctor.facts import Facts, gather
from mmssl.doctor.finding import Finding, State, worst
from mmssl.doctor.shards import examine_shards

__all__ = ["Facts", "Finding", "State", "examine", "examine_shards", "gather", "worst"]
