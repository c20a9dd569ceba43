"""The page a vCPU shares with KVM: its mapping, its descriptor, and the registers as KVM last left them in it.

A `Page` refers to nothing that refers back, so a vCPU and the exits made from it can both hold one without a cycle, and the
mapping outlives `close()`: a kick may be storing to it at that moment (it goes when the last holder goes).
"""

cimport cython
from libc.errno cimport errno
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport getpid

from kvmexit._ioctl cimport Handle, forks, forks_counter
from kvmexit._uapi cimport (
    KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_VCPU_EVENTS, KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_VCPU_EVENTS, kvm_regs,
    kvm_sregs, kvm_sync_regs, kvm_vcpu_events,
)
from kvmexit.errors import Error, KvmError, VcpuBusyError

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef kvm_sync_regs _layout  # for offsets only

cdef struct RegisterClass:
    int bit
    size_t offset, size
    unsigned long get, set

cdef RegisterClass _classes[3]
_classes[0] = RegisterClass(REGS, <char *>&_layout.regs - <char *>&_layout, sizeof(kvm_regs), KVM_GET_REGS, KVM_SET_REGS)
_classes[1] = RegisterClass(
    SREGS, <char *>&_layout.sregs - <char *>&_layout, sizeof(kvm_sregs), KVM_GET_SREGS, KVM_SET_SREGS)
_classes[2] = RegisterClass(
    EVENTS, <char *>&_layout.events - <char *>&_layout, sizeof(kvm_vcpu_events), KVM_GET_VCPU_EVENTS,
    KVM_SET_VCPU_EVENTS)

_NAMES = {
    <unsigned long>KVM_GET_REGS: "KVM_GET_REGS", <unsigned long>KVM_SET_REGS: "KVM_SET_REGS",
    <unsigned long>KVM_GET_SREGS: "KVM_GET_SREGS", <unsigned long>KVM_SET_SREGS: "KVM_SET_SREGS",
    <unsigned long>KVM_GET_VCPU_EVENTS: "KVM_GET_VCPU_EVENTS", <unsigned long>KVM_SET_VCPU_EVENTS: "KVM_SET_VCPU_EVENTS"}


cdef void forget(kvmexit_vcpu *c, RegisterClass *k) noexcept nogil:
    """Drop what was kept aside for one class."""
    memset(c.mask + k.offset, 0, k.size)
    c.written &= ~k.bit


cdef int flush_registers(kvmexit_vcpu *c, unsigned long *call) noexcept nogil:
    """Hand the values kept aside to KVM. Only by who runs the vCPU, and only when no operation is pending: KVM applies
    registers before it completes one, whose result would be lost (arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl_run).
    -> 0, or errno of the ioctl `call`."""
    cdef RegisterClass *k
    cdef uint8_t *copy
    cdef int i
    cdef size_t j
    for i in range(3):
        k = &_classes[i]
        if not c.written & k.bit:
            continue
        copy = <uint8_t *>&c.run.s.regs + k.offset
        if not c.valid & k.bit:
            call[0] = k.get
            if c.fd >= 0 and ioctl(c.fd, k.get, copy) < 0:
                return errno
            c.valid |= k.bit
        for j in range(k.size):
            if c.mask[k.offset + j]:
                copy[j] = c.value[k.offset + j]
        if k.bit == SREGS and c.mask[k.offset + (<char *>&_layout.sregs.cr8 - <char *>&_layout.sregs)]:
            c.run.cr8 = c.run.s.regs.sregs.cr8  # which KVM takes after all other registers
        if c.synced & k.bit:
            c.run.kvm_dirty_regs |= <uint64_t>k.bit
            c.flushed |= k.bit
            continue
        call[0] = k.set
        if c.fd >= 0 and ioctl(c.fd, k.set, copy) < 0:
            c.valid &= ~k.bit
            forget(c, k)
            return errno
        forget(c, k)
    return 0


cdef void settle_registers(kvmexit_vcpu *c) noexcept nogil:
    """After an entry: the values in the page that KVM took are its own, the others are kept on. It takes none where it
    returned before it looked (an application processor not started yet)."""
    cdef RegisterClass *k
    cdef int i
    for i in range(3):
        k = &_classes[i]
        if c.flushed & k.bit and not c.run.kvm_dirty_regs & <uint64_t>k.bit:
            forget(c, k)
    c.run.kvm_dirty_regs = 0
    c.flushed = 0


cdef object closed():
    return Error("this vCPU's VM is closed")


cdef object busy():
    return VcpuBusyError("registers of a running vCPU: another thread is inside run(); kick() it and wait, or use a handler")


@cython.no_gc  # it refers to nothing that refers back; and cleared by the collector it could not close what it holds
cdef class Page:
    """One vCPU's shared page and descriptor. Internal."""

    def __init__(self):
        raise TypeError("internal: made by VM.create_vcpu()")

    def __dealloc__(self):
        # In a forked child this only drops the child's own mapping and descriptor; the parent's vCPU is not touched.
        self.close()
        if self.c.run != NULL:
            munmap(self.c.run, self.c.run_size)

    cdef void close(self) noexcept:
        with cython.critical_section(self):  # two threads may close a VM
            if self.borrowed and self.handle.forks == forks():
                self.c.run.kvm_valid_regs = self.borrowed_valid_regs
                self.c.run.immediate_exit = self.c.run.request_interrupt_window = 0
            self.borrowed = False
        if self.handle is not None:
            self.handle.close()
        self.c.fd = -1

    cdef int check(self) except -1:
        """Raise in a forked child: its stores to the shared page would reach the parent's vCPU."""
        if self.c.run == NULL:
            raise Error("a vCPU comes from VM.create_vcpu()")
        if self.handle.forks != forks():
            raise Error(
                f"this vCPU belongs to process {self.c.pid}; after fork() the child must make a VM of its own")
        return 0

    cdef int check_mine(self) except -1:
        """Raise where registers may not be touched: in a forked child, where the VM is closed, or while another thread runs
        the vCPU. On free-threaded Python in the critical section of hold(): so who only looks is waited for."""
        with cython.critical_section(self):
            self.check_mine_here()
        return 0

    cdef int check_mine_here(self) except -1:
        """The same in that section already."""
        cdef unsigned long owner
        self.check()
        owner = kvmexit_owner(&self.c)
        if owner and owner != PyThread_get_thread_ident():
            raise busy()
        if self.handle.closed:
            raise closed()
        return 0

    cdef bint hold(self) except -1:
        """Keep others from running the vCPU while we look at it or change it; VcpuBusyError where another thread runs it.
        -> whether kvmexit_disown() has to follow: this thread is not in a run() of it.

        With the GIL held until then, or on free-threaded Python in a critical section on this page: so Python's threads that
        hold it, begin a run() or look who is out in pause() wait for each other, and find nobody holding. Only the C API
        does not wait.
        """
        cdef unsigned long me = PyThread_get_thread_ident()
        if kvmexit_owner(&self.c) == me:
            return False
        if not kvmexit_claim(&self.c, me):
            raise busy()
        if kvmexit_requests(&self.c) & KVMEXIT_REQUEST_CLOSED:  # after the claim, as in run(): or close() waits for us
            kvmexit_disown(&self.c)
            raise closed()
        return True

    cdef bint hold_current(self, int which) except -1:
        """hold(), with the page's copy of these register classes current."""
        cdef bint held = self.hold()
        while which & ~self.c.valid:
            if held:
                kvmexit_disown(&self.c)
            self.load(which)
            held = self.hold()
        return held

    cdef int load(self, int which) except -1:
        """Make the page's copy of these register classes current."""
        cdef RegisterClass *k
        cdef int i
        cdef uint64_t entries = self.c.entries
        cdef bint held, stale
        cdef kvm_sregs fetched  # the largest of them
        for i in range(3):
            k = &_classes[i]
            if k.bit & which & ~self.c.valid:
                if self.c.fd >= 0:
                    self.handle.call(_NAMES[k.get], k.get, &fetched)
                held = self.hold()
                # Had another thread run the vCPU meanwhile, these would be old registers.
                stale = self.c.entries != entries
                if not stale:
                    if self.c.fd >= 0:
                        memcpy(<char *>&self.c.run.s.regs + k.offset, &fetched, k.size)
                    self.c.valid |= k.bit
                if held:
                    kvmexit_disown(&self.c)
                if stale:
                    raise busy()
        return 0

    cdef int flush(self) except -1:
        """flush_registers(), with the GIL released; KvmError where KVM refuses."""
        cdef unsigned long call = 0
        cdef int error
        with nogil:
            error = flush_registers(&self.c, &call)
        if error:
            raise KvmError(error, _NAMES[call])
        return 0


cdef Page map_vcpu(int fd, size_t run_size):
    """A page over a vCPU's descriptor, which it owns from here on, also when this fails."""
    cdef Page page = Page.__new__(Page)
    cdef void *run
    page.handle = Handle(fd, "this vCPU")
    page.c.fd = fd
    page.c.forks = forks_counter()
    page.c.born = page.handle.forks
    page.c.pid = getpid()
    run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if run == MAP_FAILED:
        raise KvmError(errno, "mmap of kvm_run")
    page.c.run = <kvm_run *>run
    page.c.run_size = run_size
    return page


cdef Page anonymous(size_t run_size):
    """A page with no kernel behind it, for scripted vCPUs."""
    cdef Page page = Page.__new__(Page)
    cdef void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    page.handle = Handle(-1, "this vCPU")
    page.c.fd = -1
    page.c.forks = forks_counter()
    page.c.born = page.handle.forks
    if run == MAP_FAILED:
        raise KvmError(errno, "mmap")
    page.c.pid = getpid()
    page.c.run = <kvm_run *>run
    page.c.run_size = run_size
    page.c.valid = REGS | SREGS | EVENTS
    return page
