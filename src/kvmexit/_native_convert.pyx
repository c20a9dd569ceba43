"""kvmexit.native.Convert: guest memory made private or shared as the guest wants it, without Python.

Nothing here waits for long, since kicks, pauses and Route.remove() wait for native handlers: for the converter's lock
LOCK_WAIT_MS, and a large range is converted by the chunk, with a look at `immediate_exit` between, which is set for
everybody who wants this vCPU's thread. A fault need not be finished: the vCPU re-enters, KVM_RUN returns at once where
somebody asked, and else the guest faults again and finds what was converted so far. A hypercall has to be answered before
the vCPU may re-enter, so where somebody asked it goes on from Python's dispatch (KVMEXIT_LATER), PATIENCE_MS at a time, as
handlers.map_gpa_range would.
"""

import os
from operator import index

cimport cython
from libc.errno cimport EAGAIN, EBUSY, EFAULT, EINVAL, ENOMEM
from libc.stdint cimport UINT64_MAX, uint8_t, uint16_t, uint64_t

from kvmexit._chain cimport KVMEXIT_DONE, KVMEXIT_LATER, KVMEXIT_PASS, kvmexit_exit
from kvmexit._convert cimport (
    BUSY, DISCARD_FAILED, DONE, NO_BACKEND, NO_PRIVATE_SIDE, NO_SLOT, SET_FAILED, STUCK, UNDECIDED_DISCARD, Result, Tally,
    convert_chunk, examine, examine_fault, kvmexit_next_generation, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock,
)
from kvmexit._memory cimport Memory
from kvmexit._native_ring cimport Ring, kvmexit_lane, kvmexit_ring_admit, kvmexit_ring_put
from kvmexit._routes cimport Native
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_MEMORY_FAULT, KVM_HC_MAP_GPA_RANGE, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_run,
)
from kvmexit._memory import _range
from kvmexit.errors import ConversionError

cdef extern from * nogil:
    """
    #define kvmexit_add(at, n) __atomic_fetch_add(at, n, __ATOMIC_RELAXED)
    #define kvmexit_added(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    #include <time.h>
    static uint64_t kvmexit_now_ms(void)
    {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
    }
    #define kvmexit_asked_out(run) __atomic_load_n(&(run)->immediate_exit, __ATOMIC_RELAXED)
    """
    void kvmexit_add(uint64_t *, uint64_t n)
    uint64_t kvmexit_added(const uint64_t *)
    uint64_t kvmexit_now_ms()
    bint kvmexit_asked_out(const kvm_run *)


cdef enum:
    PAGE_SHIFT = 12
    PAGE = 1 << PAGE_SHIFT
    PATIENCE_MS = 100  # of hypercalls: each time they go on, all that was converted is looked over
    MAX_WINDOW = 1 << 30
    ADAPTIVE_WINDOW = 1 << 21  # unless said
    PRIVATE_ATTRIBUTE = 1 << 4   # of KVM_HC_MAP_GPA_RANGE: encrypted. Bits 3:0 are a page size, a hint
    KNOWN_ATTRIBUTES = (1 << 5) - 1
    MOST_NOTED = 2     # conversions of one exit: of a window that failed in the middle, and of what the fault names


cdef int take(kvmexit_exit *exit, void *opaque) noexcept nogil:
    cdef Shared *s = <Shared *>opaque
    if exit.reason == KVM_EXIT_MEMORY_FAULT:
        return repair(s, exit)
    if exit.reason == KVM_EXIT_HYPERCALL and exit.data != NULL and exit.address == KVM_HC_MAP_GPA_RANGE:
        return map_gpa_range(s, exit)
    return KVMEXIT_PASS


cdef Result convert(
        Shared *s, kvmexit_exit *exit, kvmexit_lane *lane, uint64_t first, uint64_t last, bint private,
        uint64_t patience_ms) noexcept nogil:
    """Convert a range by the chunk. DONE with `at` before `last`: somebody asked us out, `patience_ms` or more ago.
    Something was converted then, so that coming back often ends, too."""
    cdef Tally tally
    cdef Result result
    cdef uint64_t until = 0, begin = first, size
    tally.runs = tally.pages = 0
    while True:
        result = convert_chunk(s.converter, first, last, private, &tally)
        if result.step != DONE or result.at == last:
            break
        if tally.runs and kvmexit_asked_out(exit.run):
            until = until or kvmexit_now_ms() + patience_ms
            if kvmexit_now_ms() >= until:
                break
        first = result.at + 1
    if tally.runs:
        kvmexit_add(&s.conversions, tally.runs)
        kvmexit_add(&s.pages, tally.pages)
    # A run of which a later slot's discard failed is not tallied, and its first slots' pages are converted all the same.
    if s.journal != NULL and (tally.runs or result.step in (DISCARD_FAILED, STUCK) and result.at != begin):
        size = result.at - begin + (result.step == DONE)
        kvmexit_ring_put(s.journal, lane, exit, begin, <uint8_t *>&size, sizeof(size), 1,
                         <uint16_t>KVM_MEMORY_EXIT_FLAG_PRIVATE if private else 0)
    return result


cdef int admit(Shared *s, kvmexit_exit *exit, kvmexit_lane **lane) noexcept nogil:
    """Whether the journal has room for what is to be converted: DONE, or what becomes of the exit."""
    return KVMEXIT_DONE if s.journal == NULL else kvmexit_ring_admit(s.journal, exit, MOST_NOTED, lane)


cdef int fail(Shared *s, uint64_t first, uint64_t last, bint private, Result result) noexcept nogil:
    """Note why, and leave it to Python."""
    kvmexit_add(&s.failed, 1)
    pthread_mutex_lock(&s.lock)
    s.failure.result, s.failure.first, s.failure.last, s.failure.private = result, first, last, private
    pthread_mutex_unlock(&s.lock)
    return KVMEXIT_PASS


# ---- faults ----

cdef int repair(Shared *s, kvmexit_exit *exit) noexcept nogil:
    """What the fault names, and its surroundings where they can be, become as the fault says."""
    cdef uint64_t first = exit.address, last = exit.address + (exit.size - 1), low = 0, high = 0, from_ = 0, to = 0
    cdef bint private = exit.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE != 0, whole = True
    cdef Result result
    cdef kvmexit_lane *lane = NULL
    cdef int verdict
    if exit.error != EFAULT or exit.size == 0 or last < first or exit.flags & ~<uint64_t>KVM_MEMORY_EXIT_FLAG_PRIVATE:
        return KVMEXIT_PASS  # EHWPOISON, rubbish, and kinds of fault that are to come
    first, last = first & ~<uint64_t>(PAGE - 1), last | (PAGE - 1)
    if first < s.first or last > s.last:
        return KVMEXIT_PASS
    result = examine_fault(s.converter, first, last, private, &low, &high)
    if result.step == DONE and result.at != last:
        verdict = admit(s, exit, &lane)
        if verdict != KVMEXIT_DONE:
            return verdict
    kvmexit_add(&s.faults, 1)
    if result.step == DONE and result.at == last:
        # Somebody else's fault converted it. If that was not why, the same fault comes again with nothing repaired between:
        # FaultLoopError after vcpu.fault_limit, since a native DONE does not reset the burst's count.
        kvmexit_add(&s.duplicates, 1)
        return KVMEXIT_DONE
    if result.step == DONE:
        low, high = max(low, s.first), min(high, s.last)
        plan(s, first, last, private, &from_, &to)
        from_, to = max(from_, low), min(to, high)
        result = convert(s, exit, lane, from_, to, private, 0)
        whole = result.step == DONE or result.step == BUSY
        if result.step == STUCK:
            first, last = from_, to
        elif not whole and (from_ != first or to != last):
            result = convert(s, exit, lane, first, last, private, 0)
        if s.adaptive and result.step == DONE:
            follow(s, first, result.at, private, whole)
    if result.step == BUSY:
        # Whoever has the lock for so long is at work on memory: not the loop that fault_limit is to end. The generation says
        # so, and the burst counts anew. If it was us who were asked out, KVM_RUN says EINTR.
        kvmexit_add(&s.busy, 1)
        kvmexit_next_generation(&s.converter.generation)
        return KVMEXIT_DONE
    return KVMEXIT_DONE if result.step == DONE else fail(s, first, last, private, result)


cdef void plan(
        Shared *s, uint64_t first, uint64_t last, bint private, uint64_t *from_, uint64_t *to) noexcept nogil:
    """What to convert for a fault: the window around it; or, adaptive, from it to the end of a window that doubles while
    each fault begins where the last conversion ended, and else is a page. What lies before such a fault was converted, or is
    not asked for.

    Two vCPUs may plan before either follow()s, or each break the other's stream: the window is then too small, or doubles
    for one that did not go on. Both are guesses about what the guest will want; each vCPU converts what its own fault named.
    """
    cdef Stream *stream = &s.stream
    cdef uint64_t window = s.window
    from_[0] = first & ~(window - 1)
    if s.adaptive:
        pthread_mutex_lock(&s.lock)
        if private == stream.private and first and first - 1 == stream.last:
            stream.window = min(stream.window * 2, s.window)
        else:
            stream.window = PAGE
        window = stream.window
        pthread_mutex_unlock(&s.lock)
        from_[0] = first
    to[0] = last | (window - 1)


cdef void follow(Shared *s, uint64_t first, uint64_t last, bint private, bint whole) noexcept nogil:
    """Note what a fault converted. Where its window could not be converted the next one begins with a page again."""
    cdef Stream *stream = &s.stream
    pthread_mutex_lock(&s.lock)
    stream.first, stream.last, stream.private = first, last if whole else 0, private
    pthread_mutex_unlock(&s.lock)


cdef void part(Shared *s, uint64_t first, uint64_t last, bint private) noexcept nogil:
    """The guest asked for a range by hypercall: if it takes back what was converted last, that stream has ended."""
    cdef Stream *stream = &s.stream
    pthread_mutex_lock(&s.lock)
    if private != stream.private and first <= stream.last and last >= stream.first:
        stream.last = 0
    pthread_mutex_unlock(&s.lock)


# ---- KVM_HC_MAP_GPA_RANGE ----

cdef int map_gpa_range(Shared *s, kvmexit_exit *exit) noexcept nogil:
    """As handlers.map_gpa_range: the guest's word is checked, and answered."""
    cdef const uint64_t *args = exit.run.hypercall.args
    cdef uint64_t first = args[0], pages = args[1], last = first + ((pages << PAGE_SHIFT) - 1)
    cdef bint private = args[2] & PRIVATE_ATTRIBUTE != 0
    cdef Result result
    cdef kvmexit_lane *lane = NULL
    cdef int verdict
    if (first & (PAGE - 1) or pages == 0 or args[2] & ~<uint64_t>KNOWN_ATTRIBUTES
            or pages - 1 > (UINT64_MAX - first) >> PAGE_SHIFT):
        return reply(s, exit, EINVAL)
    if first < s.first or last > s.last:
        return KVMEXIT_PASS
    result = examine(s.converter, first, last, private)
    if result.step == DONE:
        verdict = admit(s, exit, &lane)
        if verdict != KVMEXIT_DONE:
            return verdict
        result = convert(s, exit, lane, first, last, private, PATIENCE_MS)
    if result.step == BUSY or (result.step == DONE and result.at != last):
        return KVMEXIT_LATER
    if result.step == DONE:
        if s.adaptive:
            part(s, first, last, private)
        return reply(s, exit, 0)
    if result.step in (NO_SLOT, NO_PRIVATE_SIDE, UNDECIDED_DISCARD, NO_BACKEND):
        return reply(s, exit, EINVAL)
    if result.error in (EAGAIN, EBUSY, ENOMEM):
        return reply(s, exit, EAGAIN)  # asking again goes on from there
    return fail(s, first, last, private, result)


cdef int reply(Shared *s, kvmexit_exit *exit, int error) noexcept nogil:
    kvmexit_add(&s.hypercalls, 1)
    (<uint64_t *>exit.data)[0] = <uint64_t>(error if s.positive else -error)
    return KVMEXIT_DONE


# ---- the handler ----

@cython.final
cdef class Convert(Native):
    """Makes guest memory private or shared as the guest wants it: handlers.convert and handlers.map_gpa_range in one, for
    `on_memory_fault` and `on_hypercall(12)` of `vm` (ValueError in another VM).

    gpa, size (bytes): what may be converted; all, unless given. What asks for anything else passes.

    window: bytes, a power of two, 4 KiB to 1 GiB. A fault converts this much around it, aligned, as far as slot, gpa and
    size go; what is so already costs nothing. Where that cannot be, it is what the fault names. **What the guest had in
    the rest of the window is lost with it**: this is for guests that will want it all. 4096, the default, converts what
    the fault names, a hypercall what it names.
    adaptive: a fault converts a page, and the one that begins where it ended twice as much from there on, and so on, up to
    `window` (2 MiB unless given), never what lies before the fault. Any other fault starts with a page again.

    Passed on: what cannot be converted, or failed (`failed`, `failure`), EHWPOISON, faults with unknown flags. Their other
    handlers say why: handlers.convert raises the ConversionError. A page that is as its fault wants it re-enters without a
    system call; for ever the same, it is FaultLoopError. Hypercalls are answered as handlers.map_gpa_range does.

    While somebody else converts for more than 100 ms a fault re-enters, so that kicks, time-outs and pauses are heeded;
    large windows are converted 64 MiB at a time, and left where somebody asks.

    journal: a Ring that each conversion is noted in, before the guest goes on: address, and data bytes from there on (0:
    all 2**64), are as wanted since then, some perhaps before; flags has KVM_MEMORY_EXIT_FLAG_PRIVATE (8) where private;
    reason is KVM_EXIT_MEMORY_FAULT (39) or KVM_EXIT_HYPERCALL (3). Where it has no room nothing is converted, unless its
    policy is to drop: the exit waits, or run() returns it and, re-entered, asks again. A vCPU that the ring does not take
    passes.

    Counts, as long as it exists: faults (that it tried), duplicates (of these, as wanted already), hypercalls (answered),
    conversions (runs of pages, a call of KVM each), pages, busy, failed (faults and hypercalls passed on).

    Raises ValueError for a window or a range that is none, and for a VM with SlotRebind, which is paused for each
    conversion: there use Python's handlers. Source: Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT; docs/memory.md.
    """

    def __cinit__(self, vm, gpa=None, size=None, *, window=None, bint adaptive=False, Ring journal=None):
        cdef Memory memory
        cdef Shared *s = &self.shared
        if pthread_mutex_init(&s.lock, NULL) != 0:
            raise MemoryError
        memory = vm.memory
        if (gpa is None) != (size is None):
            raise ValueError("give gpa and size, or neither")
        gpa, size = (0, 1 << 64) if gpa is None else _range(gpa, size)
        window = (ADAPTIVE_WINDOW if adaptive else PAGE) if window is None else index(window)
        if not PAGE <= window <= MAX_WINDOW or window & (window - 1):
            raise ValueError(f"window {window:#x} must be a power of two from {PAGE:#x} to {MAX_WINDOW:#x}")
        if memory.rebinds:
            raise ValueError("a VM with SlotRebind is paused for each conversion, which native handlers cannot do: use "
                             "handlers.convert and handlers.map_gpa_range")
        self.journal = journal
        if journal is not None:
            s.journal = &journal.ring
        self.owner = memory.conversions
        s.converter = memory.converter
        s.positive = vm.type.name in ("SNP", "TDX")
        s.adaptive, s.window = adaptive, window
        s.first, s.last = gpa, gpa + size - 1
        self.call, self.opaque = take, s

    def __dealloc__(self):
        pthread_mutex_destroy(&self.shared.lock)

    cdef int check(self, object memory) except -1:
        # Slots are freed when their own VM's vCPUs stand still. Another's would not.
        if (<Memory?>memory).conversions is not self.owner:
            raise ValueError(f"{self!r} is for another VM")
        return 0

    @property
    def window(self):
        """Bytes that a fault converts at most, unless it names more."""
        return self.shared.window

    @property
    def adaptive(self):
        """Whether windows grow."""
        return bool(self.shared.adaptive)

    @property
    def faults(self):
        """Memory faults that it tried to repair."""
        return kvmexit_added(&self.shared.faults)

    @property
    def duplicates(self):
        """Of these, the ones that found everything as they wanted it."""
        return kvmexit_added(&self.shared.duplicates)

    @property
    def hypercalls(self):
        """Hypercalls answered."""
        return kvmexit_added(&self.shared.hypercalls)

    @property
    def conversions(self):
        """Runs of pages converted: a call of KVM each."""
        return kvmexit_added(&self.shared.conversions)

    @property
    def pages(self):
        """Pages of 4 KiB converted."""
        return kvmexit_added(&self.shared.pages)

    @property
    def busy(self):
        """Faults that re-entered since somebody else was converting."""
        return kvmexit_added(&self.shared.busy)

    @property
    def failed(self):
        """Faults and hypercalls passed on because they could not be converted."""
        return kvmexit_added(&self.shared.failed)

    @property
    def failure(self):
        """Why the last of these could not: a ConversionError, not raised; or None."""
        cdef Failure f
        with nogil:
            pthread_mutex_lock(&self.shared.lock)
            f = self.shared.failure
            pthread_mutex_unlock(&self.shared.lock)
        if f.result.step == DONE:
            return None
        where = f"gpa {f.result.where:#x}"
        name = f"{os.strerror(f.result.error)} (errno {f.result.error})"
        why = {
            NO_SLOT: f"no slot covers {where}",
            NO_PRIVATE_SIDE: f"the slot at {where} has no guest_memfd",
            UNDECIDED_DISCARD: f"add() was not told whether to discard the memory at {where}",
            NO_BACKEND: "this VM has no private memory",
            SET_FAILED: f"KVM refused at {where}: {name}",
            DISCARD_FAILED: f"discarding what went out of use at {where}: {name}; the attributes were put back",
            STUCK: f"discarding what went out of use at {where}: {name}; the attributes could not be put back, either",
        }[f.result.step]
        return ConversionError(f.first, <object>f.last - f.first + 1, bool(f.private), f.result.at - f.first, why,
                               f.result.error or None)

    def __repr__(self):
        s = f"window={self.window:#x}" + (", adaptive=True" if self.shared.adaptive else "")
        return f"Convert({s})"
