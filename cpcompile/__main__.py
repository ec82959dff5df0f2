"""`python -m cpcompile`."""

from cpcompile.cli import main

main()
