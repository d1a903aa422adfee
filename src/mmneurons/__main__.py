"""The command line, run as `python -m mmneurons`."""

from mmneurons.cli import main

main()
