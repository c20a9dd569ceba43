"""What fuzz/run has libFuzzer call, and fuzz/coverage replays: inputs become returns of KVM_RUN, and what kvmexit makes of
them is held against a model. README.md says which targets there are.

An input is a configuration (a byte: who answers what) and then, as they are needed, *steps*, what KVM_RUN returns next, and
*actions*, what the vCPU's user does then. All of it is native: no GIL, but for the target `python`.
"""

import atexit as py_atexit
import ctypes
import mmap
import os
import sys

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.errno cimport EAGAIN, EFAULT, EINTR, EINVAL, EIO, ENODATA, ENOMEM, ENOSYS
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, atexit, calloc, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_NONE, PROT_READ, PROT_WRITE, mprotect
from posix.mman cimport mmap as c_mmap

from kvmexit._chain cimport KVMEXIT_DONE, KVMEXIT_HANDLER, KVMEXIT_LATER, KVMEXIT_PASS, KVMEXIT_STOP, kvmexit_exit
from kvmexit._convert cimport DONTNEED, PUNCH, Converter, Log as RecordedLog, RecordedAttributes, Region
from kvmexit._loop cimport Vcpu
from kvmexit._native cimport Registers, Serial16550, kvmexit_serial_feed
from kvmexit._native_convert cimport Convert
from kvmexit._native_ring cimport (
    KVMEXIT_FULL_DROP, KVMEXIT_FULL_STOP, KVMEXIT_FULL_WAIT, Ring, kvmexit_entry, kvmexit_lane, kvmexit_ring,
)
from kvmexit._page cimport kvmexit_vcpu
from kvmexit._routes cimport Native
from kvmexit._uapi cimport (
    KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SNP_REQ_CERTS,
    KVM_EXIT_TDX, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_EXIT_XEN, KVMEXIT_REASON_SENTINEL, kvm_run,
)
from kvmexit._exits cimport completes_on_entry
import kvmexit
from kvmexit import native
from kvmexit.testing import RecordedAttributes as Recorded
from kvmexit.testing import ScriptedVM, hlt
import traces

cdef extern from "<errno.h>" nogil:
    const int EHWPOISON, EPROTO, ENXIO, EOPNOTSUPP, ENOEXEC

cdef extern from "_stats.h" nogil:
    struct kvmexit_stats:
        uint64_t recorded
        uint64_t counts[46][5]

cdef extern from "_serial.h" nogil:
    struct kvmexit_serial:
        int fd
        uint64_t sent, dropped
        uint8_t lcr, mcr, scr
        size_t received, first, waiting

cdef extern from "_ring.h" nogil:
    uint64_t kvmexit_ring_drain(kvmexit_ring *, kvmexit_entry *, uint64_t)

cdef extern from "include/kvmexit/embed.h" nogil:
    enum:
        KVMEXIT_RUN_EXIT, KVMEXIT_RUN_PYTHON, KVMEXIT_RUN_KICKED, KVMEXIT_RUN_TIMED_OUT, KVMEXIT_RUN_BROKEN
    const uint64_t KVMEXIT_FOREVER
    struct kvmexit_api:
        kvmexit_vcpu *(*vcpu)(void *) except NULL
        int (*run)(kvmexit_vcpu *, uint64_t, const kvmexit_exit **) noexcept nogil
        int (*exit)(kvmexit_vcpu *, const kvmexit_exit **) noexcept nogil
        int (*answer)(kvmexit_vcpu *) noexcept nogil
        int (*kick)(kvmexit_vcpu *) noexcept nogil
        int (*convert)(kvmexit_vcpu *, uint64_t, uint64_t, int, uint64_t *) noexcept nogil


cdef enum:
    PAGE = 4096
    RUN = 3 * PAGE
    UNION = 32
    RING = 2 * PAGE      # of posted writes
    MAX_VMS = 8
    MAX_KEPT = 48
    MAX_REGIONS = 8
    MAX_WORDS = 4        # of 64 pages: the largest region


cdef struct Kept:        # memory that each input finds as it was made
    void *at
    void *copy
    size_t size


cdef struct Machine:     # a VM, its one vCPU, and what the model knows of them
    const uint8_t *at    # the input
    const uint8_t *end
    kvmexit_vcpu *v
    kvmexit_vcpu fresh
    uint8_t *mirror      # the mapping as it should be
    uint64_t random
    uint64_t given, begun_with  # exits, and those before this input
    int failed_with      # errno of the last entry that did not happen
    bint open            # KVM has yet to complete the exit
    bint owes, contradicts
    bint kicked, liar, python, objects
    bint paused, timed   # the VM; the run that is under way
    int later            # how often the liar may still say so
    uint32_t reason
    size_t answer, answer_size  # bytes that may be written
    Kept kept[MAX_KEPT]
    int kept_count
    # what a kernel would hold
    void *backend        # RecordedAttributes' log: see check_shadow()
    size_t seen
    uint64_t private[MAX_REGIONS][MAX_WORDS]
    uint64_t fault_first, fault_last
    int fault_wants      # 1 private, 0 shared, -1 no fault that a handler may have answered


cdef Machine machines[MAX_VMS]
cdef int machine_count = 0
cdef uint64_t pages = 0, accesses = 0, inputs = 0
cdef const kvmexit_api *api = <const kvmexit_api *>PyCapsule_GetPointer(kvmexit._C_API, "kvmexit._C_API")
_alive = []  # what the C side points into
_vms = []
_vcpus = []
_logs = []


cdef int die(Machine *m, const char *what) noexcept nogil:
    fprintf(stderr, "fuzz: %s (machine %d, reason %u, place %u, errno %d, owes %d, answered %d)\n", what,
            <int>(m - machines), m.v.reason, m.v.place, m.v.error, <int>m.owes, m.v.answered)
    abort()
    return 0


# ---- the input ----

cdef inline uint8_t take(Machine *m) noexcept nogil:
    if m.at == m.end:
        return 0
    m.at += 1
    return m.at[-1]


cdef uint64_t take_word(Machine *m, int size) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value |= <uint64_t>take(m) << 8 * i
    return value


cdef inline uint64_t shuffle(Machine *m) noexcept nogil:
    m.random ^= m.random << 13
    m.random ^= m.random >> 7
    m.random ^= m.random << 17
    return m.random


# ---- the model ----

cdef void expect(Machine *m, uint32_t reason, int error) noexcept nogil:
    """What the exit just given asks for: by the table in docs/triage.md, and not by _exits.pxd."""
    cdef kvm_run *run = m.v.run
    cdef uint64_t size = 0, offset
    m.owes = m.contradicts = False
    m.answer_size = 0
    m.fault_wants = -1
    m.reason = reason if not error or reason == KVM_EXIT_MEMORY_FAULT else KVMEXIT_REASON_SENTINEL
    m.given += 1
    m.open = not error and completes_on_entry(reason)
    if error:
        if reason == KVM_EXIT_MEMORY_FAULT and error == EFAULT and run.memory_fault.flags & ~<uint64_t>8 == 0:
            size = run.memory_fault.size
            if size and run.memory_fault.gpa + (size - 1) >= run.memory_fault.gpa:
                m.fault_first, m.fault_last = run.memory_fault.gpa, run.memory_fault.gpa + (size - 1)
                m.fault_wants = run.memory_fault.flags >> 3 & 1
        return
    if reason == KVM_EXIT_IO:
        size, offset = <uint64_t>run.io.size * run.io.count, run.io.data_offset
        m.contradicts = (run.io.direction > 1 or (run.io.size != 1 and run.io.size != 2 and run.io.size != 4) or size == 0
                         or offset < sizeof(kvm_run) or offset > RUN or size > RUN - offset)
        m.owes = m.contradicts or run.io.direction == 0
        if m.owes and not m.contradicts:
            m.answer, m.answer_size = offset, size
    elif reason == KVM_EXIT_MMIO:
        m.contradicts = run.mmio.len == 0 or run.mmio.len > 8 or run.mmio.is_write > 1
        m.owes = m.contradicts or run.mmio.is_write == 0
        if m.owes and not m.contradicts:
            m.answer, m.answer_size = 40, 8
    elif reason == KVM_EXIT_HYPERCALL:
        m.owes, m.answer, m.answer_size = True, 88, 8
    elif reason == KVM_EXIT_X86_RDMSR:
        m.owes, m.answer, m.answer_size = True, 48, 8
    elif reason in (KVM_EXIT_XEN, KVM_EXIT_TDX, KVM_EXIT_SNP_REQ_CERTS):
        m.owes = True
    elif reason == KVM_EXIT_HYPERV:
        m.owes = run.hyperv.type == 2 or run.hyperv.type == 3
    if m.objects and reason != KVM_EXIT_IO:
        m.answer, m.answer_size = UNION, 256  # exit objects answer more than native handlers do


cdef void check_page(Machine *m) noexcept nogil:
    """Nobody wrote to the mapping but where an answer goes, and what is userspace's."""
    cdef kvmexit_vcpu *v = m.v
    cdef uint8_t *page = <uint8_t *>v.run
    cdef size_t i
    memcpy(m.mirror + 8, page + 8, 4)    # exit_reason
    memcpy(m.mirror + 288, page + 288, 16)  # valid_regs, dirty_regs
    memcpy(m.mirror + RING, page + RING, 4)  # the ring's `first`
    if m.answer_size:
        memcpy(m.mirror + m.answer, page + m.answer, m.answer_size)
    if v.written:
        memcpy(m.mirror + 304, page + 304, 520)
    # The first two are request_interrupt_window and immediate_exit, which a tick sets at any moment.
    if memcmp(m.mirror + 2, page + 2, RUN - 2) != 0:
        for i in range(2, RUN):
            if m.mirror[i] != page[i]:
                fprintf(stderr, "fuzz: at offset %lu of kvm_run\n", i)
                break
        die(m, "userspace wrote to kvm_run where it has nothing to write")


cdef void check_shadow(Machine *m) noexcept nogil:
    """The converter's bits are what its backend was told."""
    cdef Converter *c = <Converter *>m.v.converter
    cdef Region *r
    cdef size_t i
    if m.backend == NULL:
        return
    replay_log(m)
    for i in range(c.count):
        r = c.regions[i]
        if r.bits != NULL and memcmp(r.bits, m.private[i], ((((r.last - r.first) >> 12) + 64) >> 6) * 8) != 0:
            die(m, "the shadow is not what the backend holds")


cdef void replay_log(Machine *m) noexcept nogil:
    cdef Converter *c = <Converter *>m.v.converter
    cdef RecordedLog *log = <RecordedLog *>m.backend
    cdef uint64_t page, last, at
    cdef size_t i
    cdef Region *r
    while m.seen < log.count:
        call = &log.calls[m.seen]
        m.seen += 1
        if call.error:
            continue
        for i in range(c.count):
            r = c.regions[i]
            page, last = max(call.gpa, r.first), min(call.gpa + (call.size - 1), r.last)
            while page <= last:
                at = (page - r.first) >> 12
                if call.private:
                    m.private[i][at >> 6] |= <uint64_t>1 << (at & 63)
                else:
                    m.private[i][at >> 6] &= ~(<uint64_t>1 << (at & 63))
                page += PAGE


cdef bint has_all(Machine *m, uint64_t first, uint64_t last, bint private) noexcept nogil:
    """Whether every page of a range has a state, by what the backend was told; holes are shared."""
    cdef Converter *c = <Converter *>m.v.converter
    cdef Region *r
    cdef size_t i
    cdef uint64_t page, upto, at, covered = 0
    replay_log(m)
    for i in range(c.count):
        r = c.regions[i]
        if r.first > last or r.last < first:
            continue
        page, upto = max(first, r.first) >> 12, min(last, r.last) >> 12
        covered += upto - page + 1
        while page <= upto:
            at = page - (r.first >> 12)
            if (m.private[i][at >> 6] >> (at & 63) & 1) != <uint64_t>private:
                return False
            page += 1
    return not private or covered == (last >> 12) - (first >> 12) + 1


# ---- KVM_RUN ----

cdef int ERRORS[32]
ERRORS[:] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, EFAULT, EFAULT, EFAULT, EHWPOISON, EINTR, EINTR,
             EAGAIN, ENOMEM, EINVAL, EIO, -1, -2]  # -1: any; -2: success with no reason written


cdef int enter_fuzzed(kvmexit_vcpu *v) noexcept nogil:
    """KVM_RUN from the input, in KVM's order: complete what is pending, look at immediate_exit, run."""
    global pages
    cdef Machine *m = <Machine *>v.script
    cdef kvm_run *run = v.run
    cdef uint8_t op, reason, n
    cdef uint32_t wide
    cdef int error
    cdef size_t i
    check_page(m)
    if m.paused:
        die(m, "entered while the VM is paused")
    if m.owes and not v.answered:
        die(m, "entered while an exit owes its answer")
    if m.fault_wants >= 0 and m.backend != NULL and not m.liar and not has_all(
            m, m.fault_first & ~<uint64_t>(PAGE - 1), m.fault_last | (PAGE - 1), m.fault_wants):
        die(m, "a fault was answered, and its pages are not as it wants them")
    if m.at == m.end:
        m.failed_with = ENODATA
        return -ENODATA
    run.kvm_dirty_regs = 0
    if run.immediate_exit:
        m.open = m.owes = False
        m.answer_size = 0
        memcpy(m.mirror, run, RUN)
        return -EINTR
    op = take(m)
    error = ERRORS[op & 31]
    if error == -1:
        error = take(m)
        if error == 0:
            error = ENOSYS
    if error == -2:
        return 0  # nothing has happened, as far as userspace can tell: what was pending still is
    if error == EINTR:
        m.open = m.owes = False
        m.answer_size = 0
        memcpy(m.mirror, run, RUN)
        if op & 32:
            m.kicked = True
            api.kick(v)
        return -EINTR
    if error and error != EFAULT and error != EHWPOISON:
        m.failed_with = error  # there was no entry
        return -error
    reason = take(m)
    wide = reason
    if reason == 0xff:
        wide = <uint32_t>take_word(m, 4)
    elif op & 32:
        wide = reason % 44
    if wide == KVMEXIT_REASON_SENTINEL and not error:
        return 0
    n = take(m) & 127
    memset(<uint8_t *>run + UNION, 0, 128)
    for i in range(n):
        (<uint8_t *>run)[UNION + i] = take(m)
    if op & 64:  # everything but what is userspace's: the header, registers, PIO data
        run.flags = <int>shuffle(m) & 0xffff
        run.cr8 = shuffle(m)
        for i in range(304, PAGE + 512, 8):
            (<uint64_t *>(<uint8_t *>run + i))[0] = shuffle(m)
    if op & 128:  # posted writes
        (<uint32_t *>(<uint8_t *>run + RING))[1] = take(m)
        for i in range(2):
            (<uint32_t *>(<uint8_t *>run + RING))[0] = (<uint32_t *>(<uint8_t *>run + RING))[0] & 0xff
            memset(<uint8_t *>run + RING + 8 + 24 * i, take(m), 24)
            (<uint64_t *>(<uint8_t *>run + RING + 8 + 24 * i))[0] = take_word(m, 4)
            (<uint32_t *>(<uint8_t *>run + RING + 16 + 24 * i))[0] = take(m) & 15
            (<uint32_t *>(<uint8_t *>run + RING + 20 + 24 * i))[0] = take(m) & 1
        if n & 64:
            (<uint32_t *>(<uint8_t *>run + RING))[0] = <uint32_t>take_word(m, 4)
            (<uint32_t *>(<uint8_t *>run + RING))[1] = <uint32_t>take_word(m, 4)
    pages += 1
    run.exit_reason = wide
    memcpy(m.mirror, run, RUN)
    expect(m, wide, error)
    return -error


cdef int lie(kvmexit_exit *exit, void *opaque) noexcept nogil:
    """A handler that says anything, and looks at what it is given."""
    cdef Machine *m = <Machine *>opaque
    cdef uint8_t what = take(m)
    if exit.run != NULL:
        check_exit(m, exit)
    if what < 96:
        if exit.data != NULL and not exit.is_write:
            memset(exit.data, what, exit.size * exit.count)
        return KVMEXIT_DONE
    if what < 192:
        return KVMEXIT_PASS
    if what < 224:
        return KVMEXIT_STOP
    if what < 250 and m.later:
        m.later -= 1
        return KVMEXIT_LATER
    return <int>what


cdef void check_exit(Machine *m, const kvmexit_exit *exit) noexcept nogil:
    """What a handler is given: inside the mapping, and what the model says."""
    cdef uint64_t at = <uint64_t>(<uint8_t *>exit.data - <uint8_t *>m.v.run)
    if exit.run != m.v.run or exit.reason != m.reason or exit.owes != <uint32_t>m.owes:
        die(m, "an exit that is not the one given")
    if exit.count == 0:
        die(m, "an exit of no accesses")
    if exit.data != NULL:
        if at < UNION or at > RUN or exit.size == 0 or exit.size > 8 or exit.size * exit.count > RUN - at:
            die(m, "an exit's data is outside the mapping")
        if m.contradicts:
            die(m, "an exit that contradicts itself has data")
        if m.answer_size and not m.objects and (at != m.answer or exit.size * exit.count > m.answer_size):
            die(m, "an answer goes elsewhere")


# ---- the user of the vCPU ----

cdef void check_returned(Machine *m, int what, const kvmexit_exit *exit) noexcept nogil:
    cdef kvmexit_vcpu *v = m.v
    cdef const kvmexit_exit *again = NULL
    cdef int pends
    check_page(m)
    check_shadow(m)
    if v.native & 1:
        die(m, "a run ended with a table in use")
    if (<kvmexit_stats *>v.stats).recorded - m.begun_with != m.given:
        die(m, "exits recorded are not those given")
    if what < 0 and what != -m.failed_with and what != -EPROTO:
        die(m, "run() failed with an errno that KVM_RUN did not have")
    if what == KVMEXIT_RUN_KICKED:
        if not m.kicked:
            die(m, "kicked by nobody")
        m.kicked = False
    if what == KVMEXIT_RUN_TIMED_OUT and (
            not m.timed or (m.open and not m.paused and not v.unsettled and not (m.owes and not v.answered))):
        die(m, "timed out without a time-out, or before what pended was completed")
    m.fault_wants = -1  # whoever has it now
    if what == KVMEXIT_RUN_BROKEN and not m.liar:
        die(m, "a broken handler, and there is none")
    if what == KVMEXIT_RUN_EXIT or what == KVMEXIT_RUN_PYTHON:
        if exit == NULL:
            die(m, "no exit")
        check_exit(m, exit)
        if what == KVMEXIT_RUN_PYTHON and not m.python and not m.liar:
            die(m, "Python's, and there is no such handler")
    elif exit != NULL and what < 0:
        die(m, "a failure with an exit")
    pends = api.exit(v, &again)
    if pends != KVMEXIT_RUN_EXIT and pends != KVMEXIT_RUN_PYTHON and pends != -ENODATA:
        die(m, "exit() says something else")
    if (m.open or (m.owes and not v.answered)) and pends == -ENODATA:
        die(m, "a pending exit got lost")
    if pends == KVMEXIT_RUN_EXIT and not m.open and not m.owes:
        die(m, "an exit pends that does not")
    if pends >= 0 and again.reason != m.reason and (m.open or m.owes):
        die(m, "another exit pends")


cdef void renew(Machine *m) noexcept nogil:
    """Another vCPU: the one there is owes an answer that nobody can give."""
    cdef kvmexit_vcpu *v = m.v
    cdef uint64_t count = v.native, seq = v.seq, exit_seq = v.exit_seq, generation = v.generation
    check_page(m)  # of part of an answer, which settles nothing, the next entry would know no more
    if m.paused:
        pause(m, False)
    memcpy(v, &m.fresh, sizeof(kvmexit_vcpu))
    v.native, v.seq, v.exit_seq, v.generation = count, seq, exit_seq, generation
    m.open = m.owes = m.contradicts = m.kicked = False
    m.answer_size = 0
    m.fault_wants = -1


cdef Machine *begin(const uint8_t *data, size_t size, int machine) noexcept nogil:
    global inputs
    cdef Machine *m = &machines[machine]
    cdef int i
    inputs += 1
    m.at, m.end = data, data + size
    m.random = 0x9e3779b97f4a7c15
    for i in range(m.kept_count):
        memcpy(m.kept[i].at, m.kept[i].copy, m.kept[i].size)
    memset(m.v.run, 0, RUN)
    memcpy(m.mirror, m.v.run, RUN)
    renew(m)
    m.v.run.kvm_valid_regs = m.v.synced
    memcpy(m.mirror, m.v.run, RUN)
    m.given, m.begun_with = 0, (<kvmexit_stats *>m.v.stats).recorded
    m.failed_with, m.later = 0, 8
    m.seen = 0
    memset(m.private, 0, sizeof(m.private))
    return m


cdef void pause(Machine *m, bint paused) noexcept nogil:
    m.paused = paused
    with gil:
        vm = _vms[m - machines]
        vm.pause() if paused else vm.resume()


cdef void drive(Machine *m) noexcept nogil:
    """Run the vCPU to the input's end, and answer as that says."""
    cdef kvmexit_vcpu *v = m.v
    cdef const kvmexit_exit *exit = NULL
    cdef uint64_t first, size, done = 0
    cdef uint8_t action
    cdef int what, error
    cdef bint timed = False
    while True:
        m.timed = timed or m.paused  # a run of a paused VM would wait for ever
        what = api.run(v, 0 if m.timed else KVMEXIT_FOREVER, &exit)
        check_returned(m, what, exit)
        timed = False
        if m.at == m.end:
            break
        action = take(m)
        if action & 15 <= 8:
            if exit != NULL and exit.data != NULL and not exit.is_write:
                memset(exit.data, action, exit.size * exit.count)
            if exit != NULL and (what == KVMEXIT_RUN_EXIT or what == KVMEXIT_RUN_PYTHON):
                error = api.answer(v)
                if (error == -EINVAL) != m.contradicts or (error and error != -EINVAL and error != -ENODATA):
                    die(m, "answer() says something else")
                if error == -EINVAL:
                    renew(m)
        elif action & 15 == 9:
            m.kicked = True
            api.kick(v)
        elif action & 15 == 10:
            first, size = <uint64_t>take(m) << 12, <uint64_t>take(m) << 12
            error = api.convert(v, first, size, action >> 7, &done)
            if done > size or (error == 0 and (done != size or size == 0)):
                die(m, "convert() got further than it was asked, or not so far")
            if m.backend != NULL and done and not has_all(m, first, first + (done - 1), action >> 7):
                die(m, "convert() says it got further than it did")
            check_shadow(m)
        elif action & 15 == 11:  # as Python's register views do
            v.written |= 1
            v.mask[action >> 4] = 1
            v.value[action >> 4] = action
        elif action & 15 == 12 and m.contradicts:
            renew(m)
        elif action & 15 == 13:
            pause(m, not m.paused)
        elif action & 15 == 14:
            timed = True
    if m.paused:
        pause(m, False)


cdef void total(Machine *m) noexcept nogil:
    """At an input's end: the statistics are the sum of what was given."""
    if (<kvmexit_stats *>m.v.stats).recorded - m.begun_with != m.given:
        die(m, "the statistics have lost an exit")


cdef public int fuzz_exits(const uint8_t *data, size_t size) noexcept nogil:
    cdef Machine *m
    if size < 2:
        return 0
    m = begin(data + 1, size - 1, data[0] % machine_count)
    drive(m)
    total(m)
    return 0


# ---- Convert ----

cdef int no_file = os.open(os.devnull, os.O_RDONLY)
cdef int REFUSALS[4]
REFUSALS[:] = [ENOMEM, EAGAIN, EINVAL, EIO]


cdef public int fuzz_convert(const uint8_t *data, size_t size) noexcept nogil:
    """The VM with Convert; its backend and its discards fail as the first bytes say."""
    cdef Machine *m
    cdef Converter *c
    cdef RecordedLog *log
    cdef size_t i
    cdef uint8_t how
    if size < 8:
        return 0
    m = begin(data + 7, size - 7, 1)
    log = <RecordedLog *>m.backend
    c = <Converter *>m.v.converter
    how = data[0]
    log.fails = how & 3
    for i in range(log.fails):
        log.fail_at[i], log.fail_with[i] = 1 + data[1 + i] % 24, REFUSALS[data[4] >> 2 * i & 3]
    for i in range(c.count):
        if how & 4 and c.regions[i].gmem_fd >= 0:
            c.regions[i].private_discard = PUNCH  # of a descriptor that cannot
            c.regions[i].gmem_fd = no_file if data[5] >> i & 1 else c.regions[i].gmem_fd
        if how & 8 and data[6] >> i & 1 and c.regions[i].gmem_fd >= 0:
            c.regions[i].shared_discard, c.regions[i].hva = DONTNEED, <uint64_t>1 << 46  # of what is not mapped
    drive(m)
    total(m)
    check_shadow(m)
    return 0


# ---- devices by themselves: what a handler may be given, and a model ----

cdef kvmexit_exit made_exit(Machine *m, uint8_t *data) noexcept nogil:
    """An access as describe() would give it."""
    cdef kvmexit_exit exit
    memset(&exit, 0, sizeof(exit))
    exit.version, exit.run = 1, m.v.run
    exit.reason = KVM_EXIT_IO if take(m) & 1 else KVM_EXIT_MMIO
    exit.base, exit.address = 0x3f8, 0x3f8 + <uint64_t>(take(m) & 31)
    exit.count = 1
    if exit.reason == KVM_EXIT_IO:
        exit.size = <uint64_t>1 << take(m) % 3
        exit.count = 1 + take(m)
        if take(m) & 7 == 0:
            exit.count *= 8
    else:
        exit.size = 1 + take(m) % 8
    exit.is_write = take(m) & 1
    exit.owes = not exit.is_write
    exit.data = data
    return exit


cdef uint8_t *_bytes = <uint8_t *>malloc(16384)
cdef Native _serial
cdef kvmexit_serial *serial
cdef Kept serial_kept


cdef public int fuzz_serial(const uint8_t *data, size_t size) noexcept nogil:
    """Serial16550: what was sent is what was written to THR outside of loopback, and nothing leaves its buffers."""
    global accesses
    cdef Machine *m = begin(data, size, 0)
    cdef kvmexit_exit exit
    cdef uint64_t expected = 0, i, at
    cdef uint8_t lcr, mcr, scr = 0
    cdef uint8_t *guarded = _bytes
    memcpy(serial, serial_kept.copy, serial_kept.size)
    lcr, mcr = serial.lcr, serial.mcr
    while m.at != m.end:
        if take(m) & 7 == 0:
            i = take_word(m, 2) % 6000
            kvmexit_serial_feed(serial, guarded, i)
        else:
            accesses += 1
            exit = made_exit(m, guarded)
            for i in range(min(exit.size * exit.count, 8)):
                guarded[i] = take(m)
            if exit.is_write:
                for i in range(exit.size * exit.count):
                    at = exit.address - 0x3f8 + i % exit.size
                    if at == 0 and not lcr & 0x80 and not mcr & 0x10:
                        expected += 1
                    elif at == 3:
                        lcr = guarded[i]
                    elif at == 4:
                        mcr = guarded[i]
                    elif at == 7:
                        scr = guarded[i]
            if _serial_call(&exit, serial) != KVMEXIT_DONE:
                die(m, "the serial port passed")
            if not exit.is_write and exit.address == 0x3f8 + 7 and guarded[0] != scr:
                die(m, "the scratch register forgot")
        if serial.received > 16 or serial.waiting > 4096 or serial.first >= 4096 or serial.lcr != lcr:
            die(m, "the serial port's state is beyond itself")
        if serial.sent + serial.dropped != expected:
            die(m, "the serial port sent another number of bytes than was written")
    return 0


cdef int (*_serial_call)(kvmexit_exit *, void *) noexcept nogil
cdef int (*_registers_call)(kvmexit_exit *, void *) noexcept nogil
cdef int (*_ring_call)(kvmexit_exit *, void *) noexcept nogil
cdef void *registers_device
cdef kvmexit_ring *ring
cdef Kept ring_kept[3]
cdef kvmexit_entry _drained[64]

cdef enum:
    REGISTERS = 13  # an odd number
    ROOM = 16

cdef uint8_t *register_bytes = NULL  # what the Registers are over: exactly these bytes


cdef struct Expected:
    uint64_t address, data, sequence
    uint8_t size, reason


cdef bint is_the_same(const kvmexit_entry *entry, const Expected *wanted) noexcept nogil:
    return (entry.sequence == wanted.sequence and entry.address == wanted.address and entry.data == wanted.data
            and entry.size == wanted.size and entry.reason == wanted.reason)


cdef public int fuzz_devices(const uint8_t *data, size_t size) noexcept nogil:
    """Registers against a plain array, Ring against a queue; the last byte says what is done where that is full."""
    global accesses
    cdef Machine *m = begin(data, size, 0)
    cdef kvmexit_exit exit
    cdef Expected queue[ROOM]
    cdef uint64_t head = 0, tail = 0, sequence = 0, i, j, n, at
    cdef uint8_t model[REGISTERS]
    cdef int verdict
    memset(register_bytes, 0, REGISTERS)
    memset(model, 0, REGISTERS)
    for i in range(3):
        memcpy(ring_kept[i].at, ring_kept[i].copy, ring_kept[i].size)
    ring.full = data[size - 1] % 3 if size else <int>KVMEXIT_FULL_STOP
    m.v.run.immediate_exit = 1  # who waits is asked out at once
    while m.at != m.end:
        accesses += 1
        i = take(m)
        exit = made_exit(m, _bytes)
        if i & 4:
            exit.reason = KVM_EXIT_X86_WRMSR if exit.is_write else KVM_EXIT_X86_RDMSR
            exit.size, exit.count = 8, 1
        for j in range(min(exit.size * exit.count, 8)):
            _bytes[j] = take(m)
        if i & 3 == 0:
            n = kvmexit_ring_drain(ring, _drained, 1 + (i >> 3))
            for j in range(n):
                if head == tail or not is_the_same(&_drained[j], &queue[head % ROOM]):
                    die(m, "the ring gave out something else")
                head += 1
            if n == 0 and head != tail:
                die(m, "the ring lost an entry")
        elif i & 3 == 1:
            verdict = _ring_call(&exit, ring)
            if verdict != (KVMEXIT_PASS if not exit.is_write else
                           KVMEXIT_DONE if tail - head + exit.count <= ROOM or ring.full == KVMEXIT_FULL_DROP else
                           KVMEXIT_LATER if ring.full == KVMEXIT_FULL_WAIT and exit.count <= ROOM else KVMEXIT_STOP):
                die(m, "the ring's verdict")
            if verdict == KVMEXIT_DONE and tail - head + exit.count > ROOM:
                sequence += exit.count  # dropped, all of them
            elif verdict == KVMEXIT_DONE:
                for j in range(exit.count):
                    queue[tail % ROOM] = Expected(exit.address, 0, sequence, <uint8_t>exit.size, <uint8_t>exit.reason)
                    memcpy(&queue[tail % ROOM].data, _bytes + j * exit.size, exit.size)
                    tail += 1
                    sequence += 1
        else:
            at = (exit.address - exit.base) * (8 if i & 4 else 1)
            if exit.is_write:
                for j in range(exit.size * exit.count):
                    n = at + j % exit.size
                    if n < REGISTERS and n % 3:
                        model[n] = _bytes[j]
            if _registers_call(&exit, registers_device) != KVMEXIT_DONE:
                die(m, "the registers passed")
            if not exit.is_write:
                for j in range(exit.size * exit.count):
                    n = at + j % exit.size
                    if _bytes[j] != (model[n] if n < REGISTERS else 0xff):
                        die(m, "the registers read as something else")
            if memcmp(model, register_bytes, REGISTERS) != 0:
                die(m, "the registers hold something else")
    return 0


# ---- what Python sees ----

class Lost(BaseException):
    """No exception that run() may raise."""


def _answer(vcpu, exit):
    """A handler in Python: looks at everything, and says anything."""
    cdef Machine *m = &machines[2]
    look(exit)
    what = take(m)
    if what < 96:
        return what
    if what < 112:
        return None
    if what < 128:
        return bytes(what & 15)
    if what < 136:
        return kvmexit.STOP
    if what < 140:
        raise RuntimeError("a handler's")
    return kvmexit.PASS


_names = {}


def look(exit):
    """Read all that an exit has."""
    cls = type(exit)
    if cls not in _names:
        _names[cls] = [name for name in dir(cls) if not name.startswith("_")]
    repr(exit)
    for name in _names[cls]:
        try:
            value = getattr(exit, name)
            if callable(value) and name.startswith("decode"):
                value()
        except (AttributeError, ValueError):
            pass


_EXPECTED = (kvmexit.Error, TypeError, ValueError, OverflowError, RuntimeError)
_REFUSED = (AttributeError, *_EXPECTED)


cdef public int fuzz_python(const uint8_t *data, size_t size) noexcept nogil:
    cdef Machine *m = begin(data, size, 2)
    with gil:
        try:
            _drive_python()
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            die(m, "Python raised")
    total(m)
    return 0


def _drive_python():
    cdef Machine *m = &machines[2]
    vcpu = _vcpus[2]
    while True:
        exit = None
        try:
            exit = vcpu.complete() if m.at != m.end and m.at[0] & 15 == 15 else vcpu.run()
        except _EXPECTED:
            pass
        if exit is not None:
            look(exit)
        if (<kvmexit_stats *>m.v.stats).recorded - m.begun_with != m.given:
            raise Lost("exits recorded are not those given")
        pending = vcpu.pending
        if (m.open or (m.owes and not m.v.answered)) != (pending is not None) and not m.v.unsettled:
            raise Lost(f"pending is {pending!r}")
        if m.at == m.end:
            return
        action = take(m)
        if action < 64 and exit is not None:
            for name in ("data", "ret", "result", "error", "status", "npages"):
                try:
                    setattr(exit, name, take(m))
                except _REFUSED:
                    pass
        elif action < 72:
            m.kicked = True
            vcpu.kick()
        elif action < 80:
            try:
                vcpu.regs.rax = action
            except _EXPECTED:
                pass
        elif action < 84:
            repr(vcpu.last_exits), vcpu.stats
        elif action < 255 and m.contradicts or action & 1:
            with nogil:
                renew(m)


# ---- trace files ----

cdef public int fuzz_trace(const uint8_t *data, size_t size) noexcept nogil:
    global inputs
    inputs += 1
    with gil:
        try:
            traces.one(data[:size])
            if inputs % 64 == 0:
                traces.renew()
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            die(&machines[0], "a trace's reader")
    return 0


# ---- making them ----

cdef int keep(Machine *m, void *at, size_t size) except -1:
    cdef Kept *k = &m.kept[m.kept_count]
    if m.kept_count == MAX_KEPT:
        raise OverflowError
    k[0] = kept(at, size)
    m.kept_count += 1
    return 0


cdef Kept kept(void *at, size_t size):
    cdef Kept k = Kept(at, malloc(size), size)
    memcpy(k.copy, at, size)
    return k


cdef void keep_ring(Machine *m, Ring r):
    keep(m, &r.ring, sizeof(kvmexit_ring))
    keep(m, r.ring.lanes, r.ring.lane_count * sizeof(kvmexit_lane))


def _liar(i):
    return native.Function(PyCapsule_New(<void *>lie, KVMEXIT_HANDLER, NULL), <uintptr_t>&machines[i])


def _make(routes):
    """A machine: a VM, whose vCPU enters enter_fuzzed(), with its mapping between two pages that nobody may touch."""
    global machine_count
    cdef int i = machine_count
    cdef Machine *m = &machines[i]
    cdef Vcpu vcpu
    cdef char *place
    cdef size_t offset
    backend = Recorded({1: 1, 2: 1, 3: 1})
    vm = ScriptedVM(attributes=backend)
    vcpu = vm.create_vcpu(0, [hlt()])
    vcpu.fault_limit = 40
    m.v = &vcpu.page.c
    place = <char *>c_mmap(NULL, RUN + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>place == MAP_FAILED or mprotect(place + PAGE, RUN, PROT_READ | PROT_WRITE) != 0:
        raise MemoryError
    memcpy(place + PAGE, m.v.run, RUN)
    if <const void *>m.v.rip != NULL and <char *>m.v.rip > <char *>m.v.run and <char *>m.v.rip < <char *>m.v.run + RUN:
        offset = <char *>m.v.rip - <char *>m.v.run
        m.v.rip = <const uint64_t *>(place + PAGE + offset)
    m.v.run = <kvm_run *>(place + PAGE)  # the other stays mapped, unused
    m.mirror = <uint8_t *>calloc(1, RUN)
    m.v.enter = enter_fuzzed
    m.v.script = m
    _alive.append((vm, vcpu, backend))
    _vms.append(vm)
    _vcpus.append(vcpu)
    _logs.append(backend)
    machine_count += 1
    routes(vm, i)
    m.v.generation = 0
    memcpy(&m.fresh, m.v, sizeof(kvmexit_vcpu))


def _nothing(vm, i):
    pass


cdef _memory(vm, int i):
    """Memory that can be private, and memory that cannot; and the model of it."""
    cdef Machine *m = &machines[i]
    cdef RecordedAttributes backend = _logs[i]
    cdef Converter *c
    cdef size_t k
    theirs = mmap.mmap(-1, 4 * PAGE)
    _alive.append(theirs)
    vm.memory.add(0, 64 * PAGE, guest_memfd=True, discard=False)
    vm.memory.add(64 * PAGE, 4 * PAGE)
    vm.memory.add(68 * PAGE, 4 * PAGE, buffer=theirs, guest_memfd=True)
    vm.memory.add(80 * PAGE, 130 * PAGE, guest_memfd=True, discard=False)
    vm.memory.add(210 * PAGE, 30 * PAGE, guest_memfd=True)
    backend.log.fails = 0
    c = <Converter *>m.v.converter
    m.backend = &backend.log
    # `calls` may grow, and then stays: only what counts is put back
    keep(m, &backend.log.count, sizeof(backend.log.count))
    keep(m, &backend.log.fails, sizeof(backend.log.fails))
    for k in range(c.count):
        keep(m, c.regions[k], sizeof(Region))
        if c.regions[k].bits != NULL:
            keep(m, c.regions[k].bits, ((((c.regions[k].last - c.regions[k].first) >> 12) + 64) >> 6) * 8)


def _devices(vm, int i):
    """One of each, and Convert."""
    cdef Machine *m = &machines[i]
    cdef Serial16550 com = native.Serial16550(os.open(os.devnull, os.O_WRONLY | os.O_NONBLOCK))
    cdef Ring posted = native.Ring(16, vcpus=2, full="drop"), stops = native.Ring(16, vcpus=2)
    cdef Convert convert
    _memory(vm, i)
    convert = native.Convert(vm, window=8 * PAGE, adaptive=True)
    vm.on_pio(0x3f8, 8, com)
    keep(m, com.opaque, sizeof(kvmexit_serial))
    vm.on_pio(0x80, 1, native.Ignore(-1))
    bell = native.EventFd(os.eventfd(0, os.EFD_NONBLOCK))
    vm.on_pio(0x81, 3, bell)
    vm.on_pio(0x60, 5, native.Registers(bytearray(5)))
    vm.on_pio(0x61, 1, native.Counter())
    vm.on_pio(0x100, 16, posted)
    vm.on_mmio(0xd0000000, 0x1000, native.Registers(bytearray(0x123), bytes(i % 7 == 0 for i in range(0x123))))
    vm.on_mmio(0xd0000010, 4, native.Ignore(0x1122334455667788))
    vm.on_mmio(0xd0001000, 0x1000, stops)
    vm.on_mmio(0xe0000000, 1 << 40, native.Ignore())
    vm.on_msr(0x100, 3, native.Registers(bytearray(20)))
    vm.on(kvmexit.Mmio, native.Counter())
    vm.on(kvmexit.Hlt, native.Stop())
    vm.on_memory_fault(handler=convert)
    vm.on_hypercall(12, convert)
    vm.on(kvmexit.Exit, native.Counter())
    keep(m, convert.opaque, sizeof(convert.shared))
    keep_ring(m, posted)
    keep_ring(m, stops)
    vm.coalesce_mmio(0xd0002000, 0x100, posted)
    vm.coalesce_pio(0x200, 8, com)


def _pythons(vm, i):
    """Python's handlers between native ones."""
    cdef Machine *m = &machines[i]
    m.python = m.objects = True
    vm.on(kvmexit.Exit, native.Ignore(5))
    vm.on(kvmexit.Exit, _answer)
    for cls in (kvmexit.Io, kvmexit.Mmio, kvmexit.MemoryFault):
        vm.on(cls, native.Counter())
    vm.on_mmio(0x1000, 0x1000, native.Ignore(3))
    vm.on_pio(0x10, 16, _answer)
    vm.on_pio(0x10, 16, native.Stop())
    vm.on_hypercall(12, _answer)


def _segments(vm, i):
    """Many routes, and an unaligned end at each extreme."""
    for k in range(60):
        vm.on_mmio(0x1000 * k + k, 0x10 * k + 1, native.Ignore(k))
        vm.on_msr(3 * k, 2, native.Ignore(k))
        vm.on_pio(0x100 * k + k, 1 + k, native.Ignore(k))
    vm.on_mmio((1 << 64) - 16, 16, native.Registers(bytearray(16)))
    vm.on_pio(0xffff, 1, native.Registers(bytearray(2)))
    vm.on_mmio(0, 1, native.Counter())
    vm.on_msr(0xfffffff0, 16, native.Registers(bytearray(128)))


def _liars(vm, i):
    """Handlers that say anything, over all exits, twice, with devices between."""
    cdef Machine *m = &machines[i]
    m.liar = True
    m.python = True
    _memory(vm, i)
    vm.on(kvmexit.Exit, _liar(i))
    vm.on(kvmexit.Io, _answer)
    vm.on_pio(0, 0x10000, native.Counter())
    vm.on_pio(0, 0x100, _liar(i))
    vm.on_mmio(0, 1 << 63, _liar(i))
    vm.on_memory_fault(handler=native.Convert(vm))
    vm.on_hypercall(12, native.Convert(vm, window=PAGE * 16))
    vm.coalesce_mmio(0, 1 << 20, _liar(i))
    vm.coalesce_pio(0, 0x100, native.Counter())


def _build():
    global _serial, serial, _serial_call, serial_kept, _registers_call, registers_device, _ring_call, ring, register_bytes
    cdef Registers registers
    cdef Ring made
    for routes in (_nothing, _devices, _pythons, _segments, _liars):
        _make(routes)
    _serial = native.Serial16550(os.open(os.devnull, os.O_WRONLY | os.O_NONBLOCK))
    serial, _serial_call = <kvmexit_serial *>_serial.opaque, _serial.call
    serial_kept = kept(serial, sizeof(kvmexit_serial))
    register_bytes = <uint8_t *>malloc(REGISTERS)
    memory = (ctypes.c_uint8 * REGISTERS).from_address(<uintptr_t>register_bytes)
    registers = native.Registers(memory, bytes(n % 3 == 0 for n in range(REGISTERS)))
    _registers_call, registers_device = registers.call, registers.opaque
    made = native.Ring(ROOM, vcpus=2)
    ring, _ring_call = &made.ring, made.call
    ring_kept[0] = kept(ring, sizeof(kvmexit_ring))
    ring_kept[1] = kept(ring.lanes, ring.lane_count * sizeof(kvmexit_lane))
    ring_kept[2] = kept(&ring.lanes[0], sizeof(kvmexit_lane))
    _alive.append((registers, made, memory))


_build()


# ---- running them ----

ctypedef int (*Target)(const uint8_t *, size_t) noexcept nogil

TARGETS = {
    "exits": <uintptr_t>&fuzz_exits, "convert": <uintptr_t>&fuzz_convert, "serial": <uintptr_t>&fuzz_serial,
    "devices": <uintptr_t>&fuzz_devices, "python": <uintptr_t>&fuzz_python, "trace": <uintptr_t>&fuzz_trace,
}


cdef void say() noexcept nogil:
    fprintf(stderr, "fuzz: %lu inputs, %lu pages decoded, %lu accesses of devices\n", inputs, pages, accesses)


atexit(say)
py_atexit.register(traces.remove)


def one(target, bytes data):
    """Run one input."""
    cdef Target function = <Target><uintptr_t>TARGETS[target]
    cdef const uint8_t *at = data
    cdef size_t size = len(data)
    with nogil:
        function(at, size)


def counts():
    """-> inputs, and pages decoded, so far."""
    return inputs, pages
