"""`python -m pilotage` is the command line."""

from pilotage.cli import main

main()
