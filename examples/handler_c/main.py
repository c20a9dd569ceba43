"""Try out the device of echomodule.c: see there."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), "."]
import echomodule  # noqa: E402
from guest import try_out  # noqa: E402


class State:
    """The device's state, as it is when it is looked at."""

    def __getitem__(self, i):
        """Word `i`."""
        return echomodule.state(device)[i]


device = echomodule.create()
try_out(device, State())  # the capsule keeps the state, and the route the capsule
