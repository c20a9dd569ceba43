"""Posted writes: where there are any, and how that comes and goes. The drain is in _coalesced.h."""

import errno as errnos
import threading
import weakref

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from kvmexit._convert cimport (
    kvmexit_lock_for, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_unlock,
)
from kvmexit._ioctl cimport Handle
from kvmexit._page cimport Page, kvmexit_owner, kvmexit_vcpu
from kvmexit._routes cimport Native
from kvmexit._uapi cimport (
    KVM_CAP_COALESCED_MMIO, KVM_CAP_COALESCED_PIO, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_EXIT_IO, KVM_EXIT_MMIO,
    KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, kvm_coalesced_mmio_zone,
)
from kvmexit._vcpus cimport Vcpus
from kvmexit.errors import KvmError
from kvmexit.handlers import coerce

cdef extern from *:
    """
    #define kvmexit_store_offset(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
    #define kvmexit_load_posted(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    """
    void kvmexit_store_offset(size_t *, size_t) nogil
    uint64_t kvmexit_load_posted(const uint64_t *) nogil

cdef enum:
    PATIENCE_MS = 100  # between two looks at signals
    PAGE = 4096


@cython.final
cdef class Coalesced:
    """Internal: the zones of one VM. It holds them, so they are in force until they are removed, as routes are."""

    def __cinit__(self, Handle handle, Vcpus vcpus):
        self.handle, self.vcpus = handle, vcpus
        self.lock = threading.RLock()
        self.zones = ()
        pthread_mutex_init(&self.c.lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.c.lock)
        free(self.c.zones)

    def add(self, vm, bint pio, uint64_t first, uint64_t last, handler):
        """See VM.coalesce_mmio()."""
        cdef CoalescedZone made = CoalescedZone.__new__(CoalescedZone)
        cdef CoalescedZone other
        handler = coerce(handler)
        if not isinstance(handler, Native):
            raise TypeError(f"{handler!r} is Python, and posted writes are handled in the burst, without the GIL: give a "
                            "native handler (kvmexit.native), or answer these writes as exits, with a route")
        (<Native>handler).check(vm.memory)
        made.handler = handler
        made.zone.first, made.zone.last, made.zone.pio = first, last, pio
        made.zone.call, made.zone.opaque = made.handler.call, made.handler.opaque
        made.vm, made.owner = weakref.ref(vm), weakref.ref(self)
        with self.lock:
            self.handle.check()
            for other in self.zones:
                if other.zone.pio == pio and other.zone.first <= last and first <= other.zone.last:
                    raise ValueError(f"{made!r} overlaps {other!r}: remove that first")  # KVM may take back both with one
            offset = self._offset(vm, pio)
            made.entries = vm._entries((KVM_EXIT_IO if pio else KVM_EXIT_MMIO,), first, last, made.handler)
            vm._swap_entries(made.entries, ())
            try:
                self.publish((*self.zones, made), offset)  # before KVM posts: who has posted sees the zone
                try:
                    made.tell(self.handle, True)
                except BaseException:
                    self.publish(self.zones[:-1], offset)
                    raise
            except BaseException:
                vm._swap_entries((), made.entries)
                raise
        return made

    def _offset(self, vm, pio):
        """Where the ring lies in a vCPU's mapping; KvmError where this kernel has none."""
        if self.handle.fd < 0:
            return KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE
        page = vm.check(KVM_CAP_COALESCED_MMIO)
        if not page or pio and not vm.check(KVM_CAP_COALESCED_PIO):
            raise KvmError(errnos.EOPNOTSUPP, "KVM_REGISTER_COALESCED_MMIO",
                           f"posted writes need Linux {'4.20 for ports' if pio else '2.6.27'}: answer them with a route")
        return page * PAGE

    cdef int publish(self, tuple zones, size_t offset) except -1:
        """Have drainers see these zones from now on. On return none uses one that is no longer there; where it raises,
        nothing has changed."""
        cdef size_t count = len(zones), i
        cdef kvmexit_zone **old = NULL
        cdef kvmexit_zone **new = <kvmexit_zone **>malloc(max(count, <size_t>1) * sizeof(void *))
        cdef bint held = False
        if new == NULL:
            raise MemoryError
        for i in range(count):
            new[i] = &(<CoalescedZone>zones[i]).zone
        try:
            while not held:
                PyErr_CheckSignals()
                with nogil:
                    held = kvmexit_lock_for(&self.c.lock, PATIENCE_MS) == 0
                    if held:
                        old, self.c.zones, self.c.count = self.c.zones, new, count
                        kvmexit_store_offset(&self.c.offset, offset if count else 0)
                        pthread_mutex_unlock(&self.c.lock)
        finally:
            free(old if held else new)
        self.zones = zones
        return 0

    def drain(self):
        """See VM.drain_coalesced()."""
        cdef Page page
        cdef kvmexit_vcpu *c
        cdef size_t count = 0
        cdef bint held
        self.handle.begin_use()  # close() waits
        try:
            for page in self.vcpus.pages():  # they all show the same ring, but a scripted VM's
                page.check()
                if page.c.fd < 0 and kvmexit_owner(&page.c):
                    continue  # its script, which is no kernel, is writing there
                c = &page.c
                held = False
                while not held:
                    PyErr_CheckSignals()
                    self.handle.check()
                    with nogil:
                        held = kvmexit_lock_for(&self.c.lock, PATIENCE_MS) == 0
                        if held:
                            count += kvmexit_drain_ring(&self.c, c)
                            pthread_mutex_unlock(&self.c.lock)
        finally:
            self.handle.end_use()
        return count


@cython.final
cdef class CoalescedZone:
    """Addresses whose writes KVM posts: made by `vm.coalesce_mmio()` and `vm.coalesce_pio()`. Taken back by remove(), or at
    the end of a with block; else in force as long as the VM. handler: the native one.
    """

    def __init__(self):
        raise TypeError("use vm.coalesce_mmio() or vm.coalesce_pio()")

    @property
    def posted(self):
        """How many writes were handled without an exit of their own."""
        return kvmexit_load_posted(&self.zone.posted)

    @property
    def declined(self):
        """Of `posted`, how many the handler did not take (PASS, STOP): nobody else was asked, and the guest has gone on."""
        return kvmexit_load_posted(&self.zone.declined)

    cdef int tell(self, Handle handle, bint register) except -1:
        cdef kvm_coalesced_mmio_zone zone
        memset(&zone, 0, sizeof(zone))
        zone.addr, zone.size, zone.pio = self.zone.first, self.zone.last - self.zone.first + 1, self.zone.pio
        if handle.fd < 0:
            return 0
        if register:
            return handle.call("KVM_REGISTER_COALESCED_MMIO", KVM_REGISTER_COALESCED_MMIO, &zone)
        return handle.call("KVM_UNREGISTER_COALESCED_MMIO", KVM_UNREGISTER_COALESCED_MMIO, &zone)

    def remove(self):
        """Have KVM post these writes no longer, handle those that it has, and take the handler out, also while vCPUs run.
        On return nobody uses the handler, nor its memory. Removing twice, or after the VM was closed, is no error.
        """
        cdef Coalesced owner = self.owner()
        vm = self.vm()
        if owner is None or vm is None or owner.handle.closed:
            return
        owner.handle.check()
        with owner.lock:
            if owner.handle.closed:
                return
            if self in owner.zones:
                self.tell(owner.handle, False)  # no write is under way there once it returns; a second time it is no error
                owner.drain()
                owner.publish(tuple([zone for zone in owner.zones if zone is not self]), owner.c.offset)
        vm._swap_entries((), self.entries)  # also where a signal ended this before: it waits for who is in the handler

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.remove()

    def __repr__(self):
        return f"CoalescedZone({'port' if self.zone.pio else 'gpa'}={self.zone.first:#x}, " \
               f"size={self.zone.last - self.zone.first + 1:#x}, {self.handler!r})"
