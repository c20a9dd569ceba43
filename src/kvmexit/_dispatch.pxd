"""The exit in hand is offered to native handlers. Inline: with a call for each step the burst took a fifth more."""

from libc.stdint cimport uint32_t, uint64_t

from kvmexit._chain cimport (
    KVMEXIT_API_VERSION, KVMEXIT_DONE, KVMEXIT_LATER, KVMEXIT_PASS, KVMEXIT_STOP, kvmexit_exit, kvmexit_route,
)
from kvmexit._loop cimport AGAIN, BROKEN, STOPPED, Outcome
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._routes cimport kvmexit_begin_native, kvmexit_end_native, kvmexit_find, kvmexit_key
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, kvm_run,
)


cdef inline void describe(kvmexit_vcpu *c, kvmexit_exit *exit, uint64_t key) noexcept nogil:
    """The exit in hand as native handlers see it (include/kvmexit/kvmexit.h)."""
    cdef kvm_run *run = c.run
    cdef void *data = NULL  # each member is stored once: stores are what this costs
    cdef uint64_t size = 0, flags = 0
    cdef uint32_t count = 1, is_write = 0
    if c.place == KVM_EXIT_IO:
        size = run.io.size
        count = run.io.count
        is_write = run.io.direction == KVM_EXIT_IO_OUT
        data = <char *>run + run.io.data_offset
    elif c.place == KVM_EXIT_MMIO:
        size = run.mmio.len
        is_write = run.mmio.is_write
        data = run.mmio.data
    elif c.place == KVM_EXIT_MEMORY_FAULT:
        size = run.memory_fault.size
        flags = run.memory_fault.flags
    elif c.place == KVM_EXIT_HYPERCALL:
        size = sizeof(run.hypercall.ret)
        data = &run.hypercall.ret
        if not c.answered:
            run.hypercall.ret = 0  # stale bytes in 6.12
    elif c.place == KVM_EXIT_X86_RDMSR or c.place == KVM_EXIT_X86_WRMSR:
        size = sizeof(run.msr.data)
        is_write = c.place == KVM_EXIT_X86_WRMSR
        data = &run.msr.data
    exit.version = KVMEXIT_API_VERSION
    exit.reason = c.reason
    exit.error = c.error
    exit.vcpu = c.id
    exit.address = key
    exit.size = size
    exit.count = count
    exit.is_write = is_write
    exit.owes = c.needs
    exit.reserved = 0
    exit.data = data
    exit.flags = flags
    exit.run = run


cdef inline int call_natively(kvmexit_vcpu *c, kvmexit_exit *exit) noexcept nogil:
    """Offer the exit to the native handler whose turn it is. -> its verdict."""
    cdef const kvmexit_route *route = c.chain
    cdef int verdict
    exit.base = route.first
    verdict = route.call(exit, route.opaque)
    if verdict == KVMEXIT_DONE:
        c.answered = True
        c.chain = NULL
    else:
        c.chain = route if verdict == KVMEXIT_LATER else route + 1
    return verdict


cdef inline Outcome go_down(kvmexit_vcpu *c, Outcome outcome, uint64_t key) noexcept nogil:
    """The same from `c.chain` on, a native handler."""
    cdef kvmexit_exit exit
    cdef int verdict
    describe(c, &exit, key)
    while c.chain.call != NULL:
        verdict = call_natively(c, &exit)
        if verdict == KVMEXIT_DONE:
            kvmexit_end_native(c)
            return AGAIN
        if verdict == KVMEXIT_STOP:
            return STOPPED
        if verdict == KVMEXIT_LATER:
            return outcome
        if verdict != KVMEXIT_PASS:
            return BROKEN
    return outcome


cdef inline Outcome dispatch_natively(kvmexit_vcpu *c, Outcome outcome) noexcept nogil:
    """Offer the exit in hand to the native handlers that come before Python's. AGAIN: one took it; STOPPED, BROKEN, or
    `outcome`, where it is Python's or nobody's. Unless it is AGAIN, the table stays in use until enter() holds it."""
    cdef uint64_t key
    key = kvmexit_key(c)
    c.answered = False
    c.table = kvmexit_begin_native(c)
    c.chain = kvmexit_find(c, c.table, key)
    return outcome if c.chain.call == NULL else go_down(c, outcome, key)
