"""Checks of a machine and its shards before training: what was found, and how to fix it.

`machine` and `shards` collect facts, `checks` assesses them. Nothing is written or sent.
"""

from mmssl.apps.doctor.checks import Finding, State, examine, worst
from mmssl.apps.doctor.machine import SystemFacts, gather
from mmssl.apps.doctor.shards import examine_shards

__all__ = ["Finding", "State", "SystemFacts", "examine", "examine_shards", "gather", "worst"]
