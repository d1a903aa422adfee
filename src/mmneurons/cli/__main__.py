"""The command line, run as `python -m mmneurons.cli`."""

from mmneurons.cli import main

main()
