"""Inspection of shards: a survey of all samples, a health report with advice, and single samples (`browse`)."""

from mmssl.data.health import browse
from mmssl.data.health.report import HealthReport, check_health, draw_report
from mmssl.data.health.survey import Survey, survey_shards

__all__ = ["HealthReport", "Survey", "browse", "check_health", "draw_report", "survey_shards"]
