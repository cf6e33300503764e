"""`accelerate launch -m mmssl.train CONFIG key=value ...` is `mmssl train` on many processes."""

import sys

from mmssl.cli.main import main
from mmssl.distributed import missing_processes, start_processes

if __name__ == "__main__":
    count = missing_processes()
    if count is None:
        main(["train", *sys.argv[1:]])
    else:
        start_processes(count, "mmssl.train", sys.argv[1:])
