"""`python -m mmssl` is the `mmssl` command; `accelerate launch -m mmssl eval ...` shares its work."""

import sys

from mmssl.cli.main import main
from mmssl.distributed import missing_processes, start_processes

if __name__ == "__main__":
    count = missing_processes()
    if count is None:
        main()
    else:
        start_processes(count, "mmssl", sys.argv[1:])
