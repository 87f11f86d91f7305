"""Run the command line with `python -m sparring`."""

from .cli import main

main()
