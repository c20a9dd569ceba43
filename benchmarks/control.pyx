# cython: language_level=3
"""The controls: what a C programmer would write by hand, over the same scripted vCPU."""

from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint64_t

from kvmexit._loop cimport Vcpu
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._uapi cimport KVM_EXIT_IO, KVM_EXIT_MMIO, KVMEXIT_REASON_SENTINEL

cdef extern from "Python.h":
    object PyObject_Vectorcall(object, PyObject **, size_t, PyObject *)


cdef uint64_t step(kvmexit_vcpu *c) noexcept nogil:
    """Sentinel, enter, read the payload. 0 at the end of the script, else something that depends on the payload."""
    c.run.exit_reason = KVMEXIT_REASON_SENTINEL
    if c.enter(c) == -61:
        return 0
    if c.run.exit_reason == KVM_EXIT_IO:
        return 1 + c.run.io.port + (<uint8_t *>c.run)[c.run.io.data_offset]
    if c.run.exit_reason == KVM_EXIT_MMIO:
        return 1 + c.run.mmio.phys_addr + c.run.mmio.data[0]
    return 1 + c.run.memory_fault.gpa


def c_loop(Vcpu vcpu):
    """The script to its end in C; -> a checksum, so that nothing is optimised away."""
    cdef uint64_t sum = 0, got
    cdef kvmexit_vcpu *c = &vcpu.page.c
    with nogil:
        while True:
            got = step(c)
            if got == 0:
                break
            sum += got
    return sum


def c_loop_calling(Vcpu vcpu, handler):
    """The same, but each exit takes the GIL and calls handler(None, None) by vectorcall: what Python itself costs."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef uint64_t got
    cdef PyObject *arguments[2]
    arguments[0] = arguments[1] = <PyObject *>None
    while True:
        with nogil:
            got = step(c)
        if got == 0:
            return
        PyObject_Vectorcall(handler, arguments, 2, NULL)
