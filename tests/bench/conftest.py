"""The toy tower of the tests of explanations."""

from tests.apps.explain.conftest import one_patch

__all__ = ["one_patch"]
