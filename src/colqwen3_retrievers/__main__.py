"""``python -m colqwen3_retrievers`` is the command line."""

import sys

from colqwen3_retrievers.cli import main

if __name__ == "__main__":
    sys.exit(main())
