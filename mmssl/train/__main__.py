"""`python -m mmssl.train CONFIG [KEY=VALUE]...`: `mmssl train`, for `torchrun` and `accelerate launch`."""

from mmssl.__main__ import main

if __name__ == "__main__":
    main("mmssl.train", "train")
