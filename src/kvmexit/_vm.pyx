"""A virtual machine: its descriptor, capabilities, memory, vCPUs and routes. Cold code."""

import enum
import errno as errnos
import mmap
import os
import platform
import sys
import threading
import time
import weakref
from operator import index
from typing import NamedTuple

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmexit._coalesced cimport Coalesced
from kvmexit._convert cimport KvmAttributes
from kvmexit._eventfd cimport EventFds
from kvmexit._ioctl cimport Handle, call, call_value, forks
from kvmexit._memory cimport Memory
from kvmexit._msr_filter cimport MsrFilter
from kvmexit._page cimport EVENTS, REGS, SREGS, Page, kvmexit_in_use, kvmexit_owner, map_vcpu
from kvmexit._routes cimport ANY, Native, Routing
from kvmexit._uapi cimport (
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXIT_HYPERCALL,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IRQ_ROUTING,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_NR_MEMSLOTS,
    KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR, KVM_CAP_SYNC_REGS, KVM_CAP_USER_MEMORY2, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_CHECK_EXTENSION, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU, KVM_CREATE_VM,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_ENABLE_CAP,
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    KVM_GET_API_VERSION, KVM_GET_SUPPORTED_CPUID, KVM_GET_VCPU_MMAP_SIZE, KVM_IRQ_LINE, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_SET_CPUID2, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_SIGNAL_MASK, KVM_SET_TSS_ADDR, KVM_X86_DEFAULT_VM,
    KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM, KVM_X86_SNP_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM,
    kvm_dirty_gfn, kvm_enable_cap,
    kvm_irq_level,
)
from kvmexit._stats cimport Recorder
from kvmexit._vcpus cimport Vcpus
from kvmexit import _exits
from kvmexit._ioctl import generic_ioctl
from kvmexit._routes import Entry, Route, RouteSwap
from kvmexit.errors import Error, KvmError
from kvmexit.handlers import coerce
from kvmexit.stats import Stats

cdef enum:
    PAGE = 4096

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil


class VMType(enum.IntEnum):
    """KVM_X86_*_VM of arch/x86/include/uapi/asm/kvm.h."""

    DEFAULT = KVM_X86_DEFAULT_VM
    SW_PROTECTED = KVM_X86_SW_PROTECTED_VM
    SEV = KVM_X86_SEV_VM
    SEV_ES = KVM_X86_SEV_ES_VM
    SNP = KVM_X86_SNP_VM
    TDX = KVM_X86_TDX_VM


class AdoptedSlot(NamedTuple):
    """A memslot that the adopted VM already has: as its owner told KVM. Addresses and sizes in bytes."""

    number: int
    gpa: int
    size: int
    hva: int
    guest_memfd: int | None = None
    gmem_offset: int = 0
    discard: bool = False
    """Whether conversions may give the pages that go out of use back to the host, their data with them."""


# Below 4 GiB, where firmware leaves three pages free and a page table of KVM's: api.rst, KVM_SET_TSS_ADDR.
_IDENTITY_MAP = 0xfffbc000
_TSS = 0xfffbd000
_DEFAULT_RUN_SIZE = 3 * 4096  # kvm_run, PIO data, coalesced ring


def _check_platform():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Error(f"kvmexit runs vCPUs on x86-64 Linux, this is {platform.machine()} {sys.platform}: "
                    "use a machine that is, or kvmexit.testing.ScriptedVM")


cdef int _open_device(device) except -1:
    """Open /dev/kvm and see that it is KVM."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = KvmError(error.errno, "open /dev/kvm").hint
        raise KvmError(error.errno, f"open {os.fspath(device)}", hint) from None
    try:
        version = call_value(fd, "KVM_GET_API_VERSION", KVM_GET_API_VERSION, 0)
        if version != KVM_API_VERSION:
            raise Error(f"{device} speaks KVM API version {version}, not {KVM_API_VERSION}")
    except BaseException as error:
        os.close(fd)
        if isinstance(error, KvmError):
            raise KvmError(error.errno, error.call, f"{device} is no KVM device") from None
        raise
    return fd


cdef class VM:
    """A virtual machine. A context manager: leaving the block closes it.

    type: a VMType; device: the KVM device. On processors that need them the TSS and identity-map pages are placed at
    0xfffbd000 and 0xfffbc000.

    memory: its Memory. fd: its descriptor.

    Raises KvmError where the device cannot be opened or has no such VM type, Error on other systems and processors.
    After fork() every use of it in the child raises Error.

    attributes: how ranges become private or shared. None: KVM_SET_MEMORY_ATTRIBUTES where this VM has it, else nothing can
    become private; or SlotRebind().
    """

    def __init__(self, type=VMType.DEFAULT, *, device="/dev/kvm", attributes=None):
        cdef int kvm
        type = VMType(type)
        _check_platform()
        kvm = _open_device(device)
        try:
            self.run_size = _run_size(kvm)
            self.cpuid = _supported_cpuid(kvm)
            handle = Handle(_create_vm(kvm, type), "this VM")  # which owns it, should close() fail
        finally:
            os.close(kvm)
        self._set_up(handle, type, device)
        if self.check(KVM_CAP_IMMEDIATE_EXIT) == 0:
            self.close()
            raise Error("kvmexit needs KVM_CAP_IMMEDIATE_EXIT (Linux 4.11)")
        self._set_up_memory(range(self.check(KVM_CAP_NR_MEMSLOTS)), attributes)
        if type != VMType.TDX:
            self._place_intel_pages()

    def _set_up(self, handle, type, device):
        self.handle = handle
        self.type = type
        self.device = os.fspath(device)
        self.routing = Routing()
        self.lock = threading.RLock()
        self.vcpus = Vcpus(handle)
        self.eventfds = EventFds(handle)
        self.coalesced = Coalesced(handle, self.vcpus)
        self.recorders = []
        self.swaps = {}

    def _set_up_memory(self, numbers, attributes):
        if attributes is None and self.check(KVM_CAP_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE:
            attributes = KvmAttributes()
        region2 = self.handle.fd < 0 or self.check(KVM_CAP_USER_MEMORY2) > 0
        self.memory = Memory(self.handle, self.type, region2, numbers, attributes, self.vcpus)

    def _set_up_scripted(self, attributes):
        """Make this a VM without a kernel behind it (kvmexit.testing.ScriptedVM)."""
        self._set_up(Handle(-1, "this VM"), VMType.DEFAULT, "")
        self._set_up_memory(range(32764), attributes)

    def _place_intel_pages(self):
        cdef uint64_t identity_map = _IDENTITY_MAP
        if self.check(KVM_CAP_SET_IDENTITY_MAP_ADDR):
            self.handle.call("KVM_SET_IDENTITY_MAP_ADDR", KVM_SET_IDENTITY_MAP_ADDR, &identity_map)
        if self.check(KVM_CAP_SET_TSS_ADDR):
            self.handle.call_value("KVM_SET_TSS_ADDR", KVM_SET_TSS_ADDR, _TSS)

    @classmethod
    def adopt(cls, fd, *, type=VMType.DEFAULT, slots=(), free_slots=(), device="/dev/kvm"):
        """Work on a VM that a VMM in this process owns; -> VM.

        fd: its descriptor, duplicated; the caller's is never closed. type: what it was created as. slots: its memslots, as
        AdoptedSlot or tuples like it. free_slots: slot numbers that memory.add() may use; close() deletes those slots again.
        Raises KvmError where `fd` is no VM of this process (EIO: KVM checks the address space).
        """
        cdef VM vm
        _check_platform()
        vm = cls.__new__(cls)
        vm._set_up(Handle(os.dup(fd), "this VM"), VMType(type), device)
        if vm.check(KVM_CAP_NR_MEMSLOTS) and _is_device(fd):
            raise ValueError(f"fd {fd} is the KVM device itself, not a VM")
        vm.adopted = True
        vm._ask_device()
        vm._set_up_memory(free_slots, None)
        for slot in slots:
            vm.memory.adopt(*AdoptedSlot(*slot))
        # The adopted VM outlives ours: dropped without close(), our slots have to go from it all the same.
        weakref.finalize(vm, vm.memory.withdraw)
        weakref.finalize(vm, vm.eventfds.withdraw)
        return vm

    def _ask_device(self):
        """What only the device tells. A process that can no longer open it does without: runs, but creates no vCPU."""
        self.run_size = _DEFAULT_RUN_SIZE
        try:
            kvm = _open_device(self.device)
        except KvmError:
            return
        try:
            self.run_size = _run_size(kvm)
            self.cpuid = _supported_cpuid(kvm)
        finally:
            os.close(kvm)

    # ---- lifetime ----

    def close(self):
        """Close the VM: kick its vCPUs, wait for their run() to return, release everything.

        Views of guest memory stay valid. Raises Error when called from one of its own vCPUs' handlers. Closing twice is
        no error. In a forked child it only drops the child's descriptors.
        """
        if self.handle is None:
            return
        from kvmexit._loop import kick_page
        mine = self.handle.forks == forks()
        if mine:
            me = PyThread_get_thread_ident()
            if me in [kvmexit_owner(&(<Page>page).c) for page in self.vcpus.pages()]:
                raise Error("close() from a handler of a running vCPU: return STOP, and close after run()")
            self.handle.shut()  # from here on run() and everything else is refused
            self.vcpus.close()
            # Every close() waits, also a second one: descriptors are not taken from under a vCPU or an ioctl.
            while self.handle.in_use() or any([
                    kvmexit_in_use(&(<Page>page).c) or (<Page>page).handle.in_use() for page in self.vcpus.pages()]):
                for page in self.vcpus.pages():
                    if kvmexit_owner(&(<Page>page).c):
                        try:
                            kick_page(page)
                        except KvmError:
                            pass  # the signal queue is full: again in a moment
                time.sleep(0.001)  # with the GIL released; raises on Ctrl-C, and close() can be called again
            with self.lock:
                self._release(self.adopted)
        else:  # where the lock may be a thread's that is not there
            self._release(False)

    def _release(self, withdraw):
        """What is left of close() when nobody is at work on it. `withdraw`: the VM lives on without us."""
        for page in self.vcpus.pages():
            if withdraw and not (<Page>page).c.completes:
                (<Page>page).flush()  # what was written last is the vCPU's, whoever runs it next
            (<Page>page).close()
        if withdraw:
            self.eventfds.withdraw()
        self.eventfds.close()
        if self.memory is not None:
            if withdraw:
                self.memory.withdraw()
            self.memory.close()
        self.handle.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def closed(self):
        """Whether close() was called."""
        return self.handle.closed

    @property
    def fd(self):
        """The VM's descriptor, an int. Error when closed."""
        self.handle.check()
        return self.handle.fd

    def __repr__(self):
        state = "closed" if self.handle is None or self.handle.closed else f"fd {self.handle.fd}"
        return f"<{type(self).__name__} {self.type!r}, {state}>"

    # ---- capabilities ----

    def check(self, cap):
        """KVM_CHECK_EXTENSION on this VM: -> what KVM says of capability number `cap`, 0 where it has none."""
        self.handle.check()
        if self.handle.fd < 0:
            return 0
        return self.handle.call_value("KVM_CHECK_EXTENSION", KVM_CHECK_EXTENSION, cap)

    def enable(self, cap, *args):
        """KVM_ENABLE_CAP on this VM, with up to four numbers."""
        cdef kvm_enable_cap argument
        if len(args) > 4:
            raise ValueError(f"KVM_ENABLE_CAP takes four arguments at most, not {len(args)}")
        memset(&argument, 0, sizeof(argument))
        argument.cap = cap
        for i, value in enumerate(args):
            argument.args[i] = value
        self.handle.check()
        self.handle.call("KVM_ENABLE_CAP", KVM_ENABLE_CAP, &argument)

    def ioctl(self, number, argument=0):
        """Any ioctl on the VM: `argument` is an int, or a buffer that is changed in place. -> its result.

        The buffer is checked against the size in `number` only: of structs with a trailing array the counts are yours.
        """
        self.handle.check()
        return generic_ioctl(self.handle, number, argument)

    # ---- vCPUs and interrupts ----

    def create_vcpu(self, id=0):
        """-> a new Vcpu with the CPUID that the host's KVM supports. Raises KvmError where KVM refuses the id."""
        cdef int fd
        cdef Page page
        cdef uint8_t[::1] cpuid
        from kvmexit._loop import Vcpu
        self.handle.check()
        if id < 0:
            raise ValueError(f"vCPU id {id} is negative")
        fd = self.handle.call_value("KVM_CREATE_VCPU", KVM_CREATE_VCPU, id)
        page = map_vcpu(fd, self.run_size)
        if self.cpuid is None:
            raise KvmError(errnos.EACCES, f"open {self.device}", "the CPUID that KVM supports has to be asked of the device")
        cpuid = self.cpuid
        call(fd, "KVM_SET_CPUID2", KVM_SET_CPUID2, &cpuid[0])
        if self.memory.dirty_log.entries:
            self.memory.dirty_log.add_ring(mmap.mmap(
                fd, self.memory.dirty_log.entries * sizeof(kvm_dirty_gfn), offset=KVM_DIRTY_LOG_PAGE_OFFSET * PAGE))
        return self._make_vcpu(Vcpu, page, id)

    def adopt_vcpu(self, fd, id=0):
        """-> Vcpu over a vCPU that a VMM in this process owns; its descriptor is duplicated.

        Nobody else may run it meanwhile, and nothing may be pending: complete it first. Its KVM_SET_SIGNAL_MASK is cleared,
        since it could block our kick; its valid_regs are restored when the VM is closed or the Vcpu goes.
        """
        cdef Page page
        from kvmexit._loop import Vcpu
        self.handle.check()
        if self.memory.dirty_log.entries:
            raise Error("this VM has dirty rings, and an adopted vCPU's would not be collected: use create_vcpu()")
        page = map_vcpu(os.dup(fd), self.run_size)
        page.handle.call("KVM_SET_SIGNAL_MASK", KVM_SET_SIGNAL_MASK, NULL)
        page.borrowed = True
        page.borrowed_valid_regs = page.c.run.kvm_valid_regs
        return self._make_vcpu(Vcpu, page, id)

    def _make_vcpu(self, cls, Page page, id):
        if page.c.fd >= 0:
            page.c.syncable = self.check(KVM_CAP_SYNC_REGS) & (REGS | SREGS | EVENTS)
        page.c.id = id
        page.c.coalesced = &self.coalesced.c
        self.routing.attach(page)
        vcpu = cls._make(self, page, id)
        vcpu.timing = self.timing_
        self.recorders.append(page.recorder)
        self.vcpus.add(page)
        if self.recording is not None:
            self.recording._add(page)
        return vcpu

    @property
    def stats(self):
        """What all its vCPUs did, also those that are gone: -> Stats, the sum of theirs. Also of a closed VM."""
        return sum([(<Recorder>recorder).stats() for recorder in self.recorders], Stats())

    def reset_stats(self):
        """Vcpu.reset_stats() of them all."""
        for recorder in self.recorders:
            (<Recorder>recorder).reset()

    @property
    def timing(self):
        """Whether times are measured for `stats`. Setting it sets Vcpu.timing of the vCPUs there are, and those to come."""
        return self.timing_

    @timing.setter
    def timing(self, on):
        self.timing_ = on
        for recorder in self.recorders:
            (<Recorder>recorder).timing = on

    def record(self, folder, *, rotate=1 << 28, keep=None, registers=False):
        """Vcpu.record() of all vCPUs, those there are and those to come, to files `vcpu-ID.trace` in a folder, which is made
        where there is none: -> VMRecorder, a context manager. Raises as that."""
        from kvmexit._record import VMRecorder
        self.handle.check()
        return VMRecorder._begin(self, folder, {"rotate": rotate, "keep": keep, "registers": registers})

    def pause(self):
        """Stop all vCPUs: on return each is outside KVM_RUN, with nothing pending that KVM could complete, and outside its
        handlers (in a handler: all vCPUs but the one that handler runs for). Until resume() a run() parks: it heeds kick(),
        its timeout and Ctrl-C, and calls no handler.

        Waits with the GIL released, also for handlers to return. Pauses nest, and any thread may pause or resume; two
        handlers that pause at the same time come one after the other. A vCPU that no thread runs stays as it is: complete()
        finishes what is pending there. Raises Error where the VM is closed, also meanwhile.
        """
        self.vcpus.pause()

    def resume(self):
        """End one pause(); with the last one the vCPUs go on. Error where none is in effect."""
        self.vcpus.resume()

    @property
    def paused(self):
        """Whether a pause is in effect or asked for."""
        return self.vcpus.pauses != 0

    def create_irqchip(self):
        """An in-kernel interrupt controller (KVM_CREATE_IRQCHIP); before the first vCPU."""
        self.handle.check()
        self.handle.call_value("KVM_CREATE_IRQCHIP", KVM_CREATE_IRQCHIP, 0)

    def irq_line(self, gsi, level):
        """Set an interrupt line of the in-kernel controller (KVM_IRQ_LINE)."""
        cdef kvm_irq_level argument
        argument.irq = gsi
        argument.level = 1 if level else 0
        self.handle.check()
        self.handle.call("KVM_IRQ_LINE", KVM_IRQ_LINE, &argument)

    def irqfd(self, gsi, eventfd, *, resample=None):
        """Have KVM raise interrupt line `gsi` when an eventfd is written, without a thread of ours: -> IrqFd.

        Needs an in-kernel interrupt controller: create_irqchip(). An edge, once for each time that the counter becomes
        nonzero; KVM reads it back to 0. With `resample`, another eventfd, it is a level: it stays raised until the guest
        acknowledges it (EOI), whereupon KVM lowers it and adds to `resample`; write `eventfd` again if the device still
        wants attention. gsi: 0..15 go to PIC and IOAPIC, up to 23 to the IOAPIC, others where KVM_SET_GSI_ROUTING says.

        eventfd, resample: descriptors, or objects with fileno(); duplicated. Nobody else should read `eventfd`. Raises
        ValueError for what is no eventfd or no line, KvmError where KVM refuses (EBUSY: the eventfd raises a line already).
        A scripted VM has no interrupts: there nothing comes of it.
        Source: Documentation/virt/kvm/api.rst, KVM_IRQFD.
        """
        self.handle.check()
        gsi = index(gsi)
        lines = self.check(KVM_CAP_IRQ_ROUTING) or 1 << 32
        if not 0 <= gsi < lines:
            raise ValueError(f"gsi {gsi} is not in 0..{lines - 1}")
        return self.eventfds.irqfd(gsi, eventfd, resample)

    # ---- what guests write to ----

    def manual_dirty_protect(self, *, initially_set=False):
        """Have slots keep what they have dirty until it is cleared: slot.dirty() only looks, and slot.clear_dirty() takes
        back what was dealt with, piece by piece (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2). Then the slot is not write-protected as
        a whole at once. initially_set: a slot that is added from now on is dirty as a whole at first.

        Raises KvmError where KVM has it not.
        """
        wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | (KVM_DIRTY_LOG_INITIALLY_SET if initially_set else 0)
        if self.check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted != wanted:
            raise KvmError(
                errnos.EOPNOTSUPP, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "it needs Linux 5.0, or 5.8 to be set at first")
        self.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted)

    def enable_dirty_ring(self, entries=4096):
        """Have KVM note pages written to in a ring of each vCPU, in place of a bitmap of each slot: before the first vCPU.
        memory.dirty() and slot.dirty() say the same as without. It costs by the pages written to, not by the slots' sizes.

        entries: of each ring, 16 bytes an entry, a power of two. A vCPU whose ring is full exits with DirtyRingFull:
        `vm.on(DirtyRingFull, handlers.collect_dirty)`. In a scripted VM it changes nothing. Raises ValueError for another
        number of entries, Error in an adopted VM, KvmError where KVM refuses: there are vCPUs or rings already, or it has no
        rings.
        Source: Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING.
        """
        self.handle.check()
        entries = index(entries)
        if entries < PAGE // sizeof(kvm_dirty_gfn) or entries & (entries - 1):
            raise ValueError(f"{entries} entries: a dirty ring has a power of two of them, 256 at least")
        if self.adopted:
            raise Error("the vCPUs of an adopted VM are its owner's, and so are their dirty rings: one harvester")
        if self.handle.fd < 0:
            return
        cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL if self.check(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) else KVM_CAP_DIRTY_LOG_RING
        most = self.check(cap) // sizeof(kvm_dirty_gfn)
        if not most:
            raise KvmError(errnos.EOPNOTSUPP, "KVM_CAP_DIRTY_LOG_RING", "dirty rings need Linux 5.11 or later")
        if entries > most:
            raise ValueError(f"{entries} entries are more than KVM takes, {most}")
        try:
            self.enable(cap, entries * sizeof(kvm_dirty_gfn))
        except KvmError as error:
            error.hint = "call it once, before the first vCPU; 1024 entries at least where the processor logs pages itself"
            raise
        self.memory.dirty_log.use_rings(entries)

    # ---- doorbells ----

    def ioeventfd(self, address, size, eventfd, *, pio=False, match=None):
        """Have KVM add one to an eventfd for each of the guest's writes to an address, in place of an exit: -> IoEventFd.

        address: guest-physical, or with `pio` a port. It is the write's first byte; size: the write's bytes (1, 2, 4; MMIO
        also 8), or 0 for any; match: only writes of this value. Other writes, and all reads, exit as ever. No vCPU's handler
        sees the writes, nor is there an order between them and its exits: who waits on the eventfd learns of them when it
        gets to run. Where a memslot covers the address, the guest writes to memory and nothing rings.

        eventfd: a descriptor, or an object with fileno(); duplicated. Raises ValueError for what is no eventfd, for a size
        or a value that no such write has; KvmError where KVM refuses (EEXIST: another ioeventfd has these writes). A
        scripted VM has no kernel to do it: there such writes are exits.
        Source: Documentation/virt/kvm/api.rst, KVM_IOEVENTFD.
        """
        self.handle.check()
        size = index(size)
        if size not in (0, 1, 2, 4, 8) or pio and size == 8:
            raise ValueError(
                f"size {size}: a write has 1, 2{' or 4' if pio else ', 4 or 8'} bytes; 0 stands for any")
        address, _ = _span(address, size or 1, 0xffff if pio else UINT64_MAX, "port" if pio else "gpa")
        if match is not None:
            match = index(match)
            if not size:
                raise ValueError(f"match {match:#x} of any size: give the size of the write")
            if not 0 <= match < 1 << 8 * size:
                raise ValueError(f"match {match:#x} is not in 0..{(1 << 8 * size) - 1:#x}, what {size} bytes can be")
        return self.eventfds.ioeventfd(address, size, eventfd, bool(pio), match)

    # ---- posted writes ----

    def coalesce_mmio(self, gpa, size, handler):
        """Have KVM post the guest's writes to `size` bytes from `gpa`: the guest goes on at once, and a native handler is
        called for each of them, in their order, when a vCPU next leaves KVM_RUN, before anything else is done about
        that: -> CoalescedZone.

        handler: a native handler (kvmexit.native), called as for a write's exit, on a vCPU's thread, not always the one
        that wrote: `vcpu` is whose thread it is, and `run` is NULL. What it returns changes nothing: the guest has gone on.
        The handler is also a route (on_mmio()): reads, writes that are not wholly inside, and writes that find the ring full
        (169 are in it) are exits, and come to it after those that were posted before.

        Raises TypeError for a handler in Python, ValueError for a range that is empty, wraps, is 2 GiB or larger or
        overlaps another such zone, Error in an adopted VM (its owner drains the ring), KvmError where KVM refuses.
        Source: Documentation/virt/kvm/api.rst, KVM_(UN)REGISTER_COALESCED_MMIO.
        """
        gpa, last = _span(gpa, size, UINT64_MAX, "gpa")
        if last - gpa > 0x7ffffffe or last == UINT64_MAX:  # KVM keeps the size in an int, and looks at where the zone ends
            raise ValueError(
                f"gpa {gpa:#x}, size {size:#x}: KVM takes zones of up to 0x7fffffff bytes, before the last byte there is")
        return self._coalesce(False, gpa, last, handler)

    def coalesce_pio(self, port, count, handler):
        """The same for `count` ports from `port`: see coalesce_mmio()."""
        port, last = _span(port, count, 0xffff, "port")
        return self._coalesce(True, port, last, handler)

    def _coalesce(self, pio, first, last, handler):
        self.handle.check()
        if self.adopted:
            raise Error("posted writes of an adopted VM are its owner's: one ring, one drainer. Use a route")
        return self.coalesced.add(self, pio, first, last, handler)

    def drain_coalesced(self):
        """Handle the writes that are posted by now; -> how many. They are anyway when a vCPU leaves KVM_RUN: this is for
        what a guest posted that has not left it since. Raises Error where the VM is closed."""
        self.handle.check()
        return self.coalesced.drain()

    # ---- routes ----

    def swap_routes(self):
        """What this thread adds and removes in a with block of this comes into force at its end, in one swap: -> RouteSwap.

        A vCPU sees all of it or none, where a device moves, say; and each swap makes a table of all routes, so thousands are
        added in a block. An exception in it changes nothing. Until the end, Route.remove() waits for nobody.
        """
        return RouteSwap(self, self.swaps)

    def on(self, exit_class, handler=None):
        """Call `handler(vcpu, exit)` for every exit of a class; for `Exit`, of any. -> Route; without a handler a decorator.

        Ranges come before classes, classes before `Exit`; of equals the newest comes first.
        """
        if exit_class is _exits.Exit:
            place = ANY
        elif exit_class in _exits.CLASSES:
            place = _exits.CLASSES.index(exit_class)
        else:
            raise ValueError(f"{exit_class!r} is no class of exits that handlers see")
        return self._route((place,), 0, UINT64_MAX, handler)

    def on_pio(self, port, count=1, handler=None):
        """Answer port I/O on `count` ports from `port`: see on()."""
        port, last = _span(port, count, 0xffff, "port")
        return self._route((KVM_EXIT_IO,), port, last, handler)

    def on_mmio(self, gpa, size, handler=None):
        """Answer MMIO whose address lies in `size` bytes from `gpa`: see on()."""
        gpa, last = _span(gpa, size, UINT64_MAX, "gpa")
        return self._route((KVM_EXIT_MMIO,), gpa, last, handler)

    def on_memory_fault(self, gpa=None, size=None, handler=None):
        """Repair memory faults, all or those whose gpa lies in `size` bytes from `gpa`: see on(). ValueError for one without
        the other, or a range that is empty or wraps."""
        if (gpa is None) != (size is None):
            raise ValueError("give gpa and size, or neither")
        gpa, last = (0, UINT64_MAX) if gpa is None else _span(gpa, size, UINT64_MAX, "gpa")
        return self._route((KVM_EXIT_MEMORY_FAULT,), gpa, last, handler)

    def on_fault(self, gpa=None, size=None, handler=None):
        """Repair whatever keeps the guest from its memory: `handler(vcpu, fault)`, a kvmexit.faults.Fault. See on().

        Memory faults, faults that explain() finds the address of, and MMIO in a slot, all or those in `size` bytes from
        `gpa`; without them also those that stay unexplained. None: the guest tries again (MMIO is completed as memory).
        ValueError as on_memory_fault().
        """
        if (gpa is None) != (size is None):
            raise ValueError("give gpa and size, or neither")
        if handler is None:
            def register(function):
                self.on_fault(gpa, size, function)
                return function
            return register
        from kvmexit.faults import OnFault
        first, last = (0, UINT64_MAX) if gpa is None else _span(gpa, size, UINT64_MAX, "gpa")
        calls = OnFault(handler, first, last, gpa is None)
        entries = [
            *self._entries((KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO), first, last, calls),
            *self._entries((_exits.CLASSES.index(_exits.UnexplainedFault),), 0, UINT64_MAX, calls)]
        self._change_entries(entries, ())
        return Route(self, handler, entries)

    def on_hypercall(self, nr, handler=None):
        """Answer hypercall `nr`; the handler returns what goes to the guest's RAX. Enables KVM_CAP_EXIT_HYPERCALL for it.

        Raises ValueError for a number that KVM never forwards (it forwards 12, KVM_HC_MAP_GPA_RANGE). See on().
        """
        nr, _ = _span(nr, 1, UINT64_MAX, "hypercall")
        if self.handle.fd >= 0:
            forwarded = self.check(KVM_CAP_EXIT_HYPERCALL)
            if nr >= 64 or not forwarded >> nr & 1:
                able = [n for n in range(64) if forwarded >> n & 1]
                raise ValueError(f"KVM does not forward hypercall {nr} to userspace; it can forward {able}")
            with self.lock:
                self.enable(KVM_CAP_EXIT_HYPERCALL, self.hypercalls | 1 << nr)
                self.hypercalls |= 1 << nr
        return self._route((KVM_EXIT_HYPERCALL,), nr, nr, handler)

    def on_msr(self, first, count=1, handler=None):
        """Answer accesses to MSRs that KVM does not know or refuses: Rdmsr and Wrmsr exits.

        Enables KVM_CAP_X86_USER_SPACE_MSR. An MSR that KVM handles itself comes only where filter_msrs() denies it.
        See on().
        """
        first, last = _span(first, count, 0xffffffff, "MSR")
        if self.handle.fd >= 0:
            if not self.check(KVM_CAP_X86_USER_SPACE_MSR):
                raise KvmError(errnos.EOPNOTSUPP, "KVM_CAP_X86_USER_SPACE_MSR", "MSR exits need Linux 5.10 or later")
            self._exit_on_msrs(
                KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
        return self._route((KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR), first, last, handler)

    def filter_msrs(self, ranges=(), *, default_allow=True):
        """Say which MSRs the guest may access: what is denied is an Rdmsr or Wrmsr exit, `why` MsrExitReason.FILTER.

        ranges: MsrRange or tuples like it: (first, nmsrs, read, write). `read` and `write`: True allows, False denies, None
        says nothing of it; or bytes with a bit for each MSR, the lowest first, set where allowed. default_allow: what holds
        for accesses that no range decides. Denied accesses that no handler takes (on_msr(), on(Rdmsr), on(Wrmsr)) are
        returned by run(); answering `error` = 1 is the #GP that hardware would raise. What is allowed KVM handles as ever.

        It replaces the filter there was, for all vCPUs; without arguments there is none any more. KVM never filters the
        x2APIC's MSRs, 0x800 to 0x8ff, nor its own accesses. In a scripted VM it is checked and nothing more.

        Raises ValueError for a range that is empty, longer than 0x3000 MSRs, overlaps another in what it decides, decides
        nothing or cannot be filtered; for bytes of another length; for more than 16 ranges, those counting twice whose
        `read` and `write` differ; and for denying all by default with no range, which KVM does not take. KvmError where KVM
        refuses.
        Source: Documentation/virt/kvm/api.rst, KVM_X86_SET_MSR_FILTER.
        """
        self.handle.check()
        wanted = MsrFilter(ranges, default_allow)
        with self.lock:
            if self.handle.fd >= 0 and wanted.denies:
                if not self.check(KVM_CAP_X86_MSR_FILTER):
                    raise KvmError(errnos.EOPNOTSUPP, "KVM_X86_SET_MSR_FILTER", "MSR filters need Linux 5.10 or later")
                self._exit_on_msrs(KVM_MSR_EXIT_REASON_FILTER)  # first: without it KVM answers with #GP
            wanted.install(self.handle)

    def _exit_on_msrs(self, reasons):
        """Have such accesses exit, too: KVM forgets the reasons that are not said again."""
        with self.lock:
            self.enable(KVM_CAP_X86_USER_SPACE_MSR, self.msr_exits | reasons)
            self.msr_exits |= reasons

    def _route(self, places, first, last, handler):
        if handler is None:
            def register(function):
                self._route(places, first, last, function)
                return function
            return register
        handler = coerce(handler)
        if isinstance(handler, Native):
            (<Native>handler).check(self.memory)
        entries = self._entries(places, first, last, handler)
        self._change_entries(entries, ())
        return Route(self, handler, entries)

    def _entries(self, places, first, last, handler):
        with self.lock:
            self.handle.check()
            self.serial += 1
            return [Entry(handler, place, first, last, self.serial) for place in places]

    def _change_entries(self, added, removed):
        """Have swap_routes() swap the table, where this thread is in one; or do it now."""
        swap = self.swaps.get(PyThread_get_thread_ident())
        if swap is not None:
            swap._note(added, removed)
        else:
            self._swap_entries(added, removed)

    def _swap_entries(self, added, removed):
        """Swap the table, and wait until nobody uses native handlers that are removed."""
        with self.lock:
            while True:  # a finalizer that runs while the new table is made may swap it too: then once more
                before = self.routing.table
                if self.routing.swap(before, before.changed(added, removed), self.vcpus.pages()):
                    break
        if [True for entry in removed if isinstance(entry.handler, Native)]:
            self.routing.settle()


def _span(first, count, limit, what):
    """Check a range of ports, addresses or numbers; -> first, last."""
    first, count = index(first), index(count)
    if count <= 0:
        raise ValueError(f"a range of {count} is empty")
    if first < 0 or first + count - 1 > limit:
        raise ValueError(f"{what} {first:#x} + {count:#x} is outside 0..{limit:#x}")
    return first, first + count - 1


cdef size_t _run_size(int kvm) except 0:
    return call_value(kvm, "KVM_GET_VCPU_MMAP_SIZE", KVM_GET_VCPU_MMAP_SIZE, 0)


cdef int _create_vm(int kvm, int type) except -1:
    """KVM_CREATE_VM; any signal can make it EINTR, which is not restarted (mm_take_all_locks, for the MMU notifier)."""
    while True:
        try:
            return call_value(kvm, "KVM_CREATE_VM", KVM_CREATE_VM, type)
        except KvmError as error:
            if error.errno != errnos.EINTR:
                raise
        PyErr_CheckSignals()


cdef bytearray _supported_cpuid(int kvm):
    """KVM_GET_SUPPORTED_CPUID: a struct kvm_cpuid2 ready for KVM_SET_CPUID2."""
    cdef uint8_t[::1] table
    cdef size_t entries
    for entries in (128, 512, 4096):
        data = bytearray(8 + 40 * entries)
        table = data
        (<uint32_t *>&table[0])[0] = entries
        try:
            call(kvm, "KVM_GET_SUPPORTED_CPUID", KVM_GET_SUPPORTED_CPUID, &table[0])
        except KvmError as error:
            if error.errno != errnos.E2BIG or entries == 4096:
                raise
        else:
            return data


def _is_device(int fd):
    """Whether this is /dev/kvm: only that tells its API version."""
    try:
        return call_value(fd, "KVM_GET_API_VERSION", KVM_GET_API_VERSION, 0) == KVM_API_VERSION
    except KvmError:
        return False
