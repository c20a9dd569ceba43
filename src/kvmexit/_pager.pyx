"""The native half of kvmexit.faults.Pager: how it works is in _pager.h, what it is for in faults/_pager.py."""

import errno as errnos
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EFAULT
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.mman cimport PROT_READ, PROT_WRITE
from posix.unistd cimport close

from kvmexit._chain cimport KVMEXIT_DONE, KVMEXIT_LATER, KVMEXIT_PASS, kvmexit_exit
from kvmexit._convert cimport (
    Conversions, Converter, Region, kvmexit_next_generation, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)
from kvmexit._ioctl cimport Handle, forks
from kvmexit._memory cimport Memory, Slot
from kvmexit._routes cimport Native
from kvmexit._uapi cimport KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO
from kvmexit.errors import Error, KvmError

cdef extern from "_pager.h" nogil:
    enum:
        KVMEXIT_PAGER_PAGE
        KVMEXIT_PAGER_KEPT
        KVMEXIT_MISSING
        KVMEXIT_PRESENT
        KVMEXIT_FAILED
        KVMEXIT_FROM_MEMORY
        KVMEXIT_FROM_FILE
        KVMEXIT_FROM_STREAM
        KVMEXIT_FROM_CALL
        KVMEXIT_GAVE
        KVMEXIT_SHORT
        KVMEXIT_LONG
        KVMEXIT_RAISED
        KVMEXIT_WANTED
        KVMEXIT_FETCHED
        KVMEXIT_UNFETCHED
        KVMEXIT_AWAITED
        KVMEXIT_BROUGHT
        KVMEXIT_WAS_THERE
        KVMEXIT_WITHHELD
        KVMEXIT_ENDED
    struct kvmexit_pager_failure:
        uint64_t page, pages, got, token
        int why, error
    struct kvmexit_pager:
        char *base
        uint64_t pages, window, offset
        int uffd, stop, bell, prot, by_faults
        int from_ "from", in_ "in", out
        const char *source
        int (*ask)(void *, uint64_t, uint64_t, char *, kvmexit_pager_failure *) noexcept nogil
        void (*tell)(void *, uint64_t) noexcept nogil
        void *context
        int (*annotate)(void *, uint64_t, uint64_t, int) noexcept nogil
        void *attributes
        pthread_mutex_t lock
        uint8_t *state
        uint64_t missing, faults, fetches, filled, failed
        int sealed
        kvmexit_pager_failure *failures
    int kvmexit_uffd_open(int, int *, int *)
    int kvmexit_uffd_register(kvmexit_pager *)
    int kvmexit_pager_init(kvmexit_pager *)
    void kvmexit_pager_serve(kvmexit_pager *) noexcept
    uint64_t kvmexit_pager_want(kvmexit_pager *, uint64_t, uint64_t)
    int kvmexit_pager_wait(kvmexit_pager *, int, kvmexit_pager_failure *)
    void kvmexit_pager_cancel(kvmexit_pager *)
    int kvmexit_pager_bring(kvmexit_pager *, uint64_t, int)
    int kvmexit_pager_access(kvmexit_pager *, uint64_t, void *, uint64_t, int)
    int kvmexit_pager_retry(kvmexit_pager *, uint64_t, uint64_t)
    void kvmexit_pager_seal(kvmexit_pager *) noexcept
    void kvmexit_pager_free(kvmexit_pager *) noexcept

cdef extern from * nogil:
    """
    #define kvmexit_use(users, n) ((void)__atomic_fetch_add(users, n, __ATOMIC_SEQ_CST))
    #define kvmexit_seen(at) __atomic_load_n(at, __ATOMIC_SEQ_CST)
    """
    void kvmexit_use(int *, int)
    bint kvmexit_seen(const bint *)

cdef enum:
    PAGE_SHIFT = 12
    TICK_MS = 100  # how late a signal is noticed by who waits

AWAITED, BROUGHT, WAS_THERE, WITHHELD = KVMEXIT_AWAITED, KVMEXIT_BROUGHT, KVMEXIT_WAS_THERE, KVMEXIT_WITHHELD
FROM = {
    "memory": KVMEXIT_FROM_MEMORY, "file": KVMEXIT_FROM_FILE, "stream": KVMEXIT_FROM_STREAM, "call": KVMEXIT_FROM_CALL,
}


cdef struct Guest:  # whose vCPUs' faults bring pages in
    kvmexit_pager *pager
    Converter *converter
    Region *region  # of the slot, to know it by: it may be removed
    uint64_t gpa
    bint readonly
    int tick_ms     # that a handler waits at most
    int *users      # of the VM's Handle, and ...
    bint *closed    # ... whether it is closed


@cython.final
cdef class Worker:
    """Fills `memory` from a source: serve() in a thread of its own, until stop(). `slot`, `vm_memory`: of mode="faults".

    `source` is, by `kind`, a buffer, or a callable; else `read_fd` and `write_fd`, which it owns, are. Nothing here refers
    to the Pager, so that one that is dropped goes, and its thread after it.
    """

    cdef kvmexit_pager p
    cdef Guest guest
    cdef Slot slot                        # these three stay for what `guest` points to
    cdef Conversions conversions
    cdef Handle handle
    cdef unsigned forks
    cdef object memory, source, on_error  # memory, source: memoryviews, which keep what they are of
    cdef dict exceptions                  # by token, the last ones
    cdef uint64_t tokens

    def __cinit__(self):
        memset(&self.p, 0, sizeof(self.p))
        self.p.uffd = self.p.stop = self.p.bell = self.p.in_ = self.p.out = -1

    def __init__(self, memory, bint writable, kind, source, read_fd, write_fd, uint64_t offset, uint64_t window, on_error,
                 Slot slot=None, Memory vm_memory=None):
        cdef int system_error = 0, device_error = 0, error
        self.p.in_, self.p.out = read_fd, write_fd
        self.forks = forks()
        self.memory, self.on_error, self.exceptions = memory, on_error, {}
        self.p.base = <char *>_address(memory)
        self.p.pages, self.p.window = len(memory) // KVMEXIT_PAGER_PAGE, window // KVMEXIT_PAGER_PAGE
        self.p.prot = PROT_READ | (PROT_WRITE if writable else 0)
        self.p.from_, self.p.offset = FROM[kind], offset
        self.p.context = <void *>self
        self.source = source
        if kind == "memory":
            self.p.source = <const char *>_address(source)
        self.p.ask = ask
        if slot is not None:
            self.p.by_faults = True
            self.slot, self.conversions, self.handle = slot, vm_memory.conversions, vm_memory.handle
            self.guest = Guest(&self.p, &self.conversions.c, &slot.region, slot.gpa, slot.readonly, TICK_MS,
                               &self.handle.users, &self.handle.closed)
            self.p.attributes = &self.guest
        if on_error is not None:
            self.p.tell = tell
        error = kvmexit_pager_init(&self.p)
        if error:
            raise MemoryError if error == errnos.ENOMEM else KvmError(error, "eventfd")
        self.p.uffd = kvmexit_uffd_open(self.p.by_faults, &system_error, &device_error)
        if self.p.uffd < 0:
            raise KvmError(system_error, "userfaultfd", _why_not(system_error, device_error))
        with nogil:
            error = kvmexit_uffd_register(&self.p)
        if error:
            close(self.p.uffd)  # nothing of this memory is ours to seal
            self.p.uffd = -1
            raise KvmError(error, "UFFDIO_REGISTER", _NOT_REGISTERED.get(error, ""))
        if slot is not None and says_where(vm_memory):
            with nogil:
                error = annotate(&self.guest, 0, self.p.pages, True)
            if error:
                close(self.p.uffd)
                self.p.uffd = -1
                raise KvmError(error, "KVM_SET_MEMORY_ATTRIBUTES")
            self.p.annotate = annotate

    def __dealloc__(self):
        # Whoever waits for pages is woken first: the thread was never started, or is done and has sealed.
        if self.p.uffd >= 0 and self.forks == forks():
            with nogil:
                kvmexit_pager_seal(&self.p)
        kvmexit_pager_free(&self.p)

    def serve(self):
        """The thread: answers faults until stop(), then lets everything go. No GIL, but where the source is a callable."""
        with nogil:
            kvmexit_pager_serve(&self.p)
        self.memory = self.source = self.on_error = None

    def stop(self):
        """Fill nothing any more, make what is missing inaccessible, let the memory go. -> False, and nothing, in a forked
        child."""
        if self.forks != forks():
            return False
        with nogil:
            kvmexit_pager_seal(&self.p)
        return True

    cdef int check(self) except -1:
        cdef bint sealed
        if self.forks != forks():
            raise Error("this Pager belongs to the parent process: a child sees what was there when it was forked")
        self.lock()
        sealed = self.p.sealed
        self.unlock()
        if sealed:
            raise Error("this Pager is closed")
        return 0

    cdef void lock(self) noexcept:
        with nogil:  # who has it may be at a system call
            pthread_mutex_lock(&self.p.lock)

    cdef void unlock(self) noexcept:
        pthread_mutex_unlock(&self.p.lock)

    def prefetch(self, uint64_t first, uint64_t pages):
        """Have pages filled, and wait. -> None, or what failed, as failures() has it. One caller at a time."""
        cdef int step = KVMEXIT_WANTED
        cdef kvmexit_pager_failure failure
        self.check()
        with nogil:
            kvmexit_pager_want(&self.p, first, pages)
        try:
            while step == KVMEXIT_WANTED:
                with nogil:
                    step = kvmexit_pager_wait(&self.p, TICK_MS, &failure)
                PyErr_CheckSignals()
        except BaseException:
            with nogil:
                kvmexit_pager_cancel(&self.p)
            raise
        if step == KVMEXIT_UNFETCHED:
            return self.described(&failure)
        if step != KVMEXIT_FETCHED:
            raise Error("this Pager was closed meanwhile")
        return None

    def lacks(self, uint64_t page):
        """Whether a page is missing or failed, as far as is known here."""
        cdef bint lacks
        self.lock()
        lacks = self.p.state[page] != KVMEXIT_PRESENT
        self.unlock()
        return lacks

    def wait_long(self, int ms):
        """For tests, where no vCPU faults anew: have handlers wait for so long."""
        self.guest.tick_ms = ms

    def bring(self, uint64_t page):
        """Have a page brought, for a vCPU's handler. -> what became of it; AWAITED: it takes long, come back."""
        cdef int outcome
        with nogil:
            outcome = kvmexit_pager_bring(&self.p, page, self.guest.tick_ms)
            if outcome == KVMEXIT_AWAITED or outcome == KVMEXIT_BROUGHT:
                kvmexit_next_generation(&self.conversions.c.generation)  # no loop, however often the fault comes again
        return outcome

    def retry(self, uint64_t first, uint64_t pages):
        """Open pages again that failed."""
        cdef int error
        self.check()
        with nogil:
            error = kvmexit_pager_retry(&self.p, first, pages)
        if error:
            raise KvmError(error, "mprotect")

    def failures(self):
        """-> the last failures, oldest first: (page, pages, why, errno, bytes got, exception or None)."""
        cdef kvmexit_pager_failure kept[KVMEXIT_PAGER_KEPT]
        cdef uint64_t count, i
        self.lock()
        memcpy(kept, self.p.failures, sizeof(kept))
        count = self.p.failed
        self.unlock()
        found = []
        for i in range(count - min(count, <uint64_t>KVMEXIT_PAGER_KEPT), count):
            found.append(self.described(&kept[i % KVMEXIT_PAGER_KEPT]))
        return found

    cdef tuple described(self, kvmexit_pager_failure *f):
        return f.page, f.pages, f.why, f.error, f.got, self.exceptions.get(f.token)

    def first_failed(self, uint64_t first, uint64_t pages):
        """-> the first page of a range that failed and was not opened again, or None."""
        cdef uint64_t i = first
        self.lock()
        while i < first + pages and self.p.state[i] != KVMEXIT_FAILED:
            i += 1
        self.unlock()
        return i if i < first + pages else None

    def counts(self):
        """-> faults, fetches, pages filled, errors, pages missing."""
        self.lock()
        found = self.p.faults, self.p.fetches, self.p.filled, self.p.failed, self.p.missing
        self.unlock()
        return found


def says_where(Memory memory):
    """Whether KVM says of which page an access failed, since this VM has memory attributes."""
    return memory.converter.backend != NULL and not memory.rebinds


cdef int annotate(void *context, uint64_t first, uint64_t pages, int private) noexcept nogil:
    """Make pages PRIVATE, or shared, for KVM. The shadow has them as shared either way: the slot has no private side.
    -> 0, or errno. Of a closed VM nothing, which waits for who is counted."""
    cdef Guest *g = <Guest *>context
    cdef Converter *c = g.converter
    cdef int error = 0
    kvmexit_use(g.users, 1)
    if not kvmexit_seen(g.closed):
        pthread_mutex_lock(&c.lock)
        error = c.backend.set(c.backend, NULL, g.gpa + (first << PAGE_SHIFT), pages << PAGE_SHIFT, private)
        pthread_mutex_unlock(&c.lock)
        kvmexit_next_generation(&c.generation)
    kvmexit_use(g.users, -1)
    return error


cdef bint has_slot(Guest *g) noexcept nogil:
    """Whether the slot is there still."""
    cdef size_t i
    cdef bint found = False
    pthread_mutex_lock(&g.converter.lock)
    for i in range(g.converter.count):
        found = found or g.converter.regions[i] == g.region
    pthread_mutex_unlock(&g.converter.lock)
    return found


cdef int bring_in(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """A vCPU's access to a page that is not there: its page is brought, and an access that KVM left to us is made. What has
    failed passes. A source that takes long does not hold up who wants the vCPU for more than `tick_ms`."""
    cdef Guest *g = <Guest *>opaque
    cdef kvmexit_pager *p = g.pager
    cdef uint64_t offset = exit.address - g.gpa
    cdef bint mmio = exit.reason == KVM_EXIT_MMIO
    cdef int outcome
    if exit.address < g.gpa or offset >> PAGE_SHIFT >= p.pages:
        return KVMEXIT_PASS
    if mmio:
        if offset & (KVMEXIT_PAGER_PAGE - 1) > KVMEXIT_PAGER_PAGE - exit.size:
            return KVMEXIT_PASS  # KVM splits what crosses pages
        if exit.is_write and g.readonly:
            return KVMEXIT_PASS
    elif exit.reason != KVM_EXIT_MEMORY_FAULT or exit.error != EFAULT:
        return KVMEXIT_PASS
    if not has_slot(g):
        return KVMEXIT_PASS
    outcome = kvmexit_pager_bring(p, offset >> PAGE_SHIFT, g.tick_ms)
    if outcome == KVMEXIT_AWAITED:
        kvmexit_next_generation(&g.converter.generation)
        return KVMEXIT_LATER if mmio else KVMEXIT_DONE
    if outcome == KVMEXIT_WITHHELD or outcome == KVMEXIT_ENDED:
        return KVMEXIT_PASS
    if mmio and kvmexit_pager_access(p, offset, exit.data, exit.size, exit.is_write):
        return KVMEXIT_PASS
    return KVMEXIT_DONE


@cython.final
cdef class BringIn(Native):
    """The handler of memory faults and MMIO in the slot of a Worker."""

    cdef Worker worker
    cdef object memory  # stays for as long as vCPUs may be here: route.remove() waits for them

    def __cinit__(self, Worker worker not None):
        self.worker, self.memory = worker, worker.memory
        self.call, self.opaque = bring_in, &worker.guest

    cdef int check(self, object memory) except -1:
        if (<Memory?>memory).conversions is not self.worker.conversions:
            raise ValueError(f"{self!r} is for another VM")
        return 0


_NOT_REGISTERED = {
    errnos.EBUSY: "another userfaultfd has this memory already: close it first",
    errnos.EINVAL: "userfaultfd takes anonymous memory, and files in memory (memfd, tmpfs): no other file's mapping",
    errnos.EPERM: "the file behind this memory may not be written: open it for writing",
    errnos.ENOTSUP: "pages of hugetlbfs would have to be filled whole: use memory of 4 KiB pages",
}


def _why_not(system_error, device_error):
    """What a userfaultfd that sees KVM's accesses needs, and has not."""
    if system_error == errnos.ENOSYS:
        return "this kernel has none (CONFIG_USERFAULTFD)"
    allowed = "not readable"
    try:
        with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
            allowed = file.read().strip()
    except OSError:
        pass
    return ("KVM's accesses are the kernel's own; to be told of them a process needs one of: CAP_SYS_PTRACE, which this one "
            f"has not; sysctl vm.unprivileged_userfaultfd=1, which is {allowed}; read and write access to /dev/userfaultfd, "
            f"which gives {os.strerror(device_error)!r}. mode='faults' needs none of these")


cdef int ask(void *context, uint64_t offset, uint64_t size, char *to, kvmexit_pager_failure *failure) noexcept with gil:
    """Ask a callable."""
    cdef Worker worker = <Worker>context
    cdef Py_buffer buffer
    try:
        data = memoryview(worker.source(offset, size)).cast("B")
        failure.got = len(data)
        if failure.got != size:
            return KVMEXIT_SHORT if failure.got < size else KVMEXIT_LONG
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        memcpy(to, buffer.buf, size)
        PyBuffer_Release(&buffer)
        return KVMEXIT_GAVE
    except BaseException as error:
        worker.tokens += 1
        failure.token = worker.tokens
        worker.exceptions[worker.tokens] = error
        worker.exceptions.pop(worker.tokens - 2 * KVMEXIT_PAGER_KEPT, None)  # a failure has two of them at most
        return KVMEXIT_RAISED


cdef void tell(void *context, uint64_t number) noexcept with gil:
    """Say that there is a failure. What this raises is unraisable: a thread has nobody to tell."""
    cdef Worker worker = <Worker>context
    cdef kvmexit_pager_failure failure
    worker.lock()
    failure = worker.p.failures[number % KVMEXIT_PAGER_KEPT]
    worker.unlock()
    worker.on_error(worker.described(&failure))


cdef uintptr_t _address(view) except? 0:
    """Where a memoryview's bytes are. SAFETY: valid for as long as somebody holds the view."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    try:
        return <uintptr_t>buffer.buf
    finally:
        PyBuffer_Release(&buffer)
