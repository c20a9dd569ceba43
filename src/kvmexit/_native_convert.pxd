from libc.stdint cimport uint64_t

from kvmexit._convert cimport Conversions, Converter, Result, pthread_mutex_t
from kvmexit._native_ring cimport Ring, kvmexit_ring
from kvmexit._routes cimport Native


cdef struct Stream:          # of faults, one behind the other
    uint64_t first, last     # what was converted last; a `last` of 0: nothing, so nothing follows it
    uint64_t window
    bint private


cdef struct Failure:
    Result result            # DONE: there was none
    uint64_t first, last
    bint private


cdef struct Shared:          # what the vCPUs that call one Convert work on
    Converter *converter
    kvmexit_ring *journal    # or NULL
    bint positive            # how this type of VM takes a hypercall's errno
    bint adaptive
    uint64_t first, last     # what may be converted
    uint64_t window          # bytes; of an adaptive one the most
    uint64_t faults, duplicates, hypercalls, conversions, pages, busy, failed  # atomic
    pthread_mutex_t lock     # of what follows; nothing waits while it is held
    Stream stream
    Failure failure


cdef class Convert(Native):
    cdef Shared shared
    cdef Conversions owner  # of the converter; refers to no VM, so that VM -> routes -> Convert makes no cycle
    cdef readonly Ring journal
