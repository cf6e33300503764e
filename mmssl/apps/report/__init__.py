"""One page about runs, and a card about a model."""

from mmssl.apps.report.card import card_beside, write_card
from mmssl.apps.report.page import write_report

__all__ = ["card_beside", "write_card", "write_report"]
