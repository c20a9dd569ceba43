"""`python -m kvmexit`: see kvmexit.cli."""

import sys

from kvmexit.cli import main

sys.exit(main())
