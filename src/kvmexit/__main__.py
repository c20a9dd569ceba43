"""`python -m kvmexit`: see kvmexit.cli."""

import sys

from kvmexit.cli import main

if __name__ == "__main__":
    sys.exit(main())
