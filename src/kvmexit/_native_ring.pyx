"""kvmexit.native.Ring: what guests write, put by for Python to fetch in batches. How it works: _ring.h."""

import os
from operator import index
from typing import NamedTuple

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.stdlib cimport free, malloc
from libc.stdint cimport UINT64_MAX, uint64_t
from posix.unistd cimport close

from kvmexit._chain cimport kvmexit_exit
from kvmexit._ioctl cimport forks
from kvmexit._native cimport dup_eventfd
from kvmexit._routes cimport Native
from kvmexit.errors import Error

cdef extern from "_ring.h" nogil:
    int kvmexit_ring_take_write(kvmexit_exit *, void *) noexcept
    int kvmexit_ring_init(kvmexit_ring *, uint64_t room, uint32_t lanes, int full)
    void kvmexit_ring_free(kvmexit_ring *)
    uint64_t kvmexit_ring_pending(kvmexit_ring *)
    uint64_t kvmexit_ring_dropped(const kvmexit_ring *)
    uint64_t kvmexit_ring_drain(kvmexit_ring *, kvmexit_entry *, uint64_t)
    bint kvmexit_ring_rest(kvmexit_ring *)


cdef enum:
    MAX_ENTRIES = 1 << 24
    MAX_LANES = 1 << 16

_FULL = {"stop": KVMEXIT_FULL_STOP, "drop": KVMEXIT_FULL_DROP, "wait": KVMEXIT_FULL_WAIT}
_FIELDS = [
    ("address", "<u8"), ("data", "<u8"), ("sequence", "<u8"), ("vcpu", "<u4"), ("size", "|u1"), ("reason", "|u1"),
    ("flags", "<u2"),
]
cdef const char *_FORMAT = b"T{<Q:address:<Q:data:<Q:sequence:<I:vcpu:B:size:B:reason:<H:flags:}"  # the same, by PEP 3118


class RingEntry(NamedTuple):
    """One entry of a Ring: see there."""

    address: int
    data: int
    sequence: int
    vcpu: int
    size: int
    reason: int
    flags: int


@cython.final
cdef class RingBatch:
    """What one `Ring.drain()` took out: the caller's own, whatever becomes of the ring.

    A sequence of RingEntry, and a writable buffer of 32 bytes an entry, which `numpy.asarray(batch)` makes a structured
    array of, without a copy; `Ring.dtype` has the names. Each vCPU's entries are together, in the order in which it wrote
    them.
    """

    def __init__(self):
        raise TypeError("use Ring.drain()")

    def __dealloc__(self):
        free(self.entries)

    def __len__(self):
        return self.count

    def __getitem__(self, Py_ssize_t i):
        cdef kvmexit_entry *e
        if i < 0:
            i += self.count
        if not 0 <= i < self.count:
            raise IndexError(f"{self.count} entries")
        e = &self.entries[i]
        return RingEntry(e.address, e.data, e.sequence, e.vcpu, e.size, e.reason, e.flags)

    def __iter__(self):
        return map(self.__getitem__, range(self.count))

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        buffer.buf = self.entries
        buffer.obj = self
        buffer.len = self.count * <Py_ssize_t>sizeof(kvmexit_entry)
        buffer.itemsize = sizeof(kvmexit_entry)
        buffer.readonly = False
        buffer.ndim = 1
        buffer.format = <char *>_FORMAT if flags & PyBUF_FORMAT else NULL
        buffer.shape = &self.count if flags & PyBUF_ND else NULL
        buffer.strides = &self.stride if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL

    def __repr__(self):
        return f"<RingBatch of {self.count}>"


cdef RingBatch batch(size_t count):
    """-> one with room for so many."""
    cdef RingBatch made = RingBatch.__new__(RingBatch)
    made.stride = sizeof(kvmexit_entry)
    made.entries = <kvmexit_entry *>malloc(max(count, <size_t>1) * sizeof(kvmexit_entry))
    if made.entries == NULL:
        raise MemoryError
    return made


@cython.final
cdef class Ring(Native):
    """Posted writes: what guests write is noted, and the vCPU goes on; Python fetches it in batches.

        ring = native.Ring(full="wait")
        vm.on_mmio(0xD000_0000, 0x1000, ring)
        loop.add_reader(ring, lambda: handle(numpy.asarray(ring.drain())))     # asyncio; or select, poll, epoll

    It takes writes to ports, memory and MSRs; reads and all else pass. It may be behind several routes, of several VMs, and
    the `journal` of Converts.

    entries: of each vCPU, a power of two, 2 to 2**24; 32 bytes each, allocated now, touched when used. vcpus: how many vCPUs
    can write, 1 to 65536, whatever their ids: the first that do. Others' writes pass.

    An entry (RingEntry): address, the port, guest-physical address or MSR; data, the value written (up to 8 bytes, low
    first, zero-extended); sequence, which access of that vCPU it is, from 0 on; vcpu, its id; size, bytes; reason,
    KVM_EXIT_IO (2), KVM_EXIT_MMIO (6), KVM_EXIT_X86_WRMSR (30); flags, 0. A string instruction is an entry for each access.
    Each vCPU's entries stay in order; between two vCPUs there is none.

    full: what becomes of a write for which there is no room. "stop": run() returns the exit, which then is the caller's,
    comes after what is in the ring, and counts as accepted. "drop": it is dropped, counted in `dropped`, and leaves a gap in
    `sequence`. "wait": the vCPU waits for a drain(). A kick, time-out or pause ends that: run() heeds it, and the next run()
    (resumed, this one) offers the exit again. A ring that is removed passes it on within some 100 ms. Of a string
    instruction all accesses go in, or none; where they are more than the ring has entries, "wait" does as "stop".
    What KVM has posted (vm.coalesce_mmio()) is no exit, and has a place of its own, of so many entries: there it is "drop".

    eventfd: None, or one that is yours to read, to which one is added when a first entry comes; duplicated: see EventFd.
    Else the ring has its own.

    Raises ValueError for other arguments. Source: include/uapi/linux/kvm.h, struct kvm_run.
    """

    dtype = _FIELDS

    def __cinit__(self, entries=4096, *, vcpus=64, full="stop", eventfd=None):
        self.ring.eventfd = -1
        self.opaque = &self.ring
        entries, vcpus = index(entries), index(vcpus)
        if not 2 <= entries <= MAX_ENTRIES or entries & (entries - 1):
            raise ValueError(f"entries {entries} must be a power of two from 2 to 2**24")
        if not 1 <= vcpus <= MAX_LANES:
            raise ValueError(f"vcpus {vcpus} is not in 1..65536")
        if full not in _FULL:
            raise ValueError(f"full={full!r} must be one of {', '.join(map(repr, _FULL))}")
        self.forks = forks()
        self.ring.eventfd = (
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if eventfd is None else dup_eventfd(eventfd))
        self.ring.is_read = eventfd is None
        if kvmexit_ring_init(&self.ring, entries, vcpus, _FULL[full]) != 0:
            raise MemoryError
        self.call = kvmexit_ring_take_write

    def __dealloc__(self):
        if self.opaque != NULL and self.ring.eventfd >= 0:  # else its __cinit__ did not begin, and this is 0
            close(self.ring.eventfd)
        if self.ring.lanes != NULL:
            kvmexit_ring_free(&self.ring)

    def drain(self, max=None):
        """Take out what is there, or up to `max` entries: -> RingBatch, in the order in which each vCPU wrote.

        What comes meanwhile is left for the next. Call it until it gives nothing, or when the ring is readable again: only
        an empty drain() makes it unreadable. Any thread may; several share the entries. What a run() that has returned left
        is there. ValueError for a `max` below 1; Error in a forked child, whose copy of the ring is its parent's.
        """
        cdef uint64_t count, most = 0
        cdef RingBatch taken
        if self.forks != forks():
            raise Error("this ring belongs to the process that made it; after fork() the child must make its own")
        if max is not None:
            max = index(max)
            if max < 1:
                raise ValueError(f"max {max} must be at least 1")
            most = min(max, UINT64_MAX)
        while True:
            count = kvmexit_ring_pending(&self.ring)
            if most and count > most:
                count = most
            taken = batch(count)
            taken.count = kvmexit_ring_drain(&self.ring, taken.entries, count)
            if taken.count or not kvmexit_ring_rest(&self.ring):  # nothing is given only by who rested, as ring.pml has it
                return taken

    def fileno(self):
        """The eventfd that is readable from the first entry on until a drain() finds nothing; it lives as long as the ring.

        Where `eventfd` was given, a duplicate of it, which you read: first read it, then drain() until nothing comes.
        """
        return self.ring.eventfd

    @property
    def pending(self):
        """Entries that wait to be drained."""
        return kvmexit_ring_pending(&self.ring)

    @property
    def dropped(self):
        """Entries that found no room, with full="drop", or of vm.coalesce_mmio() and coalesce_pio()."""
        return kvmexit_ring_dropped(&self.ring)

    @property
    def entries(self):
        """Of each vCPU."""
        return self.ring.room

    @property
    def vcpus(self):
        """How many can write."""
        return self.ring.lane_count - 1

    @property
    def full(self):
        """What happens to a write for which there is no room: "stop", "drop" or "wait"."""
        return [name for name, value in _FULL.items() if value == self.ring.full][0]

    def __repr__(self):
        return f"Ring(entries={self.entries}, full={self.full!r}, pending={self.pending}, dropped={self.dropped})"
