"""Peak memory of this process."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most memory this process held so far.

    Linux's `ru_maxrss` would count what the parent held when it started this process; the kernel's mark of
    this process alone does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        mark = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(mark.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let Linux's mark begin again at what is held now; elsewhere the peak stays."""
    marks = Path("/proc/self/clear_refs")
    if marks.is_file():
        marks.write_text("5")
