"""Who answers which exit.

A `RouteTable` is never changed: adding or removing makes a new one and swaps the VM's under the GIL. A vCPU that is
dispatching holds a reference to the table it began with, so handlers cannot vanish under it.
"""

cimport cython
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport free, malloc

from kvmexit._exits cimport Exit, as_run
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, kvm_run,
)


@cython.final
cdef class Entry:
    """One range of exits and its handler. Refers to no VM, so tables make no cycle."""

    cdef readonly object handler
    cdef readonly int place
    cdef readonly uint64_t first, last
    cdef readonly uint64_t serial

    def __init__(self, handler, place, first, last, serial):
        self.handler = handler
        self.place = place
        self.first = first
        self.last = last
        self.serial = serial


def _order(Entry entry):
    return (entry.place == ANY, entry.last - entry.first, -entry.serial)


@cython.final
cdef class RouteTable:
    """An ordered set of entries. The smallest range comes first, of equal ones the newest; so ranges come before whole
    classes. What is registered for `Exit` comes last."""

    def __cinit__(self, entries=()):
        cdef Py_ssize_t i
        cdef Entry entry
        self.entries = tuple(sorted(entries, key=_order))
        self.count = len(self.entries)
        self.ranges = <Range *>malloc(max(self.count, 1) * sizeof(Range))
        if self.ranges == NULL:
            raise MemoryError
        for i in range(self.count):
            entry = self.entries[i]
            self.ranges[i] = Range(entry.place, entry.first, entry.last, <PyObject *>entry.handler)

    def __dealloc__(self):
        free(self.ranges)

    def changed(self, added, removed):
        """-> a table with some entries more, and some less."""
        return RouteTable([e for e in self.entries if e not in removed] + list(added))

    cdef PyObject *find(self, Exit e, Py_ssize_t *position) noexcept:
        """The first handler for `e` at or after `position`, which moves behind it; NULL when there is none left.

        Borrowed: good for as long as the caller holds the table.
        """
        cdef uint64_t key = key_of(e)
        cdef Range *r
        while position[0] < self.count:
            r = &self.ranges[position[0]]
            position[0] += 1
            if (r.place == <int32_t>e.place or r.place == ANY) and r.first <= key <= r.last:
                return r.handler
        return NULL


cdef uint64_t key_of(Exit e) noexcept:
    """What the ranges of this kind of exit are over."""
    cdef kvm_run *run = as_run(e)
    if e.place == KVM_EXIT_IO:
        return run.io.port
    if e.place == KVM_EXIT_MMIO:
        return run.mmio.phys_addr
    if e.place == KVM_EXIT_MEMORY_FAULT:
        return run.memory_fault.gpa
    if e.place == KVM_EXIT_HYPERCALL:
        return run.hypercall.nr
    if e.place == KVM_EXIT_X86_RDMSR or e.place == KVM_EXIT_X86_WRMSR:
        return run.msr.index
    return 0


@cython.final
cdef class Route:
    """A registered handler: what `vm.on_*(..., handler)` returns. Taken back by remove(), or at the end of a with block."""

    cdef readonly object handler
    cdef object _vm
    cdef tuple _entries

    def __init__(self, vm, handler, entries):
        self._vm = vm
        self.handler = handler
        self._entries = tuple(entries)

    def remove(self):
        """Take the handler out, also while vCPUs run. A call of it that is under way is not waited for.

        Removing twice is no error.
        """
        self._vm._remove_entries(self._entries)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.remove()

    def __repr__(self):
        cdef Entry entry = self._entries[0]
        return f"Route({self.handler!r}, first={entry.first:#x}, last={entry.last:#x})"
