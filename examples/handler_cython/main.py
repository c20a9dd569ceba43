"""Try out the device of echo_cython.pyx: see there."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from echo_cython import Echo  # noqa: E402
from guest import try_out  # noqa: E402

device = Echo()
try_out(device.handler(), device)
