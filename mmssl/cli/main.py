"""The `mmssl` command. Its verbs are the modules beside this one: each registers itself by `verb` or `group`."""

import errno
import io
import os
import pkgutil
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import typer

from mmssl import system
from mmssl.cli.common import VERBS
from mmssl.errors import StopRequested, UserError, clean_streams

SAME_SECONDS = 2.0
"""Signals closer together than this, in seconds, are one request."""
PATIENCE_SECONDS = 8.0
"""Time for a verb to end after a signal, before the process ends without it."""
REMEDIES = {
    errno.EACCES: "change its permissions, or give another place",
    errno.EPERM: "change its permissions, or give another place",
    errno.EROFS: "give another place",
    errno.ENOSPC: "free some space, or give another place",
    errno.EDQUOT: "free some space, or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give another place",
    errno.EISDIR: "give a file",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
}
"""Remedies for errors of the operating system that no verb handles itself."""
# typer has its own copy of click since 0.26, where this class has no public name.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _escape_output()
    with clean_streams():
        _run(words)


def _run(words: list[str]) -> NoReturn:
    stop = _Stop()
    try:
        with stop, system.on_stop_signals(stop):
            code = app(args=words, prog_name="mmssl", standalone_mode=False)
        sys.exit(code if stop.number is None else stop.finish())
    except UserError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(_usage_message(error))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = "a file" if error.filename is None else error.filename
        _fail(f"{place} cannot be used: {error.strerror}; {REMEDIES[error.errno]}")


def _escape_output() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing after the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Stop:
    """Handler of signals to stop: the first ends the verb, and the process soon after; a later one ends it at once.

    While a training runs, its own handler stands in: it saves first.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._when = 0.0
        self._ended = Event()
        # The thread that ends the process stands ready: starting one in a handler may wait for a lock for ever.
        self._signalled, self._writing = os.pipe()
        Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> "_Stop":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        os.close(self._writing)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if time.monotonic() - self._when > SAME_SECONDS:
                system.leave(self.number)
            return
        self.number, self._when = number, time.monotonic()
        os.write(self._writing, b"!")
        raise StopRequested(number)

    def finish(self) -> int:
        """Say what ended the verb; returns the exit code."""
        assert self.number is not None
        print(f"stopped by signal {self.number}", file=sys.stderr)
        return 128 + self.number

    def _watch(self) -> None:
        signalled = os.read(self._signalled, 1)
        os.close(self._signalled)
        if signalled and not self._ended.wait(PATIENCE_SECONDS):
            assert self.number is not None
            system.leave(self.number)


def run_module(module: str, *verb: str) -> None:
    """Run `python -m MODULE ARGUMENTS`, in as many processes as an enclosing `accelerate launch --cpu` asks for.

    Args:
        verb: words before the arguments, for a module that is one verb.
    """
    if "ACCELERATE_USE_CPU" in os.environ:
        from mmssl.distributed import missing_processes, start_processes

        count = missing_processes()
        if count is not None:
            start_processes(count, module, sys.argv[1:])
            return
    main([*verb, *sys.argv[1:]])


def _print_version(wanted: bool) -> None:
    from importlib.metadata import version

    if wanted:
        print(f"mmssl {version('mmssl')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options in front of the verb."""


def _make_app() -> typer.Typer:
    """The command line with every verb and group that a module of this folder registers."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        import_module(f"mmssl.cli.{module.name}")
    app = typer.Typer(
        help="Train image-text dual encoders on images with captions, evaluate them, and use them.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for _, name, run in sorted(VERBS, key=lambda entry: entry[0]):
        if isinstance(run, typer.Typer):
            app.add_typer(run, name=name)
        else:
            app.command(name)(run)
    return app


app = _make_app()


def _usage_message(error: Any) -> str:
    """One line on a wrong verb, option or argument, with the command that shows the right ones."""
    words = error.format_message()
    if words.startswith("Usage:"):  # a verb without any word shows its help
        print(words, file=sys.stderr)
        sys.exit(2)
    return f"{words[:1].lower()}{words[1:].rstrip('.')}; see: {error.ctx.command_path} --help"


def _fail(line: str) -> NoReturn:
    """Print the error and exit, even while other ranks wait for this one in a collective."""
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' (process {rank})'}: {line}", file=sys.stderr)
    sys.exit(2)
