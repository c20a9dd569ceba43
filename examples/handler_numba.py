"""A native handler in Python, compiled by numba to a C function (a cfunc).

python handler_numba.py
"""

import ctypes

from guest import try_out
from numba import carray, cfunc, types
from numba.extending import intrinsic

from kvmexit import native

Exit = types.Record.make_c_struct([  # struct kvmexit_exit of <kvmexit/kvmexit.h>; numba's records have no pointers
    ("version", types.uint32), ("reason", types.uint32), ("error", types.int32), ("vcpu", types.uint32),
    ("address", types.uint64), ("base", types.uint64), ("size", types.uint64), ("count", types.uint32),
    ("is_write", types.uint32), ("owes", types.uint32), ("reserved", types.uint32), ("data", types.uint64),
    ("flags", types.uint64), ("run", types.uint64),
])  # fmt: skip
Bytes = types.CPointer(types.uint8)
DONE, PASS = 0, 1  # KVMEXIT_DONE, KVMEXIT_PASS


@intrinsic
def bytes_at(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(Bytes))

    return Bytes(types.uint64), generate


@cfunc(types.int32(types.CPointer(Exit), types.CPointer(types.uint64)))
def echo(exits, state):
    """The echo device."""
    exit = carray(exits, 1)[0]
    if exit.data == 0:
        return PASS
    data = bytes_at(exit.data)
    if exit.is_write:
        state[0] = data[exit.size * exit.count - 1]
    else:
        for i in range(exit.size * exit.count):
            data[i] = ~state[0] & 0xFF
    state[1] += exit.count
    return DONE


state = (ctypes.c_uint64 * 2)()
try_out(native.Function(echo, state), state)
