"""`python -m mmneurons.cli`."""

from mmneurons.cli import main

main()
