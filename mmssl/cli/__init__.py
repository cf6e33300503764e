"""The command line. Each module is a verb or a group of verbs; `common` holds what they share."""

from mmssl.cli.main import app, main, run_module

__all__ = ["app", "main", "run_module"]
