"""What a vCPU's thread counts and notes (_stats.h), as Python sees it: a Recorder makes Stats and LastExits of it."""

import time
from array import array

cimport cython
from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from kvmexit._exits cimport KNOWN, UNEXPLAINED
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_run,
)
from kvmexit import stats
from kvmexit._exits import ExitReason
from kvmexit.stats import LastExit, Stats

cdef extern from "_stats.h" nogil:
    int kvmexit_has_tsc()
    kvmexit_stats *kvmexit_new_stats(int)
    void kvmexit_set_timing(kvmexit_stats *, int)
    int kvmexit_timing(const kvmexit_stats *)
    void kvmexit_snapshot(const kvmexit_stats *, uint64_t *)
    size_t kvmexit_last(const kvmexit_stats *, kvmexit_record *)
    void kvmexit_note(kvmexit_stats *, int, uint64_t, uint64_t)
    uint64_t kvmexit_ticks(const kvmexit_stats *)


cdef enum:
    CALIBRATION_NS = 20_000_000  # the least that the two clocks are compared over

TSC = bool(kvmexit_has_tsc())
_REASONS = tuple(ExitReason)
_OUTCOMES = (*stats.OUTCOMES, stats.PENDING)
_compared = None    # the two clocks at one moment: (ticks, ns)
_ns_per_tick = None


cdef object _compare(kvmexit_stats *c):
    """The clocks at one moment: the closest of a few readings."""
    cdef uint64_t before, after, closest = 0
    found = None
    for _ in range(10):
        before = kvmexit_ticks(c)
        ns = time.monotonic_ns()
        after = kvmexit_ticks(c)
        if found is None or after - before < closest:
            closest = after - before
            found = before + closest // 2, ns
    return found


cdef object _scale(kvmexit_stats *c):
    """Nanoseconds a tick of the time stamp counter; waits where its first use was just now. One value a process, so that
    the times of its vCPUs can be added."""
    global _ns_per_tick
    if _ns_per_tick is None:
        ticks, ns = _compared
        time.sleep(max(0, (ns + CALIBRATION_NS - time.monotonic_ns()) / 1e9))
        later, later_ns = _compare(c)
        if _ns_per_tick is None:  # another thread may have been faster
            _ns_per_tick = (later_ns - ns) / (later - ticks)
    return _ns_per_tick


@cython.final
cdef class Recorder:
    """Owns what a vCPU's thread counts and notes, and outlives the vCPU in its VM."""

    def __cinit__(self):
        self.tsc = TSC
        self.c = kvmexit_new_stats(self.tsc)
        if self.c == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.c)

    def __sizeof__(self):
        return object.__sizeof__(self) + sizeof(kvmexit_stats)

    @property
    def timing(self):
        """Whether times are measured."""
        return kvmexit_timing(self.c) != 0

    @timing.setter
    def timing(self, bint on):
        global _compared
        if on and self.tsc and _compared is None:
            _compared = _compare(self.c)
        self.timed |= on
        kvmexit_set_timing(self.c, on)

    def stats(self):
        """-> Stats since the last reset()."""
        with cython.critical_section(self):
            baseline = self.baseline  # first: a reset() meanwhile would be later than the snapshot
        now = self.snapshot()
        return now if baseline is None else now - baseline

    def reset(self):
        """Begin anew."""
        snapshot = self.snapshot()
        with cython.critical_section(self):
            self.baseline = snapshot

    cdef object snapshot(self):
        cdef uint64_t[::1] view
        words = array("Q", bytes(8 * KVMEXIT_WORDS))
        view = words
        kvmexit_snapshot(self.c, &view[0])
        return Stats(words, _scale(self.c) if self.timed and self.tsc else 1.0)

    def last_exits(self):
        """-> [LastExit], oldest first."""
        cdef kvmexit_record records[KVMEXIT_LAST]
        cdef size_t i, count = kvmexit_last(self.c, records)
        exits = []
        for i in range(count):
            exits.append(_last_exit(&records[i]))
        return exits


cdef object _last_exit(const kvmexit_record *r):
    cdef kvm_run run
    cdef int place = r.place
    memset(&run.hw, 0, 32)
    memcpy(&run.hw, r.payload, sizeof(r.payload))
    address = size = is_write = private = None
    if place == KVM_EXIT_IO:
        address, size, is_write = run.io.port, run.io.size * run.io.count, run.io.direction == KVM_EXIT_IO_OUT
    elif place == KVM_EXIT_MMIO:
        address, size, is_write = run.mmio.phys_addr, run.mmio.len, run.mmio.is_write != 0
    elif place == KVM_EXIT_MEMORY_FAULT:
        address, size = run.memory_fault.gpa, run.memory_fault.size
        private = run.memory_fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE != 0
    elif place == KVM_EXIT_HYPERCALL:
        address = run.hypercall.nr
    elif place == KVM_EXIT_X86_RDMSR or place == KVM_EXIT_X86_WRMSR:
        address, size, is_write = run.msr.index, sizeof(run.msr.data), place == KVM_EXIT_X86_WRMSR
    reason = None if place == UNEXPLAINED else _REASONS[r.reason] if r.reason < KNOWN else r.reason
    return LastExit(
        reason, None if r.rip == KVMEXIT_NO_RIP else r.rip, address, size, is_write, private, r.error, _OUTCOMES[r.outcome])


def clock(Recorder recorder not None):
    """What time stamps are by: -> the ticks now, ns a tick. Internal. It may wait as the first look at times does."""
    global _compared
    if recorder.tsc and _compared is None:
        _compared = _compare(recorder.c)
    return kvmexit_ticks(recorder.c), _scale(recorder.c) if recorder.tsc else 1.0


def sorted_into_buckets(ticks):
    """A Stats whose `kvm` has these samples, at one ns a tick. Internal: for tests of Histogram."""
    cdef Recorder recorder = Recorder()
    for n in ticks:
        kvmexit_note(recorder.c, KVMEXIT_IN_KVM, 0, n)
    return recorder.snapshot()
