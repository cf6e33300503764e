"""The report page of one or several runs, and the model card of a run."""

from mmssl.apps.report.card import card_beside, write_card
from mmssl.apps.report.page import write_report

__all__ = ["card_beside", "write_card", "write_report"]
