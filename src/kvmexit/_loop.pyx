"""Vcpu.run(): enter, triage, decode, dispatch, complete, re-enter.

An exit goes down this file: `burst()` enters KVM until something needs Python, with no GIL; `triage()` says what a return of
KVM_RUN means; `Vcpu.until_taken()` makes it an Exit (_exits.make) and offers it to the handlers (`dispatch`), and either
goes round or gives it to the caller of run().
"""

import math
import numbers
import threading
from array import array

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from libc.errno cimport EAGAIN, EBADF, EBUSY, ECHILD, EFAULT, EINTR, ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from kvmexit._chain cimport (
    KVMEXIT_DONE, KVMEXIT_LATER, KVMEXIT_PASS, KVMEXIT_STOP, kvmexit_exit, kvmexit_route, kvmexit_table,
)
from kvmexit._convert cimport Converter, has_state, kvmexit_generation, locate
from kvmexit._dispatch cimport call_natively, describe, dispatch_natively
from kvmexit._exits cimport (
    PLACES, UNEXPLAINED, Exit, Interrupted, UnexplainedFault, Mmio, answer, classify, completes_on_entry, make,
    make_interrupted,
)
from kvmexit._page cimport (
    KVMEXIT_REQUEST_CLOSED, KVMEXIT_REQUEST_KICK, KVMEXIT_REQUEST_PAUSE, REGS, Page, kvmexit_claim, kvmexit_disown,
    kvmexit_owner, kvmexit_parked, kvmexit_poison, kvmexit_requests, kvmexit_set_parked, kvmexit_set_seq, kvmexit_stats,
    kvmexit_vcpu, settle_registers,
)
from kvmexit._registers cimport events_of, regs_of, sregs_of
from kvmexit._routes cimport RouteTable, kvmexit_begin_native, kvmexit_end_native, kvmexit_find, kvmexit_key
from kvmexit._stats cimport (
    KVMEXIT_CALLER, KVMEXIT_ERROR, KVMEXIT_IN_KVM, KVMEXIT_IN_NATIVE, KVMEXIT_NATIVE, KVMEXIT_PYTHON, KVMEXIT_RACE, Recorder,
    kvmexit_enter_phase, kvmexit_enter_python, kvmexit_hand_over, kvmexit_leave_native, kvmexit_leave_python, kvmexit_no_rip,
    kvmexit_remember, kvmexit_settle,
)
from kvmexit._uapi cimport (
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_GET_REGS, KVM_INTERRUPT,
    KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_NMI, KVM_RUN, KVMEXIT_REASON_SENTINEL, kvm_interrupt, kvm_regs,
)
from kvmexit._vcpus cimport paused_by, stopped_one
from kvmexit._vm cimport VM
from kvmexit import errors
from kvmexit._ioctl import generic_ioctl
from kvmexit._vm import VMType
from kvmexit.errors import Error, FaultLoopError, KvmError, NotPendingError, VcpuBusyError
from kvmexit.handlers import PASS, STOP
from kvmexit.stats import as_text

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil
    object PyObject_Vectorcall(object, PyObject **, size_t, PyObject *)
    const size_t PY_VECTORCALL_ARGUMENTS_OFFSET

cdef extern from "<errno.h>" nogil:
    const int EDEADLK, EHWPOISON

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "_coalesced.h" nogil:
    void kvmexit_drain_coalesced(const kvmexit_vcpu *)

cdef extern from "<signal.h>" nogil:
    const int SIGRTMIN

cdef extern from "_control.h" nogil:
    const uint64_t KVMEXIT_NEVER
    int kvmexit_install(int)
    bint kvmexit_nested(const kvmexit_vcpu *)
    int kvmexit_begin(kvmexit_vcpu *, uint64_t, int)
    void kvmexit_end(kvmexit_vcpu *)
    int kvmexit_watch(kvmexit_vcpu *)
    int kvmexit_ask(kvmexit_vcpu *, uint32_t)
    void kvmexit_release(kvmexit_vcpu *)
    void kvmexit_wait(kvmexit_vcpu *, uint32_t, const kvmexit_vcpu *)
    void kvmexit_renew(kvmexit_vcpu *)
    void kvmexit_set_immediate_exit(kvmexit_vcpu *)
    uint32_t kvmexit_acknowledge(kvmexit_vcpu *)
    void kvmexit_consume_kick(kvmexit_vcpu *)
    uint64_t kvmexit_now_ns()

cdef extern from "_poison.h" nogil:
    bint (*kvmexit_locate)(const kvmexit_vcpu *, uint64_t, uint64_t, kvmexit_poison *) noexcept nogil
    int kvmexit_enter_kvm(kvmexit_vcpu *)
    bint kvmexit_take_poison(const void *, const void *)
    int kvmexit_catch_poison()
    void kvmexit_release_poison()
    bint kvmexit_catches_first()


cdef enum:
    MAX_RETRIES = 1000        # of returns that say nothing, in a row
    DEFAULT_FAULT_LIMIT = 1000
    MAX_TIMED_MS = 200        # of time_entries()
    KICK_SIGNAL_OFFSET = 5    # from SIGRTMIN: the C libraries take the first few

KICK_SIGNAL = SIGRTMIN + KICK_SIGNAL_OFFSET
_HIDDEN = (VMType.SEV_ES, VMType.SNP, VMType.TDX)  # whose guests' registers KVM does not show


# ---- the burst: no GIL, no allocation, no Python ----

cdef Outcome triage(int error, uint32_t reason) noexcept nogil:
    """What a return of KVM_RUN means. One row a line, as in docs/triage.md; tests/test_triage.py has the expectations."""
    if error == 0:
        return EXIT if reason != KVMEXIT_REASON_SENTINEL else UNWRITTEN
    if error == EFAULT or error == EHWPOISON:
        return FAULT
    if error == EINTR:
        return INTERRUPTED
    if error == EAGAIN:
        return AGAIN
    if error == ENOMEM:
        return NO_MEMORY
    return FAILED


cdef Outcome burst(kvmexit_vcpu *c, bint drain) noexcept nogil:
    """Enter KVM until something needs Python. `drain`: only let KVM complete what is pending, and come back."""
    cdef Outcome outcome
    cdef kvmexit_stats *s = c.stats
    cdef uint32_t reason
    if drain:
        kvmexit_set_immediate_exit(c)
    else:
        kvmexit_renew(c)
    note_generation(c)
    while True:
        c.run.exit_reason = KVMEXIT_REASON_SENTINEL
        kvmexit_enter_phase(s, KVMEXIT_IN_KVM)
        c.error = -c.enter(c)
        kvmexit_enter_phase(s, KVMEXIT_IN_NATIVE)
        c.entries += 1
        kvmexit_drain_coalesced(c)
        reason = c.reason
        c.reason = c.run.exit_reason
        outcome = triage(c.error, c.reason)
        if outcome == EXIT or outcome == FAULT:
            c.unwritten = c.no_memory = 0
            if outcome == EXIT:
                c.completes = completes_on_entry(c.reason)
                c.fault_count = 0
                if c.reason == KVM_EXIT_IRQ_WINDOW_OPEN:
                    c.run.request_interrupt_window = 0
            else:
                c.completes = False
                if c.reason != KVM_EXIT_MEMORY_FAULT:
                    c.reason = KVMEXIT_REASON_SENTINEL  # a bare fault, whatever else the page says
            classify(c)
            kvmexit_remember(s, c)
            if outcome == FAULT and fault_repeats(c):
                return LOOPING
            if outcome == FAULT and lost_race(c):
                c.retried_race += 1
                kvmexit_hand_over(s)
                kvmexit_settle(s, KVMEXIT_RACE)
            else:
                outcome = dispatch_natively(c, outcome)
                if outcome != AGAIN:
                    return outcome
            note_generation(c)
            continue
        if c.completes and outcome != INTERRUPTED:
            c.reason = reason  # there was no entry: what was pending still is
        if outcome == INTERRUPTED:
            # KVM completes what is pending before it looks at immediate_exit (kvm_arch_vcpu_ioctl_run).
            c.completes = False
            outcome = interrupted(c, drain)
            c.said = outcome
            c.retried_eintr += outcome == AGAIN or outcome == LOOK
            if outcome != AGAIN:
                return outcome
        elif outcome == AGAIN:
            c.retried_eagain += 1
        elif outcome == NO_MEMORY:
            c.retried_enomem += 1
            c.no_memory, c.unwritten = c.no_memory + 1, 0
            if c.no_memory == MAX_RETRIES:
                c.no_memory = 0
                return NO_MEMORY
        elif outcome == UNWRITTEN:
            c.retried_unwritten += 1
            c.unwritten, c.no_memory = c.unwritten + 1, 0
            if c.unwritten == MAX_RETRIES:
                c.unwritten = 0
                return UNWRITTEN
        else:
            return FAILED


cdef void note_generation(kvmexit_vcpu *c) noexcept nogil:
    """An exit is answered: what is converted from now on, is converted while the guest runs on."""
    cdef uint64_t generation = kvmexit_generation(&(<Converter *>c.converter).generation)
    if c.generation != generation:
        c.generation = generation
        c.fault_count = 0  # something was done about it


cdef bint lost_race(kvmexit_vcpu *c) noexcept nogil:
    """Whether a fault only shows that another vCPU was converting since this one entered: then there is nothing to do.

    What the guest asks for has been done meanwhile. Or, in a software-protected VM, any fault at such a time: the guest
    has no say there, KVM takes an access for what its page is, and faults where that changes under its hands
    (arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn). A fault with another cause comes again.
    """
    cdef Converter *converter = <Converter *>c.converter
    cdef uint64_t first = c.run.memory_fault.gpa, size = c.run.memory_fault.size
    cdef bint private = c.run.memory_fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE != 0
    cdef bint converted = c.generation != kvmexit_generation(&converter.generation)
    if c.reason != KVM_EXIT_MEMORY_FAULT or c.error != EFAULT or size == 0 or first + (size - 1) < first:
        return False
    if c.software_protected:
        return converted or has_state(converter, first, first + (size - 1), private) == -1
    return converted and has_state(converter, first, first + (size - 1), private) == 1


cdef Outcome interrupted(kvmexit_vcpu *c, bint drain) noexcept nogil:
    """Who asked for this EINTR. AGAIN: nobody did."""
    cdef uint32_t request = kvmexit_acknowledge(c)
    if drain:
        kvmexit_watch(c)  # the immediate_exit just spent may have been the timer's
        return DRAINED    # K7: an open request stays open: kvmexit_renew() sees to it before the next entry
    if request & (KVMEXIT_REQUEST_KICK | KVMEXIT_REQUEST_CLOSED):
        kvmexit_consume_kick(c)
        return KICKED     # K8: said by the request alone
    if c.deadline_ns != KVMEXIT_NEVER and kvmexit_now_ns() >= c.deadline_ns:
        return TIMED_OUT
    if request & KVMEXIT_REQUEST_PAUSE or outer_paused(c):
        return PAUSED
    kvmexit_watch(c)  # the timer may have been set for an earlier run()
    return LOOK if c.main_thread else AGAIN


cdef bint outer_paused(kvmexit_vcpu *c) noexcept nogil:
    """Whether the VM of a vCPU in whose handler this one runs is being paused."""
    cdef kvmexit_vcpu *v = c.outer
    while v != NULL:
        if kvmexit_requests(v) & KVMEXIT_REQUEST_PAUSE:
            return True
        v = v.outer
    return False


cdef bint fault_repeats(kvmexit_vcpu *c) noexcept nogil:
    """Note a fault; whether it is the same one, at the same registers, too often in a row."""
    cdef uint64_t payload[4]
    cdef kvm_regs *regs = &c.run.s.regs.regs
    memset(payload, 0, sizeof(payload))
    if c.reason == KVM_EXIT_MEMORY_FAULT:
        memcpy(payload, &c.run.memory_fault, sizeof(c.run.memory_fault))
    payload[3] = c.error
    if not c.regs_synced and c.fd >= 0:
        ioctl(c.fd, KVM_GET_REGS, regs)  # of a protected guest there are none, and the payload decides alone
    if (c.fault_count and memcmp(payload, c.fault_payload, sizeof(payload)) == 0
            and memcmp(regs, &c.fault_regs, sizeof(kvm_regs)) == 0):
        c.fault_count += 1
        return c.fault_limit != 0 and c.fault_count > c.fault_limit
    memcpy(c.fault_payload, payload, sizeof(payload))
    memcpy(&c.fault_regs, regs, sizeof(kvm_regs))
    c.fault_count = 1
    return False


cdef void after_burst(kvmexit_vcpu *c, Outcome outcome, uint64_t native) noexcept nogil:
    """The book-keeping after each burst. `native`: c.native before it. What is for Python, or broken, holds its table."""
    c.valid = c.synced  # only what KVM copied on return is current
    if c.flushed:
        settle_registers(c)
    if outcome == FAILED or outcome == NO_MEMORY or outcome == UNWRITTEN:
        # Where something is pending the entry did not happen: it still is, with its answer, Python's or a native one.
        if not c.completes:
            c.needs = False
        elif c.native == native:
            kvmexit_set_seq(c, c.seq - 1)
    elif outcome == EXIT or outcome == FAULT or outcome == BROKEN:
        kvmexit_hand_over(c.stats)
        c.unsettled = True
    else:
        c.chain = NULL
        if outcome == STOPPED or outcome == LOOPING:
            kvmexit_hand_over(c.stats)
            c.unsettled = False
        else:
            c.needs = False  # there is no exit
        if c.native & 1:
            kvmexit_end_native(c)


# ---- poisoned memory: _poison.h ----

cdef bint locate_poison(const kvmexit_vcpu *c, uint64_t hva, uint64_t span, kvmexit_poison *found) noexcept nogil:
    cdef bint private = False
    if not locate(<Converter *>c.converter, hva, span, &found.gpa, &found.size, &private):
        return False
    found.flags = KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0
    return True


cdef bint take_poison(const void *siginfo, const void *context) noexcept nogil:
    """In a handler of SIGBUS: whether it is of this thread's guest, whose run then says so."""
    return kvmexit_take_poison(siginfo, context)


kvmexit_locate = locate_poison


def catch_poison():
    """Have SIGBUS handled, for faults.catch_poison()."""
    error = kvmexit_catch_poison()
    if error:
        raise KvmError(error, "sigaction")


def release_poison():
    """Undo one catch_poison()."""
    kvmexit_release_poison()


def catches_first():
    """Whether SIGBUS comes to our handler before any other."""
    return kvmexit_catches_first()


# ---- a run() without Python: _embed.pyx ----

cdef int begin_natively(kvmexit_vcpu *c, uint64_t timeout_ns) noexcept nogil:
    """Vcpu.begin() without a thread state. -> 0, or errno."""
    if c.forks[0] != c.born:
        return ECHILD
    if kvmexit_nested(c):
        return EDEADLK
    return claim(c, PyThread_get_thread_ident(), timeout_ns, False)


cdef int claim(kvmexit_vcpu *c, unsigned long me, uint64_t timeout_ns, bint main_thread) noexcept nogil:
    """Begin a run, Python's or another. -> 0, or errno: EBUSY, EBADF where the VM is closed, or why there is no timer."""
    cdef int error = 0
    if not kvmexit_claim(c, me):  # P5: before the first look at the requests
        return EBUSY
    if kvmexit_requests(c) & KVMEXIT_REQUEST_CLOSED:
        error = EBADF
    elif kvmexit_begin(c, timeout_ns, main_thread) != 0:
        error = errno
    if error:
        let_go(c)
    return error


cdef void let_go(kvmexit_vcpu *c) noexcept nogil:
    """From here on the vCPU is anybody's."""
    kvmexit_disown(c)  # P15: then who waits in pause() is told
    if kvmexit_requests(c) & KVMEXIT_REQUEST_PAUSE:
        stopped_one()


cdef void end_run(kvmexit_vcpu *c) noexcept nogil:
    kvmexit_leave_python(c.stats)
    kvmexit_end(c)
    let_go(c)


cdef Outcome enter_natively(kvmexit_vcpu *c, bint drain) noexcept nogil:
    """Vcpu.enter() without Python: what is for it, or broken, holds its table until kvmexit_end_native()."""
    cdef uint64_t native = c.native
    cdef Outcome outcome
    c.chain = NULL
    kvmexit_set_seq(c, c.seq + 1)  # no other thread can answer what is pending: it is our run
    outcome = burst(c, drain)
    after_burst(c, outcome, native)
    return outcome


cdef Outcome stand_still(kvmexit_vcpu *c) noexcept nogil:
    """Vcpu.park() without Python, for a run in nobody's handler. AGAIN: go on; or KICKED, TIMED_OUT.

    No lock makes look and store one: so after `parked` is cleared request is looked at once more before anything is entered
    (P19). A pause() in between either finds it cleared, and waits, or its bit is seen here.
    """
    cdef Outcome outcome
    cdef uint32_t seen
    while True:
        seen = kvmexit_requests(c)  # P10
        if seen & KVMEXIT_REQUEST_CLOSED or (seen & KVMEXIT_REQUEST_KICK and seen & KVMEXIT_REQUEST_PAUSE):
            kvmexit_consume_kick(c)
            outcome = KICKED  # a kick without a pause is the burst's: it enters once, so that what is pending completes
        elif not seen & KVMEXIT_REQUEST_PAUSE:
            outcome = AGAIN
        elif kvmexit_now_ns() >= c.deadline_ns:
            outcome = TIMED_OUT
        else:
            if not kvmexit_parked(c):
                kvmexit_leave_python(c.stats)
                kvmexit_set_parked(c, True)
                stopped_one()  # P12: after the store
            kvmexit_wait(c, seen, c)  # P13
            continue
        if not kvmexit_parked(c):
            return outcome
        kvmexit_set_parked(c, False)  # P11: on every way out
        if outcome != AGAIN:
            return outcome


cdef int ask_natively(kvmexit_vcpu *c, uint32_t request) noexcept nogil:
    """Kick a vCPU, or have it park. -> 0, or errno."""
    return ECHILD if c.forks[0] != c.born else kvmexit_ask(c, request)


# ---- the vCPU ----

@cython.final
cdef class Vcpu:
    """A virtual CPU: made by `vm.create_vcpu()`.

    id, vm. One thread at a time runs it, any thread. Everything but kick() waits or raises VcpuBusyError while it runs.
    Run vCPUs off the main thread where Ctrl-C has to be quick: on it, an interrupt is noticed within 100 ms.
    """

    def __init__(self):
        raise TypeError("use vm.create_vcpu()")

    @staticmethod
    def _make(VM vm, Page page, id):
        cdef Vcpu vcpu = Vcpu.__new__(Vcpu)
        cdef Recorder recorder
        vcpu.vm = vm
        vcpu.page = page
        vcpu.c = &page.c
        vcpu.id = id
        vcpu.cache = [None] * PLACES
        vcpu.main_thread = threading.main_thread().ident
        recorder = Recorder()
        page.recorder, page.c.stats = recorder, recorder.c
        page.c.converter = vm.memory.converter
        page.c.software_protected = vm.type == VMType.SW_PROTECTED
        page.c.rebinds = vm.memory.rebinds
        if page.c.enter == NULL:
            page.c.enter = kvmexit_enter_kvm
        page.c.fault_limit = DEFAULT_FAULT_LIMIT
        vcpu.sync = page.c.syncable & REGS
        if kvmexit_install(KICK_SIGNAL) != 0:
            raise Error(f"signal {KICK_SIGNAL} (KICK_SIGNAL) cannot be handled in this process")
        return vcpu

    # ---- running ----

    def run(self, timeout=None):
        """Run the guest until an exit that no handler takes; -> that Exit.

        timeout: seconds, or None; then, and after kick(), the result is Interrupted. 0 completes what is pending and comes
        back.
        A read or hypercall that is returned has to be answered (exit.data, exit.ret, ...) before the next run(), which
        otherwise offers the same exit again. A returned write counts as accepted.

        Raises what a handler raises (the exit is then offered again by the next run()), KvmError where KVM fails,
        FaultLoopError after `fault_limit` identical faults, VcpuBusyError while it runs already.
        """
        cdef Outcome outcome
        self.begin(timeout)
        try:
            outcome = self.park()  # P6: a pause before us: nothing is entered, and no handler called
            return self.until_taken(False) if outcome == AGAIN else self.interruption(outcome)
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            self.end()

    def complete(self):
        """Let KVM finish the pending exit without running the guest on; -> None, or an exit that came of it.

        The second half of an access may come as an exit of its own; handlers see it as always, and what none takes is
        returned. So is an exit that still has to be answered. A kick stays for the next run(). Raises as run().
        """
        self.begin(None)
        try:
            return self.until_taken(True)
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            self.end()

    def kick(self):
        """Make the run() in progress, or else the next one, return Interrupted("kick"): once, however many kicks came.

        From any thread, and from signal handlers. A run() that has something else to return first, an exit that owes an
        answer, keeps it for the one after. Raises KvmError (EAGAIN) where the signal queue is full.
        """
        kick_page(self.page)

    cdef int begin(self, timeout) except -1:
        cdef uint64_t timeout_ns = KVMEXIT_NEVER
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef int error
        if timeout is not None:
            timeout_ns = _nanoseconds(timeout)
        self.page.check()
        self.vm.handle.check()
        with cython.critical_section(self.page):  # whoever holds it for a look: Page.hold()
            error = claim(&self.page.c, me, timeout_ns, me == self.main_thread)
        if error == EBUSY:
            raise VcpuBusyError(
                f"vCPU {self.id} is running already" + (": this is its own handler" if kvmexit_owner(&self.page.c) == me else
                                                        " in another thread: kick() it, and wait for that run() to return"))
        if error:
            raise KvmError(error, "timer_create", "too many timers or queued signals (RLIMIT_SIGPENDING)")
        return 0

    cdef int end(self) except -1:
        end_run(&self.page.c)
        if self.vm.routing.retired:
            self.vm.routing.reap()
        return 0

    cdef Outcome park(self) except? FAILED:
        """Stand still while the VM is paused. AGAIN: go on; or KICKED, TIMED_OUT.

        A run() inside another vCPU's handler keeps that one standing, too, so it goes on only when none of them is paused,
        and heeds its own kick, its deadline and exceptions only then (P18). As in stand_still() no lock makes look and store
        one: after `parked` is cleared all is looked at once more (P19).
        """
        cdef kvmexit_vcpu *own = self.c
        cdef kvmexit_vcpu *v
        cdef kvmexit_vcpu *paused
        cdef uint32_t seen, requests
        exception = None
        try:
            while True:
                seen = kvmexit_requests(own)  # P10: looked at, and parked stored, each time round
                paused = own if seen & KVMEXIT_REQUEST_PAUSE else NULL
                v = own.outer
                while v != NULL:
                    requests = kvmexit_requests(v)
                    if requests & KVMEXIT_REQUEST_PAUSE:
                        paused, seen = v, requests
                    v = v.outer
                if paused == NULL or (paused == own and (
                        exception is not None or seen & KVMEXIT_REQUEST_KICK or kvmexit_now_ns() >= own.deadline_ns)):
                    if kvmexit_parked(own):
                        set_parked(own, False)
                        continue
                    if exception is not None:
                        raise exception
                    if paused == NULL:
                        return AGAIN
                    if not seen & KVMEXIT_REQUEST_KICK:
                        return TIMED_OUT
                    kvmexit_consume_kick(own)
                    return KICKED
                if paused != own and paused_by(PyThread_get_thread_ident(), self.page):
                    raise Error(
                        "run() inside a handler of a paused VM would wait for this thread's own pause(): resume() first")
                kvmexit_leave_python(own.stats)
                if not kvmexit_parked(own):  # else who waits in pause() knows
                    set_parked(own, True)
                    stopped_one()  # P12: after the store
                with nogil:
                    kvmexit_wait(paused, seen, own)
                if exception is None:  # else further signals stay pending
                    try:
                        PyErr_CheckSignals()
                    except BaseException as error:
                        exception = error
        finally:
            set_parked(own, False)  # P11: on every way out

    cdef Exit interruption(self, Outcome outcome):
        return make_interrupted(self.page, "kick" if outcome == KICKED else "timeout")

    # The four below are the way of every exit. begin() has seen that nothing they use is None.

    @cython.nonecheck(False)
    cdef Exit until_taken(self, bint drain):
        """Go round until an exit is for the caller. None: drained."""
        cdef kvmexit_vcpu *c = self.c
        cdef Outcome outcome
        cdef Exit e
        PyErr_CheckSignals()
        while True:
            if not (c.unsettled or (c.needs and not c.answered)):
                if drain and not c.completes:
                    return None
                # Registers go to KVM when nothing is pending: what is, gets completed first.
                if c.written and not c.completes:
                    self.page.flush()
                outcome = self.enter(drain or c.written & ~c.flushed != 0)
                if outcome == DRAINED:
                    continue
                if outcome == LOOK:
                    PyErr_CheckSignals()
                    continue
                if outcome == PAUSED:
                    outcome = self.park()
                    if outcome == AGAIN:
                        continue
                if outcome == KICKED or outcome == TIMED_OUT:
                    return self.interruption(outcome)
                if outcome == STOPPED:
                    kvmexit_settle(c.stats, KVMEXIT_CALLER)
                    return self.current()
                if outcome != EXIT and outcome != FAULT:
                    self._fail(outcome)
            e = self.current()
            outcome = self.dispatch(e, drain)
            if outcome == EXIT:
                kvmexit_settle(c.stats, KVMEXIT_CALLER)
                return e
            if outcome != AGAIN:
                return self.interruption(outcome)
            kvmexit_settle(c.stats, KVMEXIT_PYTHON)
            e = None  # or the next exit of this class could not reuse it

    @cython.nonecheck(False)
    cdef Outcome enter(self, bint drain) except? FAILED:
        """One burst, and the book-keeping around it."""
        cdef kvmexit_vcpu *c = self.c
        cdef Outcome outcome
        cdef RouteTable table
        cdef uint64_t native = c.native
        if c.forks[0] != c.born:
            self.page.check()  # a handler has forked: the child must not store to the parent's page
        c.chain = NULL
        kvmexit_set_seq(c, c.seq + 1)  # no other thread can answer the previous exit: it is our run
        with nogil:
            outcome = burst(c, drain)
            kvmexit_leave_native(c.stats)
        kvmexit_enter_python(c.stats)
        after_burst(c, outcome, native)
        if outcome == EXIT or outcome == FAULT or outcome == BROKEN:
            table = <RouteTable>c.table.owner
            kvmexit_end_native(c)
            self.table = table  # only now: what it lets go may run a finalizer that waits for us
        return outcome

    def _fail(self, int outcome):
        """Raise for a KVM_RUN or a handler that failed. What was pending still is."""
        cdef kvmexit_vcpu *c = &self.page.c
        if outcome == BROKEN:
            broken = self._broken(c.chain - 1)
            self.table, c.chain = None, NULL
            raise broken
        if outcome == LOOPING:
            kvmexit_settle(c.stats, KVMEXIT_ERROR)
            c.fault_count = 0
            fault = self.current()
            raise FaultLoopError(
                f"the same fault {c.fault_limit + 1} times in a row, at the same registers and with nothing repaired: "
                f"{fault!r}", fault)
        if outcome == UNWRITTEN:
            raise Error(f"KVM_RUN succeeded {MAX_RETRIES} times in a row without giving an exit reason")
        error, c.error = c.error, 0  # not of the exit that pends, if one does
        raise KvmError(error, "KVM_RUN")

    @cython.nonecheck(False)
    cdef Exit current(self):
        """The exit in hand as an object: the same one as long as it is the same exit."""
        cdef bint fresh = False
        cdef Exit e = make(self.cache, self.page, &fresh)
        if fresh and e.place == KVM_EXIT_MMIO:
            (<Mmio>e).slot_ = self.vm.memory.slot_at(self.c.run.mmio.phys_addr)
        elif fresh and e.place == UNEXPLAINED:
            (<UnexplainedFault>e).rip_ = self._rip()
        return e

    def _tell(self, error):
        """An exception is about to leave run(): note it, and give it what came before it."""
        if self.c.unsettled:
            kvmexit_settle(self.c.stats, KVMEXIT_ERROR)
        if isinstance(error, Error) and not error.last_exits:
            error.last_exits = tuple(self.last_exits)
        if errors.show_last_exits:
            error.add_note(f"the last exits of vCPU {self.id}:\n{as_text(self.last_exits)}")

    def _rip(self):
        """Where the guest is, or None where it does not show."""
        if self.vm.type in _HIDDEN:
            return None
        try:
            self.page.load(REGS)
        except KvmError:
            return None
        return self.page.c.run.s.regs.regs.rip

    @property
    def _entered_at(self):
        """What vm.memory.changes was when the guest was entered for the exit in hand."""
        return self.page.c.generation

    def _explain(self, Exit e not None):
        """Exit.explain() of one that this vCPU has not gone on from."""
        if e.page is not self.page or not e.is_current():
            raise NotPendingError(f"{e!r} is not what {self!r} stands at: another vCPU's, or it has been re-entered since")
        from kvmexit.faults import explain
        return explain(self)

    @cython.nonecheck(False)
    cdef Outcome dispatch(self, Exit e, bint drain) except? FAILED:
        """Offer an exit to the handlers. AGAIN: one took it; EXIT: it is the caller's; or as unfinished() says. It stays
        unsettled when one raises, or has not finished."""
        cdef kvmexit_vcpu *c = self.c
        cdef RouteTable routes
        cdef const kvmexit_route *route = c.chain
        cdef PyObject *handler
        cdef PyObject *arguments[3]
        cdef int native
        cdef Outcome outcome
        if route != NULL:
            routes, self.table, c.chain = self.table, None, NULL
        else:  # offered again: from the first one on
            routes = self.vm.routing.present()
            route = kvmexit_find(c, &routes.table, kvmexit_key(c))
        c.unsettled = True
        c.answered = False
        while True:
            handler = <PyObject *>route.handler
            if handler == NULL:
                c.unsettled = False
                return EXIT
            if route.call != NULL:
                native = self.dispatch_again(routes, route)
                if native == KVMEXIT_PASS:
                    route += 1
                    continue
                if native == KVMEXIT_LATER:
                    outcome = self.unfinished(drain)
                    if outcome == AGAIN:
                        continue
                    return outcome
                c.unsettled = False
                if native != KVMEXIT_DONE:
                    return EXIT
                kvmexit_settle(c.stats, KVMEXIT_NATIVE)
                return AGAIN
            # Called directly: a reference less, and the stable ABI has no shorter way.
            arguments[1], arguments[2] = <PyObject *>self, <PyObject *>e
            verdict = PyObject_Vectorcall(<object>handler, arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
            if verdict is None:
                if c.needs and not c.answered:
                    raise TypeError(
                        f"{<object>handler!r} returned None for {e!r}, which asks for an answer: return it, or PASS or STOP")
                c.unsettled = False
                return AGAIN
            if verdict is PASS:
                route += 1
                continue
            if verdict is STOP:
                c.unsettled = False
                return EXIT
            answer(e, verdict)
            c.unsettled = False
            return AGAIN

    cdef Outcome unfinished(self, bint drain) except? FAILED:
        """A native handler said LATER: what is asked of this vCPU comes first, as after EINTR. AGAIN: call it again.
        KICKED, TIMED_OUT: the next run() offers the exit again. complete() leaves what is asked to that: the EXIT."""
        cdef Outcome outcome = interrupted(self.c, drain)
        if outcome == DRAINED:
            outcome = EXIT if kvmexit_requests(self.c) else AGAIN
        if outcome == PAUSED:
            outcome = self.park()
        if outcome == AGAIN or outcome == LOOK:
            self.vm.memory.look_around()
            outcome = AGAIN
        return outcome

    cdef int dispatch_again(self, RouteTable routes, const kvmexit_route *route) except -1:
        """Call a native handler that comes after Python's, with the GIL released. -> its verdict."""
        cdef kvmexit_vcpu *c = self.c
        cdef const kvmexit_table *present
        cdef kvmexit_exit exit
        cdef int verdict
        self.page.check()  # a Python handler before it has forked: the child must not store to the parent's page
        # One that was removed meanwhile has passed: its memory may be gone. The look comes after the count (R1), so that a
        # remove() either is seen here, or sees us at it, and waits.
        present = kvmexit_begin_native(c)
        if present != &routes.table and not (<RouteTable>present.owner).has(route):
            kvmexit_end_native(c)
            return KVMEXIT_PASS
        c.chain = route
        describe(c, &exit, kvmexit_key(c))
        with nogil:
            verdict = call_natively(c, &exit)
            kvmexit_end_native(c)
        c.chain = NULL
        if verdict not in (KVMEXIT_DONE, KVMEXIT_PASS, KVMEXIT_STOP, KVMEXIT_LATER):
            raise self._broken(route)
        return verdict

    cdef object _broken(self, const kvmexit_route *route):
        return Error(f"{<object><PyObject *>route.handler!r} returned neither KVMEXIT_DONE, KVMEXIT_PASS nor KVMEXIT_STOP")

    @property
    def pending(self):
        """The exit whose operation KVM has not completed, or that still has to be answered; None where nothing pends."""
        cdef kvmexit_vcpu *c = &self.page.c
        cdef bint held
        self.page.check_mine()
        with cython.critical_section(self.page):
            held = self.page.hold()  # what is looked at here must not become another exit's payload
            try:
                if c.completes or c.unsettled or (c.needs and not c.answered):
                    return self.current()
                return None
            finally:
                if held:
                    let_go(c)  # the GIL, or the section, may have been released, so pause() may have seen us

    # ---- registers ----

    @property
    def regs(self):
        """General registers: a view (Regs). Free of system calls after an exit; writes reach KVM before the next entry."""
        return regs_of(self.page)

    @property
    def sregs(self):
        """Segment, control and table registers: a view (Sregs), fetched on demand."""
        return sregs_of(self.page)

    @property
    def events(self):
        """Pending and injected events: a view (Events), fetched on demand."""
        return events_of(self.page)

    @property
    def sync(self):
        """Register classes that KVM copies on every exit: 1 regs, 2 sregs, 4 events. All cost some 350 ns an exit more than
        regs alone; the others are fetched on demand. ValueError for what this kernel cannot copy."""
        return self.page.c.synced

    @sync.setter
    def sync(self, classes):
        cdef kvmexit_vcpu *c = &self.page.c
        cdef int wanted
        cdef bint held, shows
        self.page.check_mine()
        if classes & ~c.syncable:
            raise ValueError(
                f"register classes {classes:#x}: this kernel can copy {c.syncable:#x} (KVM_CAP_SYNC_REGS)")
        wanted = classes
        shows = wanted & REGS and self.vm.type not in _HIDDEN
        with cython.critical_section(self.page):
            held = self.page.hold()
            c.synced = wanted
            c.regs_synced = wanted & REGS != 0
            c.run.kvm_valid_regs = wanted
            c.rip = &kvmexit_no_rip
            if shows:
                c.rip = &c.run.s.regs.regs.rip
            if held:
                kvmexit_disown(c)

    @property
    def cr8(self):
        """The task priority register's value, as KVM last gave it; what is written reaches KVM at the next entry."""
        self.page.check_mine()
        return self.page.c.run.cr8

    @cr8.setter
    def cr8(self, value):
        cdef bint held
        self.page.check_mine()
        if not 0 <= value <= 15:
            raise ValueError(f"cr8 {value} is not in 0..15")
        with cython.critical_section(self.page):
            held = self.page.hold()
            self.page.c.run.cr8 = <int>value
            if held:
                kvmexit_disown(&self.page.c)

    # ---- interrupts ----

    def request_irq_window(self):
        """Exit with IrqWindowOpen as soon as the guest can take an interrupt; once."""
        cdef bint held
        self.page.check_mine()
        with cython.critical_section(self.page):
            held = self.page.hold()
            self.page.c.run.request_interrupt_window = 1
            if held:
                kvmexit_disown(&self.page.c)

    def interrupt(self, vector):
        """Inject an interrupt (KVM_INTERRUPT; without an in-kernel interrupt controller)."""
        cdef kvm_interrupt argument
        if not 0 <= vector <= 255:
            raise ValueError(f"vector {vector} is not in 0..255")
        argument.irq = vector
        self._check()
        self.page.handle.call("KVM_INTERRUPT", KVM_INTERRUPT, &argument)
        self.page.c.valid = 0

    def nmi(self):
        """Inject an NMI (KVM_NMI)."""
        self._check()
        self.page.handle.call_value("KVM_NMI", KVM_NMI, 0)
        self.page.c.valid = 0

    # ---- the rest ----

    def ioctl(self, number, argument=0):
        """Any ioctl on the vCPU, as VM.ioctl. In KVM's own order: register values kept aside are not applied before it.

        It waits for a running vCPU to leave the guest. Views fetch registers anew afterwards.
        """
        if number & 0xffffffff == KVM_RUN:
            raise ValueError("KVM_RUN is run()'s: what it returned would be lost")
        self._check()
        try:
            return generic_ioctl(self.page.handle, number, argument)
        finally:
            self.page.c.valid = 0 if self.page.c.fd >= 0 else self.page.c.valid

    def _check(self):
        self.page.check()
        self.vm.handle.check()

    @property
    def fd(self):
        """The vCPU's descriptor, an int."""
        self._check()
        return self.page.c.fd

    @property
    def running(self):
        """Whether a run() is in progress, handlers included."""
        return kvmexit_owner(&self.page.c) != 0

    @property
    def fault_limit(self):
        """How often one fault may come in a row, at the same registers and with no change to memory between, before run()
        raises FaultLoopError; 0 for ever. 1000 at first."""
        return self.page.c.fault_limit

    @fault_limit.setter
    def fault_limit(self, value):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"fault_limit {value} is not in 0..2**32-1")
        self.page.c.fault_limit = value

    @property
    def retries(self):
        """How often the loop re-entered by itself: {"unwritten": no exit reason given, "eintr": interrupted by nobody's
        request, "eagain": ..., "enomem": ..., "race": a fault that a conversion meanwhile explains}."""
        cdef kvmexit_vcpu *c = &self.page.c
        return {"unwritten": c.retried_unwritten, "eintr": c.retried_eintr, "eagain": c.retried_eagain,
                "enomem": c.retried_enomem, "race": c.retried_race}

    # ---- statistics: _stats.h ----

    @property
    def stats(self):
        """What this vCPU did since it was made, or since reset_stats(): -> Stats. Any thread may look, also while it runs;
        counts may then be a few exits apart."""
        return (<Recorder>self.page.recorder).stats()

    def reset_stats(self):
        """Have `stats` begin anew. Any thread may, also while it runs."""
        (<Recorder>self.page.recorder).reset()

    @property
    def timing(self):
        """Whether times are measured for `stats`: False at first. Any thread may switch it, also while the vCPU runs."""
        return (<Recorder>self.page.recorder).timing

    @timing.setter
    def timing(self, on):
        (<Recorder>self.page.recorder).timing = on

    def record(self, path, *, rotate=1 << 28, keep=None, registers=False):
        """Have what KVM_RUN returns, and what is answered, written to a file: -> Recorder, a context manager.

        path: of a file that must not exist. rotate: bytes, 64 KiB to 1 TiB, beyond which a new file begins: path.1, path.2
        and so on; keep: how many of them stay (None: all). registers: with each record the general registers, 144 bytes, as
        far as KVM copies them (`sync`). An exit that is pending is the first record. docs/trace.md has the format.

        Also while another thread runs the vCPU: then the VM is paused for a moment (VM.pause()). Raises FileExistsError,
        other OSErrors where the file cannot be made, ValueError for a `rotate` or `keep` that cannot be, Error where it is
        recorded already or the VM is closed.
        """
        from kvmexit._record import Recorder
        return Recorder._begin(self.vm, self.page, path, rotate, keep, registers)

    @property
    def last_exits(self):
        """The flight recorder: -> the last 64 exits, [LastExit], oldest first. Any thread may look, also while the vCPU
        runs; those that are overwritten meanwhile are left out."""
        return (<Recorder>self.page.recorder).last_exits()

    def __repr__(self):
        return f"<Vcpu {self.id} of {self.vm!r}{', running' if self.running else ''}>"


cdef void set_parked(kvmexit_vcpu *v, bint parked) noexcept:
    """Of a vCPU and those whose handlers it runs in (P17)."""
    while v != NULL:
        kvmexit_set_parked(v, parked)
        v = v.outer


cdef int ask(Page page, uint32_t request) except -1:
    cdef int error
    page.check()
    error = ask_natively(&page.c, request)
    if error:
        raise KvmError(error, "tgkill", "the user's signal queue is full (RLIMIT_SIGPENDING): the request is noted, and the "
                       "next kick() delivers it")
    return 0


def kick_page(Page page):
    """Vcpu.kick() on what it works on."""
    ask(page, KVMEXIT_REQUEST_KICK)


def ask_to_pause(Page page):
    """Have the vCPU's thread park; see _vcpus.pyx."""
    ask(page, KVMEXIT_REQUEST_PAUSE)


def release_page(Page page):
    """The pause is over."""
    kvmexit_release(&page.c)


def time_entries(Vcpu vcpu not None, size_t count):
    """What KVM_RUN costs by itself: -> array("Q"), nanoseconds (CLOCK_MONOTONIC) that each of up to `count` entries took.

    Internal. Runs to an exit that no handler takes, then re-enters natively for as long as exits of that reason come that
    ask for nothing, 200 ms in all at most; these count as accepted. What ends it early is left to the next run(): another
    exit, a kick, a failing entry. Empty where the first exit asks for an answer, or none came. Raises as run().
    """
    cdef kvmexit_vcpu *c = vcpu.c
    cdef uint64_t before = 0, after = 0
    cdef uint32_t reason
    cdef size_t n = 0
    times = array("Q", bytes(8 * count))
    cdef uint64_t[::1] view = times
    cdef uint64_t *time = &view[0] if count else NULL
    vcpu.begin(MAX_TIMED_MS / 1000)
    try:
        if isinstance(vcpu.until_taken(False), Interrupted) or c.needs:
            return array("Q")
        reason = c.reason
        c.seq += 1
        with nogil:
            while n < count:
                c.run.exit_reason = KVMEXIT_REASON_SENTINEL
                before = kvmexit_now_ns()
                c.error = -c.enter(c)
                after = kvmexit_now_ns()
                c.entries += 1
                kvmexit_drain_coalesced(c)
                if c.error == EINTR:
                    c.completes = False
                    if kvmexit_acknowledge(c) or after >= c.deadline_ns:
                        break
                    kvmexit_watch(c)  # a tick, or a timer set for an earlier run()
                    continue
                if c.error or c.run.exit_reason == KVMEXIT_REASON_SENTINEL:
                    break  # a fault is raised anew, and so is an error
                c.reason = c.run.exit_reason
                c.completes = completes_on_entry(c.reason)
                classify(c)
                kvmexit_remember(c.stats, c)
                kvmexit_hand_over(c.stats)
                if c.reason != reason or c.needs:
                    c.unsettled = True
                    break
                kvmexit_settle(c.stats, KVMEXIT_CALLER)
                time[n] = after - before
                n += 1
        c.error = 0
        c.valid = c.synced
        PyErr_CheckSignals()
        return times[:n]
    finally:
        vcpu.end()


cdef uint64_t _nanoseconds(timeout) except? 0:
    if not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout {timeout!r} must be a number of seconds, or None")
    seconds = float(timeout)
    if not seconds >= 0:
        raise ValueError(f"timeout {timeout!r} must be None or at least 0 seconds")
    return KVMEXIT_NEVER if math.isinf(seconds) or seconds > 1e9 else <uint64_t>(seconds * 1e9)
