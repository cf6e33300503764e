"""`python -m mmssl`: the `mmssl` command, for `torchrun` and `accelerate launch`."""

from mmssl.cli import run_module

if __name__ == "__main__":
    run_module("mmssl")
