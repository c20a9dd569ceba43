"""Guest-physical memory: memslots over host memory, guest_memfds bound to them, and what of it is private.

A `Slot` owns what it is made of through library objects: an `mmap.mmap` or the caller's buffer, seen through one memoryview.
Every slice is a view derived from that one, so the mapping lives until its last view is gone, whatever happens to the slot.
"""

import enum
import errno as errnos
import fcntl
import mmap
import os
import threading
from array import array
from operator import attrgetter, index
from typing import NamedTuple

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport errno
from libc.stdint cimport UINT64_MAX, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, munmap,
)
from posix.mman cimport mmap as c_mmap
from posix.unistd cimport close as close_descriptor, getpid

from kvmexit._convert cimport (
    BUSY, DONE, DONTNEED, NO_BACKEND, NO_PRIVATE_SIDE, NO_SLOT, NOTHING, PUNCH, REMOVE, SET_FAILED, STUCK, UNDECIDED,
    UNDECIDED_DISCARD, AttributesBackend, Conversions, Converter, Piece, Region, Result, Run, SlotRebind, Step,
    convert_chunk, examine, exclude, free_region, give_bits, insert, kvmexit_generation, kvmexit_next_generation,
    kvmexit_take_fd, list_runs, release_number, renew_private, reserve_number, state_at, withdraw,
)
from kvmexit._dirty cimport DirtyLog, SlotDirty
from kvmexit._ioctl cimport Handle, forks
from kvmexit._uapi cimport (
    GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CREATE_GUEST_MEMFD, KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2,
    kvm_create_guest_memfd, kvm_userspace_memory_region2,
)
from kvmexit._vcpus cimport Vcpus
from kvmexit._dirty import DirtyRange
from kvmexit.errors import ConversionError, Error, KvmError

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(
        int pid, const iovec *local, unsigned long n, const iovec *remote, unsigned long m, unsigned long flags)
    ssize_t process_vm_writev(
        int pid, const iovec *local, unsigned long n, const iovec *remote, unsigned long m, unsigned long flags)

cdef extern from "Python.h":
    enum:
        PyBUF_READ
        PyBUF_WRITE


class GuestMemfdFlags(enum.IntFlag):
    """Flags of a guest_memfd (GUEST_MEMFD_FLAG_*; KVM_CAP_GUEST_MEMFD_FLAGS says which this kernel takes)."""

    NONE = 0
    MMAP = GUEST_MEMFD_FLAG_MMAP
    INIT_SHARED = GUEST_MEMFD_FLAG_INIT_SHARED


class MemoryRange(NamedTuple):
    """A run of guest-physical pages in one state. gpa and size in bytes."""

    gpa: int
    size: int
    private: bool


_PAGE = mmap.PAGESIZE
_by_gpa = attrgetter("gpa")


def _range(first, size, what="gpa"):
    """Check a page-aligned range that does not wrap; -> its two numbers."""
    first, size = index(first), index(size)
    if first < 0 or first > UINT64_MAX:
        raise ValueError(f"{what} {first:#x} is no 64-bit address")
    if first % _PAGE:
        raise ValueError(f"{what} {first:#x} is not a multiple of the page size, {_PAGE:#x}")
    if size <= 0 or size % _PAGE:
        raise ValueError(f"size {size:#x} must be a positive multiple of the page size, {_PAGE:#x}")
    if first + size - 1 > UINT64_MAX:
        raise ValueError(f"{what} {first:#x} + size {size:#x} wraps around 2**64")
    return first, size


@cython.final
cdef class Slot:
    """A memslot: `size` bytes of guest-physical memory from `gpa`, backed by host memory at `hva`.

    Made by `vm.memory.add()`. It has the buffer protocol, and its slices are memoryviews: raw memory, zero copy, shared with
    a running guest, and a SIGBUS where the backing file was truncated. `vm.memory.read()` and `write()` are the checked way.

    gpa, size (bytes), hva, number (KVM's slot number; with SlotRebind that of its first part), readonly, log_dirty,
    guest_memfd (the descriptor of what holds its private pages, owned by the slot, or None), gmem_flags (the
    GuestMemfdFlags that it was made with; with MMAP it is the slot's whole memory), gmem_offset (where in it the slot
    begins, bytes; not 0 only of adopted slots).
    Source: Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION2.
    """

    def __cinit__(self):
        self.region.gmem_fd = -1
        self.gmem_flags = GuestMemfdFlags.NONE

    def __init__(self):
        raise TypeError("use vm.memory.add()")

    def __dealloc__(self):
        self.close_fd()
        free_region(&self.region)

    cdef void close_fd(self) noexcept:
        cdef int fd = kvmexit_take_fd(&self.region.gmem_fd)  # a close_guest_memfd() may be at it, without the GIL
        if fd >= 0:
            close_descriptor(fd)

    @property
    def number(self):
        return self.region.pieces[0].number if self.region.piece_count else self.number_

    @property
    def guest_memfd(self):
        return self.region.gmem_fd if self.region.gmem_fd >= 0 else None

    @property
    def gmem_offset(self):
        return self.region.gmem_offset

    @property
    def view(self):
        """All of it as a memoryview of bytes. Error once the slot was removed, or its guest_memfd closed."""
        with cython.critical_section(self):
            view = self.view_
        if view is None:
            raise Error(f"{self!r} has no memory any more: it was removed, or its guest_memfd closed")
        return view[:]  # a view of its own: released, it leaves the slot's alone, which holds the memory for KVM

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        return self.view[key]

    def __setitem__(self, key, value):
        self.view[key] = value

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyObject_GetBuffer(self.view, buffer, flags)

    def __repr__(self):
        return f"Slot(gpa={self.gpa:#x}, size={self.size:#x}, number={self.number})"

    cdef SlotDirty log(self):
        with cython.critical_section(self):
            return self.dirty_

    cdef SlotDirty logged(self):
        cdef SlotDirty dirty = self.log()
        if dirty is None:
            raise Error(f"{self!r} " + ("was removed" if self.log_dirty else
                                        "does not log which pages are written to: add it with log_dirty=True"))
        return dirty

    cdef int let_go(self) except -1:
        """KVM has the slot no more, and we neither."""
        with cython.critical_section(self):
            self.view_ = self.mapping = self.conversions = None
        self.close_fd()
        return 0

    def dirty(self):
        """-> [DirtyRange(gpa, size)]: what the guest has written to since the last time, as runs of pages, by address; with
        vm.manual_dirty_protect() since it was cleared.

        Ask first, then read the pages: what is written after the question is in the next answer. What the host writes
        (views, memory.write(), handlers) is not noted. Raises Error where the slot does not log it, was removed, or its VM
        is closed; KvmError where KVM refuses.
        Source: Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG, KVM_CAP_DIRTY_LOG_RING.
        """
        cdef SlotDirty dirty = self.logged()
        return dirty.ranges(dirty.take())

    def dirty_bitmap(self):
        """The same as a bytearray: bit n % 8 of byte n // 8 is the slot's page n. A whole number of 64-bit words:
        numpy.unpackbits(numpy.frombuffer(bitmap, "u1"), bitorder="little", count=slot.size // 4096)."""
        return self.logged().take()

    def clear_dirty(self, gpa=None, size=None):
        """With vm.manual_dirty_protect(): have KVM note anew from now on who writes to `size` bytes from `gpa`, whole pages
        of this slot; without arguments to all of it (KVM_CLEAR_DIRTY_LOG). Read the pages afterwards.

        Raises ValueError for a range that is empty, unaligned or not in the slot, and as dirty(); KvmError (ENXIO) where the
        VM has dirty rings.
        """
        cdef SlotDirty dirty = self.logged()
        if (gpa is None) != (size is None):
            raise ValueError("give gpa and size, or neither")
        gpa, size = (self.gpa, self.size) if gpa is None else _range(gpa, size)
        if gpa < self.gpa or gpa + size > self.gpa + self.size:
            raise ValueError(f"gpa {gpa:#x}, size {size:#x} is not in {self!r}")
        dirty.clear((gpa - self.gpa) // _PAGE, size // _PAGE)

    def _renew_private(self, gpa, size):
        """Give up private pages for new ones. The range is whole pages of the slot: Fault.renew() sees to that."""
        cdef int error = 0
        cdef uint64_t first = gpa, count = size
        cdef Conversions conversions
        cdef Step step = BUSY
        with cython.critical_section(self):
            conversions = self.conversions  # stay, also when the slot is removed meanwhile
        while conversions is not None and step == BUSY:
            with nogil:
                step = renew_private(&conversions.c, &self.region, first, count, &error)
            PyErr_CheckSignals()
        if step != DONE:
            raise Error(f"{self!r} has no guest_memfd")
        if error:
            raise KvmError(error, "fallocate", f"gpa {gpa:#x}, size {size:#x} of {self!r}")

    def close_guest_memfd(self):
        """Close the slot's guest_memfd, and unmap it where it is what the slot maps. KVM drops the pages, and the guest's
        next access is a MEMORY_FAULT (virt/kvm/guest_memfd.c). For tests and for teardown in steps.

        Raises Error where there is none, BufferError while views of its mapping exist (they keep the file alive).
        """
        cdef int fd = -1
        cdef Region *r = &self.region
        cdef Converter *c
        cdef Conversions conversions
        cdef Step step
        with cython.critical_section(self):
            conversions = self.conversions  # stay, also when the slot is removed meanwhile
        if r.gmem_fd < 0 or conversions is None:
            raise Error(f"{self!r} has no guest_memfd")
        c = &conversions.c
        self.vacate()
        while True:
            with nogil:
                step = exclude(c, r, &fd)
            if step != BUSY:
                break  # and what is in our hands now, no exception may make us drop
            PyErr_CheckSignals()
        if fd >= 0:
            close_descriptor(fd)

    cdef int vacate(self) except -1:
        """Unmap a guest_memfd that the slot maps. No view of it can come to be in this section, on any thread."""
        with cython.critical_section(self):
            if isinstance(self.mapping, GmemMapping):
                self.view_ = None
                if not (<GmemMapping>self.mapping).vacate():
                    self.view_ = memoryview(self.mapping)
                    raise BufferError(f"views of {self!r} exist and keep its guest_memfd alive: release them first")
        return 0


@cython.final
cdef class GmemMapping:
    """A guest_memfd's own mapping. Unlike `mmap.mmap` it keeps no descriptor, and can be given up with its place kept.

    KVM goes on using a memslot's host address for emulated accesses, so the place must not become somebody else's memory for
    as long as the memslot exists.
    """

    cdef void *address
    cdef size_t size
    cdef Py_ssize_t exports

    def __cinit__(self, int fd, size_t size):
        cdef void *address = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if address == MAP_FAILED:
            raise KvmError(errno, "mmap of guest_memfd")
        self.address = address
        self.size = size

    def __dealloc__(self):
        if self.address != NULL:
            munmap(self.address, self.size)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.address, self.size, False, flags)
        with cython.critical_section(self):
            self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        with cython.critical_section(self):
            self.exports -= 1

    cdef bint vacate(self) except -1:
        """Put inaccessible memory in the place of the guest_memfd's, in one step. -> whether: not while views exist."""
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        cdef bint viewed
        with cython.critical_section(self):
            viewed = self.exports != 0
        if not viewed and c_mmap(self.address, self.size, PROT_NONE, flags, -1, 0) == MAP_FAILED:
            raise KvmError(errno, "mmap")
        return not viewed


@cython.final
cdef class Memory:
    """The guest-physical memory of one VM: `vm.memory`.

    slots: the memslots, by address.

    Only who has `lock` changes the set of slots; whoever has it not looks by present() and slot_at().
    """

    def __init__(self, Handle handle, vm_type, bint region2, numbers, AttributesBackend backend=None, Vcpus vcpus=None):
        self.handle = handle
        self.vm_type = vm_type
        self.region2 = region2
        self.lock = threading.RLock()  # re-entrant: a finalizer that runs meanwhile may add or remove, too
        self.slots_ = ()
        self.vcpus = vcpus
        self.rebinds = isinstance(backend, SlotRebind)
        self.still = _Paused(vcpus if self.rebinds else None)
        self.conversions = Conversions(handle, backend, [index(number) for number in numbers])
        self.converter = &self.conversions.c
        self.dirty_log = DirtyLog(handle)

    def __dealloc__(self):
        free(self.spans)

    @property
    def slots(self):
        return self.present()

    cdef tuple present(self):
        with cython.critical_section(self):
            return self.slots_

    @property
    def changes(self):
        """How often memslots or attributes changed."""
        return kvmexit_generation(&self.conversions.c.generation)

    def add(self, gpa, size, *, guest_memfd=False, gmem_flags=0, buffer=None, fd=None, offset=0, discard=None,
            readonly=False, log_dirty=False):
        """Put `size` bytes of host memory at guest-physical `gpa`, shared at first; -> Slot.

        The host memory is anonymous; or, with `fd`, that file from `offset` on, mapped shared; or `buffer` from `offset` on
        (any object with the buffer protocol, page-aligned, kept for as long as the slot lives). With `guest_memfd` a
        guest_memfd of this size is made and bound too, for private pages; with GuestMemfdFlags.MMAP in `gmem_flags` the
        slot's memory is that guest_memfd's own mapping. `readonly`: the guest's writes are Mmio exits. `log_dirty`:
        KVM_MEM_LOG_DIRTY_PAGES.

        `discard`: whether a conversion gives the pages that go out of use back to the host, their data with them. True
        for memory made here. For `buffer` and `fd` it has to be said, or their pages cannot become private: True makes a
        hole in the file, or drops the buffer's pages. With GuestMemfdFlags.MMAP both sides are one memory: no discard.

        All sizes and addresses in bytes, multiples of the page size. Raises ValueError for a range that is unaligned, wraps,
        or overlaps a slot (which it names), for backing memory too small, and for arguments that exclude each other;
        TypeError for a buffer that is none; KvmError where KVM refuses; Error where the VM is closed. A failure leaves
        nothing behind. Source: Documentation/virt/kvm/api.rst, KVM_SET_USER_MEMORY_REGION2, KVM_CREATE_GUEST_MEMFD.
        """
        cdef Slot slot
        gpa, size = _range(gpa, size)
        offset, flags = index(offset), GuestMemfdFlags(gmem_flags)
        if guest_memfd and (readonly or log_dirty):
            raise ValueError("a slot with guest_memfd can be neither readonly nor log_dirty (KVM_MEM_GUEST_MEMFD)")
        if flags and not guest_memfd:
            raise ValueError("gmem_flags without guest_memfd=True")
        if (buffer is not None) + (fd is not None) + bool(flags & GuestMemfdFlags.MMAP) > 1:
            raise ValueError("give one of buffer, fd and gmem_flags with MMAP: each says where the slot's memory is")
        if offset and buffer is None and fd is None:
            raise ValueError("offset without buffer or fd")
        if guest_memfd and not self.region2 and not self.rebinds and self.handle.fd >= 0:
            raise KvmError(errnos.EOPNOTSUPP, "KVM_SET_USER_MEMORY_REGION2",
                           f"guest_memfd needs Linux 6.8 or later, this is {os.uname().release}")
        if flags and self.rebinds:
            raise ValueError("gmem_flags with SlotRebind, which makes the private side itself: leave them out")
        slot = Slot.__new__(Slot)
        slot.gpa, slot.size, slot.readonly, slot.log_dirty, slot.gmem_flags = gpa, size, readonly, log_dirty, flags
        slot.region.first, slot.region.last = slot.gpa, slot.gpa + (slot.size - 1)
        with self.still, self.lock:  # in this order: who pauses waits for handlers, which may wait for the lock
            self.handle.check()
            self._check_free(gpa, size)
            if guest_memfd:
                give_bits(&slot.region, False)
                self._create_guest_memfd(slot, flags)
            if self.rebinds and guest_memfd:
                slot.region.private_side = map_shared(slot.region.gmem_fd, size)
            if flags & GuestMemfdFlags.MMAP:
                slot.mapping = GmemMapping(slot.region.gmem_fd, size)
            elif fd is not None:
                slot.mapping = _map_file(fd, offset, size, readonly)
            elif buffer is None:
                slot.mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
            slot.view_ = _view(
                slot.mapping if buffer is None else buffer, offset if buffer is not None else 0, size, readonly)
            slot.hva = slot.region.hva = _address(slot.view_)
            if guest_memfd and not flags & GuestMemfdFlags.MMAP:
                slot.region.private_discard = PUNCH if discard is not False else NOTHING
                if buffer is None and fd is None:
                    slot.region.shared_discard = DONTNEED if discard is not False else NOTHING
                elif discard is None:
                    slot.region.shared_discard = UNDECIDED
                elif discard:
                    slot.region.shared_discard = REMOVE if fd is not None or _is_shared(slot.hva, size) else DONTNEED
            self._install(slot)
        return slot

    def remove(self, slot):
        """Delete a memslot, also under a running vCPU. `slot`: the Slot, or an address in it.

        Its memory is unmapped when the last view of it is gone; its guest_memfd is closed now, and its addresses are
        shared again. Raises ValueError where there is no such slot, ConversionError or KvmError where KVM refuses; the slot
        is still there then.
        """
        cdef Slot gone
        with self.still, self.lock:  # in this order: who pauses waits for handlers, which may wait for the lock
            self.handle.check()
            if isinstance(slot, Slot):
                found = slot
            else:
                found = self.slot_at(index(slot)) if 0 <= index(slot) <= UINT64_MAX else None
            if found not in self.slots_:
                raise ValueError(f"no such slot: {slot!r}; there are {list(self.slots_)}")
            gone = found
            self.handle.check()
            self._withdraw(gone)
            try:
                self.set_region(gone, 0)
            except BaseException:
                self._insert(gone)
                raise
            self.change_slots([], [gone])
            try:
                if gone.dirty_ is not None:
                    self.dirty_log.forget(gone.dirty_)
            finally:  # KVM has it no more
                self._release_number(gone.number)
                with cython.critical_section(gone):
                    gone.dirty_ = None
                gone.let_go()

    def convert(self, gpa, size, *, private):
        """Make `size` bytes from guest-physical `gpa` private, or shared: attributes first, then the data of the side that
        went out of use is given back to the host (see add(discard=)). Waits, without the GIL, while others convert. With
        SlotRebind the VM is paused meanwhile.

        What has the wanted state already costs no system call. The range may go across slots; where there is no slot it is
        shared already. Huge ranges are converted in steps of 64 MiB; Ctrl-C and close() are heeded between them, with a
        note on the exception that says how far it got.

        Raises ValueError for a range that is empty, unaligned or wraps, TypeError for a `private` that is no bool.
        ConversionError, before anything is done, where it is to become private and has no slot, or one without guest_memfd
        or without a word about discard=, and where this VM has no private memory; and where KVM refuses half way: its
        `done` says how far it got. What is_private() and ranges() say is then still what KVM holds. Error where the VM is
        closed. Source: Documentation/virt/kvm/api.rst, KVM_SET_MEMORY_ATTRIBUTES.
        """
        gpa, size = _range(gpa, size)
        if not isinstance(private, bool):
            raise TypeError(f"private {private!r} must be True or False")
        self.handle.check()
        if not self.rebinds:
            self.convert_steps(gpa, gpa + size - 1, private)
            return
        self.vcpus.pause()  # a memslot is not there for a moment
        try:
            self.convert_steps(gpa, gpa + size - 1, private)
        finally:
            self.vcpus.resume()

    cdef int convert_steps(self, uint64_t first, uint64_t last, bint private) except -1:
        cdef uint64_t at = first
        size = int(last) - first + 1  # up to 2**64: a guest may ask for everything there is
        cdef Result result
        self.handle.begin_use()  # close() waits
        try:
            while True:
                with nogil:
                    result = examine(self.converter, first, last, private)
                if result.step != BUSY:
                    break
                self.look_around()
            while result.step == DONE:
                with nogil:
                    result = convert_chunk(self.converter, at, last, private, NULL)
                if result.step == BUSY:
                    result.step = DONE
                elif result.step == DONE:
                    if result.at == last:
                        return 0
                    at = result.at + 1
                self.look_around()
            at = result.at
        except BaseException as error:
            error.add_note(f"conversion of gpa {first:#x}, size {size:#x} to {'private' if private else 'shared'}: "
                           f"{at - first:#x} bytes done")
            raise
        finally:
            self.handle.end_use()
        raise self._refusal(first, size, private, result)

    cdef int look_around(self) except -1:
        """What waits for the lock, or converts much, does now and then."""
        PyErr_CheckSignals()
        return self.handle.check()

    def is_private(self, gpa):
        """Whether the page at guest-physical `gpa` (any byte of it) is private: -> True or False; False where there is no
        slot. None for a page of an adopted slot that was not converted yet: KVM has no way to ask.

        It is what was noted, and costs no system call. Raises ValueError for a `gpa` beyond 64 bits, Error where the VM is
        closed.
        """
        cdef uint64_t at
        cdef int state
        if not 0 <= index(gpa) <= UINT64_MAX:
            raise ValueError(f"gpa {gpa:#x} is no 64-bit address")
        at = gpa
        self.handle.begin_use()  # close() waits
        try:
            while True:
                with nogil:
                    state = state_at(self.converter, at)
                if state != -2:
                    return None if state < 0 else state == 1
                self.look_around()
        finally:
            self.handle.end_use()

    def ranges(self):
        """-> a list of MemoryRange(gpa, size, private): the slots' memory as runs of one state, as long as they can be, by
        address. Left out: holes, and pages of an adopted slot that were not converted yet. Error where the VM is closed."""
        cdef Run *runs = NULL
        cdef size_t count = 0
        cdef Step step = BUSY
        self.handle.begin_use()  # close() waits
        try:
            while True:
                with nogil:
                    step = list_runs(self.converter, &runs, &count)
                if step != BUSY:
                    break
                self.look_around()
        finally:
            self.handle.end_use()
        if step != DONE:
            raise MemoryError
        try:
            return [MemoryRange(runs[i].first, runs[i].last - runs[i].first + 1, bool(runs[i].private))
                    for i in range(count)]
        finally:
            free(runs)

    def dirty(self):
        """What guests have written to since the last time, in all slots that log it: as Slot.dirty(), runs by address."""
        cdef Slot slot
        cdef list found = []
        self.handle.check()
        for slot in self.present():
            if slot.log() is not None:
                for run in slot.dirty():
                    if found and sum(found[-1]) == run.gpa:
                        run = DirtyRange(found[-1].gpa, found.pop().size + run.size)
                    found.append(run)
        return found

    def dirty_pages(self):
        """The same as array("Q") of the pages' guest-physical addresses, in order; numpy.frombuffer(pages, "u8") is a
        view."""
        cdef Slot slot
        cdef SlotDirty dirty
        found = array("Q")
        self.handle.check()
        for slot in self.present():
            dirty = slot.log()
            if dirty is not None:
                found += dirty.addresses(dirty.take())
        return found

    def collect_dirty(self):
        """Empty the dirty rings, as a full one asks for (handlers.collect_dirty); -> how many entries they had. What they
        say is kept for the next dirty(). Raises Error where the VM has none (vm.enable_dirty_ring()), or is closed."""
        self.handle.check()
        if not self.dirty_log.entries:
            raise Error("this VM has no dirty rings: call vm.enable_dirty_ring() before the first vCPU")
        return self.dirty_log.collect()

    def read(self, gpa, n):
        """-> n bytes from guest-physical `gpa`, across slots: of private pages the shared side, which is zeros.

        Checked: a page that cannot be read (unmapped, past the end of a truncated file) is a KvmError with EFAULT, never a
        SIGBUS. Raises ValueError where no slot covers the range.
        """
        n = index(n)
        if n < 0:
            raise ValueError(f"n {n} is negative")
        cdef bytes data = PyBytes_FromStringAndSize(NULL, n)
        self.transfer(index(gpa), PyBytes_AsString(data), n, False)
        return data

    def write(self, gpa, data):
        """Write bytes to guest-physical `gpa`, across slots; checked as read(). The host may write to read-only slots."""
        cdef const unsigned char[::1] source
        view = memoryview(data).cast("B")
        if len(view):
            source = view
            self.transfer(index(gpa), <char *>&source[0], len(view), True)

    def __repr__(self):
        return f"Memory({list(self.present())})"

    # ---- the rest is internal ----

    def _refusal(self, gpa, size, private, Result result):
        """The ConversionError for what went wrong."""
        slot = self.slot_at(result.where)
        where = f"gpa {result.where:#x}"
        done = result.at - gpa
        if result.step in (NO_SLOT, NO_PRIVATE_SIDE, UNDECIDED_DISCARD, NO_BACKEND):
            why = {
                NO_SLOT: f"no slot covers {where}; there are {list(self.present())}",
                NO_PRIVATE_SIDE: f"{slot!r} at {where} has no guest_memfd: add it with guest_memfd=True",
                UNDECIDED_DISCARD: f"{slot!r} at {where} is the caller's memory: say in add() whether conversions may "
                                   "discard its data, discard=True or False",
                NO_BACKEND: f"a VM of type {self.vm_type!r} has no private memory on Linux {os.uname().release} "
                            "(KVM_CAP_MEMORY_ATTRIBUTES): use VMType.SW_PROTECTED on a kernel with "
                            "CONFIG_KVM_SW_PROTECTED_VM, or VM(attributes=SlotRebind())",
            }[result.step]
            return ConversionError(gpa, size, private, done, why)
        name = os.strerror(result.error)
        if result.step == SET_FAILED:
            why = f"{type(self.conversions.backend).__name__} at {where}: {name} (errno {result.error})"
        else:
            why = f"discarding what went out of use at {where}: {name} (errno {result.error}); " + (
                "the attributes could not be put back, either" if result.step == STUCK else "the attributes were put back")
        return ConversionError(gpa, size, private, done, why, result.error)

    def _insert(self, Slot slot):
        """Let conversions find a slot. Where it raises they do not, and the slot can go."""
        cdef Region *r = &slot.region
        cdef Step step = BUSY
        while True:
            with nogil:
                step = insert(self.converter, r)
            if step != BUSY:
                break
            PyErr_CheckSignals()
        if step != DONE:
            raise MemoryError

    def _withdraw(self, Slot slot):
        """Make a slot shared and take it from the converter; ConversionError where that fails."""
        cdef Region *r = &slot.region
        cdef Result result
        if self.rebinds:
            self.vcpus.pause()
        try:
            while True:
                with nogil:
                    result = withdraw(self.converter, r)
                if result.step != BUSY:
                    break
                self.look_around()
        finally:
            if self.rebinds:
                self.vcpus.resume()
        if result.step != DONE:
            raise self._refusal(slot.gpa, slot.size, False, result)

    cdef int _reserve_number(self) except -2:
        """A free memslot number, or -1."""
        cdef int number
        while True:
            with nogil:
                number = reserve_number(self.converter)
            if number != -2:
                return number
            PyErr_CheckSignals()

    cdef int _release_number(self, uint32_t number) except -1:
        cdef Step step = BUSY
        while step == BUSY:
            with nogil:
                step = release_number(self.converter, number)
        return 0

    def adopt(self, number, gpa, size, hva, gmem_fd, gmem_offset, discard):
        """Take note of a memslot that somebody else made."""
        cdef Slot slot = Slot.__new__(Slot)
        gpa, size = _range(gpa, size)
        hva, _ = _range(hva, size, "hva")
        self._check_free(gpa, size)
        slot.gpa, slot.size, slot.hva, slot.number_ = gpa, size, hva, number
        slot.region.first, slot.region.last, slot.region.hva = slot.gpa, slot.gpa + (slot.size - 1), slot.hva
        slot.region.gmem_offset = gmem_offset
        slot.adopted = True
        # SAFETY: the adopter vouches for the mapping, as it does to KVM.
        slot.view_ = PyMemoryView_FromMemory(<char *><uintptr_t>slot.hva, slot.size, PyBUF_WRITE)
        if gmem_fd is not None:
            slot.region.gmem_fd = fcntl.fcntl(gmem_fd, fcntl.F_DUPFD_CLOEXEC, 3)
        if discard and gmem_fd is not None:
            slot.region.private_discard = PUNCH
            slot.region.shared_discard = REMOVE if _is_shared(slot.hva, size) else DONTNEED
        if self.conversions.backend is not None:
            give_bits(&slot.region, True)
        slot.conversions = self.conversions
        self._insert(slot)
        self.change_slots([slot], [])
        return slot

    def _check_free(self, gpa, size):
        cdef Slot slot
        for slot in self.slots_:
            if slot.gpa < gpa + size and gpa <= slot.gpa + (slot.size - 1):  # which may be the last address there is
                raise ValueError(
                    f"gpa {gpa:#x}, size {size:#x} overlaps {slot!r}: remove that slot, or choose other addresses")

    def _create_guest_memfd(self, Slot slot, flags):
        """The slot has it as soon as it exists, and closes it also where what follows fails."""
        cdef kvm_create_guest_memfd argument
        if self.handle.fd < 0 or self.rebinds:  # a file with the same calls, which the host can read
            slot.region.gmem_fd = os.memfd_create("kvmexit-private", os.MFD_CLOEXEC)
            os.ftruncate(slot.region.gmem_fd, slot.size)
            return
        memset(&argument, 0, sizeof(argument))
        argument.size = slot.size
        argument.flags = flags
        slot.region.gmem_fd = self.handle.call("KVM_CREATE_GUEST_MEMFD", KVM_CREATE_GUEST_MEMFD, &argument)
        fcntl.fcntl(slot.region.gmem_fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)

    def _install(self, Slot slot):
        self.handle.check()
        cdef int number = self._reserve_number()
        if number < 0:
            raise KvmError(
                errnos.ENOSPC, "KVM_SET_USER_MEMORY_REGION2", f"all memslots are in use: {len(self.slots_)} slots")
        slot.number_ = number
        try:
            if slot.log_dirty:
                slot.dirty_ = self.dirty_log.watch(number, slot.gpa, slot.size)  # before a guest can write to it
            if slot.region.private_side != NULL:
                take_whole(&slot.region, number)
            self.set_region(slot, slot.size)
            try:
                self._insert(slot)
            except BaseException:
                self.set_region(slot, 0)
                raise
            slot.conversions = self.conversions
        except BaseException as error:
            try:
                if slot.dirty_ is not None:
                    self.dirty_log.forget(slot.dirty_)
            finally:
                self._release_number(number)
            if not isinstance(error, KvmError):
                raise
            if slot.region.gmem_fd >= 0 and error.errno == errnos.EINVAL:
                error.hint = (
                    f"Linux {os.uname().release} cannot bind this guest_memfd in a VM of type {self.vm_type!r}: use "
                    "VMType.SW_PROTECTED, or gmem_flags=GuestMemfdFlags.MMAP|INIT_SHARED where the kernel has them")
            elif error.errno == errnos.EEXIST:
                error.hint = "the range overlaps memory that KVM itself keeps (TSS and identity map below 4 GiB)"
            raise
        self.change_slots([slot], [])

    cdef int set_region(self, Slot slot, uint64_t size) except -1:
        """Tell KVM of a slot; size 0 deletes it."""
        cdef kvm_userspace_memory_region2 region
        if self.handle.fd < 0:
            return 0
        memset(&region, 0, sizeof(region))
        region.slot = slot.number
        region.guest_phys_addr = slot.gpa
        region.memory_size = size
        region.userspace_addr = slot.hva
        if slot.readonly:
            region.flags |= KVM_MEM_READONLY
        if slot.log_dirty:
            region.flags |= KVM_MEM_LOG_DIRTY_PAGES
        if size and slot.region.gmem_fd >= 0 and not self.rebinds:
            region.flags |= KVM_MEM_GUEST_MEMFD
            region.guest_memfd = slot.region.gmem_fd
            region.guest_memfd_offset = slot.region.gmem_offset
        if self.region2:
            return self.handle.call("KVM_SET_USER_MEMORY_REGION2", KVM_SET_USER_MEMORY_REGION2, &region)
        # The older struct is the newer one's beginning.
        return self.handle.call("KVM_SET_USER_MEMORY_REGION", KVM_SET_USER_MEMORY_REGION, &region)

    cdef int change_slots(self, list added, list removed) except -1:
        """Publish a new set of slots. Readers hold the GIL, or are in this section, so they see one set or the other.

        Making it may run a finalizer that changes the set as well: then once more.
        """
        cdef Span *spans = NULL
        cdef Slot slot
        cdef Py_ssize_t i
        cdef tuple before, after = ()
        while True:
            before = self.slots_
            after = tuple(sorted([s for s in before if s not in removed] + added, key=_by_gpa))
            spans = <Span *>malloc(max(len(after), 1) * sizeof(Span))
            if spans == NULL:
                raise MemoryError
            for i, slot in enumerate(after):
                spans[i] = Span(slot.gpa, slot.gpa + (slot.size - 1))
            if self.slots_ is before:
                break
            free(spans)
        # Nothing from here on runs Python code: `before` keeps the old set's objects.
        with cython.critical_section(self):
            free(self.spans)
            self.spans = spans
            self.slots_ = after
        kvmexit_next_generation(&self.converter.generation)
        return 0

    cdef object slot_at(self, uint64_t gpa):
        """The slot that covers `gpa`, or None."""
        cdef Py_ssize_t low = 0, high, middle
        with cython.critical_section(self):
            high = len(self.slots_)
            while low < high:
                middle = (low + high) // 2
                if gpa > self.spans[middle].last:
                    low = middle + 1
                elif gpa < self.spans[middle].first:
                    high = middle
                else:
                    return self.slots_[middle]
        return None

    def withdraw(self):
        """Delete our memslots from a VM that lives on without us."""
        cdef Slot slot
        cdef list gone = []
        if self.handle.fd < 0 or self.handle.forks != forks():
            return
        with self.lock:
            for slot in self.slots_:
                if slot.adopted:
                    continue
                try:
                    self._withdraw(slot)
                    self.set_region(slot, 0)
                except Error:
                    continue  # that VM is dead already; the slot stays ours, whoever goes on using it
                gone.append(slot)
            self.change_slots([], gone)

    def close(self):
        """The VM is gone, and so are its memslots. Nobody converts any more: VM.close() has waited."""
        cdef Slot slot
        with self.lock:
            self.converter.count = 0
            for slot in self.slots_:
                slot.let_go()
            with cython.critical_section(self):
                self.slots_ = ()
        self.dirty_log.close()

    cdef int transfer(self, gpa, char *local, size_t n, bint to_guest) except -1:
        cdef iovec ours, theirs
        cdef size_t done = 0, here
        cdef ssize_t moved
        cdef int error
        cdef Slot slot
        cdef uint64_t at
        self.handle.check()
        if gpa < 0 or gpa + n > <object>UINT64_MAX + 1:
            raise ValueError(f"gpa {gpa:#x} + {n:#x} is outside 64 bits")
        while done < n:
            at = gpa + done
            slot = self.slot_at(at)
            if slot is None:
                raise ValueError(f"no slot covers gpa {at:#x}; {done} of {n} bytes done; there are {list(self.present())}")
            here = min(n - done, slot.size - (at - slot.gpa))
            ours = iovec(local + done, here)
            theirs = iovec(<void *><uintptr_t>(slot.hva + (at - slot.gpa)), here)
            keep = slot.view  # the mapping stays while the GIL is released
            with nogil:
                if to_guest:
                    moved = process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0)
                else:
                    moved = process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0)
                error = errno
            del keep
            if moved <= 0:
                raise KvmError(
                    error, "process_vm_writev" if to_guest else "process_vm_readv",
                    f"gpa {at:#x} (hva {slot.hva + (at - slot.gpa):#x}, {slot!r}) cannot be reached; "
                    f"{done} of {n} bytes done")
            done += moved
        return 0


class _Paused:
    """For the length of a with block the vCPUs stand still, if there are any to stop."""

    def __init__(self, vcpus):
        self.vcpus = vcpus

    def __enter__(self):
        if self.vcpus is not None:
            self.vcpus.pause()

    def __exit__(self, *exc_info):
        if self.vcpus is not None:
            self.vcpus.resume()


cdef char *map_shared(int fd, size_t size) except NULL:
    cdef void *address = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if address == MAP_FAILED:
        raise KvmError(errno, "mmap of the private side")
    return <char *>address


cdef int take_whole(Region *r, uint32_t number) except -1:
    """The one piece that a region of SlotRebind is at first."""
    r.pieces = <Piece *>malloc(sizeof(Piece))
    if r.pieces == NULL:
        raise MemoryError
    r.pieces[0] = Piece(r.first, r.last, number, False)
    r.piece_count = 1
    return 0


def _is_shared(address, size):
    """Whether memory of this process is mapped shared (MAP_SHARED). ValueError where only part of it is."""
    kinds = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions = line.split()[:2]
            first, end = [int(part, 16) for part in span.split("-")]
            if first < address + size and address < end:
                kinds.add(permissions[3] == "s")
    if len(kinds) != 1:
        raise ValueError(f"memory at {address:#x}, size {size:#x} is mapped shared in part, and private in part")
    return kinds.pop()


def _map_file(fd, offset, size, readonly):
    """Map a file shared; read-only where the descriptor is."""
    fd = index(fd)
    if offset < 0 or offset % _PAGE:
        raise ValueError(f"offset {offset:#x} must be a multiple of the page size, {_PAGE:#x}")
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    if not writable and not readonly:
        raise ValueError(f"fd {fd} is not open for reading and writing: open it so, or pass readonly=True")
    try:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
    except ValueError:
        raise ValueError(
            f"fd {fd} is a file of {os.fstat(fd).st_size:#x} bytes, too short for offset {offset:#x} + size {size:#x}"
        ) from None


def _view(memory, offset, size, readonly):
    """The slot's bytes as a memoryview; checks a caller's buffer."""
    try:
        view = memoryview(memory).cast("B")
    except TypeError as error:
        raise TypeError(f"buffer: {error}") from None
    if view.readonly and not readonly:
        raise ValueError("buffer is read-only: pass a writable one, or readonly=True")
    if offset < 0 or offset + size > len(view):
        raise ValueError(f"buffer of {len(view):#x} bytes is too short for offset {offset:#x} + size {size:#x}")
    view = view[offset:offset + size]
    address = _address(view)
    if address % _PAGE:
        raise ValueError(f"buffer memory at {address:#x} is not page-aligned: use an mmap.mmap, or another offset")
    return view


cdef uint64_t _address(view) except? 0:
    """Where a memoryview's bytes are. SAFETY: valid for as long as somebody holds the view."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    try:
        return <uintptr_t>buffer.buf
    finally:
        PyBuffer_Release(&buffer)
