"""The command line: ``python -m curvlinops``, or ``curvlinops``."""

import sys

from curvlinops.report._cli import main

if __name__ == "__main__":
    sys.exit(main())
