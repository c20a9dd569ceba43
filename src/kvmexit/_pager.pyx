"""The native half of kvmexit.faults.Pager: how it works is in _pager.h, what it is for in faults/_pager.py."""

import errno as errnos
import os

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.mman cimport PROT_READ, PROT_WRITE
from posix.unistd cimport close

from kvmexit._ioctl cimport forks
from kvmexit.errors import Error, KvmError

cdef extern from "_pager.h" nogil:
    enum:
        KVMEXIT_PAGER_PAGE
        KVMEXIT_PAGER_KEPT
        KVMEXIT_MISSING
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
    ctypedef int pthread_mutex_t
    struct kvmexit_pager_failure:
        uint64_t page, pages, got, token
        int why, error
    struct kvmexit_pager:
        char *base
        uint64_t pages, window, offset
        int uffd, stop, bell, prot
        int from_ "from", in_ "in", out
        const char *source
        int (*ask)(void *, uint64_t, uint64_t, char *, kvmexit_pager_failure *) noexcept nogil
        void (*tell)(void *) noexcept nogil
        void *context
        pthread_mutex_t lock
        uint8_t *state
        uint64_t missing, faults, fetches, filled, failed
        int sealed
        kvmexit_pager_failure *failures
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int kvmexit_uffd_open(int *, int *)
    int kvmexit_uffd_register(kvmexit_pager *)
    int kvmexit_pager_init(kvmexit_pager *)
    void kvmexit_pager_serve(kvmexit_pager *) noexcept
    uint64_t kvmexit_pager_want(kvmexit_pager *, uint64_t, uint64_t)
    int kvmexit_pager_wait(kvmexit_pager *, int, kvmexit_pager_failure *)
    void kvmexit_pager_cancel(kvmexit_pager *)
    int kvmexit_pager_retry(kvmexit_pager *, uint64_t, uint64_t)
    void kvmexit_pager_seal(kvmexit_pager *) noexcept
    void kvmexit_pager_close(kvmexit_pager *) noexcept
    void kvmexit_pager_free(kvmexit_pager *) noexcept

cdef enum:
    TICK_MS = 100  # how late a signal is noticed by who waits

FROM = {
    "memory": KVMEXIT_FROM_MEMORY, "file": KVMEXIT_FROM_FILE, "stream": KVMEXIT_FROM_STREAM, "call": KVMEXIT_FROM_CALL,
}


@cython.final
cdef class Worker:
    """Fills `memory` from a source: serve() in a thread of its own, until stop().

    `source` is, by `kind`, a buffer, or a callable; else `read_fd` and `write_fd`, which it owns, are. Nothing here refers
    to the Pager, so that one that is dropped goes, and its thread after it.
    """

    cdef kvmexit_pager p
    cdef unsigned forks
    cdef object memory, source, on_error  # memory, source: memoryviews, which keep what they are of
    cdef dict exceptions                  # by token, the last ones
    cdef uint64_t tokens

    def __cinit__(self):
        memset(&self.p, 0, sizeof(self.p))
        self.p.uffd = self.p.stop = self.p.bell = self.p.in_ = self.p.out = -1

    def __init__(self, memory, bint writable, kind, source, read_fd, write_fd, uint64_t offset, uint64_t window, on_error):
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
        if on_error is not None:
            self.p.tell = tell
        error = kvmexit_pager_init(&self.p)
        if error:
            raise MemoryError if error == errnos.ENOMEM else KvmError(error, "eventfd")
        self.p.uffd = kvmexit_uffd_open(&system_error, &device_error)
        if self.p.uffd < 0:
            raise KvmError(system_error, "userfaultfd", _why_not(system_error, device_error))
        with nogil:
            error = kvmexit_uffd_register(&self.p)
        if error:
            close(self.p.uffd)  # nothing of this memory is ours to seal
            self.p.uffd = -1
            raise KvmError(error, "UFFDIO_REGISTER", _NOT_REGISTERED.get(error, ""))

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
            kvmexit_pager_close(&self.p)  # the other side of a stream sees the end
        self.memory = self.source = self.on_error = None

    def stop(self):
        """Fill nothing any more, make what is missing inaccessible, let the memory go. In a forked child: nothing."""
        if self.forks == forks():
            with nogil:
                kvmexit_pager_seal(&self.p)

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
            f"which gives {os.strerror(device_error)!r}")


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


cdef void tell(void *context) noexcept with gil:
    """Say that there is a failure. What this raises is unraisable: a thread has nobody to tell."""
    cdef Worker worker = <Worker>context
    worker.on_error(worker.failures()[-1])


cdef uintptr_t _address(view) except? 0:
    """Where a memoryview's bytes are. SAFETY: valid for as long as somebody holds the view."""
    cdef Py_buffer buffer
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    try:
        return <uintptr_t>buffer.buf
    finally:
        PyBuffer_Release(&buffer)
