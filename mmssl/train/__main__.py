"""`python -m mmssl.train CONFIG [KEY=VALUE]...`: `mmssl train`, for `torchrun` and `accelerate launch`."""

from mmssl.cli import run_module

if __name__ == "__main__":
    run_module("mmssl.train", "train")
