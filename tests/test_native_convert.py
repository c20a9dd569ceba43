"""native.Convert: faults and MAP_GPA_RANGE converted in the burst. Which calls the backend sees says what was done."""

import errno
import gc
import random
import threading
import time
import weakref

import pytest
from guests import stress
from processes import in_thread, unsanitized
from test_convert import PAGE, SLOTS, TOP, machine, private_pages

import kvmexit
from kvmexit import (
    ConversionError,
    FaultLoopError,
    Hypercall,
    KvmError,
    MemoryFault,
    SlotRebind,
    VMType,
    handlers,
    native,
)
from kvmexit.testing import RecordedAttributes, ScriptedVM, ScriptStep, hlt, hypercall, memory_fault, pio_out

FOR_EVER = 1 << 60
MIB = 1 << 20


@pytest.fixture
def made():
    """-> a scripted VM with SLOTS, and its backend."""
    vm, recorded = machine()
    with vm:
        yield vm, recorded


def fault(page, count=1, *, private=True):
    return memory_fault(page * PAGE, count * PAGE, private=private)


def pages(calls):
    """A backend's calls in pages, without their success."""
    return [(gpa // PAGE, size // PAGE, private) for gpa, size, private, error in calls if not error]


def run(vm, *steps):
    """Run a script to its end: nothing of it comes to Python. -> the vCPU."""
    vcpu = vm.create_vcpu(len(vm._scripts), steps)
    with pytest.raises(KvmError) as ended:
        raise AssertionError(vcpu.run())
    assert ended.value.errno == errno.ENODATA
    return vcpu


def counts(handler):
    return handler.faults, handler.duplicates, handler.conversions, handler.pages


# ---- faults ----


def test_a_fault_converts_what_it_names(made):
    """Page by page, in both directions; rounded to whole pages; over two slots in one call; a duplicate costs none."""
    vm, recorded = made
    convert = native.Convert(vm)
    vm.on_memory_fault(handler=convert)
    odd = memory_fault(3 * PAGE + 5, PAGE, private=True)
    run(vm, fault(1), fault(1), fault(64, 2), odd, fault(4, private=False))
    assert pages(recorded.calls) == [(1, 1, True), (64, 2, True), (3, 2, True), (4, 1, False)]
    assert counts(convert) == (5, 1, 4, 6)
    assert (convert.failed, convert.failure, convert.busy, convert.hypercalls) == (0, None, 0, 0)
    assert private_pages(vm) == recorded.private == {PAGE, 3 * PAGE, 64 * PAGE, 65 * PAGE}


@pytest.mark.parametrize(
    ("window", "page", "expected"),
    [
        (2, 0, (0, 2)), (2, 1, (0, 2)), (4, 7, (4, 4)), (64, 63, (0, 64)),
        (64, 64, (64, 1)),             # the slot's end
        (64, 65, (65, 63)), (64, 128, (128, 1)), (128, 128, (128, 1)), (128, 127, (65, 63)),  # its beginning, and its end
        (1 << 18, 20, (0, 65)), (1 << 18, 350, (300, 128)),  # more than all of it
        (16, 301, (300, 4)),
        ((1 << 18), TOP // PAGE + 69, (TOP // PAGE, 70)), (2, TOP // PAGE + 69, (TOP // PAGE + 68, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("private", [True, False])
def test_a_window_is_clipped_to_the_slot(made, window, page, expected, private):
    """One call, aligned, whatever page of it is touched; up to the end of the address space."""
    vm, recorded = made
    if not private:
        for gpa, count, able in SLOTS:
            if able:
                vm.memory.convert(gpa, count * PAGE, private=True)
    before = len(recorded.calls)
    convert = native.Convert(vm, window=window * PAGE)
    vm.on_memory_fault(handler=convert)
    run(vm, fault(page, private=private))
    assert pages(recorded.calls[before:]) == [(*expected, private)]
    assert counts(convert) == (1, 0, 1, expected[1])


def test_a_fault_over_two_slots_takes_both_with_its_window(made):
    """And what it names beyond a window is converted all the same."""
    vm, recorded = made
    vm.on_memory_fault(handler=native.Convert(vm, window=4 * PAGE))
    run(vm, fault(64, 2), fault(10, 9))
    assert pages(recorded.calls) == [(64, 4, True), (8, 12, True)]


def test_a_window_leaves_out_what_is_so_already(made):
    """The rest of it are runs."""
    vm, recorded = made
    vm.memory.convert(3 * PAGE, 2 * PAGE, private=True)
    vm.on_memory_fault(handler=native.Convert(vm, window=8 * PAGE))
    run(vm, fault(7))
    assert pages(recorded.calls[1:]) == [(0, 3, True), (5, 3, True)]


@pytest.mark.parametrize(
    ("gpa", "size", "page", "expected"),
    [
        (0, 1 << 64, 20, (16, 16)), (17 * PAGE, 4 * PAGE, 17, (17, 4)), (17 * PAGE, 4 * PAGE, 20, (17, 4)),
        (20 * PAGE, PAGE, 20, (20, 1)), (TOP, 70 * PAGE, TOP // PAGE + 69, (TOP // PAGE + 54, 16)),
        (17 * PAGE, 4 * PAGE, 16, None), (17 * PAGE, 4 * PAGE, 21, None),
    ],
)  # fmt: skip
def test_policy_bounds(made, gpa, size, page, expected):
    """What lies outside passes, and no window goes there."""
    vm, recorded = made
    convert = native.Convert(vm, gpa, size, window=16 * PAGE)
    vm.on_memory_fault(handler=convert)
    if expected:
        run(vm, fault(page))
        assert pages(recorded.calls) == [(*expected, True)]
    else:
        assert isinstance(vm.create_vcpu(0, [fault(page)]).run(), MemoryFault)
        assert (recorded.calls, convert.faults, convert.failed) == ([], 0, 0)


def test_a_fault_partly_outside_the_bounds_passes(made):
    vm, recorded = made
    vm.on_memory_fault(handler=native.Convert(vm, 2 * PAGE, 2 * PAGE))
    vm.on_hypercall(12, native.Convert(vm, 2 * PAGE, 2 * PAGE))
    for id, step in enumerate([fault(1, 2), fault(3, 2), hypercall(12, PAGE, 2, 16), hypercall(12, 3 * PAGE, 2, 16)]):
        assert isinstance(vm.create_vcpu(id, [step]).run(), (MemoryFault, Hypercall))
    assert recorded.calls == []


@pytest.mark.parametrize(
    ("step", "failed"),
    [
        (memory_fault(0, errno=133, private=True), None), (memory_fault(0, 0, private=True), None),
        (memory_fault((1 << 64) - PAGE, 2 * PAGE, private=True), None), (memory_fault(0, 1 << 63, private=True), "no slot"),
        (ScriptStep(39, (1 << 3 | 1 << 4).to_bytes(8, "little") + bytes(8) + PAGE.to_bytes(8, "little"), errno=14), None),
        (ScriptStep(errno=14), None), (ScriptStep(errno=133), None), (hlt(), None), (hypercall(11), None),
        (fault(129), "no slot covers gpa 0x81000"), (fault(129, private=False), "no slot"), (fault(200), "no guest_memfd"),
        (fault(128, 2), "no slot covers gpa 0x81000"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [1, 512])
def test_what_conversion_does_not_repair_passes(made, step, failed, window):
    """Without a call, to whoever comes next; of failures it is known why."""
    vm, recorded = made
    convert = native.Convert(vm, window=window * PAGE)
    vm.on(kvmexit.Exit, convert)
    exit = vm.create_vcpu(0, [step]).run()
    assert exit.errno == step.errno
    assert recorded.calls == []
    assert convert.failed == (failed is not None)
    if failed:
        assert isinstance(convert.failure, ConversionError)
        assert failed in str(convert.failure)
        assert convert.failure.errno is None
    else:
        assert convert.failure is None


def test_memory_whose_discard_is_undecided_passes():
    import mmap

    with ScriptedVM() as vm:
        vm.memory.add(0, 2 * PAGE, guest_memfd=True, buffer=mmap.mmap(-1, 2 * PAGE))
        convert = native.Convert(vm, window=2 * PAGE)
        vm.on_memory_fault(handler=handlers.convert)
        vm.on_memory_fault(handler=convert)
        with pytest.raises(ConversionError, match="say in add"):
            vm.create_vcpu(0, [fault(0)]).run()
        assert "not told whether to discard" in str(convert.failure)


def test_a_closed_guest_memfd_is_for_python(made):
    """Its private pages are as the fault wants them, and would fault for ever. To shared they can become."""
    vm, recorded = made
    vm.memory.convert(0, 2 * PAGE, private=True)
    vm.memory.slots[0].close_guest_memfd()
    convert = native.Convert(vm)
    vm.on_memory_fault(handler=convert)
    assert isinstance(vm.create_vcpu(0, [fault(0)]).run(), MemoryFault)
    assert "no guest_memfd" in str(convert.failure)
    run(vm, fault(0, private=False))
    assert pages(recorded.calls) == [(0, 2, True), (0, 1, False)]


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_a_duplicate_for_ever_is_a_loop(made, limit):
    """Nobody changed anything: what faults there does not for its state. Natively, until the guard ends it."""
    vm, recorded = made
    vm.memory.convert(0, PAGE, private=True)
    before = vm.memory.changes
    convert = native.Convert(vm)
    vm.on_memory_fault(handler=convert)
    vcpu = vm.create_vcpu(0, [fault(0)], repeat=FOR_EVER, keep=False)
    vcpu.fault_limit = limit
    with pytest.raises(FaultLoopError):
        vcpu.run()
    assert (convert.duplicates, len(recorded.calls), vm.memory.changes) == (limit, 1, before)


# ---- failures ----


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_nth_call_fails(n):
    """The fault passes with the reason, Python's handler raises it or does it; shadow is backend."""
    vm, recorded = machine({n: errno.EIO})
    with vm:
        convert = native.Convert(vm)
        vm.on_memory_fault(handler=convert)
        vcpu = vm.create_vcpu(0, [fault(page) for page in (5, 9, 2)])
        exit = vcpu.run()
        page = (5, 9, 2)[n - 1]
        assert (type(exit), exit.gpa) == (MemoryFault, page * PAGE)
        failure = convert.failure
        assert (failure.gpa, failure.size, failure.private) == (page * PAGE, PAGE, True)
        assert (failure.done, failure.errno) == (0, errno.EIO)
        assert "KVM refused at gpa" in str(failure)
        assert (convert.failed, convert.faults, convert.conversions) == (1, n, n - 1)
        assert private_pages(vm) == recorded.private == {p * PAGE for p in (5, 9, 2)[: n - 1]}


def test_a_failing_window_falls_back_to_the_fault():
    """Exactly what was asked; nothing is passed."""
    vm, recorded = machine({1: errno.ENOMEM})
    with vm:
        convert = native.Convert(vm, window=16 * PAGE)
        vm.on_memory_fault(handler=convert)
        run(vm, fault(20), fault(21))
        assert recorded.calls == [(16 * PAGE, 16 * PAGE, True, errno.ENOMEM), (20 * PAGE, PAGE, True, 0),
                                  (16 * PAGE, 4 * PAGE, True, 0), (21 * PAGE, 11 * PAGE, True, 0)]
        assert (convert.failed, convert.failure) == (0, None)
    vm, recorded = machine({1: errno.ENOMEM, 2: errno.EIO})
    with vm:
        convert = native.Convert(vm, window=16 * PAGE)
        vm.on_memory_fault(handler=convert)
        assert vm.create_vcpu(0, [fault(20)]).run().gpa == 20 * PAGE
        assert (convert.failed, convert.failure.errno, convert.failure.size) == (1, errno.EIO, PAGE)


def locked(vm, gpa, size):
    """A slot whose shared side cannot be discarded."""
    import ctypes

    slot = vm.memory.add(gpa, size, guest_memfd=True)
    mlock = ctypes.c_long(149)  # not libc's function: under a sanitizer that does nothing
    assert ctypes.CDLL(None).syscall(mlock, ctypes.c_void_p(slot.hva + size - PAGE), ctypes.c_size_t(PAGE)) == 0
    return slot


def test_a_failing_discard_falls_back_or_passes():
    """A locked neighbour: its attributes are put back, and the fault's own page is converted. The locked page itself passes."""
    with ScriptedVM(attributes=(recorded := RecordedAttributes())) as vm:
        locked(vm, 0, 4 * PAGE)
        convert = native.Convert(vm, window=4 * PAGE)
        vm.on_memory_fault(handler=convert)
        run(vm, fault(1))
        assert recorded.private == private_pages(vm) == {PAGE}
        assert convert.failed == 0
        assert vm.create_vcpu(7, [fault(3)]).run().gpa == 3 * PAGE
        assert recorded.private == private_pages(vm) == {0, PAGE}  # a run of its window that could be
        assert convert.failure.errno == errno.EINVAL
        assert "the attributes were put back" in str(convert.failure)


def test_a_stuck_window_passes():
    """Discard and undoing failed: the pages have the new state, and Python gets to know."""
    with ScriptedVM(attributes=(recorded := RecordedAttributes({2: errno.EIO}))) as vm:
        locked(vm, 0, 4 * PAGE)
        convert = native.Convert(vm, window=4 * PAGE)
        vm.on_memory_fault(handler=convert)
        assert vm.create_vcpu(0, [fault(1)]).run().gpa == PAGE
        assert recorded.private == private_pages(vm) == {0, PAGE, 2 * PAGE, 3 * PAGE}
        assert (convert.failed, convert.failure.gpa, convert.failure.size, convert.failure.done) == (1, 0, 4 * PAGE, 0)
        assert "could not be put back" in str(convert.failure)


# ---- adaptive ----


def sizes(recorded):
    return [size // PAGE for _, size, _, error in recorded.calls if not error]


def walk(vm, begin, end, *, private=True):
    """Fault on each page that has not the state, as a guest that walks upwards does."""
    while begin < end:
        if vm.memory.is_private(begin * PAGE) != private:
            run(vm, fault(begin, private=private))
        begin += 1


def big(pages=4096, **options):
    recorded = RecordedAttributes()
    vm = ScriptedVM(attributes=recorded)
    vm.memory.add(0, pages * PAGE, guest_memfd=True, discard=False)
    convert = native.Convert(vm, adaptive=True, **options)
    vm.on_memory_fault(handler=convert)
    vm.on_hypercall(12, convert)
    return vm, recorded


@pytest.mark.parametrize("private", [True, False])
def test_adaptive_windows_double_along_a_walk(private):
    """From a page to the limit, aligned at their ends; the slot's end ends the last."""
    vm, recorded = big(1024 + 100, window=256 * PAGE)
    with vm:
        if not private:
            vm.memory.convert(0, (1024 + 100) * PAGE, private=True)
            recorded.calls.clear()
        walk(vm, 0, 1024 + 100, private=private)
        assert sizes(recorded)[not private:] == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256, 100]


@pytest.mark.parametrize("begin", [1, 5, 7, 1000, 1001])
def test_adaptive_never_converts_what_lies_before(begin):
    """Wherever a walk begins; and it comes to the full window in a dozen faults."""
    vm, recorded = big(window=512 * PAGE)
    with vm:
        walk(vm, begin, 4096)
        assert min(recorded.private) == begin * PAGE
        assert len(recorded.private) == 4096 - begin
        assert max(sizes(recorded)) == 512
        assert len(recorded.calls) <= 12 + (4096 - begin) // 512
        ends = [(gpa + size) // PAGE for gpa, size, _, _ in recorded.calls]
        assert all(end % 512 == 0 for end in ends[12:])


def test_adaptive_keeps_to_a_page_where_faults_are_anywhere():
    chance = random.Random(5)
    vm, recorded = big()
    with vm:
        for page in chance.sample(range(0, 4096, 2), 200):
            run(vm, fault(page))
        assert set(sizes(recorded)) == {1}


@pytest.mark.parametrize("asked", ["fault", "hypercall"])
def test_adaptive_shrinks_when_the_guest_takes_a_page_back(asked):
    """Within what was converted last: the walk's next fault begins with a page. Elsewhere a hypercall changes nothing."""
    vm, recorded = big()
    with vm:
        walk(vm, 0, 16)
        assert recorded.calls[-1][:2] == (8 * PAGE, 8 * PAGE)
        if asked == "hypercall":
            run(vm, hypercall(12, 3 * PAGE, 1, 0))  # converted, but not last
            walk(vm, 16, 32)
            assert sizes(recorded)[-1] == 16
            run(vm, hypercall(12, 20 * PAGE, 1, 0))
        else:
            walk(vm, 16, 32)
            run(vm, fault(20, private=False))
        del_from = len(recorded.calls)
        walk(vm, 32, 40)
        assert pages(recorded.calls[del_from:]) == [(32, 1, True), (33, 1, True), (34, 2, True), (36, 4, True)]
        assert vm.memory.is_private(20 * PAGE) is False


def test_adaptive_starts_anew_in_the_other_direction():
    """Behind what became private last comes a page that is to be shared."""
    vm, recorded = big()
    with vm:
        vm.memory.convert(16 * PAGE, 32 * PAGE, private=True)
        walk(vm, 0, 16)
        walk(vm, 16, 20, private=False)
        assert pages(recorded.calls)[-4:] == [(8, 8, True), (16, 1, False), (17, 1, False), (18, 2, False)]


def test_adaptive_starts_anew_after_a_failed_window():
    recorded = RecordedAttributes({3: errno.ENOMEM})
    with ScriptedVM(attributes=recorded) as vm:
        vm.memory.add(0, 64 * PAGE, guest_memfd=True, discard=False)
        vm.on_memory_fault(handler=native.Convert(vm, adaptive=True))
        walk(vm, 0, 9)
        assert [call[:2] for call in pages(recorded.calls)] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 8)]


def test_adaptive_goes_on_into_the_next_slot(made):
    vm, recorded = made
    vm.on_memory_fault(handler=native.Convert(vm, adaptive=True))
    walk(vm, 60, 100)
    assert [call[:2] for call in pages(recorded.calls)] == [(60, 1), (61, 1), (62, 2), (64, 1), (65, 15), (80, 16), (96, 32)]


# ---- hypercalls ----


class Snp(ScriptedVM):
    type = VMType.SNP


class Tdx(ScriptedVM):
    type = VMType.TDX


RUBBISH = [(1, 1, 16), (PAGE - 1, 1, 0), (0, 0, 16), (0, 1, 1 << 5), (0, 1, 1 << 63), (0, (1 << 52) + 1, 0), (0, (1 << 64) - 1, 16),
           (TOP, 71, 0), ((1 << 64) - PAGE, 2, 0), (0, 1 << 63, 0), (129 * PAGE, 1, 16), (200 * PAGE, 1, 16), (0, 130, 16),
           (0, 1 << 52, 16)]  # fmt: skip


@pytest.mark.parametrize("kind", [ScriptedVM, Snp, Tdx])
@pytest.mark.parametrize(
    ("asked", "error"),
    [*[(asked, errno.EINVAL) for asked in RUBBISH], ((0, 1, 16), 0), ((0, 129, 17), 0), ((PAGE, 5, 0x1F), 0), ((0, 1 << 52, 0), 0),
     ((150 * PAGE, 10, 0), 0), ((TOP, 70, 16), 0)])  # fmt: skip
def test_hypercalls_are_answered_as_the_python_handler_does(kind, asked, error):
    """ret and memory; rubbish as well, natively."""
    results = []
    for answerer in (lambda vm: native.Convert(vm, window=1 << 30), lambda vm: handlers.map_gpa_range):
        recorded = RecordedAttributes()
        with kind(attributes=recorded) as vm:
            for gpa, count, able in SLOTS:
                vm.memory.add(gpa, count * PAGE, guest_memfd=able, discard=False)
            vm.memory.convert(7 * PAGE, PAGE, private=True)
            vm.on_hypercall(12, answerer(vm))
            vcpu = run(vm, hypercall(12, *asked))
            results.append((vm.script(vcpu).left(0)[0], recorded.calls))
            assert private_pages(vm) == recorded.private
    assert results[0] == results[1]
    ret = int.from_bytes(results[0][0][56:64], "little")
    assert ret == (error if kind is not ScriptedVM else -error % (1 << 64))


@pytest.mark.parametrize(("error", "ret"), [(errno.ENOMEM, 11), (errno.EBUSY, 11), (errno.EAGAIN, 11), (errno.EIO, None)])
@pytest.mark.parametrize("kind", [ScriptedVM, Snp])
def test_a_failing_host_and_a_hypercall(error, ret, kind):
    """EAGAIN where asking again helps. Else it passes, its answer untouched, and whoever comes next is asked."""
    recorded = RecordedAttributes({1: error})
    with kind(attributes=recorded) as vm:
        vm.memory.add(0, 4 * PAGE, guest_memfd=True, discard=False)
        convert = native.Convert(vm)
        vm.on_hypercall(12, convert)
        vcpu = vm.create_vcpu(0, [hypercall(12, 0, 2, 16), hlt()])
        exit = vcpu.run()
        if ret is None:
            assert (type(exit), exit.ret, convert.failed, convert.failure.errno) == (Hypercall, 0, 1, error)
            assert convert.hypercalls == 0
            assert isinstance(vcpu.run(), kvmexit.Hlt)  # not answered, so it was offered again
        else:
            assert int.from_bytes(vm.script(vcpu).left(0)[0][56:64], "little") == (ret if kind is Snp else -ret % (1 << 64))
            assert (convert.hypercalls, convert.failed) == (1, 0)


@unsanitized("so much does not fit beside TSan's shadow")
def test_a_huge_hypercall_heeds_signals():
    """It goes on from Python's dispatch where somebody asks: a signal handler runs, its exception leaves run(), and the next
    run() finishes what is left."""
    import signal

    class Rung(Exception):
        pass

    def ring(number, frame):
        raise Rung

    with ScriptedVM() as vm:
        vm.memory.add(0, 1 << 43, guest_memfd=True, discard=False)
        convert = native.Convert(vm)
        vm.on_hypercall(12, convert)
        vcpu = vm.create_vcpu(0, [hypercall(12, 0, 1 << 31, 16), hlt()])
        previous = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            with pytest.raises(Rung):
                vcpu.run()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert 0 < convert.pages < 1 << 31
        assert isinstance(vcpu.pending, Hypercall)
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert (convert.pages, convert.hypercalls) == (1 << 31, 1)
        assert vm.memory.ranges() == [(0, 1 << 43, True)]


# ---- who may have it ----


def test_bad_arguments(made):
    vm, _ = made
    for window in (0, 1, 2048, 4097, 3 * PAGE, 1 << 31, -PAGE):
        with pytest.raises(ValueError, match="power of two"):
            native.Convert(vm, window=window)
    for bounds in [(0, 0), (1, PAGE), (0, PAGE + 1), (TOP, 71 * PAGE), (0, None), (None, PAGE)]:
        with pytest.raises(ValueError):  # noqa: PT011
            native.Convert(vm, *bounds)
    for bad in [lambda: native.Convert(vm, window="2M"), lambda: native.Convert(vm, "0", PAGE), lambda: native.Convert(object()),
                native.Convert]:
        with pytest.raises((TypeError, AttributeError)):
            bad()
    assert repr(native.Convert(vm, adaptive=True)) == "Convert(window=0x200000, adaptive=True)"
    assert (native.Convert(vm).window, native.Convert(vm).adaptive) == (PAGE, False)


def test_another_vm_is_refused(made):
    """The slots that it converts would be freed under it."""
    vm, _ = made
    with ScriptedVM() as other:
        convert = native.Convert(other)
        with pytest.raises(ValueError, match="another VM"):
            vm.on_memory_fault(handler=convert)
        with pytest.raises(ValueError, match="another VM"):
            vm.on_hypercall(12, convert)
        with pytest.raises(ValueError, match="another VM"):
            vm.on(kvmexit.Exit, convert)
    assert vm.create_vcpu(0, [fault(0)]).run().gpa == 0


def test_slot_rebind_is_refused():
    with ScriptedVM(attributes=SlotRebind()) as vm, pytest.raises(ValueError, match="SlotRebind"):
        native.Convert(vm)


def test_it_keeps_no_vm_alive():
    """VM -> routes -> Convert is no cycle, with the collector off."""
    gc.collect()
    gc.disable()
    try:
        vm, _ = machine()
        convert = native.Convert(vm)
        vm.on_memory_fault(handler=convert)
        vm.create_vcpu(0, [fault(0), hlt()]).run()
        gone = weakref.ref(vm)
        vm.close()
        del vm
        assert gone() is None
        assert convert.pages == 1
        with ScriptedVM() as vm, pytest.raises(ValueError, match="another VM"):
            vm.on_memory_fault(handler=convert)
    finally:
        gc.enable()


# ---- requests and threads ----


@pytest.mark.parametrize("action", ["kick", "timeout", "pause"])
def test_a_storm_of_faults_heeds_requests(action):
    """All of it native: windows of 1 GiB, to and fro."""
    with ScriptedVM() as vm:
        vm.memory.add(0, 1 << 30, guest_memfd=True, discard=False)
        vm.on_memory_fault(handler=native.Convert(vm, window=1 << 30))
        vcpu = vm.create_vcpu(0, [fault(7), fault(9, private=False)], repeat=FOR_EVER, keep=False)
        if action == "timeout":
            assert vcpu.run(timeout=0.05).cause == "timeout"
            return
        results = []
        thread = in_thread(lambda: results.append(vcpu.run()))
        while not vcpu.running:
            time.sleep(0.001)
        if action == "pause":
            vm.pause()
            changes = vm.memory.changes
            time.sleep(0.02)
            assert vm.memory.changes == changes
            vm.resume()
        vcpu.kick()
        thread.join(40)
        assert results[0].cause == "kick"


def test_a_window_of_many_chunks_is_left_where_somebody_asks():
    """One chunk an entry, the vCPU having been asked to complete what is pending; more when the guest faults again."""
    with ScriptedVM() as vm:
        vm.memory.add(0, 1 << 30, guest_memfd=True, discard=False)
        convert = native.Convert(vm, window=1 << 30)
        vm.on_memory_fault(handler=convert)
        again = fault((1 << 18) - 1)._replace(second_half=True)  # given out although immediate_exit is set
        vcpu = vm.create_vcpu(0, [pio_out(1, b"x"), again])
        vcpu.run()
        assert vcpu.complete() is None
        assert (convert.pages, convert.faults) == (1 << 14, 1)
        run(vm, fault((1 << 18) - 1))
        assert (convert.pages, convert.conversions) == (1 << 18, 16)


@unsanitized("so much does not fit beside TSan's shadow")
def test_a_lock_that_somebody_holds_for_long():
    """The fault re-enters, and is no loop however often that happens; the hypercall waits. Both end as they should."""
    with ScriptedVM() as vm:
        vm.memory.add(0, 1 << 46, guest_memfd=True, discard=False)
        convert, stop = native.Convert(vm), threading.Event()
        vm.on_memory_fault(handler=convert)
        vm.on_hypercall(12, convert)

        def look():
            while not stop.is_set():
                vm.memory.ranges()

        thread = in_thread(look)
        try:
            for page in range(90):
                time.sleep(0.02)
                vcpu = vm.create_vcpu(page, [*[fault(page)] * 3, hypercall(12, (100 + page) * PAGE, 1, 16), hlt()])
                vcpu.fault_limit = 2  # of three faults, two may be duplicates
                assert isinstance(vcpu.run(), kvmexit.Hlt)
                if convert.busy >= 3:
                    break
        finally:
            stop.set()
            thread.join(60)
        assert convert.busy >= 3
        assert convert.hypercalls == page + 1
        assert all(vm.memory.is_private((100 + n) * PAGE) for n in range(page + 1))


def test_two_vcpus_convert_overlapping_ranges_in_opposite_directions():
    """Faults and hypercalls, windows and adaptive: in the end shadow is backend, and everything was answered natively."""
    for options in ({}, {"window": 16 * PAGE}, {"adaptive": True, "window": 64 * PAGE}):
        vm, recorded = machine()
        with vm:
            convert = native.Convert(vm, **options)
            vm.on_memory_fault(handler=convert)
            vm.on_hypercall(12, convert)
            chance = random.Random(11)
            count = stress(3000)
            vcpus = []
            for private in (True, False):
                steps = []
                for _ in range(count):
                    first = chance.choice([*range(129), *range(300, 428)])
                    end = 129 if first < 129 else 428
                    number = chance.randrange(1, min(end - first, 20) + 1)
                    steps.append(fault(first, number, private=private) if chance.random() < 0.7 else
                                 hypercall(12, first * PAGE, number, 16 * private))
                vcpus.append(vm.create_vcpu(int(private), [*steps, hlt()], keep=False))
            results = []
            threads = [in_thread(lambda vcpu=vcpu, results=results: results.append(vcpu.run())) for vcpu in vcpus]
            for thread in threads:
                thread.join(60)
            assert not any(thread.is_alive() for thread in threads)
            assert [type(exit) for exit in results] == [kvmexit.Hlt] * 2
            assert private_pages(vm) == recorded.private
            assert convert.failed == 0
            assert convert.hypercalls > 0
            raced = sum(vcpu.retries["race"] for vcpu in vcpus)
            assert convert.faults + convert.hypercalls + raced == 2 * count
            assert (convert.conversions, convert.pages) == (len(recorded.calls), sum(sizes(recorded)))


def test_faults_while_python_converts_and_slots_come_and_go():
    """Nothing but faults that pass, and in the end shadow is backend."""
    vm, recorded = machine()
    stop = threading.Event()
    with vm:
        vm.on_memory_fault(handler=lambda vcpu, fault: None)
        vm.on_memory_fault(handler=native.Convert(vm, window=1 << 30))
        steps = [fault(page, private=page % 2 == 0) for page in (*range(0, 129, 3), *range(1 << 18, (1 << 18) + 8))]
        vcpu = vm.create_vcpu(0, steps, repeat=FOR_EVER, keep=False)
        thread = in_thread(vcpu.run)

        def churn():
            while not stop.is_set():
                vm.memory.remove(vm.memory.add(1 << 30, 4 * PAGE, guest_memfd=True))

        def convert():
            while not stop.is_set():
                vm.memory.convert(0, 129 * PAGE, private=True)
                vm.memory.convert(10 * PAGE, 300 * PAGE, private=False)

        others = [in_thread(churn), in_thread(convert)]
        stop.wait(stress(10) / 50)
        stop.set()
        vcpu.kick()
        for t in [thread, *others]:
            t.join(30)
        assert not any(t.is_alive() for t in [thread, *others])
        assert private_pages(vm) == recorded.private
