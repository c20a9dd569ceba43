"""A native handler through ctypes: a C function in a library.

cc -shared -fPIC -O2 -I "$(python -c 'import kvmexit; print(kvmexit.get_include())')" -o echo.so echo.c
python handler_ctypes.py ./echo.so
"""

import ctypes
import sys

from guest import try_out

from kvmexit import native

echo = ctypes.CDLL(sys.argv[1]).echo
echo.argtypes = [ctypes.c_void_p, ctypes.c_void_p]  # restype is int, unless said otherwise
state = (ctypes.c_uint64 * 2)()
try_out(native.Function(echo, state), state)  # which keeps both alive
