"""Inspection of shards: a survey of all samples, a health report with advice, and single samples (`browse`)."""

from mmssl.data.health import browse
from mmssl.data.health.duplicates import KnownImages
from mmssl.data.health.report import HealthReport, check_health, draw_report
from mmssl.data.health.survey import Survey, read_known_images, survey_shards
from mmssl.data.shards.causes import account_of

__all__ = [
    "HealthReport",
    "KnownImages",
    "Survey",
    "account_of",
    "browse",
    "check_health",
    "draw_report",
    "read_known_images",
    "survey_shards",
]
