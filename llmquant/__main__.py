"""`python -m llmquant` and the `llmquant` command."""

import sys

from llmquant.cli.app import main


def run() -> None:
    sys.exit(main())


if __name__ == "__main__":
    run()
