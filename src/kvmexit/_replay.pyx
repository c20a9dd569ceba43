"""Reading traces, and replaying them: an *enter* that gives out what was recorded. No /dev/kvm, no GIL.

A file may hold anything: `scan()` checks every length of every record before anything else looks at it, and the bytes are
copied first, so that nobody can change them later. docs/trace.md has the format.
"""

import os
import time
from stat import S_ISREG
from typing import NamedTuple

cimport cython
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from libc.errno cimport EBADMSG, EINTR, ENODATA
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from kvmexit._exits cimport (
    INLINE_DATA, PLACES, UNEXPLAINED, Exit, Io, Mmio, UnexplainedFault, classify, make, make_interrupted,
)
from kvmexit._loop cimport Vcpu
from kvmexit._page cimport (
    EVENTS, KVMEXIT_REQUEST_KICK, REGS, SREGS, Page, anonymous, kvmexit_disown, kvmexit_vcpu,
)
from kvmexit._stats cimport KVMEXIT_NO_RIP, KVMEXIT_OUTCOMES, KVMEXIT_PENDING
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVMEXIT_REASON_SENTINEL, kvm_regs, kvm_run,
)
from kvmexit import stats
from kvmexit._exits import Interrupted
from kvmexit._record import parts_of
from kvmexit.errors import KvmError, TraceError

cdef extern from "_trace_format.h" nogil:
    const char *KVMEXIT_TRACE_MAGIC
    const uint32_t KVMEXIT_TRACE_VERSION, KVMEXIT_TRACE_WORD
    const uint8_t KVMEXIT_TRACE_RETRIED, KVMEXIT_TRACE_KICK, KVMEXIT_TRACE_TIMEOUT, KVMEXIT_TRACE_DRAINED
    const uint8_t KVMEXIT_TRACE_IMMEDIATE, KVMEXIT_TRACE_REGISTERS, KVMEXIT_TRACE_BEGUN, KVMEXIT_TRACE_WAITED
    struct kvmexit_trace_header:
        char magic[8]
        uint32_t version, header_size
        uint8_t recording[16]
        uint32_t part, vcpu
        uint32_t run_size, vm_type
        uint64_t first_ticks, first_ns
        double ns_per_tick
        uint64_t size
        uint32_t ended, error
        uint64_t lost
        char kvmexit[24]
    struct kvmexit_trace_record:
        uint32_t sizes
        uint16_t run_flags
        uint8_t outcome, settled
        uint64_t entered, left, rip
        uint32_t reason
        uint16_t error
        uint8_t state, how
    struct kvmexit_trace_wait:
        uint64_t asked, got
    struct kvmexit_trace_span:
        uint16_t at, size
    struct kvmexit_trace_shape:
        size_t words, data, answer_words
        kvmexit_trace_span answer[2]
    size_t kvmexit_trace_words(size_t)
    void kvmexit_trace_look(kvmexit_trace_shape *, const kvm_run *, size_t)
    void kvmexit_trace_gather(const kvmexit_trace_shape *, const kvm_run *, uint8_t *)
    size_t kvmexit_trace_tail(unsigned)
    bint kvmexit_trace_is_exit(int, uint32_t)
    bint kvmexit_trace_has_payload(int, uint32_t)
    bint kvmexit_trace_completes(int, uint32_t)

cdef extern from *:
    """
    #define kvmexit_load_immediate_exit(run) __atomic_load_n(&(run)->immediate_exit, __ATOMIC_SEQ_CST)
    #define kvmexit_request(c, bit) __atomic_fetch_or(&(c)->request, bit, __ATOMIC_SEQ_CST)
    #define kvmexit_load_count(count) __atomic_load_n(count, __ATOMIC_ACQUIRE)
    #define kvmexit_store_count(count, value) __atomic_store_n(count, value, __ATOMIC_RELEASE)
    """
    int kvmexit_load_immediate_exit(kvm_run *) nogil
    void kvmexit_request(kvmexit_vcpu *, uint32_t) nogil
    size_t kvmexit_load_count(size_t *) nogil  # Replay's properties are looked at while a thread replays
    void kvmexit_store_count(size_t *, size_t) nogil


cdef enum:
    PAGE = 4096
    MOST_RUN_SIZE = 1 << 20
    MOST_ANSWER = 32768  # KVMEXIT_TRACE_MOST_DATA

cdef double MOST_NS = 9223372036854774784.0  # the largest double that an int64_t can hold

ENDINGS = (None, "closed", "rotated", "failed")
_OTHER_OUTCOMES = ("retried", "kick", "timeout", "pause", "drained")
_OUTCOMES = (*stats.OUTCOMES, stats.PENDING)


cdef struct Ref:
    const kvmexit_trace_record *record
    uint32_t source


cdef struct Row:  # of Trace.numpy(), whose dtype says the same
    int64_t entered_ns, left_ns
    uint64_t rip, address, data
    uint32_t size, reason, vcpu
    uint16_t error, run_flags
    uint8_t outcome, is_write, settled, how
    uint32_t reserved


_DTYPE = [
    ("entered_ns", "<i8"), ("left_ns", "<i8"), ("rip", "<u8"), ("address", "<u8"), ("data", "<u8"), ("size", "<u4"),
    ("reason", "<u4"), ("vcpu", "<u4"), ("errno", "<u2"), ("run_flags", "<u2"), ("outcome", "u1"), ("is_write", "u1"),
    ("settled", "u1"), ("how", "u1"), ("reserved", "<u4")]


class TraceRecord(NamedTuple):
    """One return of KVM_RUN, as it was recorded.

    number: in its Trace, from 0. vcpu: the id. exit: the Exit, with its answer where there was one; an Interrupted where
    run() returned that; None of any other return. outcome: of an exit, as in `stats.OUTCOMES` or "pending", what became of
    it first; of others "kick", "timeout", "pause", "drained" (complete()), or "retried". settled: the answer is in, and
    `answer` is what the guest got, or gets at the next entry.
    errno: of KVM_RUN. entered_ns, left_ns: when it was entered and when it came back, from the trace's beginning on.
    rip: where the guest was, None where KVM did not show. immediate: immediate_exit was set. begun: it was pending already
    when recording began. answer: its bytes, as in kvm_run or the PIO data. registers: struct kvm_regs, or None.
    cr8, if_flag, ready_for_interrupt_injection: of kvm_run's head. waited_ns: how the vCPU's record before came to
    Python: when native code had done with it, and when Python had the GIL; None where it did not, or `vcpu.timing` was off.
    """

    number: int
    vcpu: int
    exit: Exit | None
    outcome: str
    settled: bool
    errno: int
    entered_ns: int
    left_ns: int
    rip: int | None
    immediate: bool
    begun: bool
    answer: bytes
    registers: bytes | None
    cr8: int
    if_flag: bool
    ready_for_interrupt_injection: bool
    waited_ns: tuple[int, int] | None


class Divergence(NamedTuple):
    """Where a replay differs from its trace: `record` was answered otherwise. recorded, replayed: the answers' bytes; None
    for `replayed` where no handler took the exit, though one had."""

    record: TraceRecord
    recorded: bytes
    replayed: bytes | None

    def __str__(self):
        was = f"record {self.record.number}, {self.record.exit!r}: recorded {_hex(self.recorded)} ({self.record.outcome})"
        return f"{was}, replayed {'no answer' if self.replayed is None else _hex(self.replayed)}"


def _hex(data):
    return f"{data[:16].hex(' ')}{' ...' if len(data) > 16 else ''}" if data else "nothing"


class TracePart(NamedTuple):
    """One file of a trace. path, part (its number), vcpu, records (how many). ended: "closed", "rotated", "failed" (`error`
    is the errno then, and `lost` how many records were not written), or None where the writer was killed or still writes, or
    the file was cut.
    torn: bytes at the end that belong to no whole record: a record that was being written, or the file was cut.
    """

    path: str
    part: int
    vcpu: int
    records: int
    ended: str | None
    torn: int
    error: int
    lost: int


@cython.final
cdef class Source:
    """One file's bytes, and what its header says."""

    cdef bytes data
    cdef kvmexit_trace_header header
    cdef object path
    cdef bint whole  # closed, and not cut since
    cdef size_t torn
    cdef size_t records

    def __init__(self, path):
        self.path = path
        if not S_ISREG(os.stat(path).st_mode):
            raise TraceError(f"{path} is no file")  # a device may have no end, and a pipe no beginning
        with open(path, "rb") as file:
            self.data = file.read()
        self.look()
        self.records = self.scan(NULL, 0)

    def error(self, offset, why):
        """-> a TraceError: what is wrong, and where."""
        return TraceError(f"{self.path}, offset {offset:#x}: {why}")

    cdef int look(self) except -1:
        """Check the header."""
        cdef kvmexit_trace_header *h = &self.header
        cdef size_t size = len(self.data)
        if size < sizeof(kvmexit_trace_header):
            raise self.error(0, f"{size} bytes are no trace: its header has {sizeof(kvmexit_trace_header)}")
        memcpy(h, PyBytes_AsString(self.data), sizeof(kvmexit_trace_header))
        if memcmp(h.magic, KVMEXIT_TRACE_MAGIC, sizeof(h.magic)):
            raise self.error(0, "no trace of kvmexit's: it begins otherwise")
        if h.version != KVMEXIT_TRACE_VERSION:
            raise self.error(8, f"version {h.version}; this kvmexit reads {KVMEXIT_TRACE_VERSION}")
        if h.header_size < sizeof(kvmexit_trace_header) or h.header_size > size or h.header_size % KVMEXIT_TRACE_WORD:
            raise self.error(12, f"a header of {h.header_size} bytes in a file of {size}")
        if h.run_size < 2 * PAGE or h.run_size > MOST_RUN_SIZE or h.run_size % PAGE:
            raise self.error(40, f"a vCPU's mapping of {h.run_size} bytes: pages expected, 2 to {MOST_RUN_SIZE // PAGE}")
        if h.vcpu > 0x7fffffff:
            raise self.error(36, f"vCPU {h.vcpu}")
        if not 0 < h.ns_per_tick < 1e9:
            raise self.error(64, f"{h.ns_per_tick} ns a tick")
        if h.size and (h.size < h.header_size or h.size % KVMEXIT_TRACE_WORD):
            raise self.error(72, f"{h.size} bytes in use, of which the header is {h.header_size}")
        if h.ended >= <uint32_t>len(ENDINGS):
            raise self.error(80, f"an ending {h.ended}")
        if h.error > 0x7fffffff:
            raise self.error(84, f"errno {h.error}")
        return 0

    cdef size_t scan(self, Ref *refs, uint32_t source) except? 0:
        """Check each record; -> how many there are. refs: noted there, unless NULL."""
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AsString(self.data)
        cdef size_t size = len(self.data), at = self.header.header_size, end = size, bytes_, count = 0
        cdef const kvmexit_trace_record *r
        cdef bint closed = self.header.size != 0 and self.header.size <= size
        self.whole = closed
        if closed:
            end = self.header.size
        while end - at >= sizeof(kvmexit_trace_record):
            r = <const kvmexit_trace_record *>(data + at)
            if r.sizes == 0:
                if closed:
                    raise self.error(at, "no record, where the header says that there are more")
                break
            bytes_ = (r.sizes & 0xffff) * KVMEXIT_TRACE_WORD
            if bytes_ > end - at and not closed:
                break
            self.check(r, at, end - at)
            if refs != NULL:
                refs[count].record = r
                refs[count].source = source
            count += 1
            at += bytes_
        if closed and at != end:
            raise self.error(at, f"{end - at} bytes are too few for a record")
        self.torn = 0 if closed else len(self.data[at:].rstrip(b"\0"))
        return count

    cdef int check(self, const kvmexit_trace_record *r, size_t at, size_t room) except -1:
        """SAFETY: the record's head is there. Afterwards all that it says of itself can be relied on."""
        cdef kvm_run run
        cdef kvmexit_trace_shape shape
        cdef size_t words = r.sizes & 0xffff, union_words = r.sizes >> 16 & 0xff
        cdef size_t head = sizeof(kvmexit_trace_record) // KVMEXIT_TRACE_WORD, wanted
        cdef size_t tail = kvmexit_trace_tail(r.how)
        if words < head + union_words + tail or words * KVMEXIT_TRACE_WORD > room:
            raise self.error(at, f"a record of {words} words, with {union_words} of payload and {tail} at its end, "
                             f"{room} bytes before the file's end")
        if r.sizes >> 24 or r.how & ~<uint32_t>(
                KVMEXIT_TRACE_IMMEDIATE | KVMEXIT_TRACE_REGISTERS | KVMEXIT_TRACE_BEGUN | KVMEXIT_TRACE_WAITED):
            raise self.error(at, f"unknown flags: sizes {r.sizes:#x}, how {r.how:#x}")
        if r.settled > 1 or r.outcome > KVMEXIT_PENDING and not KVMEXIT_TRACE_RETRIED <= r.outcome <= KVMEXIT_TRACE_DRAINED:
            raise self.error(at, f"outcome {r.outcome}, settled {r.settled}")
        memset(&shape, 0, sizeof(shape))
        if kvmexit_trace_has_payload(r.error, r.reason):
            memset(&run, 0, sizeof(run))
            run.exit_reason = r.reason
            memcpy(&run.hw, r + 1, min(union_words, <size_t>32) * KVMEXIT_TRACE_WORD)
            kvmexit_trace_look(&shape, &run, self.header.run_size)
        wanted = head + shape.words + (kvmexit_trace_words(shape.data) if shape.data else shape.answer_words) + tail
        if union_words != shape.words or words != wanted:
            raise self.error(at, f"an exit of reason {r.reason} has a record of {wanted} words, {shape.words} of payload; "
                             f"here are {words}, {union_words}")
        return 0


cdef const uint8_t *rest_of(const kvmexit_trace_record *r) noexcept nogil:
    """What follows the union's copy."""
    return <const uint8_t *>(r + 1) + (r.sizes >> 16 & 0xff) * KVMEXIT_TRACE_WORD


cdef const uint8_t *tail_of(const kvmexit_trace_record *r) noexcept nogil:
    """Registers, where they are there, and the wait."""
    return <const uint8_t *>r + ((r.sizes & 0xffff) - kvmexit_trace_tail(r.how)) * KVMEXIT_TRACE_WORD


cdef void fill(kvmexit_vcpu *c, const kvmexit_trace_record *r, kvmexit_trace_shape *shape) noexcept nogil:
    """Make the page what it was when KVM returned, and say what a record of that holds. An answer's place in the PIO data is
    filled with what is not the answer: the guest must not get bytes that nobody wrote.
    SAFETY: check() has seen this record, for a mapping as large as this one."""
    cdef kvm_run *run = c.run
    cdef const uint8_t *rest = rest_of(r)
    cdef uint8_t *data
    cdef size_t i
    memset(shape, 0, sizeof(shape[0]))
    run.exit_reason = r.reason
    run.flags = r.run_flags
    run.cr8 = r.state & 15
    run.if_flag = r.state >> 4 & 1
    run.ready_for_interrupt_injection = r.state >> 5 & 1
    if r.rip != KVMEXIT_NO_RIP:
        run.s.regs.regs.rip = r.rip
    if r.how & KVMEXIT_TRACE_REGISTERS:
        memcpy(&run.s.regs.regs, tail_of(r), sizeof(kvm_regs))
    if not kvmexit_trace_has_payload(r.error, r.reason):
        return
    memcpy(&run.hw, r + 1, (r.sizes >> 16 & 0xff) * KVMEXIT_TRACE_WORD)
    kvmexit_trace_look(shape, run, c.run_size)
    if shape.data:
        data = <uint8_t *>run + run.io.data_offset
        if shape.answer[0].size == 0:
            memcpy(data, rest, shape.data)
        else:
            for i in range(shape.data):
                data[i] = ~rest[i]


cdef void scatter(kvm_run *run, const kvmexit_trace_shape *shape, const uint8_t *answer) noexcept nogil:
    """The recorded answer, put where KVM looks for it. SAFETY: as kvmexit_trace_gather()."""
    memcpy(<uint8_t *>run + shape.answer[0].at, answer, shape.answer[0].size)
    memcpy(<uint8_t *>run + shape.answer[1].at, answer + kvmexit_trace_words(shape.answer[0].size) * KVMEXIT_TRACE_WORD,
           shape.answer[1].size)


cdef size_t answer_size(const kvmexit_trace_shape *shape) noexcept nogil:
    """Bytes of the answer, as they are recorded."""
    if shape.data:
        return shape.answer[0].size
    return shape.answer_words * KVMEXIT_TRACE_WORD


# ---- reading ----

@cython.final
cdef class Trace:
    """What was recorded: a sequence of TraceRecord, of one vCPU or of several in the order of time. From kvmexit.load().

    parts: the files, as TracePart. start_ns: when it begins, CLOCK_REALTIME. ns_per_tick: of the records' clock.
    """

    cdef list sources
    cdef Ref *refs
    cdef size_t count
    cdef uint64_t first
    cdef Page page  # where exits are made
    cdef readonly double ns_per_tick
    cdef readonly object start_ns

    def __init__(self):
        raise TypeError("use kvmexit.load()")

    @staticmethod
    def _load(sources):
        cdef Trace self = Trace.__new__(Trace)
        cdef Source source, first
        self.sources = sources
        first = min(sources, key=_beginning)
        self.first, self.start_ns = first.header.first_ticks, first.header.first_ns
        self.ns_per_tick = first.header.ns_per_tick
        for source in sources:
            self.count += source.records
            if source.header.run_size != first.header.run_size:  # what check() relied on, fill() does
                raise source.error(40, f"a vCPU's mapping of {source.header.run_size} bytes, and one of "
                                   f"{first.header.run_size} in {first.path}")
        self.refs = <Ref *>calloc(self.count + 1, sizeof(Ref))
        if self.refs == NULL:
            raise MemoryError
        self.merge()
        self.page = anonymous(first.header.run_size)
        return self

    def __dealloc__(self):
        free(self.refs)

    cdef int merge(self) except -1:
        """Note where the records are: file after file of each vCPU, these merged by the time they came."""
        cdef Source source
        cdef size_t at = 0, i, best, vcpus = 0
        cdef Ref *all_ = <Ref *>calloc(self.count + 1, sizeof(Ref))
        cdef size_t begins[1024]
        cdef size_t ends[1024]
        if all_ == NULL:
            raise MemoryError
        try:
            before = None
            for i, source in enumerate(self.sources):
                if source.header.vcpu != before:
                    if vcpus == 1024:
                        raise TraceError("more than 1024 vCPUs in one trace")
                    before = source.header.vcpu
                    begins[vcpus] = at
                    vcpus += 1
                at += source.scan(all_ + at, <uint32_t>i)
                ends[vcpus - 1] = at
            for at in range(self.count):
                best = vcpus
                for i in range(vcpus):
                    if begins[i] < ends[i] and (
                            best == vcpus or all_[begins[i]].record.left < all_[begins[best]].record.left):
                        best = i
                self.refs[at] = all_[begins[best]]
                begins[best] += 1
        finally:
            free(all_)
        return 0

    @property
    def parts(self):
        return [_part(source) for source in self.sources]

    @property
    def vcpus(self):
        """The ids of the vCPUs."""
        return sorted({(<Source>source).header.vcpu for source in self.sources})

    @property
    def closed(self):
        """Whether the recording was ended by close(), or by the vCPU's end: not killed, not failed, not under way."""
        last = {part.vcpu: part for part in self.parts}
        return all([part.ended == "closed" for part in last.values()])

    @property
    def torn(self):
        """Bytes at the files' ends that are no whole record: 0, unless a writer was killed or a file was cut."""
        return sum([part.torn for part in self.parts])

    @property
    def lost(self):
        """How many records could not be written."""
        return sum([part.lost for part in self.parts])

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self.record(j) for j in range(*i.indices(self.count))]
        n = i + self.count if i < 0 else i
        if not 0 <= n < self.count:
            raise IndexError(f"record {i} of {self.count}")
        return self.record(n)

    def __iter__(self):
        for i in range(self.count):
            yield self.record(i)

    cdef int64_t ns(self, uint64_t ticks) noexcept:
        """Since the beginning; 292 years at the most, whatever a file says."""
        cdef double ns = <double><int64_t>(ticks - self.first) * self.ns_per_tick
        return <int64_t>max(min(ns, MOST_NS), -MOST_NS)

    cdef object record(self, size_t i):
        """-> TraceRecord."""
        cdef const kvmexit_trace_record *r = self.refs[i].record
        cdef Source source = self.sources[self.refs[i].source]
        cdef kvmexit_trace_shape shape
        cdef Exit e
        cdef kvmexit_trace_wait wait
        cdef const uint8_t *tail = tail_of(r)
        answer, registers, waited_ns = b"", None, None
        e = self.exit(r, &shape)
        if r.settled and kvmexit_trace_is_exit(r.error, r.reason):
            answer = PyBytes_FromStringAndSize(<const char *>rest_of(r), answer_size(&shape))
        if r.how & KVMEXIT_TRACE_REGISTERS:
            registers = PyBytes_FromStringAndSize(<const char *>tail, sizeof(kvm_regs))
            tail += sizeof(kvm_regs)
        if r.how & KVMEXIT_TRACE_WAITED:
            memcpy(&wait, tail, sizeof(wait))
            waited_ns = self.ns(wait.asked), self.ns(wait.got)
        return TraceRecord(
            i, source.header.vcpu, e, _outcome(r.outcome), r.settled != 0, r.error, self.ns(r.entered), self.ns(r.left),
            None if r.rip == KVMEXIT_NO_RIP else r.rip, r.how & KVMEXIT_TRACE_IMMEDIATE != 0,
            r.how & KVMEXIT_TRACE_BEGUN != 0, answer, registers, r.state & 15, r.state & 16 != 0, r.state & 32 != 0,
            waited_ns)

    cdef Exit exit(self, const kvmexit_trace_record *r, kvmexit_trace_shape *shape):
        """-> the record's Exit, or None."""
        cdef kvmexit_vcpu *c = &self.page.c
        cdef kvm_run *run = c.run
        cdef Exit e
        cdef Io io
        cdef bint fresh = False
        cdef size_t offset, size
        fill(c, r, shape)
        c.error = r.error
        if not kvmexit_trace_is_exit(r.error, r.reason):
            if r.outcome not in (KVMEXIT_TRACE_KICK, KVMEXIT_TRACE_TIMEOUT):
                return None
            e = make_interrupted(self.page, "kick" if r.outcome == KVMEXIT_TRACE_KICK else "timeout")
            e.page = None
            return e
        c.reason = r.reason
        if r.error and r.reason != KVM_EXIT_MEMORY_FAULT:
            c.reason = KVMEXIT_REASON_SENTINEL
        classify(c)
        if r.settled and not shape.data:
            scatter(run, shape, rest_of(r))
        e = make([None] * PLACES, self.page, &fresh)
        e.page = None  # nobody can answer it
        if c.place == UNEXPLAINED and r.rip != KVMEXIT_NO_RIP:
            (<UnexplainedFault>e).rip_ = r.rip
        elif c.place == KVM_EXIT_MMIO:
            (<Mmio>e).answered = r.settled
        elif c.place == KVM_EXIT_HYPERCALL and r.settled:
            # make() leaves no stale bytes there; `at` is from kvm_run's start.
            offset = <char *>&run.hypercall.ret - <char *>&run.hw
            memcpy(<uint8_t *>e.payload + offset, rest_of(r), sizeof(run.hypercall.ret))
        elif c.place == KVM_EXIT_IO and r.settled and shape.answer[0].size:
            io = <Io>e
            io.answered = True
            size = shape.answer[0].size
            if size > INLINE_DATA:
                io.long_data = PyBytes_FromStringAndSize(<const char *>rest_of(r), size)
            else:
                memcpy(io.inline_data, rest_of(r), size)
        return e

    def numpy(self):
        """-> a structured array, one element for each record, of its fixed part; needs NumPy.

        entered_ns, left_ns, rip (all ones: not shown), address (port, gpa, hypercall number or MSR), data (the first 8 bytes
        of what was written, or of the answer), size (bytes; of a string instruction all; all ones: 4 GiB or more), reason
        (of a fault without one, as of a return that is no exit, what kvm_run said), vcpu, errno, run_flags, outcome (0 to 5:
        stats.OUTCOMES and pending; 16 to 20: retried, kick, timeout, pause, drained), is_write, settled, how (1
        immediate_exit, 2 with registers, 4 begun, 8 with waited_ns).
        """
        import numpy
        cdef bytearray rows = bytearray(self.count * sizeof(Row))
        cdef uint8_t[::1] view
        cdef size_t i
        if self.count:
            view = rows
            for i in range(self.count):
                self.row(i, <Row *>&view[i * sizeof(Row)])
        return numpy.frombuffer(rows, numpy.dtype(_DTYPE))

    cdef int row(self, size_t i, Row *row) except -1:
        cdef const kvmexit_trace_record *r = self.refs[i].record
        cdef const uint8_t *rest = rest_of(r)
        cdef kvmexit_trace_shape shape
        cdef kvmexit_vcpu *c = &self.page.c
        cdef kvm_run *run = c.run
        fill(c, r, &shape)
        row.entered_ns, row.left_ns, row.rip = self.ns(r.entered), self.ns(r.left), r.rip
        row.reason, row.error, row.run_flags = r.reason, r.error, r.run_flags
        row.vcpu = (<Source>self.sources[self.refs[i].source]).header.vcpu
        row.outcome, row.settled, row.how = r.outcome, r.settled, r.how
        if not kvmexit_trace_has_payload(r.error, r.reason):
            return 0
        if r.settled and answer_size(&shape):
            memcpy(&row.data, rest, min(answer_size(&shape), <size_t>8))
        if r.reason == KVM_EXIT_IO:
            row.address, row.size, row.is_write = run.io.port, <uint32_t>shape.data, run.io.direction == KVM_EXIT_IO_OUT
            if row.is_write:
                memcpy(&row.data, rest, min(shape.data, <size_t>8))
        elif r.reason == KVM_EXIT_MMIO:
            row.address, row.size, row.is_write = run.mmio.phys_addr, run.mmio.len, run.mmio.is_write != 0
            if row.is_write:
                memcpy(&row.data, run.mmio.data, min(run.mmio.len, <uint32_t>8))
        elif r.reason == KVM_EXIT_MEMORY_FAULT:
            row.address, row.data = run.memory_fault.gpa, run.memory_fault.flags
            row.size = <uint32_t>min(run.memory_fault.size, <uint64_t>UINT32_MAX)
        elif r.reason == KVM_EXIT_HYPERCALL:
            row.address, row.size = run.hypercall.nr, 8
        elif r.reason == KVM_EXIT_X86_RDMSR or r.reason == KVM_EXIT_X86_WRMSR:
            row.address, row.size, row.is_write = run.msr.index, 8, r.reason == KVM_EXIT_X86_WRMSR
            if row.is_write:
                row.data = run.msr.data
            elif r.settled:
                memcpy(&row.data, rest + KVMEXIT_TRACE_WORD, 8)  # behind `error`
        return 0

    def __repr__(self):
        return f"<Trace of {self.count} records, vCPU {', '.join([str(id) for id in self.vcpus])}>"


def _outcome(number):
    return _OUTCOMES[number] if number < len(_OUTCOMES) else _OTHER_OUTCOMES[number - KVMEXIT_TRACE_RETRIED]


def _beginning(Source source):
    return source.header.first_ticks, source.header.vcpu


def _part(Source source):
    cdef kvmexit_trace_header *h = &source.header
    ended = ENDINGS[h.ended] if source.whole else None
    return TracePart(source.path, h.part, h.vcpu, source.records, ended, source.torn, h.error, h.lost)


def _not_begun(path):
    """Whether a part has no header yet: its writer was killed, or is, between making the file and writing that."""
    with open(path, "rb") as file:
        return not file.read(sizeof(kvmexit_trace_header)).strip(b"\0")


def _sources(path):
    """The files of one vCPU's recording, in order; checked to be that."""
    cdef Source source, before
    names = parts_of(path)
    if not names:
        raise FileNotFoundError(2, "no trace", path)
    sources = []
    before = None
    for name in names:
        try:
            if before is not None and name == names[-1] and _not_begun(name):
                continue
            source = Source(name)
        except FileNotFoundError:
            continue  # `keep` has taken it meanwhile
        if before is not None:
            if memcmp(source.header.recording, before.header.recording, sizeof(source.header.recording)):
                raise source.error(16, f"of another recording than {before.path}")
            if source.header.part != before.header.part + 1:
                raise source.error(32, f"part {source.header.part} follows part {before.header.part}: some are missing")
            if source.header.vcpu != before.header.vcpu or source.header.first_ticks != before.header.first_ticks:
                raise source.error(36, "another vCPU, or another beginning, than in the part before")
        sources.append(source)
        before = source
    return sources


def load(path):
    """Read a trace: -> Trace. path: as given to vcpu.record(), whose further files are found beside it; one of these, for
    that part alone; or the folder of vm.record(), for all vCPUs.

    A file whose writer was killed, or still writes, is read up to its last whole record (Trace.parts says so). It is read
    into memory. Raises TraceError for what is no trace, or a damaged one, with file and offset; OSError where it cannot be
    read.
    """
    path = os.fsdecode(path)
    if not os.path.isdir(path):
        return Trace._load(_sources(path))
    bases = set()
    for name in os.listdir(path):
        base, _, number = name.rpartition(".")
        if name.endswith(".trace"):
            bases.add(name)
        elif base.endswith(".trace") and number.isdigit():
            bases.add(base)
    if not bases:
        raise FileNotFoundError(2, "no *.trace in it", path)
    sources = []
    for base in sorted(bases):
        found = _sources(os.path.join(path, base))
        if {(<Source>source).header.vcpu for source in sources} & {(<Source>source).header.vcpu for source in found}:
            raise (<Source>found[0]).error(36, f"vCPU {(<Source>found[0]).header.vcpu} twice")
        sources += found
    return Trace._load(sources)


# ---- replaying ----

cdef struct Play:
    const Ref *refs
    size_t count, position   # the next record
    long open                # the record whose exit userspace is answering, or -1
    int strict
    long diverged            # the first record that was answered otherwise, or -1
    int ended                # nothing is left
    kvmexit_trace_shape shape  # of the open one
    uint8_t got[MOST_ANSWER]   # what it was answered


cdef int enter_replayed(kvmexit_vcpu *c) noexcept nogil:
    """KVM_RUN from a trace, in KVM's order: complete what is pending, look at immediate_exit, run. -> 0, or -errno.

    What interrupted the vCPU then does so now: a kick is one again. An interruption of this replay's own comes between."""
    cdef Play *p = <Play *>c.script
    cdef kvm_run *run = c.run
    cdef const kvmexit_trace_record *r = NULL
    cdef const kvmexit_trace_record *open_record
    cdef kvmexit_trace_shape none
    cdef size_t size
    cdef bint immediate = kvmexit_load_immediate_exit(run)
    run.kvm_dirty_regs = 0
    if p.position < p.count:
        r = p.refs[p.position].record
    if p.open >= 0 and (r == NULL or kvmexit_trace_completes(r.error, r.reason)):
        open_record = p.refs[p.open].record
        size = answer_size(&p.shape)
        if size and open_record.settled and p.diverged < 0:
            memset(p.got, 0, size)
            kvmexit_trace_gather(&p.shape, run, p.got)
            if memcmp(p.got, rest_of(open_record), size):
                p.diverged = p.open
        if p.diverged >= 0 and p.strict:
            return -EBADMSG
        p.open = -1
    if immediate and (r == NULL or (r.error != EINTR and not r.how & KVMEXIT_TRACE_IMMEDIATE)):
        return -EINTR
    if r == NULL:
        p.ended = True
        return -ENODATA
    kvmexit_store_count(&p.position, p.position + 1)
    if not kvmexit_trace_is_exit(r.error, r.reason):
        fill(c, r, &none)  # what was pending may still be: its shape stays
        if r.outcome == KVMEXIT_TRACE_KICK:
            kvmexit_request(c, KVMEXIT_REQUEST_KICK)
        elif r.outcome == KVMEXIT_TRACE_TIMEOUT:
            c.deadline_ns = 0
        return -r.error
    fill(c, r, &p.shape)
    p.open = <long>p.position - 1
    return -r.error


class Played(NamedTuple):
    """What Replay.play() did. records: how many were given out; exits: run()'s returns that were answered as recorded;
    ns: how long it took, in all. divergence: the first one, or None."""

    records: int
    exits: int
    ns: int
    divergence: Divergence | None


@cython.final
cdef class Replay:
    """A vCPU whose exits are those of a trace: from kvmexit.replay(). It has what a Vcpu has.

    vm: its VM, where handlers are registered; vcpu: the Vcpu; trace. It gives out what is recorded, in that order, whatever
    the answers are, and compares these. Kicks and time-outs that are recorded come again, too. Beside answers nothing of the
    guest is there: register writes go nowhere, memory is what the VM was given.
    """

    cdef Play *play_
    cdef readonly Trace trace
    cdef readonly object vm
    cdef readonly Vcpu vcpu

    def __init__(self):
        raise TypeError("use kvmexit.replay()")

    @staticmethod
    def _begin(Trace trace, vm, bint strict):
        cdef Replay self = Replay.__new__(Replay)
        cdef Page page
        cdef Steps steps
        cdef Source source
        if len(trace.vcpus) != 1:
            raise ValueError(f"{trace!r}: replay one vCPU's file, or say which `vcpu`")
        source = trace.sources[0]
        steps = Steps(trace)
        self.play_ = steps.play
        steps.play.strict = strict
        page = anonymous(trace.page.c.run_size)
        page.c.enter = enter_replayed
        page.c.script = steps.play
        page.script = steps
        page.c.syncable = REGS | SREGS | EVENTS
        self.trace, self.vm = trace, vm
        self.vcpu = vm._make_vcpu(Vcpu, page, source.header.vcpu)
        self.vcpu.fault_limit = 0  # the trace has an end
        return self

    def __getattr__(self, name):
        return getattr(self.vcpu, name)

    def run(self, timeout=None):
        """Vcpu.run(). Raises TraceError where the trace has ended, and, with `strict`, at the first divergence; KvmError
        where KVM_RUN failed then."""
        try:
            return self.vcpu.run(timeout)
        except KvmError as error:
            self._explain(error)
            raise

    def complete(self):
        """Vcpu.complete(), raising as run()."""
        try:
            return self.vcpu.complete()
        except KvmError as error:
            self._explain(error)
            raise

    def _explain(self, error):
        """Raise TraceError where it was the replay that failed an entry, not the trace."""
        if error.errno == EBADMSG and self.play_.strict and self.play_.diverged >= 0:
            divergence = self.divergence
            raise TraceError(str(divergence), divergence) from None
        if error.errno == ENODATA and self.play_.ended:
            raise TraceError(f"the trace has ended, after {self.trace.count} records", self.divergence) from None

    @property
    def position(self):
        """How many records have been given out. Any thread may look."""
        return kvmexit_load_count(&self.play_.position)

    @property
    def divergence(self):
        """The first answer that is another than the recorded one: -> Divergence, or None."""
        cdef Play *p = self.play_
        if p.diverged < 0:
            return None
        record = self.trace.record(p.diverged)
        return Divergence(record, record.answer, PyBytes_FromStringAndSize(<const char *>p.got, len(record.answer)))

    def play(self):
        """Replay to the end: -> Played. What run() returned and the caller answered then, is answered the same now.

        An exit that a handler took then and none takes now is a divergence, too. Raises what handlers raise, and can be
        called again to go on; TraceError at the first divergence with `strict`. It ends before an exit whose answer the
        recording has not.
        """
        cdef Play *p = self.play_
        cdef size_t first = p.position, before
        exits = 0
        untaken = None
        begun = time.perf_counter_ns()
        while not p.ended:
            before = p.position
            try:
                exit = self.vcpu.run()
            except KvmError as error:
                if p.ended or p.position > before:  # or it failed then, too
                    continue
                self._explain(error)
                raise
            if isinstance(exit, Interrupted):
                continue
            exits += 1
            missing = self._answer()
            if missing is not None and untaken is None and p.diverged < 0:
                untaken = missing
                if p.strict:
                    raise TraceError(str(untaken), untaken)
            if self.vcpu.c.needs and not self.vcpu.c.answered:
                break  # recording ended before it was answered
        took = time.perf_counter_ns() - begun
        return Played(p.position - first, exits, took, self.divergence if untaken is None else untaken)

    def _answer(self):
        """Answer the exit that run() returned as it was then. -> a Divergence where a handler had, else None."""
        cdef Play *p = self.play_
        cdef Page page = self.vcpu.page
        cdef const kvmexit_trace_record *r
        cdef bint held
        if p.open < 0:
            return None
        r = p.refs[p.open].record
        if r.settled:
            held = page.hold()
            if answer_size(&p.shape):
                scatter(page.c.run, &p.shape, rest_of(r))
            page.c.answered = True
            page.c.unsettled = False
            if held:
                kvmexit_disown(&page.c)
        if r.settled and r.outcome < KVMEXIT_OUTCOMES and _OUTCOMES[r.outcome] in ("native", "python"):
            record = self.trace.record(p.open)
            return Divergence(record, record.answer, None)
        return None

    def __repr__(self):
        return f"<Replay of {self.trace!r}, at {self.position}>"


@cython.final
@cython.no_gc
cdef class Steps:
    """Owns what the page's enter works on."""

    cdef Play *play
    cdef Trace trace

    def __cinit__(self, Trace trace):
        self.trace = trace
        self.play = <Play *>calloc(1, sizeof(Play))
        if self.play == NULL:
            raise MemoryError
        self.play.refs, self.play.count = trace.refs, trace.count
        self.play.open = self.play.diverged = -1

    def __dealloc__(self):
        free(self.play)


def replay(path, *, vm=None, vcpu=None, strict=False):
    """A vCPU whose exits are those of a trace: -> Replay. No /dev/kvm is needed.

    path: as for load(), or a Trace. vm: a testing.ScriptedVM to make it in, or None for a new one; vcpu: which one, of
    several.
    strict: run() raises TraceError at the first answer that differs; else `divergence` says so afterwards. Raises as load().
    """
    trace = path if isinstance(path, Trace) else load(path)
    if vcpu is not None:
        sources = [source for source in (<Trace>trace).sources if (<Source>source).header.vcpu == vcpu]
        if not sources:
            raise ValueError(f"{trace!r} has no vCPU {vcpu}")
        trace = Trace._load(sources)
    if vm is None:
        from kvmexit.testing import ScriptedVM
        vm = ScriptedVM()
    return Replay._begin(trace, vm, strict)
