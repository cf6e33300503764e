"""Ablation of objectives: train mixes with equal compute and equal seeds, and compare them on the same suites."""

from mmssl.apps.ablate.mixes import read_plan_file, request_mixes
from mmssl.apps.ablate.plan import AblationPlan, Budget, make_plan
from mmssl.apps.ablate.report import write_report
from mmssl.apps.ablate.scheduler import make_slots, run_all, threads_per_run, visible_gpus

__all__ = [
    "AblationPlan",
    "Budget",
    "make_plan",
    "make_slots",
    "read_plan_file",
    "request_mixes",
    "run_all",
    "threads_per_run",
    "visible_gpus",
    "write_report",
]
