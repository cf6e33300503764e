"""Peak memory of a part of a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmssl.system import peak_memory


@contextmanager
def grows_less_than(limit: int) -> Iterator[None]:
    """Fail if the process holds `limit` more bytes at any time in the block than at its start. Linux only; elsewhere
    an earlier peak may hide a later one."""
    record = Path("/proc/self/clear_refs")
    if record.is_file():
        record.write_text("5")  # the record of peak memory begins anew
    before = peak_memory()
    yield
    assert peak_memory() - before < limit
