"""Facts of a machine without problems."""

from typing import Any

from mmssl.apps.doctor import SystemFacts
from mmssl.apps.doctor.machine import Device

GIB = 2**30
GPU = Device("A GPU", 80 * GIB, 78 * GIB, True)


def facts(**changes: Any) -> SystemFacts:
    """Facts of a machine without problems, with some changes."""
    sound: dict[str, Any] = {
        "versions": {"python": "3.12.3", "torch": "2.8.0", "torchvision": "0.23.0"},
        "unmet": {},
        "vision_unmet": {"pillow>=20": "12"},
        "vision_error": None,
        "extras": {"search": True, "parquet": True},
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
