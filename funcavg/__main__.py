"""``python -m funcavg``: the same as ``funcavg`` on the command line."""

import sys

from funcavg.cli import main

if __name__ == "__main__":
    sys.exit(main())
