"""eventfds that KVM itself serves: a guest's write that adds to one (ioeventfd), and one that raises an interrupt (irqfd).

Neither is an exit: no thread of ours runs. KVM holds the eventfd until it is taken back, which goes by the eventfd, too: so
each `Assigned` keeps a descriptor of its own, whatever the caller does with his.
"""

import threading
import weakref

cimport cython
from libc.string cimport memset
from posix.unistd cimport close

from kvmexit._ioctl cimport Handle, forks
from kvmexit._native cimport dup_eventfd
from kvmexit._uapi cimport (
    KVM_IOEVENTFD, KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_DEASSIGN, KVM_IOEVENTFD_FLAG_PIO, KVM_IRQFD,
    KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_ioeventfd, kvm_irqfd,
)
from kvmexit.errors import KvmError


@cython.final
cdef class EventFds:
    """Internal: those of one VM. It holds them, so they are in force until they are removed, as routes are."""

    def __init__(self, Handle handle):
        self.handle = handle
        self.lock = threading.RLock()
        self.assigned = []

    def ioeventfd(self, address, size, eventfd, pio, match):
        """See VM.ioeventfd()."""
        cdef IoEventFd made = IoEventFd.__new__(IoEventFd)
        made.address, made.size, made.pio, made.match = address, size, pio, match
        made.fd = dup_eventfd(eventfd)
        self.put(made)
        return made

    def irqfd(self, gsi, eventfd, resample):
        """See VM.irqfd()."""
        cdef IrqFd made = IrqFd.__new__(IrqFd)
        made.gsi = gsi
        made.fd = dup_eventfd(eventfd)
        if resample is not None:
            made.resample = dup_eventfd(resample)
        self.put(made)
        return made

    cdef int put(self, Assigned made) except -1:
        with self.lock:
            self.handle.check()
            made.owner = weakref.ref(self)
            made.tell(self.handle, True)
            self.assigned.append(made)
        return 0

    def withdraw(self):
        """Take all of them from a VM that lives on without us."""
        if self.handle.fd < 0 or self.handle.forks != forks():
            return
        with self.lock:
            while self.assigned:
                try:
                    (<Assigned>self.assigned.pop()).tell(self.handle, False)
                except KvmError:
                    pass  # nothing more can be done about this one

    def close(self):
        """The VM is gone, and KVM has let go of them. In a forked child the lock may be a thread's that is not there."""
        if self.handle.forks == forks():
            with self.lock:
                self.assigned.clear()


cdef class Assigned:
    """An eventfd that KVM serves. Taken back by remove(), or at the end of a with block; else in force as long as the VM.

    `eventfd`: kvmexit's own descriptor of it.
    """

    def __cinit__(self):
        self.fd = -1

    def __init__(self):
        raise TypeError("use vm.ioeventfd() or vm.irqfd()")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    cdef int tell(self, Handle handle, bint assign) except -1:
        raise NotImplementedError

    @property
    def eventfd(self):
        return self.fd

    def remove(self):
        """Have KVM let go of it; afterwards it neither adds to the eventfd nor reads it. Removing twice, or after the VM was
        closed, is no error. Raises KvmError where KVM refuses; it is in force then."""
        cdef EventFds owner = self.owner()
        if owner is None or owner.handle.closed:
            return
        owner.handle.check()
        with owner.lock:
            if self in owner.assigned and not owner.handle.closed:
                self.tell(owner.handle, False)
                owner.assigned.remove(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.remove()


@cython.final
cdef class IoEventFd(Assigned):
    """A guest's writes that add to an eventfd instead of exiting: made by `vm.ioeventfd()`.

    address (a guest-physical address, or with `pio` a port), size (bytes; 0: of any size), match (the value, or None: any).
    """

    cdef int tell(self, Handle handle, bint assign) except -1:
        cdef kvm_ioeventfd argument
        memset(&argument, 0, sizeof(argument))
        argument.addr, argument.len, argument.fd = self.address, self.size, self.fd
        if self.match is not None:
            argument.datamatch = self.match
            argument.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH
        if self.pio:
            argument.flags |= KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            argument.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        if handle.fd >= 0:
            handle.call("KVM_IOEVENTFD", KVM_IOEVENTFD, &argument)
        return 0

    def __repr__(self):
        where = f"port={self.address:#x}" if self.pio else f"gpa={self.address:#x}"
        return f"IoEventFd({where}, size={self.size}, match={self.match})"


@cython.final
cdef class IrqFd(Assigned):
    """An eventfd whose writes raise an interrupt: made by `vm.irqfd()`. gsi: the interrupt line."""

    def __cinit__(self):
        self.resample = -1

    def __dealloc__(self):
        if self.resample >= 0:
            close(self.resample)

    cdef int tell(self, Handle handle, bint assign) except -1:
        cdef kvm_irqfd argument
        memset(&argument, 0, sizeof(argument))
        argument.fd, argument.gsi = self.fd, self.gsi
        if not assign:
            argument.flags = KVM_IRQFD_FLAG_DEASSIGN
        elif self.resample >= 0:
            argument.flags = KVM_IRQFD_FLAG_RESAMPLE
            argument.resamplefd = self.resample
        if handle.fd >= 0:
            handle.call("KVM_IRQFD", KVM_IRQFD, &argument)
        return 0

    def __repr__(self):
        return f"IrqFd(gsi={self.gsi}{', resample' if self.resample >= 0 else ''})"
