"""The C API of include/kvmexit/embed.h: vCPUs run by threads without a thread state. `kvmexit._C_API` is its capsule.

What a run is, its beginning and its end, is _loop.pyx's; here is how it goes round without Python. No function but
`vcpu_of` may touch an object.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EBADF, EBUSY, ECHILD, EINVAL, ENODATA, ENXIO, EPERM
from libc.stdint cimport uint32_t, uint64_t

from kvmexit._chain cimport kvmexit_exit
from kvmexit._convert cimport (
    BUSY, DONE, NO_BACKEND, NO_PRIVATE_SIDE, NO_SLOT, UNDECIDED_DISCARD, Converter, Result, convert_chunk, examine,
)
from kvmexit._exits cimport UNKNOWN
from kvmexit._dispatch cimport describe, dispatch_natively, go_down
from kvmexit._loop cimport (
    AGAIN, BROKEN, DRAINED, EXIT, FAILED, FAULT, KICKED, LOOK, LOOPING, PAUSED, STOPPED, TIMED_OUT, UNWRITTEN,
    Outcome, Vcpu, ask_natively, begin_natively, end_run, enter_natively, interrupted, let_go, stand_still, take_poison,
)
from kvmexit._page cimport (
    KVMEXIT_REQUEST_CLOSED, KVMEXIT_REQUEST_KICK, flush_registers, kvmexit_begin_use, kvmexit_claim, kvmexit_end_use,
    kvmexit_requests, kvmexit_vcpu,
)
from kvmexit._routes cimport kvmexit_end_native, kvmexit_is_present, kvmexit_key
from kvmexit._stats cimport KVMEXIT_CALLER, KVMEXIT_ERROR, KVMEXIT_NATIVE, kvmexit_settle

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "<errno.h>" nogil:
    const int EOPNOTSUPP, EPROTO

cdef extern from "include/kvmexit/embed.h" nogil:
    const uint32_t KVMEXIT_EMBED_VERSION
    const char *KVMEXIT_EMBED
    enum:
        KVMEXIT_RUN_EXIT, KVMEXIT_RUN_PYTHON, KVMEXIT_RUN_KICKED, KVMEXIT_RUN_TIMED_OUT, KVMEXIT_RUN_LOOPING
        KVMEXIT_RUN_BROKEN
    struct kvmexit_api:
        uint32_t version, size
        kvmexit_vcpu *(*vcpu)(void *) except NULL
        int (*run)(kvmexit_vcpu *, uint64_t, const kvmexit_exit **) noexcept nogil
        int (*exit)(kvmexit_vcpu *, const kvmexit_exit **) noexcept nogil
        int (*answer)(kvmexit_vcpu *) noexcept nogil
        int (*kick)(kvmexit_vcpu *) noexcept nogil
        int (*convert)(kvmexit_vcpu *, uint64_t, uint64_t, int, uint64_t *) noexcept nogil
        int (*poison)(const void *, const void *) noexcept nogil


cdef enum:
    PAGE = 4096


# ---- running ----

cdef int run(kvmexit_vcpu *c, uint64_t timeout_ns, const kvmexit_exit **exit) noexcept nogil:
    cdef Outcome outcome
    cdef int error = begin_natively(c, timeout_ns)
    if exit != NULL:
        exit[0] = NULL
    if error:
        return -error
    outcome = stand_still(c)  # P6: a pause before us: nothing is entered, and no handler called
    error = go_round(c) if outcome == AGAIN else told(c, outcome)
    if exit != NULL and error in (KVMEXIT_RUN_EXIT, KVMEXIT_RUN_PYTHON, KVMEXIT_RUN_LOOPING, KVMEXIT_RUN_BROKEN):
        exit[0] = shown(c)
    end_run(c)
    return error


cdef int go_round(kvmexit_vcpu *c) noexcept nogil:
    """Vcpu.until_taken() without Python. -> what run() says."""
    cdef Outcome outcome
    cdef unsigned long call = 0
    while True:
        if c.unsettled or (c.needs and not c.answered):
            outcome = offer_again(c)
        else:
            # Registers go to KVM when nothing is pending: what is, gets completed first.
            if c.written and not c.completes:
                c.error = flush_registers(c, &call)
                if c.error:
                    return told(c, FAILED)
            outcome = enter_natively(c, c.written & ~c.flushed != 0)
        if outcome == EXIT or outcome == FAULT:
            outcome = finish(c, outcome)
        if outcome == PAUSED:
            outcome = stand_still(c)
        if outcome != AGAIN and outcome != DRAINED and outcome != LOOK:
            return told(c, outcome)


cdef Outcome offer_again(kvmexit_vcpu *c) noexcept nogil:
    """An exit that nobody settled goes to the handlers again, from the first."""
    cdef Outcome outcome = dispatch_natively(c, EXIT)
    c.unsettled = outcome != AGAIN and outcome != STOPPED
    if outcome == STOPPED:
        c.chain = NULL
        kvmexit_end_native(c)
    elif outcome == AGAIN:
        kvmexit_settle(c.stats, KVMEXIT_NATIVE)
    return outcome


cdef Outcome finish(kvmexit_vcpu *c, Outcome outcome) noexcept nogil:
    """An exit that no native handler took: whose it is, Python's (then it stays unsettled) or the caller's. Before that a
    handler that has not finished is called until it has, or something is asked of this vCPU (as in Vcpu.unfinished): KICKED,
    TIMED_OUT or PAUSED, and the exit is offered again. Who removes a route waits for the table, so where there is a newer
    one it goes on with that. AGAIN: it took the exit."""
    cdef Outcome asked
    while (outcome == EXIT or outcome == FAULT) and c.chain.call != NULL:
        asked = interrupted(c, False)
        if asked != AGAIN and asked != LOOK:
            c.chain = NULL
            kvmexit_end_native(c)
            return asked
        if kvmexit_is_present(c):
            outcome = go_down(c, outcome, kvmexit_key(c))
        else:
            kvmexit_end_native(c)
            outcome = dispatch_natively(c, outcome)
    if outcome == AGAIN:
        kvmexit_settle(c.stats, KVMEXIT_NATIVE)
        c.unsettled = False  # and the table is out of use
    elif outcome != BROKEN:
        c.unsettled = outcome != STOPPED and c.chain.handler != NULL
        c.chain = NULL
        kvmexit_end_native(c)
    return outcome


cdef int told(kvmexit_vcpu *c, Outcome outcome) noexcept nogil:
    """What run() says."""
    cdef int error = c.error
    if outcome == EXIT or outcome == FAULT or outcome == STOPPED:
        if c.unsettled:
            return KVMEXIT_RUN_PYTHON
        kvmexit_settle(c.stats, KVMEXIT_CALLER)
        return KVMEXIT_RUN_EXIT
    if outcome == BROKEN:
        kvmexit_settle(c.stats, KVMEXIT_ERROR)
        c.chain = NULL
        kvmexit_end_native(c)
        return KVMEXIT_RUN_BROKEN
    if outcome == LOOPING:
        kvmexit_settle(c.stats, KVMEXIT_ERROR)
        c.fault_count = 0
        return KVMEXIT_RUN_LOOPING
    if outcome == KICKED:
        return KVMEXIT_RUN_KICKED
    if outcome == TIMED_OUT:
        return KVMEXIT_RUN_TIMED_OUT
    c.error = 0  # not of the exit that pends, if one does
    return -EPROTO if outcome == UNWRITTEN else -error


cdef const kvmexit_exit *shown(kvmexit_vcpu *c) noexcept nogil:
    """The exit in hand. It is no handler's, so it begins nowhere. Told twice it keeps what was written to it meanwhile."""
    if c.exit_seq != c.seq:
        c.exit_seq = c.seq
        describe(c, &c.exit, kvmexit_key(c))
        c.exit.base = 0
    return &c.exit


# ---- beside it ----

cdef int claim_exit(kvmexit_vcpu *c) noexcept nogil:
    """Have the vCPU, and an exit that pends, until let_go(). -> 0, or a negative errno."""
    cdef int error = 0
    if c.forks[0] != c.born:
        return -ECHILD
    if not kvmexit_claim(c, PyThread_get_thread_ident()):
        return -EBUSY
    if kvmexit_requests(c) & KVMEXIT_REQUEST_CLOSED:
        error = -EBADF
    elif not (c.completes or c.unsettled or (c.needs and not c.answered)):
        error = -ENODATA
    if error:
        let_go(c)
    return error


cdef int pending(kvmexit_vcpu *c, const kvmexit_exit **exit) noexcept nogil:
    cdef int error = claim_exit(c)
    if exit != NULL:
        exit[0] = NULL
    if error:
        return error
    if exit != NULL:
        exit[0] = shown(c)
    error = KVMEXIT_RUN_PYTHON if c.unsettled else KVMEXIT_RUN_EXIT
    let_go(c)
    return error


cdef int answer(kvmexit_vcpu *c) noexcept nogil:
    cdef int error = claim_exit(c)
    if error:
        return error
    if c.needs and c.place == UNKNOWN:
        error = -EINVAL  # completing it would hand the guest rubbish
    else:
        kvmexit_settle(c.stats, KVMEXIT_CALLER)
        c.answered, c.unsettled = True, False
    let_go(c)
    return error


cdef int kick(kvmexit_vcpu *c) noexcept nogil:
    return -ask_natively(c, KVMEXIT_REQUEST_KICK)


cdef int convert(kvmexit_vcpu *c, uint64_t gpa, uint64_t size, int to_private, uint64_t *done) noexcept nogil:
    cdef uint64_t reached = 0
    cdef int error = 0
    if c.forks[0] != c.born:
        error = ECHILD
    elif (gpa | size) & (PAGE - 1) or size == 0 or gpa + (size - 1) < gpa:
        error = EINVAL
    elif c.rebinds:
        error = EOPNOTSUPP
    else:
        error = kvmexit_begin_use(c)
        if error == 0:
            error = convert_steps(c, gpa, gpa + (size - 1), to_private != 0, &reached)
            kvmexit_end_use(c)
    if done != NULL:
        done[0] = reached
    return -error


cdef int convert_steps(kvmexit_vcpu *c, uint64_t first, uint64_t last, bint private, uint64_t *reached) noexcept nogil:
    """Memory.convert_steps() without Python. -> 0, or errno."""
    cdef Converter *converter = <Converter *>c.converter
    cdef Result result = Result(BUSY, 0, first, first)
    cdef uint64_t at = first
    cdef bint examined = False
    while not kvmexit_requests(c) & KVMEXIT_REQUEST_CLOSED:
        if not examined:
            result = examine(converter, first, last, private)
            examined = result.step == DONE
        else:
            result = convert_chunk(converter, at, last, private, NULL)
            if result.step != BUSY:
                reached[0] = result.at - first
            if result.step == DONE:
                reached[0] += 1  # `at` is the last byte done; where it failed, the first that is not
                if result.at == last:
                    return 0
                at = result.at + 1
        if result.step != DONE and result.step != BUSY:
            reached[0] = result.at - first
        if result.step == NO_SLOT or result.step == NO_PRIVATE_SIDE:
            return ENXIO
        if result.step == UNDECIDED_DISCARD:
            return EPERM
        if result.step == NO_BACKEND:
            return EOPNOTSUPP
        if result.step != DONE and result.step != BUSY:
            return result.error
    return EBADF


cdef int poison(const void *siginfo, const void *context) noexcept nogil:
    return take_poison(siginfo, context)


# ---- the table ----

cdef kvmexit_vcpu *vcpu_of(void *thing) except NULL:
    """With the GIL held."""
    if not isinstance(<object>thing, Vcpu):
        raise TypeError(f"a kvmexit.Vcpu has a C side, not {<object>thing!r}")
    if (<Vcpu><object>thing).c == NULL:
        raise TypeError("a Vcpu that vm.create_vcpu() did not make")
    return (<Vcpu><object>thing).c


cdef kvmexit_api _api = kvmexit_api(
    KVMEXIT_EMBED_VERSION, sizeof(kvmexit_api), vcpu_of, run, pending, answer, kick, convert, poison)

_C_API = PyCapsule_New(&_api, KVMEXIT_EMBED, NULL)
