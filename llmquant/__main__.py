"""`python -m llmquant` and the `llmquant` command."""

import os
import sys

# `python -m` looks for modules in the working folder first, where a user's random.py would stand for Python's own.
if sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from llmquant.cli.app import main


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
