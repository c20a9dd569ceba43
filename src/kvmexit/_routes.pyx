"""Who answers which exit.

A `RouteTable` is never changed: adding or removing makes a new one, and `Routing` swaps the VM's. The burst reads it
without a lock (_routes.h), Python's dispatch holds a reference to the table that the burst began with: so handlers cannot
vanish under either.

For each kind of exit the keys (ports, addresses, numbers) are cut into segments that have the same chain of handlers, the
most specific first.
"""

import weakref
from bisect import insort
from time import sleep

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from kvmexit._chain cimport kvmexit_route, kvmexit_segment, kvmexit_table
from kvmexit._exits cimport PLACES
from kvmexit._page cimport Page
from kvmexit._uapi cimport KVM_EXIT_IO

cdef extern from "_routes.h" nogil:
    int kvmexit_lacks_membarrier()
    void kvmexit_publish(const void **, const kvmexit_table *, int *fenced)
    uint64_t kvmexit_native(const kvmexit_vcpu *)

cdef extern from *:
    """
    static uint64_t kvmexit_serials; /* of tables: all VMs' */
    #define kvmexit_next_serial() __atomic_add_fetch(&kvmexit_serials, 1, __ATOMIC_RELAXED)
    """
    uint64_t kvmexit_next_serial()

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef int _fenced = kvmexit_lacks_membarrier()  # then the vCPU's side makes its own barriers
_LOOK_S = 0.0005  # while remove() waits for a native handler


cdef class Native:
    """A handler in native code: see kvmexit.native."""

    cdef int check(self, object memory) except -1:
        """Raise where it is no handler, or not for the VM that has this memory."""
        if self.call == NULL:
            raise TypeError(f"{self!r} has no function: make native handlers of C functions with kvmexit.native.Function")
        return 0


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


def _plan(entries):
    """-> the segments of one place, [(first, last, (Entry, ...))], for its entries in order."""
    begins, ends = {}, {}
    for rank, entry in enumerate(entries):
        begins.setdefault(entry.first, []).append(rank)
        ends.setdefault(entry.last + 1, []).append(rank)
    active, segments = [], []
    points = sorted({0, *begins, *ends} - {1 << 64})
    for first, following in zip(points, [*points[1:], 1 << 64]):
        for rank in ends.get(first, ()):
            active.remove(rank)
        for rank in begins.get(first, ()):
            insort(active, rank)
        segments.append((first, following - 1, tuple([entries[rank] for rank in active])))
    return segments


@cython.final
cdef class RouteTable:
    """An ordered set of entries. The smallest range comes first, of equal ones the newest; so ranges come before whole
    classes. What is registered for `Exit` comes last."""

    def __cinit__(self, entries=(), RouteTable before=None):
        entries = sorted(entries, key=_order)
        old = () if before is None else before.entries
        touched = {entry.place for entry in {*entries} ^ {*old}}
        plans = []
        for place in range(PLACES):
            if before is not None and place not in touched and ANY not in touched:
                plans.append(before.plans[place])
            else:
                plans.append(_plan([entry for entry in entries if entry.place == place or entry.place == ANY]))
        self.entries = tuple(entries)
        self.plans = tuple(plans)
        if before is not None and plans[KVM_EXIT_IO] is before.plans[KVM_EXIT_IO]:
            self.blocks = before.blocks
        else:
            self.blocks = _blocks(plans[KVM_EXIT_IO])
        self.build()
        self.table.serial = kvmexit_next_serial()
        self.table.owner = <void *>self

    def __dealloc__(self):
        free(self.memory)

    cdef int build(self) except -1:
        """Lay the plans out in C."""
        cdef Entry entry
        cdef kvmexit_segment *segment
        cdef kvmexit_route *route
        cdef const kvmexit_route **block
        cdef size_t place, port
        chains = {chain: None for plan in self.plans for _, _, chain in plan}
        segments = sum([len(plan) for plan in self.plans])
        routes = sum([len(chain) + 1 for chain in chains])
        self.memory = calloc(
            1, segments * sizeof(kvmexit_segment) + routes * sizeof(kvmexit_route)
            + len(set(self.blocks)) * 256 * sizeof(kvmexit_route *))
        if self.memory == NULL:
            raise MemoryError
        route = <kvmexit_route *>self.memory
        for chain in chains:
            chains[chain] = <size_t>route
            for entry in chain:
                route.first = entry.first
                if isinstance(entry.handler, Native):
                    route.call, route.opaque = (<Native>entry.handler).call, (<Native>entry.handler).opaque
                route.handler, route.entry = <void *>entry.handler, <void *>entry
                route += 1
            route += 1
        segment = <kvmexit_segment *>route
        for place in range(PLACES):
            self.table.places[place].at = segment
            self.table.places[place].count = len(self.plans[place])
            for first, last, chain in self.plans[place]:
                segment.first, segment.last = first, last
                segment.chain = <const kvmexit_route *><size_t>chains[chain]
                segment += 1
        block = <const kvmexit_route **>segment
        made = {}
        for place, ports in enumerate(self.blocks):
            if ports not in made:
                made[ports] = <size_t>block
                for port, chain in enumerate(ports if len(ports) == 256 else ports * 256):
                    block[port] = <const kvmexit_route *><size_t>chains[chain]
                block += 256
            self.table.ports[place] = <const kvmexit_route **><size_t>made[ports]
        return 0

    cdef bint has(self, const kvmexit_route *route):
        """Whether another table's route is here, too."""
        for entry in self.entries:
            if <void *>entry == route.entry:
                return True
        return False

    def changed(self, added, removed):
        """-> a table with some entries more, and some less."""
        removed = {*removed}
        return RouteTable([e for e in self.entries if e not in removed] + list(added), self)


def _blocks(plan):
    """-> for each high byte of a port the chains by its low byte: 256 of them, or the one that all have."""
    blocks = []
    at = iter(plan)
    _, last, chain = next(at)
    for begin in range(0, 1 << 16, 256):
        ports = []
        for port in range(begin, begin + 256):
            while last < port:
                _, last, chain = next(at)
            if last >= begin + 255 and not ports:
                break
            ports.append(chain)
        blocks.append(tuple(ports) or (chain,))
    return tuple(blocks)


@cython.final
cdef class Routing:
    """The present table of one VM, and those before it that a burst may still be using.

    Any allocation may run a finalizer that adds or removes routes, too: so each step leaves everything as the next needs it.
    Only who has the VM's lock swaps. Anybody looks: present(), reap() and settle() run on several threads at once.
    """

    def __cinit__(self):
        self.table = RouteTable()
        self.cell = &self.table.table
        self.retired = {}

    cdef RouteTable present(self):
        with cython.critical_section(self):
            return self.table

    cdef int attach(self, Page page) except -1:
        """Have a vCPU use this. Its Vcpu holds the VM, so the cell stays where it is."""
        page.c.cell = &self.cell
        page.c.fenced = &_fenced
        return 0

    def swap(self, RouteTable before, RouteTable after, pages):
        """-> whether `before` still was the present table; then `after` is now, and `before` retires."""
        cdef Page page
        if self.table is not before:
            return False
        with cython.critical_section(self):
            self.table = after
        kvmexit_publish(&self.cell, &after.table, &_fenced)
        using = []
        for page in pages:
            count = kvmexit_native(&page.c)  # R6
            if count & 1:
                using.append((weakref.ref(page), count))
        self.retired[before.table.serial] = before, using
        self.reap()
        return True

    cdef int reap(self) except -1:
        """Let go of tables that nobody uses any more."""
        for serial, (_, using) in list(self.retired.items()):
            if not [True for reference, count in using if _still(reference(), count)]:
                self.retired.pop(serial, None)
        return 0

    def settle(self):
        """Wait, without the GIL, until every table that was retired so far is out of use (R7)."""
        newest = max(list(self.retired), default=0)  # a copy: others add and reap
        self.reap()
        while min(list(self.retired), default=newest + 1) <= newest:
            sleep(_LOOK_S)
            PyErr_CheckSignals()  # sleep() does where it was interrupted; one that came just before waits for us
            self.reap()


cdef bint _still(Page page, uint64_t count):
    """Whether a vCPU still is in the very use of a table that was seen (R8: or else one that is busy at each look would be
    waited for for ever). A forked child has not the thread."""
    return page is not None and kvmexit_native(&page.c) == count and page.c.forks[0] == page.c.born


@cython.final
cdef class RouteSwap:
    """Changes of routes by one thread that are to be one: what VM.swap_routes() returns, for a with statement. A nested one
    is part of the outer."""

    cdef object _vm
    cdef dict _swaps
    cdef object _thread
    cdef RouteSwap _outer
    cdef bint _open
    cdef dict _added  # in order
    cdef set _removed

    def __init__(self, vm, swaps):
        self._vm, self._swaps = vm, swaps

    def _note(self, added, removed):
        for entry in removed:
            if self._added.pop(entry, None) is None:
                self._removed.add(entry)
        self._added.update({entry: entry for entry in added})

    def __enter__(self):
        if self._added is not None:
            raise RuntimeError("this swap_routes() has been used: call it again")
        self._added, self._removed, self._thread = {}, set(), PyThread_get_thread_ident()
        self._outer = self._swaps.get(self._thread)
        self._swaps[self._thread] = self
        self._open = True
        return self

    def __exit__(self, kind, value, traceback):
        cdef RouteSwap outer = self._outer
        self._open = False
        while outer is not None and not outer._open:  # it ended before this one, as in coroutines
            outer = outer._outer
        if self._swaps.get(self._thread) is self:
            if outer is None:
                del self._swaps[self._thread]
            else:
                self._swaps[self._thread] = outer
        if kind is None and outer is not None:
            outer._note(self._added, self._removed)
        elif kind is None and (self._added or self._removed):
            self._vm._swap_entries(self._added, self._removed)


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
        """Take the handler out, also while vCPUs run. A call of a Python handler that is under way is not waited for, one of
        a native handler is: afterwards nobody uses it, nor its memory.

        Removing twice is no error.
        """
        self._vm._change_entries((), self._entries)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.remove()

    def __repr__(self):
        cdef Entry entry = self._entries[0]
        return f"Route({self.handler!r}, first={entry.first:#x}, last={entry.last:#x})"
