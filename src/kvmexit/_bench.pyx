"""What `kvmexit bench` has to do in C: the clock, the floor, and who kicks.

Exits are timed at one place, the same for all that are compared: `enter()` notes the time just before ioctl(KVM_RUN). One
sample is the time from an entry to the next: into the guest, to its exit, out of KVM, through userspace, which answers,
and back. The floor is a C loop around `enter()`; kvmexit has it in the place of its own (Page.c.enter); a loop in Python
calls it as `EntryTimes.ioctl()`, in the place of fcntl.ioctl(). Calls that enter no guest are timed around the call, in C.
"""

import os
from array import array
from itertools import pairwise

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EFAULT, EINTR, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec

from kvmexit._chain cimport kvmexit_exit
from kvmexit._loop cimport Vcpu, ask_natively
from kvmexit._page cimport KVMEXIT_REQUEST_KICK, kvmexit_vcpu
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_RUN, KVM_SET_MEMORY_ATTRIBUTES, KVMEXIT_REASON_SENTINEL, kvm_memory_attributes, kvm_run,
)
from kvmexit import _loop

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t size, int advice)
    const int MADV_DONTNEED

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long long offset, long long size)
    const int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE

cdef extern from "include/kvmexit/embed.h" nogil:
    const uint64_t KVMEXIT_FOREVER
    enum:
        KVMEXIT_RUN_KICKED, KVMEXIT_RUN_TIMED_OUT
    struct kvmexit_api:
        int (*run)(kvmexit_vcpu *, uint64_t, const kvmexit_exit **) noexcept nogil
        int (*kick)(kvmexit_vcpu *) noexcept nogil
        int (*convert)(kvmexit_vcpu *, uint64_t, uint64_t, int, uint64_t *) noexcept nogil

cdef extern from "include/kvmexit/embed.h":
    const kvmexit_api *kvmexit_import() except NULL

cdef extern from * nogil:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    #define kvmexit_see(at) __atomic_load_n(at, __ATOMIC_SEQ_CST)
    #define kvmexit_show(at, value) __atomic_store_n(at, value, __ATOMIC_SEQ_CST)
    #define kvmexit_arrive(at) __atomic_fetch_add(at, 1, __ATOMIC_SEQ_CST)
    static int32_t kvmexit_gettid(void) { return (int32_t)syscall(SYS_gettid); }
    static int kvmexit_tgkill(int32_t tid, int number)
    {
        return syscall(SYS_tgkill, getpid(), tid, number) ? -errno : 0;
    }
    """
    uint32_t kvmexit_see(uint32_t *)
    uint8_t kvmexit_see_byte "kvmexit_see"(uint8_t *)
    void kvmexit_show(uint32_t *, uint32_t)
    void kvmexit_show_byte "kvmexit_show"(uint8_t *, uint8_t)
    void kvmexit_arrive(uint32_t *)
    int32_t kvmexit_gettid()
    int kvmexit_tgkill(int32_t tid, int number)


cdef enum:
    REST_NS = 100_000  # between a vCPU's entry and its kick: it is in the guest by then


cdef uint64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef uint64_t *room_for(size_t count) except NULL:
    cdef uint64_t *ns = <uint64_t *>calloc(count + 1, sizeof(uint64_t))
    if ns == NULL:
        raise MemoryError
    return ns


cdef object as_array(const uint64_t *ns, size_t count):
    return array("Q", PyBytes_FromStringAndSize(<const char *>ns, count * sizeof(uint64_t)))


def clock_cost(size_t count):
    """What reading the clock costs, in ns: -> array("Q") of `count` times from one reading to the next."""
    cdef uint64_t *ns = room_for(count)
    cdef size_t i
    try:
        for i in range(count + 1):
            ns[i] = now()
        for i in range(count):
            ns[i] = ns[i + 1] - ns[i]
        return as_array(ns, count)
    finally:
        free(ns)


# ---- exits ----

cdef struct Entries:
    uint32_t *gate      # atomic: how many vCPUs have come to their first entry, and ...
    uint32_t expected   # ... how many have to before any goes on
    uint64_t *ns        # when each was begun
    size_t count, room
    uint32_t cancelled  # atomic
    bint again          # the last one was interrupted: the next goes on with it


cdef bint full(Entries *e) noexcept nogil:
    return e.count >= e.room or kvmexit_see(&e.cancelled)


cdef int enter(kvmexit_vcpu *c) noexcept nogil:
    """KVM_RUN, its beginning noted; -> 0 or -errno. Where there is no room any more, KVM completes what is pending and
    says EINTR."""
    cdef Entries *e = <Entries *>c.script
    cdef int error = 0
    if e.count == 0 and e.gate != NULL:
        kvmexit_arrive(e.gate)
        while kvmexit_see(e.gate) < e.expected and not kvmexit_see(&e.cancelled):
            sched_yield()
    if full(e):
        kvmexit_show_byte(&c.run.immediate_exit, 1)
    elif not e.again:
        e.ns[e.count] = now()
        e.count += 1
    if ioctl(c.fd, KVM_RUN, 0) < 0:
        error = -errno
    e.again = error == -EINTR
    return error


cdef int enter_or_kick(kvmexit_vcpu *c) noexcept nogil:
    """The same for kvmexit, whose run() returns then: it is kicked."""
    if full(<Entries *>c.script):
        ask_natively(c, KVMEXIT_REQUEST_KICK)
    return enter(c)


cdef bint answer(kvmexit_vcpu *c) noexcept nogil:
    """What a C programmer would write, for the guests of cells.py: zeros for a read, nothing for a write. Whether the exit
    was one of these."""
    cdef kvm_run *run = c.run
    cdef uint64_t size
    if run.exit_reason == KVM_EXIT_IO:
        size = <uint64_t>run.io.size * run.io.count
        if run.io.direction == KVM_EXIT_IO_IN:
            if size > c.run_size or run.io.data_offset > c.run_size - size:
                return False
            memset(<uint8_t *>run + run.io.data_offset, 0, size)
    elif run.exit_reason == KVM_EXIT_MMIO:
        if not run.mmio.is_write:
            memset(run.mmio.data, 0, sizeof(run.mmio.data))
    elif run.exit_reason == KVM_EXIT_HYPERCALL:
        run.hypercall.ret = 0
    else:
        return run.exit_reason == KVM_EXIT_MEMORY_FAULT
    return True


@cython.final
cdef class Gate:
    """Has so many vCPUs, each on a thread of its own, make their first entries at once."""

    cdef uint32_t arrived, expected

    def __cinit__(self, uint32_t vcpus):
        self.expected = vcpus


@cython.final
cdef class EntryTimes:
    """When a vCPU's entries into KVM began: takes the place of the vCPU's KVM_RUN for as long as the vCPU exists.

    begin() makes room for so many exits; then run the vCPU in one of the ways, which ends by itself, and take intervals().
    One thread at a time, but for cancel().
    """

    cdef Vcpu vcpu
    cdef Gate gate
    cdef Entries entries

    def __cinit__(self, Vcpu vcpu not None):
        if vcpu.c.fd < 0 or vcpu.c.script != NULL:
            raise ValueError(f"{vcpu!r} is no vCPU of KVM, or is timed already")
        self.vcpu = vcpu
        vcpu.c.script, vcpu.page.script = &self.entries, self  # the page keeps what it points into
        vcpu.c.enter = enter_or_kick

    def __dealloc__(self):
        free(self.entries.ns)

    def begin(self, size_t exits, Gate gate=None):
        """Forget what was noted, and make room for `exits` intervals. gate: wait there for the other vCPUs."""
        self.vcpu.page.check_mine()
        cdef uint64_t *ns = <uint64_t *>realloc(self.entries.ns, (exits + 1) * sizeof(uint64_t))
        if ns == NULL:
            raise MemoryError
        self.entries.ns, self.entries.room, self.entries.count, self.entries.again = ns, exits + 1, 0, False
        self.gate = gate
        self.entries.gate = &gate.arrived if gate is not None else NULL
        self.entries.expected = gate.expected if gate is not None else 0

    @property
    def full(self):
        """Whether there is no room for another entry."""
        return full(&self.entries)

    def cancel(self):
        """Have what runs end at its next entry, and whatever is begun later. Any thread."""
        kvmexit_show(&self.entries.cancelled, 1)

    def intervals(self):
        """-> array("Q"): ns from one entry to the next."""
        cdef size_t count = self.entries.count
        times = as_array(self.entries.ns, count)
        return array("Q", [after - before for before, after in pairwise(times)])

    def floor(self):
        """The floor: a C loop around KVM_RUN, without the GIL, that answers the exits. Raises OSError where KVM_RUN fails,
        RuntimeError for an exit of another kind."""
        cdef kvmexit_vcpu *c = self.vcpu.c
        cdef int error = 0
        cdef bint known = True
        with nogil:
            while True:
                c.run.exit_reason = KVMEXIT_REASON_SENTINEL
                error = enter(c)
                if error == -EINTR:
                    kvmexit_show_byte(&c.run.immediate_exit, 0)
                    if full(&self.entries):
                        break
                elif error == 0 or error == -EFAULT:
                    known = answer(c)
                    if not known:
                        break
                elif error != -EAGAIN:
                    break
        if error and error not in (-EINTR, -EFAULT):
            raise OSError(-error, os.strerror(-error), "KVM_RUN")
        if not known:
            raise RuntimeError(f"exit reason {c.run.exit_reason} in the C loop")

    def ioctl(self, int fd, unsigned long request, argument=0):
        """fcntl.ioctl(fd, KVM_RUN): the GIL is released meanwhile; -> 0, or OSError."""
        cdef int error
        if fd != self.vcpu.c.fd or request != KVM_RUN:
            raise ValueError("this is the vCPU's KVM_RUN, and nothing else")
        with nogil:
            error = enter(self.vcpu.c)
            if error == -EINTR:
                kvmexit_show_byte(&self.vcpu.c.run.immediate_exit, 0)
        if error:
            raise OSError(-error, os.strerror(-error))
        return 0


# ---- calls, and kicks ----

cdef struct Kicking:
    uint32_t asked      # atomic: the vCPU's thread is about to be inside, for the so-manieth time
    uint32_t served     # atomic: and was kicked so often, signal and all
    uint32_t stopped    # atomic
    uint64_t kicked_ns  # when the kick began: of the vCPU's thread once it is out
    int32_t tid
    int error


@cython.final
cdef class Kicker:
    """Kicks a vCPU each time that it is inside. natively: by kvmexit's kick(); else as a C programmer would, by
    immediate_exit and a signal."""

    cdef Vcpu vcpu
    cdef bint natively
    cdef Kicking kicking

    def __cinit__(self, Vcpu vcpu not None, bint natively):
        self.vcpu, self.natively = vcpu, natively

    def serve(self):
        """Kick until stop(): for a thread of its own. The GIL is released."""
        cdef Kicking *k = &self.kicking
        cdef kvmexit_vcpu *c = self.vcpu.c
        cdef int signal = _loop.KICK_SIGNAL
        cdef timespec rest
        rest.tv_sec, rest.tv_nsec = 0, REST_NS
        with nogil:
            while not kvmexit_see(&k.stopped):
                nanosleep(&rest, NULL)
                if kvmexit_see(&k.asked) == k.served:
                    continue
                nanosleep(&rest, NULL)
                k.kicked_ns = now()
                if self.natively:
                    k.error = ask_natively(c, KVMEXIT_REQUEST_KICK)
                else:
                    kvmexit_show_byte(&c.run.immediate_exit, 1)
                    k.error = kvmexit_tgkill(k.tid, signal)
                kvmexit_show(&k.served, k.served + 1)  # one writer

    def stop(self):
        """Have serve() return."""
        kvmexit_show(&self.kicking.stopped, 1)


# What is called in C; -> 0 or -errno.
ctypedef int (*Call)(kvmexit_vcpu *, const kvmexit_api *, size_t) noexcept nogil


cdef int enter_raw(kvmexit_vcpu *c, const kvmexit_api *api, size_t i) noexcept nogil:
    cdef int error = -EINTR
    while error == -EINTR:
        error = 0 if ioctl(c.fd, KVM_RUN, 0) == 0 else -errno
        if kvmexit_see_byte(&c.run.immediate_exit):
            break  # else a signal that is no kick's: a tick, say
    kvmexit_show_byte(&c.run.immediate_exit, 0)
    return 0 if error == -EINTR else error


cdef int never_enter(kvmexit_vcpu *c, const kvmexit_api *api, size_t i) noexcept nogil:
    kvmexit_show_byte(&c.run.immediate_exit, 1)
    return enter_raw(c, api, i)


cdef int never_enter_natively(kvmexit_vcpu *c, const kvmexit_api *api, size_t i) noexcept nogil:
    cdef int said = api.run(c, 0, NULL)
    return 0 if said == KVMEXIT_RUN_TIMED_OUT else min(said, -1)


cdef int run_natively(kvmexit_vcpu *c, const kvmexit_api *api, size_t i) noexcept nogil:
    cdef int said = api.run(c, KVMEXIT_FOREVER, NULL)
    return 0 if said == KVMEXIT_RUN_KICKED else min(said, -1)


cdef object timed(Call call, object function, Vcpu vcpu, size_t count, Kicker kicker):
    """-> array("Q"): ns that each of `count` calls took; of those that are kicked, from the kick to the return."""
    cdef const kvmexit_api *api = kvmexit_import()
    cdef kvmexit_vcpu *c = vcpu.c if vcpu is not None else NULL
    cdef Kicking *k = &kicker.kicking if kicker is not None else NULL
    cdef uint64_t *ns = room_for(count)
    cdef uint64_t before, after
    cdef size_t i
    cdef int error = 0
    try:
        if k != NULL:
            k.tid = kvmexit_gettid()
        for i in range(count):
            if k != NULL:
                kvmexit_show(&k.asked, k.asked + 1)  # one writer
            before = now()
            if call != NULL:
                with nogil:
                    error = call(c, api, i)
                    after = now()
            else:
                function()
                after = now()
            if k != NULL:
                with nogil:  # its signal must not be taken for that of the next kick
                    while kvmexit_see(&k.served) != k.asked and not kvmexit_see(&k.stopped):
                        sched_yield()
                before, error = k.kicked_ns, error or k.error
            if error:
                raise OSError(-error, os.strerror(-error))
            ns[i] = after - before if after > before else 0
        return as_array(ns, count)
    finally:
        free(ns)


def time_calls(function, size_t count, Kicker kicker=None):
    """Time `count` calls of a function without arguments, with the clock of the others. Raises what it raises."""
    return timed(NULL, function, None, count, kicker)


def time_floor(Vcpu vcpu not None, size_t count, Kicker kicker=None):
    """The floor of time_calls(): a KVM_RUN that never enters, or one that is kicked; in C."""
    return timed(never_enter if kicker is None else enter_raw, None, vcpu, count, kicker)


def time_native(Vcpu vcpu not None, size_t count, Kicker kicker=None):
    """The same by kvmexit's C API: run() with a time-out of 0, or kicked."""
    return timed(never_enter_natively if kicker is None else run_natively, None, vcpu, count, kicker)


# ---- conversions ----

cdef struct Convertible:
    int vm_fd, gmem
    uint64_t gpa, offset
    void *hva


# -> 0 or -errno.
ctypedef int (*Conversion)(const Convertible *, kvmexit_vcpu *, const kvmexit_api *, bint) noexcept nogil


cdef int convert_raw(const Convertible *page, kvmexit_vcpu *c, const kvmexit_api *api, bint private) noexcept nogil:
    cdef kvm_memory_attributes wanted
    memset(&wanted, 0, sizeof(wanted))
    wanted.address, wanted.size = page.gpa, 4096
    wanted.attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    if ioctl(page.vm_fd, KVM_SET_MEMORY_ATTRIBUTES, &wanted) != 0:
        return -errno
    if private:
        return -errno if madvise(page.hva, 4096, MADV_DONTNEED) != 0 else 0
    return -errno if fallocate(page.gmem, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page.offset, 4096) != 0 else 0


cdef int convert_natively(const Convertible *page, kvmexit_vcpu *c, const kvmexit_api *api, bint private) noexcept nogil:
    return api.convert(c, page.gpa, 4096, private, NULL)


@cython.final
cdef class Conversions:
    """A page that turns private and shared again, call by call: ns of each, in an array("Q").

    gpa: of a page in a slot that kvmexit allocated, with a guest_memfd; hva: of its shared side, gmem: the descriptor, and
    offset, of its private one; vm_fd.
    """

    cdef Vcpu vcpu
    cdef Convertible page

    def __cinit__(self, Vcpu vcpu not None, int vm_fd, uint64_t gpa, uintptr_t hva, int gmem, uint64_t offset):
        self.vcpu = vcpu
        self.page.vm_fd, self.page.gpa, self.page.hva = vm_fd, gpa, <void *>hva
        self.page.gmem, self.page.offset = gmem, offset

    def floor(self, size_t count):
        """What a C programmer would write: KVM_SET_MEMORY_ATTRIBUTES, and the side that went out of use given back."""
        return self.timed(convert_raw, count)

    def native(self, size_t count):
        """kvmexit's convert() of the C API."""
        return self.timed(convert_natively, count)

    cdef object timed(self, Conversion convert, size_t count):
        cdef const kvmexit_api *api = kvmexit_import()
        cdef uint64_t *ns = room_for(count)
        cdef size_t i = 0
        cdef int error = 0
        try:
            with nogil:
                while i < count and not error:
                    ns[i] = now()
                    error = convert(&self.page, self.vcpu.c, api, not i & 1)
                    ns[i] = now() - ns[i]
                    i += 1
            if error:
                raise OSError(-error, os.strerror(-error))
            return as_array(ns, count)
        finally:
            free(ns)
