"""What is handed to torchrun, and the end of the launcher."""

import signal
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import get_args_parser

from mmssl.distributed.launch import torchrun_arguments


def test_a_programs_own_options_reach_it() -> None:
    """torchrun's parser finds the module and passes on every word behind it, also those that its own options begin
    with or are called."""
    words = ["--data", "x", "--run", "runs/a", "--no-python", "--master", "1", "-m", "optim.lr=1"]
    parsed = get_args_parser().parse_args(torchrun_arguments(2, "mmssl.train", words))
    assert (parsed.module, parsed.nproc_per_node, parsed.standalone) == (True, "2", True)
    assert parsed.training_script == "mmssl.train"
    assert parsed.training_script_args == words


def test_the_end_of_the_launcher_stops_the_run(tmp_path: Path) -> None:
    """A process whose parent is killed gets SIGTERM, on which a run saves and stops."""
    out = tmp_path / "signal"
    child = (
        "import pathlib, signal, sys, time; from mmssl.distributed.launch import stop_with_parent; "
        f"signal.signal(signal.SIGTERM, lambda n, _: (pathlib.Path({str(out)!r}).write_text(str(n)), sys.exit())); "
        "stop_with_parent(0.05); print('ready', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        launcher.kill()
        # Ends when the child does, which holds the pipe too.
        assert launcher.stdout.read() == b""
    assert out.read_text() == str(int(signal.SIGTERM))
