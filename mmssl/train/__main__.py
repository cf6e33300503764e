"""`accelerate launch -m mmssl.train CONFIG key=value ...` is `mmssl train` on many processes."""

import sys

from mmssl.cli import main

main(["train", *sys.argv[1:]])
