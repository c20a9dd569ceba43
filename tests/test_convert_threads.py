"""Conversions and other threads: races that are lost, close(), signals, the GIL."""

import contextlib
import errno
import sys
import threading
import time

import pytest
from guests import Typed, stress
from processes import SANITIZER, in_thread, leaks, needs_gil, python

import kvmexit
from kvmexit import ConversionError
from kvmexit.testing import RecordedAttributes, ScriptedVM, ScriptStep, memory_fault

PAGE = 4096

HUGE = 1 << (40 if SANITIZER else 42)  # bytes; takes some tenths of a second to convert. More does not fit beside TSan's shadow


# ---- races that are lost ----

MEANWHILE = [ScriptStep(errno=errno.EAGAIN)] * 10_000  # the vCPU is in the guest for so long


@contextlib.contextmanager
def somebody_converts(vm, gpa):
    """Another thread converts a page back and forth."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            for private in (True, False):
                vm.memory.convert(gpa, PAGE, private=private)
                time.sleep(0)

    thread = in_thread(work)
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


FAULTS = {
    "what it asks for is so": (memory_fault(4 * PAGE, private=True), True),
    "shared": (memory_fault(2 * PAGE, 2 * PAGE), True),
    "within a page": (memory_fault(5 * PAGE - 1, 2, private=True), True),
    "the last page there is": (memory_fault((1 << 64) - PAGE, private=True), True),
    "it is not so": (memory_fault(2 * PAGE, private=True), False),
    "not all of it is so": (memory_fault(4 * PAGE, 4 * PAGE, private=True), False),
    "the beginning is not so": (memory_fault(3 * PAGE, 2 * PAGE, private=True), False),
    "goes beyond the slot": (memory_fault(15 * PAGE, 2 * PAGE), False),
    "no slot": (memory_fault(20 * PAGE), False),
    "begins before the slot": (memory_fault((1 << 64) - 3 * PAGE, 2 * PAGE, private=True), False),
    "size 0": (memory_fault(4 * PAGE, 0, private=True), False),
    "wraps": (memory_fault((1 << 64) - PAGE, 2 * PAGE, private=True), False),
    "wraps to all but a page": (memory_fault(5 * PAGE, (1 << 64) - PAGE, private=True), False),
    "poisoned": (memory_fault(4 * PAGE, private=True, errno=133), False),
    "bare": (ScriptStep(errno=errno.EFAULT), False),
    "another exit before it": (ScriptStep(5, b"\x08" + bytes(7), errno=errno.EFAULT), False),
}


@pytest.mark.parametrize(("fault", "loses"), FAULTS.values(), ids=FAULTS)
def test_a_fault_whose_range_was_converted_meanwhile_just_re_enters(fault, loses):
    """Without the handler, counted in retries; any other fault comes to the handler, whatever others convert. Beside each
    fault comes one that is known to lose its race, so that a conversion was made meanwhile more often than not."""
    with ScriptedVM() as vm:
        vm.memory.add(0, 16 * PAGE, guest_memfd=True)
        vm.memory.add((1 << 64) - 2 * PAGE, 2 * PAGE, guest_memfd=True)
        vm.memory.convert(4 * PAGE, 3 * PAGE, private=True)
        vm.memory.convert((1 << 64) - 2 * PAGE, 2 * PAGE, private=True)
        losing = memory_fault(6 * PAGE, private=True, rip=1)
        seen = []
        vm.on(kvmexit.Exit, lambda vcpu, exit: seen.append(vcpu.regs.rip))
        repeat = 50
        for attempt in range(100):
            vcpu = vm.create_vcpu(attempt, [*MEANWHILE, fault, *MEANWHILE, losing], repeat=repeat, keep=False)
            seen.clear()
            with somebody_converts(vm, 10 * PAGE), pytest.raises(kvmexit.KvmError):  # the end of the script
                vcpu.run()
            assert len(seen) + vcpu.retries["race"] == 2 * repeat
            assert seen.count(0) == repeat or loses
            if seen.count(1) < repeat / 2 and (seen.count(0) < repeat / 2 or not loses):
                break
        else:
            raise AssertionError("no races were lost")


@pytest.mark.parametrize("fault", [fault for fault, loses in FAULTS.values() if loses])
def test_without_a_conversion_meanwhile_the_fault_is_the_handlers(scripted, fault):
    """Also when one was made before the vCPU entered, or in the handler: what is so already does not help this guest."""
    scripted.memory.add(0, 16 * PAGE, guest_memfd=True)
    scripted.memory.add((1 << 64) - 2 * PAGE, 2 * PAGE, guest_memfd=True)
    scripted.memory.convert(4 * PAGE, 3 * PAGE, private=True)
    scripted.memory.convert((1 << 64) - 2 * PAGE, 2 * PAGE, private=True)
    seen = []

    def handler(vcpu, fault):
        seen.append(fault.gpa)
        scripted.memory.convert(10 * PAGE, PAGE, private=len(seen) % 2 == 1)

    scripted.on_memory_fault(handler=handler)
    vcpu = scripted.create_vcpu(0, [*MEANWHILE, fault], repeat=20)
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert (len(seen), vcpu.retries["race"]) == (20, 0)


@pytest.mark.parametrize(("type", "comes"), [("SW_PROTECTED", False), ("SNP", True)])
def test_where_the_guest_has_no_say_any_fault_during_a_conversion_is_a_lost_race(type, comes):
    """KVM compares the attribute with itself there: that they differ says only that it has changed between two looks. An SNP
    guest's fault says what it wants. Without a conversion meanwhile it is the handlers' in both."""
    with Typed(kvmexit.VMType[type], RecordedAttributes()) as vm:
        vm.memory.add(0, 16 * PAGE, guest_memfd=True)
        fault = memory_fault(2 * PAGE, private=True)  # the page is shared, so another type of VM would be asked to convert it
        repeat = 50
        for attempt in range(100):
            seen = []
            route = vm.on_memory_fault(handler=lambda vcpu, fault, seen=seen: seen.append(fault.gpa))
            vcpu = vm.create_vcpu(attempt, [*MEANWHILE, fault], repeat=repeat, keep=False)
            with somebody_converts(vm, 10 * PAGE), pytest.raises(kvmexit.KvmError):
                vcpu.run()
            route.remove()
            assert len(seen) + vcpu.retries["race"] == repeat
            if comes or len(seen) < repeat / 2:
                break
        else:
            raise AssertionError("no races were lost")
        assert vcpu.retries["race"] == 0 or not comes
        quiet = vm.create_vcpu(attempt + 1, [fault])
        assert quiet.run().gpa == 2 * PAGE


@pytest.mark.parametrize(
    ("take", "says"),
    [(lambda vm, slot: vm.memory.remove(slot), "no slot covers"), (lambda vm, slot: slot.close_guest_memfd(), "no guest_memfd")],
    ids=["remove", "close_guest_memfd"],
)
def test_what_goes_away_during_a_huge_conversion_is_missed(take, says):
    """Each step looks again: a range whose end is no longer there is not reported as converted."""
    error = None
    for _ in range(100):  # it may go too late
        with ScriptedVM() as vm:
            vm.memory.add(0, HUGE, guest_memfd=True, discard=False)
            slot = vm.memory.add(HUGE, PAGE, guest_memfd=True, discard=False)
            begun = vm.memory.changes + 10

            def take_it(vm=vm, slot=slot, begun=begun):
                while vm.memory.changes < begun:
                    pass
                take(vm, slot)

            thread = in_thread(take_it)
            try:
                vm.memory.convert(0, HUGE + PAGE, private=True)
            except ConversionError as caught:
                error = caught
                break
            finally:
                thread.join(30)
    assert says in str(error)
    assert (error.done, error.errno) == (HUGE, None)


# ---- the GIL ----


@needs_gil("nobody waits for anybody")
def test_a_conversion_of_many_steps_lets_others_run(scripted):
    """Another Python thread counts while it lasts. No switch is forced here, so that what holds the GIL lets nobody count."""
    scripted.memory.add(0, HUGE, guest_memfd=True, discard=False)
    count, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    def counted(work):
        before = count[0]
        work()
        return count[0] - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = in_thread(tick)
    try:
        assert counted(lambda: sum(range(3_000_000))) == 0
        assert any(
            counted(lambda n=n: scripted.memory.convert(0, HUGE, private=n % 2 == 0)) > 10 for n in range(100)
        ), "the GIL was not released"
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join(30)


# ---- close() ----


def convert_until_closed(vm, n, size, errors):
    try:
        while True:
            for private in (True, False):
                vm.memory.convert(n * HUGE, size, private=private)
    except kvmexit.Error as error:
        errors.append(error)


def close_while_threads_convert(pages):
    vm, errors, size = ScriptedVM(), [], pages * PAGE
    for n in range(2):
        vm.memory.add(n * HUGE, size, guest_memfd=True, discard=pages == 1000)
    threads = [in_thread(lambda n=n: convert_until_closed(vm, n // 2, size, errors)) for n in range(4)]
    while vm.memory.changes < 20:
        time.sleep(0)
    vm.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert [str(error) for error in errors] == ["this VM is closed"] * 4
    notes = [note for error in errors for note in getattr(error, "__notes__", [])]
    assert all(f"size {size:#x} to " in note and note.endswith(" bytes done") for note in notes)
    assert notes or size < HUGE  # who was at it says so
    vm.close()


@pytest.mark.parametrize("pages", [1, 1000, HUGE // PAGE])
def test_close_while_threads_convert(pages):
    """Again and again: they end with a typed error that says how far they got; nothing leaks, nobody hangs."""
    rounds = max(stress(20), 10)
    for _ in range(5):  # the C library keeps stacks and heaps of threads
        close_while_threads_convert(pages)
    descriptors, mappings = leaks()
    for _ in range(rounds):
        close_while_threads_convert(pages)
    assert leaks()[0] == descriptors
    assert leaks()[1] < mappings + rounds


@pytest.mark.parametrize("what", ["ranges()", "is_private(0)"])
def test_close_waits_for_who_looks(what):
    """The table is looked through without the GIL. In a process of its own: it crashed."""
    done = python(f"""
import kvmexit
from processes import in_thread
from kvmexit.testing import ScriptedVM
for _ in range(10):
    vm = ScriptedVM()
    vm.memory.add(0, {HUGE}, guest_memfd=True, discard=False)
    looked, errors = [], []
    def look():
        try:
            while True:
                vm.memory.{what}
                looked.append(1)
        except kvmexit.Error as error:
            errors.append(str(error))
    thread = in_thread(look)
    while not looked:
        pass
    vm.close()
    thread.join(30)
    assert errors == ["this VM is closed"], errors
print("done")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


# ---- signals ----

INTERRUPTED = """
import os, random, signal, time, kvmexit
from guests import Typed, stress
from kvmexit.testing import RecordedAttributes, ScriptedVM

armed = False

def handle(number, frame):
    if armed:
        raise InterruptedError

def interrupted(work, most):
    # Call work() with a signal handler that raises within `most` seconds.
    global armed
    armed = True
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, most))
            work()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except InterruptedError:
        return True
    return False

signal.signal(signal.SIGALRM, handle)
"""


def test_an_interrupted_add_or_remove_leaves_one_table():
    """The slots, what the converter knows of them, the memslot numbers and the descriptors: as many at any moment."""
    done = python(INTERRUPTED + """
vm = ScriptedVM()
before, count = len(os.listdir("/proc/self/fd")), 0
ends = time.monotonic() + stress(2)
while time.monotonic() < ends:
    count += interrupted(lambda: vm.memory.remove(vm.memory.add(0, 1 << 18, guest_memfd=True)), 150e-6)
    there = [(slot.gpa, slot.size) for slot in vm.memory.slots]
    assert there == [(r.gpa, r.size) for r in vm.memory.ranges()], (there, vm.memory.ranges())
    assert len(os.listdir("/proc/self/fd")) == before + len(there)
    if there:
        vm.memory.remove(0)
assert count
print("done", vm.memory.add(0, 4096).number)
""")
    assert (done.stdout, done.stderr) == ("done 0\n", "")


def test_an_interrupted_close_of_a_guest_memfd_closes_it_or_not():
    """It was taken from the slot, and then kept by nobody."""
    done = python(INTERRUPTED + """
vm = ScriptedVM()
before, count = len(os.listdir("/proc/self/fd")), 0
ends = time.monotonic() + stress(1)
while time.monotonic() < ends:
    slot = vm.memory.add(0, 4096, guest_memfd=True)
    count += interrupted(slot.close_guest_memfd, 8e-6)
    assert len(os.listdir("/proc/self/fd")) == before + (slot.guest_memfd is not None)
    vm.memory.remove(slot)
print("done" if count else "no interruption")
""")
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_ctrl_c_ends_a_conversion_between_two_steps():
    """KeyboardInterrupt says how far it got: to there, and no further, the backend was asked. The VM goes on."""
    done = python(f"""
import os, re, signal
from processes import in_thread
from kvmexit.testing import RecordedAttributes, ScriptedVM

recorded = RecordedAttributes()
vm = ScriptedVM(attributes=recorded)
vm.memory.add(4096, {HUGE}, guest_memfd=True, discard=False)
notes = []
while not notes:  # it may have come too late
    vm.memory.convert(0, {HUGE} + 4096, private=False)
    began = vm.memory.changes
    def interrupt():
        while vm.memory.changes < began + 100:
            pass
        os.kill(os.getpid(), signal.SIGINT)
    thread = in_thread(interrupt)
    try:
        vm.memory.convert(4096, {HUGE}, private=True)
        thread.join()
        print("too late")
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
[note] = notes
far = int(re.fullmatch("conversion of gpa 0x1000, size {HUGE:#x} to private: (0x[0-9a-f]+) bytes done", note)[1], 16)
assert 0 < far < {HUGE}, far
gpa, size, private, error = recorded.calls[-1]
assert (gpa + size, private, error) == (4096 + far, True, 0)
assert vm.memory.ranges() == [(4096, far, True), (4096 + far, {HUGE} - far, False)]
vm.memory.convert(4096, {HUGE}, private=True)
assert recorded.calls[recorded.calls.index((gpa, size, private, error)) + 1][0] == 4096 + far
assert vm.memory.ranges() == [(4096, {HUGE}, True)]
vm.memory.remove(4096)
print("done")
""")
    assert (done.stdout.replace("too late\n", ""), done.stderr) == ("done\n", "")
