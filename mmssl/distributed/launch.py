"""Start of several CPU processes, which `accelerate launch --cpu --num_processes N` fails to do."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import psutil

from mmssl import system
from mmssl.errors import UserError


def missing_processes() -> int | None:
    """Number of processes requested from an enclosing `accelerate launch --cpu` that started only one; None otherwise.

    Without MPI, Accelerate (seen in 1.15) silently starts one process for `--cpu --num_processes N`. It sets
    MASTER_ADDR only if N > 1, and a launcher that does start N processes sets WORLD_SIZE.

    Raises:
        UserError: processes are missing and their number is unknown.
    """
    environment = os.environ
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    launched_by_mpi = any(
        key in environment for key in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if not on_cpu or "MASTER_ADDR" not in environment or launched_by_mpi:
        return None
    parent = psutil.Process().parent()
    count = _num_processes(parent.cmdline() if parent is not None else [])
    if count is None:
        raise UserError(
            "accelerate launch --cpu starts one process only; use: torchrun --nproc_per_node N -m mmssl train CONFIG"
        )
    return count


def torchrun_arguments(count: int, module: str, arguments: Sequence[str]) -> list[str]:
    """Arguments with which torchrun runs `python -m MODULE ARGUMENTS` as `count` processes on this machine."""
    # Without `--`, torchrun reads `--run` as an abbreviation of its own options, even after the module.
    return ["--standalone", "--nproc_per_node", str(count), "-m", "--", module, *arguments]


def start_processes(count: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` as `count` processes on this machine.

    Exits with the smallest code of the failed processes, or with 128 plus the number of the signal that stopped it.
    """
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stop_with_parent()
    # The signals that torchrun passes on to the processes; its own list lacks those of schedulers.
    names = ",".join(signal.Signals(number).name for number in system.stop_signals())
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", f"{names},SIGQUIT")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(system.allowed_cores()) // count)))
    try:
        torch.distributed.run.main(torchrun_arguments(count, module, arguments))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        sys.exit(min(codes, default=1))
    except SignalException as error:  # the processes got it too, and have saved
        sys.exit(128 + error.sigval)


def stop_with_parent(seconds: float = 0.5) -> None:
    """Send this process SIGTERM when its parent has ended, which is looked up every so many seconds.

    `accelerate launch` ends on a signal without passing it on; its run would go on unseen.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch of the launcher", daemon=True).start()


def _num_processes(command: Sequence[str]) -> int | None:
    for i, word in enumerate(command):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or (command[i + 1] if i + 1 < len(command) else "")
            return int(value) if value.isdecimal() else None
    return None
