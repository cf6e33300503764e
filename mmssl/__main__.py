"""The `mmssl` command, also as `python -m mmssl` for `torchrun` and `accelerate launch`."""

import os
import signal
import sys


def main(module: str = "mmssl", *verb: str) -> None:
    """Run the command line, and end without waiting after a signal.

    Args:
        module: the module that was started.
        verb: words before the arguments, for a module that is one verb.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the command line handles signals itself: importing it takes seconds.
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from mmssl.cli import run_module

    try:
        run_module(module, *verb)
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:
            # Python would wait for threads, and their reads may stall.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise


if __name__ == "__main__":
    main()
