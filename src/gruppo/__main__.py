"""``python -m gruppo``: the same as the command ``gruppo``."""

import sys

from gruppo.cli import main

if __name__ == "__main__":
    sys.exit(main())
