"""Wrong captions and labels, found by a model: ranked, shown, and corrected in a table that is read back."""

from mmssl.apps.suspects.ranking import Suspect, rank_samples
from mmssl.apps.suspects.scan import scan, sheet
from mmssl.apps.suspects.table import read_table, write_table

__all__ = ["Suspect", "rank_samples", "read_table", "scan", "sheet", "write_table"]
