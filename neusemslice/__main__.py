"""``python -m neusemslice``: the command line."""

from neusemslice.cli import main

main()
