"""The command line. Each command is a file of its own.

Tables and progress are for people and go to the terminal; with `--json` standard output holds one
JSON object and nothing else. An error that rankfold knows is one line and exit status 2.
"""

from rankfold.cli.app import app, main

__all__ = ["app", "main"]
