"""Published suites of datasets, by name, and their folders on the Hugging Face hub."""

from mmssl.evaluate.published.suites import SUITES, Published, Suite, download, find_suite

__all__ = ["SUITES", "Published", "Suite", "download", "find_suite"]
