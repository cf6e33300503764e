"""`python -m mmssl` is the `mmssl` command."""

from mmssl.cli import main

main()
