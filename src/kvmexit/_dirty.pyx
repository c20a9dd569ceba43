"""Which pages a guest has written to: KVM's dirty log, a bitmap of each slot; or its dirty rings, one of each vCPU.

Both end in the same question, what of a slot was written to since it was asked last, and the same answer, a bitmap. KVM
keeps it for the log. Of the rings it is kept here: they have to be emptied whenever one is full, whoever wants to know.
"""

import threading
import weakref
from array import array
from typing import NamedTuple

cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from kvmexit._ioctl cimport Handle, forks
from kvmexit._uapi cimport (
    KVM_CLEAR_DIRTY_LOG, KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_GET_DIRTY_LOG, kvm_clear_dirty_log,
    kvm_dirty_gfn, kvm_dirty_log,
)
from kvmexit.errors import Error, KvmError

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <sys/ioctl.h>
    #include "include/kvmexit/uapi.h"

    #define kvmexit_load_flags(entry) __atomic_load_n(&(entry)->flags, __ATOMIC_ACQUIRE)
    #define kvmexit_store_flags(entry, value) __atomic_store_n(&(entry)->flags, value, __ATOMIC_RELEASE)

    /*
     * -> how many entries KVM took back, or -errno. A kick or a tick must not interrupt it: newer kernels then take back a
     * part, and forget to protect pages of what they took (virt/kvm/dirty_ring.c, kvm_dirty_ring_reset).
     */
    static int kvmexit_reset_dirty_rings(int fd)
    {
        sigset_t all, before;
        int n;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        n = ioctl(fd, KVM_RESET_DIRTY_RINGS, 0);
        n = n < 0 ? -errno : n;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return n;
    }
    """
    uint32_t kvmexit_load_flags(const kvm_dirty_gfn *) nogil
    void kvmexit_store_flags(kvm_dirty_gfn *, uint32_t) nogil
    int kvmexit_reset_dirty_rings(int fd) nogil

cdef enum:
    PAGE = 4096


class DirtyRange(NamedTuple):
    """Guest-physical pages that were written to. gpa and size in bytes."""

    gpa: int
    size: int


cdef uint64_t harvest(Ring *ring, Bits *slots, size_t count) noexcept nogil:
    """Note what a vCPU's ring has, and give it back to KVM, which takes it in order (KVM_RESET_DIRTY_RINGS). -> entries.

    An entry is ours from the load that sees DIRTY, and KVM's again from the store of RESET. Which slot and page it names is
    KVM's word; it may be of a slot that is gone, and is checked.
    """
    cdef kvm_dirty_gfn *entry
    cdef uint64_t begin = ring.next, page
    cdef uint32_t number
    cdef size_t i = 0
    while ring.next - begin < ring.count:
        entry = &ring.entries[ring.next & (ring.count - 1)]
        if kvmexit_load_flags(entry) != KVM_DIRTY_GFN_F_DIRTY:
            break
        number, page = entry.slot, entry.offset
        if i >= count or slots[i].number != number:  # mostly the one before
            i = 0
            while i < count and slots[i].number != number:
                i += 1
        if i < count and page < slots[i].pages:
            slots[i].words[page >> 6] |= 1ull << (page & 63)
        kvmexit_store_flags(entry, KVM_DIRTY_GFN_F_RESET)
        ring.next += 1
    return ring.next - begin


@cython.final
cdef class DirtyLog:
    """Internal: what one VM's slots have dirty. Refers to no Memory or Slot."""

    def __init__(self, Handle handle):
        self.handle = handle
        self.lock = threading.RLock()  # re-entrant: a finalizer may remove a slot
        self.slots = weakref.WeakValueDictionary()  # or a dropped VM would wait for the garbage collector
        self.rings = []

    def use_rings(self, entries):
        """The VM's vCPUs have rings from now on, of so many entries."""
        self.entries = entries

    def add_ring(self, memory):
        """A vCPU's ring, in memory that it shares with KVM."""
        with self.lock:
            self.rings.append(DirtyRing(memory, self.entries))

    cdef SlotDirty watch(self, uint32_t number, uint64_t gpa, uint64_t size):
        cdef SlotDirty dirty = SlotDirty.__new__(SlotDirty, number, gpa, size)
        dirty.log = self
        with self.lock:
            self.slots[number] = dirty
        return dirty

    cdef int forget(self, SlotDirty dirty) except -1:
        """KVM has deleted the slot. What the rings have of it is thrown away, before the number is another's."""
        with self.lock:
            self.slots.pop(dirty.bits.number, None)
            self.collect()
        return 0

    def collect(self):
        """Empty all rings; -> how many entries they had. KVM notes pages anew that are written to from now on."""
        cdef list rings, slots
        cdef DirtyRing ring
        cdef SlotDirty dirty
        cdef size_t count = 0
        cdef uint64_t entries = 0
        cdef Bits *bits
        cdef Ring *c
        cdef int taken
        self.handle.check()
        with self.lock:
            rings, slots = list(self.rings), list(self.slots.values())
            if not rings:
                return 0
            self.handle.begin_use()  # close() waits
            bits = <Bits *>malloc(max(len(slots), 1) * sizeof(Bits))
            try:
                if bits == NULL:
                    raise MemoryError
                for dirty in slots:
                    bits[count] = dirty.bits
                    count += 1
                for ring in rings:
                    c = &ring.ring
                    with nogil:
                        entries += harvest(c, bits, count)
                self.owed += entries
                while self.owed and self.handle.fd >= 0:
                    with nogil:
                        taken = kvmexit_reset_dirty_rings(self.handle.fd)
                    if taken < 0:
                        raise KvmError(-taken, "KVM_RESET_DIRTY_RINGS")
                    self.owed = self.owed - taken if 0 < <uint64_t>taken < self.owed else 0
            finally:
                free(bits)
                self.handle.end_use()
        return entries

    def close(self):
        """The VM is gone: KVM reads the rings no more. In a forked child the lock may be a thread's that is not there."""
        if self.handle.forks == forks():
            with self.lock:
                self.slots.clear()
                self.rings.clear()


@cython.final
cdef class DirtyRing:
    """Internal: one vCPU's ring."""

    def __init__(self, memory, entries):
        cdef uint8_t[::1] view = memoryview(memory).cast("B")
        if len(view) != entries * sizeof(kvm_dirty_gfn):
            raise ValueError(f"{len(view)} bytes for {entries} entries")
        self.memory = view
        self.ring.entries = <kvm_dirty_gfn *>&view[0]
        self.ring.count = entries


@cython.final
cdef class SlotDirty:
    """Internal: what one slot has dirty."""

    def __cinit__(self, uint32_t number, uint64_t gpa, uint64_t size):
        self.gpa = gpa
        self.bits.number = number
        self.bits.pages = size // PAGE
        self.bits.words = <uint64_t *>calloc((self.bits.pages + 63) // 64, 8)
        if self.bits.words == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.bits.words)

    def take(self):
        """-> what was written to since the last time, as a bitmap: bytes, a whole number of 64-bit words."""
        cdef kvm_dirty_log argument
        cdef size_t size = (self.bits.pages + 63) // 64 * 8
        cdef bytearray bitmap = bytearray(size)
        cdef uint8_t[::1] view = bitmap
        self.log.handle.check()  # before the lock: a forked child may have it locked for ever
        with self.log.lock:
            self.check()
            if self.log.entries:
                self.log.collect()
                memcpy(&view[0], self.bits.words, size)
                memset(self.bits.words, 0, size)
            elif self.log.handle.fd >= 0:
                memset(&argument, 0, sizeof(argument))
                argument.slot, argument.dirty_bitmap = self.bits.number, &view[0]
                self.log.handle.call("KVM_GET_DIRTY_LOG", KVM_GET_DIRTY_LOG, &argument)
        return bitmap

    def clear(self, uint64_t first, uint64_t count):
        """Have KVM note `count` pages from `first` anew (KVM_CLEAR_DIRTY_LOG, in blocks of 64)."""
        cdef kvm_clear_dirty_log argument
        cdef uint64_t begin = first // 64 * 64, end = min((first + count + 63) // 64 * 64, self.bits.pages), page
        cdef bytearray bitmap = bytearray((end - begin + 63) // 64 * 8)
        cdef uint8_t[::1] view = bitmap
        for page in range(first - begin, first - begin + count):
            view[page >> 3] |= 1 << (page & 7)
        memset(&argument, 0, sizeof(argument))
        argument.slot, argument.first_page, argument.num_pages = self.bits.number, begin, end - begin
        argument.dirty_bitmap = &view[0]
        self.log.handle.check()
        with self.log.lock:
            self.check()
            if self.log.handle.fd >= 0:
                self.log.handle.call("KVM_CLEAR_DIRTY_LOG", KVM_CLEAR_DIRTY_LOG, &argument)

    cdef int check(self) except -1:
        self.log.handle.check()
        if self.log.slots.get(self.bits.number) is not self:
            raise Error("the slot was removed")
        return 0

    def ranges(self, bitmap):
        """-> the same as [DirtyRange], runs as long as they can be."""
        cdef const uint64_t[::1] words = memoryview(bitmap).cast("Q")
        cdef uint64_t page = 0, begin
        cdef list found = []
        while True:
            page = next_page(words, page, True)
            if page >= self.bits.pages:
                return found
            begin, page = page, next_page(words, page, False)
            found.append(DirtyRange(self.gpa + begin * PAGE, (min(page, self.bits.pages) - begin) * PAGE))

    def addresses(self, bitmap):
        """-> the same as array("Q") of the pages' addresses."""
        cdef const uint64_t[::1] words = memoryview(bitmap).cast("Q")
        cdef uint64_t page = next_page(words, 0, True)
        cdef size_t i, count = 0
        cdef uint64_t[::1] view
        for i in range(<size_t>words.shape[0]):
            count += popcount(words[i])
        found = array("Q", bytes(8 * count))
        if count:
            view = found
            for i in range(count):
                view[i] = self.gpa + page * PAGE
                page = next_page(words, page + 1, True)
        return found


cdef extern from *:
    int popcount "__builtin_popcountll"(unsigned long long) nogil
    int trailing_zeros "__builtin_ctzll"(unsigned long long) nogil


@cython.boundscheck(False)  # SAFETY: page < end
@cython.wraparound(False)
cdef uint64_t next_page(const uint64_t[::1] words, uint64_t page, bint dirty) noexcept nogil:
    """The first page from this one on that is dirty, or clean; where there is none, how many there are."""
    cdef uint64_t end = <uint64_t>words.shape[0] * 64, word
    while page < end:
        word = (words[page >> 6] if dirty else ~words[page >> 6]) >> (page & 63)
        if word:
            return page + trailing_zeros(word)
        page = (page | 63) + 1
    return end
