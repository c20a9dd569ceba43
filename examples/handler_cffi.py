"""A native handler through cffi: a C function in a library.

cc -shared -fPIC -O2 -I "$(python -c 'import kvmexit; print(kvmexit.get_include())')" -o echo.so echo.c
python handler_cffi.py ./echo.so
"""

import sys

import cffi
from guest import try_out

from kvmexit import native

ffi = cffi.FFI()
ffi.cdef("struct kvmexit_exit; int echo(struct kvmexit_exit *exit, void *opaque);")
library = ffi.dlopen(sys.argv[1])
state = ffi.new("uint64_t[2]")
# The address of a function itself: `library.echo` is a wrapper that calls it.
handler = native.Function(ffi.addressof(library, "echo"), int(ffi.cast("uintptr_t", state)), owner=(library, state))
try_out(handler, state)
