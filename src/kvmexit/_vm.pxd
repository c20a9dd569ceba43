from kvmexit._coalesced cimport Coalesced
from kvmexit._eventfd cimport EventFds
from kvmexit._ioctl cimport Handle
from kvmexit._memory cimport Memory
from kvmexit._routes cimport Routing
from kvmexit._vcpus cimport Vcpus


cdef class VM:
    cdef Handle handle
    cdef object __weakref__
    cdef Routing routing
    cdef object lock            # of changes to routes and capabilities
    cdef dict swaps             # thread -> the RouteSwap that it is in
    cdef readonly Memory memory
    cdef readonly object type
    cdef Vcpus vcpus
    cdef EventFds eventfds
    cdef Coalesced coalesced
    cdef list recorders         # of all vCPUs there ever were
    cdef bint timing_
    cdef object recording       # VMRecorder, or None
    cdef str device
    cdef size_t run_size        # of a vCPU's mapping
    cdef object cpuid           # struct kvm_cpuid2, what KVM supports; None where the device could not be asked
    cdef bint adopted
    cdef unsigned long serial, hypercalls, msr_exits  # the last two as KVM was told
