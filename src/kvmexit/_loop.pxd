from libc.stdint cimport uint32_t, uint64_t

from kvmexit._chain cimport kvmexit_exit, kvmexit_route
from kvmexit._exits cimport Exit
from kvmexit._page cimport Page, kvmexit_vcpu
from kvmexit._routes cimport RouteTable
from kvmexit._vm cimport VM


cdef enum Outcome:
    EXIT          # rc 0, a reason: an exit
    FAULT         # MEMORY_FAULT, or a bare fault
    UNWRITTEN     # rc 0 and no reason: KVM returned without writing one
    INTERRUPTED   # EINTR
    AGAIN         # EAGAIN: re-enter
    NO_MEMORY     # ENOMEM: re-enter, a bounded number of times
    FAILED        # an error

    # what only the burst says
    KICKED        # a kick was asked for, and is consumed
    TIMED_OUT     # the deadline has passed
    PAUSED        # the VM is being paused
    LOOK          # nobody asked; Python may have signals to handle
    DRAINED       # the pending operation is complete, as asked
    LOOPING       # the same fault again and again
    STOPPED       # a native handler wants run() to return it
    BROKEN        # a native handler returned rubbish


cdef class Vcpu:
    cdef Page page
    cdef kvmexit_vcpu *c         # page.c, without a reference for every look
    cdef readonly VM vm
    cdef readonly int id
    cdef list cache              # the last Exit of each place
    cdef unsigned long main_thread
    cdef RouteTable table        # that the exit in hand goes down

    cdef int begin(self, timeout) except -1
    cdef int end(self) except -1
    cdef Outcome park(self) except? FAILED
    cdef Exit interruption(self, Outcome outcome)
    cdef Outcome enter(self, bint drain) except? FAILED
    cdef Exit current(self)
    cdef Outcome dispatch(self, Exit e, bint drain) except? FAILED
    cdef Outcome unfinished(self, bint drain) except? FAILED
    cdef int dispatch_again(self, RouteTable routes, const kvmexit_route *route) except -1
    cdef object _broken(self, const kvmexit_route *route)
    cdef Exit until_taken(self, bint drain)


cdef Outcome triage(int error, uint32_t reason) noexcept nogil
cdef Outcome interrupted(kvmexit_vcpu *c, bint drain) noexcept nogil
cdef int begin_natively(kvmexit_vcpu *c, uint64_t timeout_ns) noexcept nogil
cdef Outcome enter_natively(kvmexit_vcpu *c, bint drain) noexcept nogil
cdef Outcome stand_still(kvmexit_vcpu *c) noexcept nogil
cdef void let_go(kvmexit_vcpu *c) noexcept nogil
cdef void end_run(kvmexit_vcpu *c) noexcept nogil
cdef bint take_poison(const void *siginfo, const void *context) noexcept nogil
cdef int ask_natively(kvmexit_vcpu *c, uint32_t request) noexcept nogil
