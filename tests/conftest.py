"""Fixtures of all tests, and the `core` marker."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers with as many threads as cores wait for each other at every operation.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch

from mmssl import precision
from mmssl.models import DualEncoder, build_dual_encoder
from tests.helpers.browser import browser
from tests.helpers.models import tiny_model_config

__all__ = ["browser"]

for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    # A shell starts background jobs with these ignored, and so would be the processes that tests send them to.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

TESTS = Path(__file__).parent
CORE = (
    "apps/ablate/test_plan.py",
    "apps/autoconfig/test_choose.py",
    "config",
    "data/loading/test_bad_samples.py",
    "data/order",
    "data/shards",
    "data/sources/test_patterns.py",
    "data/test_hostile_tar.py",
    "data/test_quality.py",
    "data/transforms",
    "evaluate/classifiers/test_logistic_regression.py",
    "evaluate/metrics",
    "evaluate/test_compare.py",
    "evaluate/test_prompts.py",
    "inference",
    "losses/test_blockwise.py",
    "losses/test_common.py",
    "losses/test_contrastive.py",
    "losses/test_groups.py",
    "losses/test_logits.py",
    "losses/test_moco.py",
    "losses/test_nt_xent.py",
    "losses/test_prediction.py",
    "losses/test_siglip.py",
    "objectives/test_mix_spec.py",
    "objectives/test_task.py",
    "test_plotting.py",
    "test_stats.py",
    "test_structure.py",
    "train/test_optim.py",
    "train/test_step_metrics.py",
)
"""Folders and files whose fast tests get the marker `core`: pure functions, without training, network or processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the core tests."""
    for item in items:
        path = item.path.relative_to(TESTS).as_posix()
        core = any(path == entry or path.startswith(f"{entry}/") for entry in CORE)
        if core and not any(item.get_closest_marker(name) for name in ("slow", "gpu", "browser")):
            item.add_marker("core")


@pytest.fixture(autouse=True)
def _features_stay_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `mmssl eval` keeps by default goes to a folder of the tests, not to the user's."""
    monkeypatch.setattr(
        "mmssl.evaluate.feature_cache.default_folder", lambda: tmp_path_factory.getbasetemp() / "features"
    )


@pytest.fixture
def tiny_encoder() -> DualEncoder:
    """A dual encoder with fixed random weights and a vocabulary of 100."""
    torch.manual_seed(0)
    return build_dual_encoder(tiny_model_config(), vocab_size=100, pad_id=0)


@pytest.fixture(autouse=True)
def _verbs_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and embeddings of verbs must not depend on which format this processor multiplies fastest."""
    choice, real = precision.PrecisionChoice("fp32", "the tests compare figures"), precision.choose_precision

    def chosen(device_type: str, *measure: Any) -> precision.PrecisionChoice:
        return real(device_type, *measure) if measure else choice

    monkeypatch.setattr(precision, "choose_precision", chosen)
