"""Handlers in native code: they answer exits on the vCPU's thread without the GIL, whatever other Python threads do.

Registered like Python handlers: `vm.on_pio(0x80, 1, native.Ignore())`. Anybody's function can be one (Function), and
those that every VMM needs are here.
"""

from kvmexit._native import Counter, EventFd, Function, Ignore, Registers, Serial16550, Stop
from kvmexit._native_convert import Convert
from kvmexit._native_ring import Ring, RingBatch, RingEntry

__all__ = [
    "Convert", "Counter", "EventFd", "Function", "Ignore", "Registers", "Ring", "RingBatch", "RingEntry", "Serial16550",
    "Stop",
]
