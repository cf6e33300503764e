"""Files on the file systems of fsspec: s3://, gs:// and all others with a driver.

Stateless: fsspec caches one file system per process. Its listing cache is invalidated before each lookup, because
listings can be stale.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec

from mmssl.data.storage.http import ReadInterruptedError, RemoteFile, RemoteFileMissingError
from mmssl.errors import UserError

_PIECE = 8 << 20
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Protocol -> extra of mmssl that installs its driver."""


@contextmanager
def open_fsspec(url: str, start: int, stop: int | None) -> Iterator[RemoteFile]:
    """A file from byte `start` to `stop`, or to its end.

    Raises:
        UserError: the file is missing or access is denied, or no driver is installed.
        ReadInterruptedError, OSError: a temporary failure.
    """
    filesystem, path = _driver(url)
    try:
        with _retryable():
            filesystem.invalidate_cache(path)
            info = filesystem.info(path)
    except FileNotFoundError:
        raise RemoteFileMissingError(f"{url} does not exist; correct the address") from None
    except PermissionError as error:
        raise RemoteFileMissingError(f"{url} cannot be read ({_line(error)}); check your access") from None
    if info.get("size") is None:
        raise UserError(f"{url}: its driver does not report its size; copy the shards to a disk")
    tag, size = info.get("ETag") or info.get("etag"), int(info["size"])
    end = size if stop is None else stop

    def pieces() -> Iterator[bytes]:
        for position in range(start, end, _PIECE):
            with _retryable():
                piece = filesystem.cat_file(path, start=position, end=min(end, position + _PIECE))
            yield piece

    yield RemoteFile(start, size, None if tag is None else str(tag), pieces())


def write_fsspec(url: str, content: bytes) -> None:
    """Write a file.

    Raises:
        UserError: the file system cannot be written.
    """
    try:
        filesystem, path = _driver(url)
        with _retryable():
            filesystem.pipe_file(path, content)
    except (OSError, ReadInterruptedError) as error:
        raise UserError(f"{url} cannot be written ({_line(error)}); check your access") from None


def list_fsspec(pattern: str) -> list[str]:
    """The files that match a glob, sorted.

    Raises:
        UserError: the file system cannot be listed.
    """
    try:
        filesystem, root = _driver(pattern)
        with _retryable():
            return sorted(str(filesystem.unstrip_protocol(match)) for match in filesystem.glob(root))
    except (OSError, ReadInterruptedError) as error:
        raise UserError(f"{pattern} cannot be listed ({_line(error)}); check the address and your access") from None


def _driver(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: no driver is installed, or the URL is a chain, by which the name of a file could open another one.
    """
    if "::" in url:
        raise UserError(f"{url} chains file systems with '::', which is not supported; rename or copy the file")
    try:
        with _retryable(ImportError, ValueError):
            filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        remedy = f"pip install 'mmssl[{_EXTRAS[protocol]}]'" if protocol in _EXTRAS else "install it, or copy the files"
        raise UserError(f"{url}: no driver for {protocol}:// ({_line(error)}); {remedy}") from None
    return filesystem, path


@contextmanager
def _retryable(*permanent: type[Exception]) -> Iterator[None]:
    """Map driver errors: all can be retried, except missing files, denied access and the types in `permanent`."""
    try:
        yield
    except Exception as error:
        # gcsfs does not raise PermissionError; its message or HTTP status shows denied access.
        if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, 403):
            raise PermissionError(_line(error)) from error
        if isinstance(error, (OSError, *permanent)):
            raise
        raise ReadInterruptedError(f"{type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
