import sys

from llmquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
