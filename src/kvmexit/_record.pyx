"""Recording what vCPUs exit with, and what is answered: the files, and who begins and ends it. The writer is _record.h."""

import errno as errnos
import os
import time
import weakref
from operator import index

cimport cython
from cpython.bytes cimport PyBytes_AsString
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, strdup

from kvmexit._ioctl cimport forks
from kvmexit._loop cimport AGAIN, DRAINED, KICKED, LOOK, PAUSED, TIMED_OUT, let_go
from kvmexit._page cimport Page, kvmexit_claim, kvmexit_owner, kvmexit_parked, kvmexit_vcpu
from kvmexit._vm cimport VM
from kvmexit._stats import clock
from kvmexit._version import __version__
from kvmexit.errors import Error, VcpuBusyError

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "_record.h" nogil:
    const char *KVMEXIT_TRACE_MAGIC
    const uint32_t KVMEXIT_TRACE_VERSION
    const uint8_t KVMEXIT_TRACE_RETRIED, KVMEXIT_TRACE_KICK, KVMEXIT_TRACE_TIMEOUT, KVMEXIT_TRACE_PAUSE
    const uint8_t KVMEXIT_TRACE_DRAINED
    const int KVMEXIT_TRACE_TRUNCATED
    struct kvmexit_trace_header:
        char magic[8]
        uint32_t version, header_size
        uint8_t recording[16]
        uint32_t part, vcpu
        uint32_t run_size, vm_type
        uint64_t first_ticks, first_ns
        double ns_per_tick
        char kvmexit[24]
    struct kvmexit_trace_part:
        uint64_t size
    ctypedef struct NativeTrace "struct kvmexit_trace":  # which is opaque elsewhere
        int registers, failed
        uint64_t records, lost
        kvmexit_trace_part parts[2]
        char *path
        uint32_t keep
        kvmexit_trace_header header
    uint8_t *kvmexit_trace_said
    int kvmexit_trace_open(NativeTrace *)
    void kvmexit_trace_attach(NativeTrace *, kvmexit_vcpu *, bint)
    void kvmexit_trace_detach(NativeTrace *, kvmexit_vcpu *, bint)
    void kvmexit_trace_close(NativeTrace *, bint)

cdef extern from *:
    """
    #define kvmexit_load(at) __atomic_load_n(at, __ATOMIC_RELAXED)
    """
    uint64_t kvmexit_load(uint64_t *) nogil
    int kvmexit_load_int "kvmexit_load"(int *) nogil


cdef enum:
    PAGE = 4096
    LEAST = 65536  # bytes of a part: the largest record is half of it

_MOST = 1 << 40

kvmexit_trace_said[<int>AGAIN] = kvmexit_trace_said[<int>LOOK] = KVMEXIT_TRACE_RETRIED
kvmexit_trace_said[<int>KICKED] = KVMEXIT_TRACE_KICK
kvmexit_trace_said[<int>TIMED_OUT] = KVMEXIT_TRACE_TIMEOUT
kvmexit_trace_said[<int>PAUSED] = KVMEXIT_TRACE_PAUSE
kvmexit_trace_said[<int>DRAINED] = KVMEXIT_TRACE_DRAINED


def parts_of(path):
    """-> the files of a recording that there are, oldest first."""
    folder, base = os.path.split(path)
    numbers = []
    for name in os.listdir(folder or "."):
        number = name[len(base) + 1:]
        if name == base:
            numbers.append(0)
        elif name.startswith(f"{base}.") and number.isascii() and number.isdigit() and number[0] != "0":
            numbers.append(int(number))
    return [f"{path}.{number}" if number else path for number in sorted(numbers)]


@cython.final
@cython.no_gc
cdef class Writer:
    """Owns the native side. The vCPU's page holds it, for as long as it is recorded."""

    cdef NativeTrace *c
    cdef unsigned forks
    cdef bint opened

    def __cinit__(self, Page page, bytes path, uint64_t size, uint32_t keep, bint registers, int type):
        cdef kvmexit_trace_header *h
        cdef bytes identity = os.urandom(16), version = __version__.encode()[:23]
        cdef int error
        ticks, ns_per_tick = clock(page.recorder)
        self.forks = forks()
        self.c = <NativeTrace *>calloc(1, sizeof(NativeTrace))
        if self.c == NULL:
            raise MemoryError
        self.c.path = strdup(PyBytes_AsString(path))
        if self.c.path == NULL:
            raise MemoryError
        self.c.keep = keep
        self.c.registers = registers
        self.c.parts[0].size = self.c.parts[1].size = size
        h = &self.c.header
        memcpy(h.magic, KVMEXIT_TRACE_MAGIC, sizeof(h.magic))
        h.version = KVMEXIT_TRACE_VERSION
        h.header_size = sizeof(kvmexit_trace_header)
        memcpy(h.recording, PyBytes_AsString(identity), sizeof(h.recording))
        h.vcpu = page.c.id
        h.run_size = page.c.run_size
        h.vm_type = type
        h.first_ticks, h.first_ns = ticks, time.time_ns()
        h.ns_per_tick = ns_per_tick
        memcpy(h.kvmexit, PyBytes_AsString(version), len(version))
        with nogil:
            error = kvmexit_trace_open(self.c)
        if error:
            raise OSError(error, os.strerror(error), os.fsdecode(path))
        self.opened = True

    def __dealloc__(self):
        if self.c != NULL:
            self.close()
            free(self.c.path)
            free(self.c)

    cdef void close(self) noexcept:
        """Once. Waits for the helper, which needs no GIL and waits for nobody."""
        cdef bint forked = self.forks != forks()
        if self.opened:
            self.opened = False
            with nogil:
                kvmexit_trace_close(self.c, forked)


@cython.final
cdef class Recorder:
    """A recording of one vCPU that is under way, or was: from Vcpu.record(). A context manager: leaving the block closes it.

    A vCPU that goes closes its files, too; what a killed process has recorded is there as well. A forked child records
    nothing.
    """

    cdef Writer writer
    cdef Page page  # None once it is closed
    cdef object vm  # weak
    cdef str path_

    def __init__(self):
        raise TypeError("use vcpu.record()")

    @staticmethod
    def _begin(VM vm, Page page, path, rotate, keep, registers):
        cdef Recorder self = Recorder.__new__(Recorder)
        rotate = index(rotate)
        if not LEAST <= rotate <= _MOST:
            raise ValueError(f"rotate {rotate} is not in {LEAST}..{_MOST} bytes")
        keep = None if keep is None else index(keep)
        if keep is not None and not 1 <= keep < 1 << 32:
            raise ValueError(f"keep {keep}: at least the file in use stays, or None for all")
        self.path_ = os.path.abspath(os.fsdecode(path))
        self.page = page
        self.page.check()
        vm.handle.check()
        if self.page.trace is not None:
            raise Error(f"vCPU {page.c.id} is being recorded already")
        for name in parts_of(self.path_):
            raise FileExistsError(errnos.EEXIST, "there is another recording", name)
        self.vm = weakref.ref(vm)
        self.writer = Writer(self.page, os.fsencode(self.path_), -(-rotate // PAGE) * PAGE, keep or 0, registers, vm.type)
        try:
            self.switch(True)
        except BaseException:
            self.writer.close()
            os.unlink(self.path_)
            raise
        return self

    cdef int switch(self, bint on) except -1:
        """Attach the writer to the vCPU, or detach it: where another thread runs that, its VM is paused for the moment."""
        try:
            self.switch_now(on, False)
            return 0
        except VcpuBusyError:
            vm = self.vm()
            if vm is None:  # then nobody runs it any more
                raise
        vm.pause()
        try:
            self.switch_now(on, True)
        finally:
            vm.resume()
        return 0

    cdef int switch_now(self, bint on, bint paused) except -1:
        """The same with the GIL held throughout, or on free-threaded Python in the page's critical section: so no thread of
        Python's begins a run() meanwhile, and the claim keeps C's out. `paused`, by us: then who is parked (P19) stays so,
        since it looks at its requests, sequentially consistent, before it enters again."""
        cdef kvmexit_vcpu *c = &self.page.c
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef bint held = False, pending
        with cython.critical_section(self.page):
            if kvmexit_owner(c) != me and not (paused and kvmexit_parked(c)):
                held = kvmexit_claim(c, me)
                if not held:
                    raise VcpuBusyError(f"vCPU {c.id} is running in another thread")
            try:
                pending = c.unsettled or (c.needs and not c.answered)
                if on and self.page.trace is not None:
                    raise Error(f"vCPU {c.id} is being recorded already")
                if on:
                    kvmexit_trace_attach(self.writer.c, c, pending or c.completes)
                    self.page.trace = self.writer
                else:
                    kvmexit_trace_detach(self.writer.c, c, pending)
                    self.page.trace = None
            finally:
                if held:
                    let_go(c)
        return 0

    def close(self):
        """End the recording. Closing twice is no error.

        Where another thread runs the vCPU its VM is paused for a moment (VM.pause()). In a forked child only the child's
        descriptors are closed.
        """
        if self.page is None:
            return
        if self.writer.forks == forks():
            self.switch(False)
        self.page = None
        self.writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def path(self):
        """Of the first file."""
        return self.path_

    @property
    def files(self):
        """The files that there are, oldest first. The newest may be one that is made ready and not in use yet."""
        return parts_of(self.path_)

    @property
    def records(self):
        """How many returns of KVM_RUN were recorded."""
        return kvmexit_load(&self.writer.c.records)

    @property
    def lost(self):
        """How many were not, since the recording has ended by itself: `error` says why."""
        return kvmexit_load(&self.writer.c.lost)

    @property
    def error(self):
        """Why the recording has ended by itself, an OSError; None where it has not. The vCPU runs on."""
        cdef int failed = kvmexit_load_int(&self.writer.c.failed)
        if not failed:
            return None
        if failed == KVMEXIT_TRACE_TRUNCATED:
            return OSError(errnos.EIO, "the file was cut, or its disk failed", self.path_)
        return OSError(failed, os.strerror(failed), self.path_)

    @property
    def closed(self):
        """Whether close() was called."""
        return self.page is None

    def __repr__(self):
        state = "closed" if self.closed else "failed" if self.error else "open"
        return f"<Recorder of {self.path_!r}, {self.records} records, {state}>"


@cython.final
cdef class VMRecorder:
    """A recording of all vCPUs of a VM: from VM.record(). A context manager: leaving the block closes it."""

    cdef object vm
    cdef dict options
    cdef str folder
    cdef dict recorders_
    cdef bint closed_

    def __init__(self):
        raise TypeError("use vm.record()")

    @staticmethod
    def _begin(VM vm, folder, dict options):
        cdef VMRecorder self = VMRecorder.__new__(VMRecorder)
        self.vm = weakref.ref(vm)
        self.folder = os.path.abspath(os.fsdecode(folder))
        self.options = options
        self.recorders_ = {}
        if vm.recording is not None:
            raise Error("this VM is being recorded already")
        os.makedirs(self.folder, exist_ok=True)
        try:
            for page in vm.vcpus.pages():
                self._add(page)
        except BaseException:
            self.close()
            raise
        vm.recording = self
        return self

    def _add(self, Page page):
        """Record one vCPU more."""
        path = os.path.join(self.folder, f"vcpu-{page.c.id}.trace")
        self.recorders_[page.c.id] = Recorder._begin(self.vm(), page, path, **self.options)

    @property
    def recorders(self):
        """vCPU id -> its Recorder."""
        return dict(self.recorders_)

    @property
    def files(self):
        """All files that there are."""
        return [name for recorder in self.recorders_.values() for name in recorder.files]

    @property
    def records(self):
        """How many returns of KVM_RUN were recorded."""
        return sum([recorder.records for recorder in self.recorders_.values()])

    @property
    def lost(self):
        """How many were not: see Recorder."""
        return sum([recorder.lost for recorder in self.recorders_.values()])

    @property
    def closed(self):
        """Whether close() was called."""
        return self.closed_

    def close(self):
        """End all recordings: see Recorder.close()."""
        vm = self.vm()
        if vm is not None and (<VM>vm).recording is self:
            (<VM>vm).recording = None
        self.closed_ = True
        for recorder in self.recorders_.values():
            recorder.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        return f"<VMRecorder in {self.folder!r}, {len(self.recorders_)} vCPUs, {self.records} records>"
