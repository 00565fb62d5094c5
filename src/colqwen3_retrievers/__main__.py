"""``python -m colqwen3_retrievers`` is the command line."""

import sys

from colqwen3_retrievers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
