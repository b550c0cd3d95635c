"""`python -m rorqual` is the `rorqual` command."""

from rorqual.cli import main

main()
