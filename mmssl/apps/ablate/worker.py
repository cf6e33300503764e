"""One run of an ablation in its own process: `python -m mmssl.apps.ablate.worker CONFIG RECORD [--resume]`.

The ablation holds the other end of its standard input. When that closes, because the ablation stopped or crashed, the
run saves a checkpoint and stops.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from mmssl import system
from mmssl.apps.report import write_card
from mmssl.config import load_config
from mmssl.errors import UserError
from mmssl.files import write_json
from mmssl.train import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one run, and write the record that marks it as finished. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)
    threading.Thread(target=_stop_with_the_ablation, daemon=True).start()
    try:
        config = load_config(given.config)
        finished = train(config, resume=given.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if finished.signal is not None:
        system.leave(finished.signal)  # without waiting for reads that stall
    write_card(config.run_dir)
    gpu = torch.cuda.is_available()
    write_json(
        given.record,
        {
            "peak_memory_bytes": system.peak_memory(),
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            "device": torch.cuda.get_device_name() if gpu else "CPU",
            "threads": torch.get_num_threads(),
        },
    )
    # Finished runs are never resumed; the checkpoints of many runs would fill the disk.
    shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)
    return 0


def _stop_with_the_ablation() -> None:
    # Not sys.stdin: at its exit Python would wait for its lock.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
