"""Inspection of shards: a survey of all samples, a health report with advice, and single samples (`browse`)."""

from mmssl.data.health import browse
from mmssl.data.health.duplicates import KnownImages
from mmssl.data.health.report import HealthReport, check_health, draw_report
from mmssl.data.health.survey import Survey, read_known_images, survey_shards

__all__ = [
    "HealthReport",
    "KnownImages",
    "Survey",
    "browse",
    "check_health",
    "draw_report",
    "read_known_images",
    "survey_shards",
]
