"""Facts of a machine on which nothing is wrong."""

from typing import Any

from packaging.requirements import Requirement

from mmssl.apps.doctor import SystemFacts
from mmssl.apps.doctor.system import Device

GIB = 2**30
GPU = Device("A GPU", 80 * GIB, 78 * GIB, True)


def facts(**changes: Any) -> SystemFacts:
    """Those of a sound machine, some of them changed."""
    sound: dict[str, Any] = {
        "python": "3.12.3",
        "python_range": ">=3.11",
        "requirements": [Requirement("torch>=2.6"), Requirement("fsspec")],
        "extras": {"search": [Requirement("usearch")], "s3": [Requirement("s3fs")]},
        "installed": {"torch": "2.8.0", "torchvision": "0.23.0", "fsspec": "2025.1", "s3fs": "2025.1", "usearch": "2"},
        "vision_needs": [Requirement("numpy"), Requirement("torch==2.8.0")],
        "vision_error": None,
        "devices": [],
        "cuda_build": "12.8",
        "driver": False,
        "product_ms": {"fp32": 20.0, "bf16": 8.0},
        "shared_memory": 8 * GIB,
        "open_files": 65_536,
        "cores": 8,
        "quota": None,
        "threads": 8,
        "memory": 32 * GIB,
        "memory_limit": None,
        "folder": "/runs",
        "disk": 500 * GIB,
        "environment": {},
        "launch_file": None,
    }
    return SystemFacts(**{**sound, **changes})
