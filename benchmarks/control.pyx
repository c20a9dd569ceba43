# cython: language_level=3
"""The controls: what a C programmer would write by hand, over the same scripted or real vCPU."""

from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvmexit._chain cimport KVMEXIT_DONE, KVMEXIT_HANDLER, KVMEXIT_STOP, kvmexit_exit
from kvmexit._loop cimport Vcpu
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._uapi cimport KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_RUN, KVMEXIT_REASON_SENTINEL

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

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


# ---- real KVM: busy.py ----

cdef struct Stamps:
    uint64_t count, room
    uint64_t *ns


cdef int stamp(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """A native handler that notes when it was called, and at last stops."""
    cdef Stamps *stamps = <Stamps *>opaque
    if stamps.count == stamps.room:
        return KVMEXIT_STOP
    stamps.ns[stamps.count] = now()
    stamps.count += 1
    return KVMEXIT_DONE


cdef uint64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef class Times:
    """Room for so many time stamps, in ns (CLOCK_MONOTONIC)."""

    cdef Stamps stamps

    def __cinit__(self, size_t room):
        self.stamps.ns = <uint64_t *>calloc(room, 8)
        self.stamps.room = room

    def __dealloc__(self):
        free(self.stamps.ns)

    def handler(self):
        """-> a native handler that fills it, as a capsule; keep this object for as long."""
        capsule = PyCapsule_New(<void *>stamp, KVMEXIT_HANDLER, NULL)
        PyCapsule_SetContext(capsule, &self.stamps)
        return capsule

    def c_loop(self, Vcpu vcpu):
        """What a C programmer would write: KVM_RUN by hand, and a stamp for each exit."""
        cdef kvmexit_vcpu *c = &vcpu.page.c
        cdef int fd = c.fd
        with nogil:
            while self.stamps.count < self.stamps.room:
                if ioctl(fd, KVM_RUN, 0) == 0 and c.run.exit_reason == KVM_EXIT_IO:
                    self.stamps.ns[self.stamps.count] = now()
                    self.stamps.count += 1

    def intervals(self):
        """-> ns between two exits."""
        return [self.stamps.ns[i] - self.stamps.ns[i - 1] for i in range(1, self.stamps.count)]
