# cython: language_level=3
"""The controls: what a C programmer would write by hand, over the same scripted vCPU; and single stages of kvmexit's in the
same loop."""

from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport write

from kvmexit._chain cimport KVMEXIT_DONE, KVMEXIT_HANDLER, kvmexit_exit, kvmexit_table
from kvmexit._dispatch cimport describe
from kvmexit._exits cimport PLACES, Exit, classify, make
from kvmexit._loop cimport Vcpu
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._routes cimport kvmexit_begin_native, kvmexit_end_native, kvmexit_find, kvmexit_key
from kvmexit._uapi cimport KVM_EXIT_IO, KVM_EXIT_MMIO, KVMEXIT_REASON_SENTINEL

cdef extern from "Python.h":
    object PyObject_Vectorcall(object, PyObject **, size_t, PyObject *)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef extern from * nogil:
    """
    #define count_atomically(at) __atomic_fetch_add(at, 1, __ATOMIC_RELAXED)
    #define use(at) __asm__ volatile("" : : "r"(at) : "memory")  /* what is there has to be */
    static __attribute__((noipa)) int opaque_call(int (*function)(struct kvmexit_exit *, void *), struct kvmexit_exit *exit,
                                                     void *opaque)
    {
        return function(exit, opaque);
    }
    #if __has_include(<valgrind/callgrind.h>)
    #include <valgrind/callgrind.h>
    static void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
    static void dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
    #else
    static void start(void) { }
    static void dump(const char *name) { }
    #endif
    """
    void count_atomically(uint64_t *)
    void use(const void *)
    int opaque_call(int (*)(kvmexit_exit *, void *) noexcept nogil, kvmexit_exit *, void *)
    void start()
    void dump(const char *)


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


def c_once(Vcpu vcpu):
    """One exit, and back to Python."""
    cdef uint64_t got
    with nogil:
        got = step(&vcpu.page.c)
    return got


def c_loop_calling(Vcpu vcpu, handler):
    """The loop, but each exit takes the GIL and calls handler(None, None) by vectorcall: what Python itself costs."""
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


# ---- a handler's work by hand ----

cdef enum Work:
    COUNT, LOAD, STORE, RING, SEND, CALL

_WORK = {"count": COUNT, "load": LOAD, "store": STORE, "ring": RING, "send": SEND, "call": CALL}
cdef uint64_t counted = 0
cdef uint8_t register = 0


cdef int add(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """A handler: see capsule()."""
    (<uint64_t *>opaque)[0] += exit.address
    return KVMEXIT_DONE


def capsule():
    """-> add(), as kvmexit takes it."""
    made = PyCapsule_New(<void *>add, KVMEXIT_HANDLER, NULL)
    PyCapsule_SetContext(made, &counted)
    return made


def c_loop_doing(Vcpu vcpu, work, int fd=-1):
    """The C loop over one kind of port I/O, which counts, loads or stores a register, rings an eventfd, sends a byte, or
    calls a function for each."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef Work what = _WORK[work]
    cdef uint8_t *data
    cdef kvmexit_exit exit
    with nogil:
        while step(c):
            data = <uint8_t *>c.run + c.run.io.data_offset
            if what == COUNT:
                count_atomically(&counted)
            elif what == LOAD:
                data[0] = register
            elif what == STORE:
                (&register)[0] = data[0]
            elif what == RING:
                eventfd_write(fd, 1)
            elif what == SEND:
                write(fd, data, 1)
            else:
                exit.address = c.run.io.port
                opaque_call(add, &exit, &counted)
            use(&register)


# ---- stages: each in the loop, in place of the control's ----

cdef inline bint enter(kvmexit_vcpu *c) noexcept nogil:
    """Sentinel, enter, classify. False at the end of the script."""
    c.run.exit_reason = KVMEXIT_REASON_SENTINEL
    c.error = -c.enter(c)
    c.reason = c.run.exit_reason
    classify(c)
    return c.error != 61


def decode(Vcpu vcpu):
    """kvm_run made what a native handler is given."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef kvmexit_exit exit
    with nogil:
        while enter(c):
            describe(c, &exit, kvmexit_key(c))
            use(&exit)


def as_object(Vcpu vcpu):
    """kvm_run made what a Python handler is given. With the GIL."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef list cache = [None] * PLACES
    cdef bint fresh = False
    cdef Exit e
    while enter(c):
        c.seq += 1  # as each entry does: it is another exit
        e = make(cache, vcpu.page, &fresh)
        e = None  # nobody kept it


def route(Vcpu vcpu):
    """The routes of MMIO accesses found."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef const kvmexit_table *table
    with nogil:
        while enter(c):
            table = kvmexit_begin_native(c)
            use(kvmexit_find(c, table, kvmexit_key(c)))
            kvmexit_end_native(c)


def search(Vcpu vcpu, size_t count):
    """The same by hand: a binary search among `count` ranges, whose beginnings are in an array."""
    cdef kvmexit_vcpu *c = &vcpu.page.c
    cdef uint64_t *firsts = <uint64_t *>malloc(count * sizeof(uint64_t))
    cdef size_t low, high, middle
    if firsts == NULL:
        raise MemoryError
    for low in range(count):
        firsts[low] = low << 12
    with nogil:
        while enter(c):
            low, high = 0, count
            while high - low > 1:
                middle = low + (high - low) // 2
                if firsts[middle] <= c.run.mmio.phys_addr:
                    low = middle
                else:
                    high = middle
            use(&firsts[low])
    free(firsts)


# ---- for instructions.py: what counts under callgrind ----

def begin_count():
    """Count from here on."""
    start()


def end_count(bytes name):
    """Have callgrind write what was counted since, to a file that has this name in it."""
    dump(<const char *>name)
