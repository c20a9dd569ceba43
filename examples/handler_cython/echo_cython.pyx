"""A native handler in Cython: a cdef function, and the object that has its state.

    pip install Cython setuptools
    CFLAGS="-I$(python -c 'import kvmexit; print(kvmexit.get_include())')" cythonize -3 -i handler_cython/echo_cython.pyx
    python handler_cython/main.py
"""

from libc.stdint cimport uint64_t
from libc.string cimport memset

from kvmexit cimport KVMEXIT_DONE, KVMEXIT_PASS, handler, kvmexit_exit


cdef int echo(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """The echo device. Cython refuses another signature when it compiles handler(echo, ...)."""
    cdef uint64_t *state = <uint64_t *>opaque
    cdef unsigned char *data = <unsigned char *>exit.data
    if data == NULL:
        return KVMEXIT_PASS
    if exit.is_write:
        state[0] = data[exit.size * exit.count - 1]
    else:
        memset(data, ~<int>state[0] & 0xff, exit.size * exit.count)
    state[1] += exit.count
    return KVMEXIT_DONE


cdef class Echo:
    """An echo device; `handler()` goes to vm.on_pio() and the like."""

    cdef uint64_t state[2]

    def handler(self):
        """Which keeps this object, and so its state, alive."""
        return handler(echo, self.state, self)

    def __getitem__(self, int i):
        return self.state[i & 1]
