"""Scripted vCPUs: an *enter* that gives out a list of exits instead of running a guest. No /dev/kvm, no GIL."""

from typing import NamedTuple

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ENODATA
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmexit._page cimport EVENTS, REGS, SREGS, Page, anonymous, kvmexit_vcpu
from kvmexit._uapi cimport kvm_run

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec *, timespec *)

cdef extern from "_page.h" nogil:
    uint64_t kvmexit_now_ns()

cdef extern from *:
    """
    #define kvmexit_load_immediate_exit(run) __atomic_load_n(&(run)->immediate_exit, __ATOMIC_SEQ_CST)
    #define kvmexit_load_request(c) __atomic_load_n(&(c)->request, __ATOMIC_SEQ_CST)
    #define kvmexit_load_count(count) __atomic_load_n(count, __ATOMIC_ACQUIRE)
    #define kvmexit_store_count(count, value) __atomic_store_n(count, value, __ATOMIC_RELEASE)
    """
    int kvmexit_load_immediate_exit(kvm_run *) nogil
    uint32_t kvmexit_load_request(kvmexit_vcpu *) nogil
    size_t kvmexit_load_count(size_t *) nogil  # Script's properties are looked at while a thread runs the script
    void kvmexit_store_count(size_t *, size_t) nogil


cdef enum:
    PAGE = 4096
    RUN_SIZE = 3 * PAGE  # kvm_run, PIO data, and a ring's place, as on x86
    MAX_ENTRIES = 4096
    NAP_NS = 1000000  # how long a kick that comes just before a nap can stay unnoticed


class ScriptStep(NamedTuple):
    """One return of KVM_RUN: `errno` (0: success), and what kvm_run says then.

    reason: kvm_run.exit_reason, None to leave it unwritten. payload: the union's first bytes. data: PIO bytes, which begin
    one page into the mapping. flags: kvm_run.flags. rip: in the synced registers. spin: the guest loops here
    until kicked; an entry ends with EINTR once immediate_exit is set. second_half: comes when the step before is completed,
    immediate_exit or not, as the second half of an access over two pages does. delay: seconds in the guest before it, from
    its first entry on; kicks and signals end KVM_RUN meanwhile.
    """

    reason: int | None = None
    payload: bytes = b""
    data: bytes = b""
    errno: int = 0
    flags: int = 0
    rip: int = 0
    spin: bool = False
    second_half: bool = False
    delay: float = 0.0


cdef bint wait_out(Program *p, kvm_run *run, uint64_t delay_ns) noexcept nogil:
    """The guest runs up to its next exit. -> whether it came that far; else somebody wants KVM_RUN to end."""
    cdef uint64_t now = kvmexit_now_ns()
    cdef timespec nap
    if p.until == 0:
        p.until = now + delay_ns
    while now < p.until:
        nap.tv_sec, nap.tv_nsec = 0, <long>min(p.until - now, <uint64_t>NAP_NS)
        if nanosleep(&nap, NULL) != 0 or kvmexit_load_immediate_exit(run):
            return False
        now = kvmexit_now_ns()
    p.until = 0
    return True


cdef int enter_scripted(kvmexit_vcpu *c) noexcept nogil:
    """KVM_RUN from a script, in KVM's order: complete what is pending, look at immediate_exit, run."""
    cdef Program *p = <Program *>c.script
    cdef Step *step
    cdef kvm_run *run = c.run
    cdef bint completing
    if p.keep and p.entered < MAX_ENTRIES:
        p.entries[p.entered] = Entry(kvmexit_load_immediate_exit(run), run.kvm_dirty_regs)
        kvmexit_store_count(&p.entered, p.entered + 1)
    run.kvm_dirty_regs = 0
    completing = p.open >= 0
    if completing:
        if p.keep:
            step = &p.steps[p.open]
            memcpy(step.payload, &run.hw, sizeof(step.payload))
            memcpy(p.arena + step.data, <char *>run + PAGE, step.data_size)
        p.open = -1
    completing = completing and p.position < p.count and p.steps[p.position].second_half
    if not completing and kvmexit_load_immediate_exit(run):
        return -EINTR
    if p.position == p.count:
        if p.repeat <= 1:
            return -ENODATA
        p.repeat -= 1
        kvmexit_store_count(&p.position, 0)
    step = &p.steps[p.position]
    if step.spin:
        while not kvmexit_load_immediate_exit(run):
            sched_yield()
        if kvmexit_load_request(c):
            kvmexit_store_count(&p.position, p.position + 1)  # a kick moves the guest on; a tick or a time-out does not
        return -EINTR
    if step.delay_ns and not wait_out(p, run, step.delay_ns):
        return -EINTR
    if step.reason >= 0:
        run.exit_reason = <uint32_t>step.reason
    run.flags = step.flags
    run.s.regs.regs.rip = step.rip
    memcpy(&run.hw, step.payload, step.used)
    if step.data_size:
        memcpy(<char *>run + PAGE, p.arena + step.data, step.data_size)
    if step.error == 0:
        p.open = <long>p.position
    kvmexit_store_count(&p.position, p.position + 1)
    return -step.error


@cython.final
cdef class Script:
    """The steps of a scripted vCPU, and what userspace left behind at each."""

    def __cinit__(self, steps, uint64_t repeat=1, bint keep=True):
        cdef Program *p = &self.program
        cdef Step *c
        cdef size_t place = 0
        cdef bytes data
        steps = [ScriptStep(*step) for step in steps]
        if not steps:
            repeat = 1
        for step in steps:
            if len(step.payload) > 256:
                raise ValueError(f"payload of {len(step.payload)} bytes: the union has 256")
            if len(step.data) > 2 * PAGE:
                raise ValueError(f"PIO data of {len(step.data)} bytes: the mapping has room for {2 * PAGE}")
            if not 0 <= step.delay < 1e9:
                raise ValueError(f"a delay of {step.delay} s: 0 or more, and less than 1e9")
        p.count = len(steps)
        p.repeat = repeat
        p.open = -1
        p.keep = keep
        p.steps = <Step *>calloc(max(p.count, <size_t>1), sizeof(Step))
        p.entries = <Entry *>calloc(MAX_ENTRIES, sizeof(Entry))
        p.arena = <uint8_t *>calloc(max(sum([len(step.data) for step in steps]), 1), 1)
        if p.steps == NULL or p.arena == NULL or p.entries == NULL:
            raise MemoryError
        for i, step in enumerate(steps):
            c = &p.steps[i]
            c.error = step.errno
            c.reason = -1 if step.reason is None else <uint32_t>step.reason
            c.flags = step.flags
            c.rip = step.rip
            c.spin = step.spin
            c.second_half = step.second_half
            c.delay_ns = <uint64_t>(<double>step.delay * 1e9)
            data = step.payload
            c.used = len(data)
            memcpy(c.payload, <const char *>data, len(data))
            data = step.data
            c.data, c.data_size = place, len(data)
            memcpy(p.arena + place, <const char *>data, len(data))
            place += len(data)

    def __dealloc__(self):
        free(self.program.steps)
        free(self.program.arena)
        free(self.program.entries)

    def left(self, size_t i):
        """-> what userspace had left in the union (256 bytes) and the PIO area when step `i` was completed."""
        cdef Step *step
        if i >= self.program.count:
            raise IndexError(i)
        step = &self.program.steps[i]
        return (
            PyBytes_FromStringAndSize(<char *>step.payload, 256),
            PyBytes_FromStringAndSize(<char *>self.program.arena + step.data, step.data_size))

    @property
    def entries(self):
        """-> (immediate_exit, kvm_dirty_regs) at each entry, the first 4096 of them."""
        return [(self.program.entries[i].immediate_exit, self.program.entries[i].dirty_regs)
                for i in range(kvmexit_load_count(&self.program.entered))]

    @property
    def position(self):
        """How many steps have been given out in this pass."""
        return kvmexit_load_count(&self.program.position)


def scripted_page(Script script):
    """A Page whose KVM_RUN is this script."""
    cdef Page page = anonymous(RUN_SIZE)
    page.c.enter = enter_scripted
    page.c.script = &script.program
    page.script = script
    page.c.syncable = REGS | SREGS | EVENTS
    return page
