"""faults.Pager with mode="faults": a page comes since an access to it failed. Scripted, where KVM says the address, and real."""

import errno
import gc
import mmap
import os
import random
import signal
import sys
import threading
import time
import weakref

import pytest
from guests import CODE, Typed, load, stress
from processes import in_thread, leaks, needs_gil, python, unsanitized
from test_explain import x86_64
from test_pager import DATA, PAGE, PAGES, PATTERN, WALK, Touch, aim, source, words

import kvmexit
from kvmexit import Error, FaultLoopError, KvmError, faults, native
from kvmexit.faults import Pager, PagerError
from kvmexit.testing import (
    RecordedAttributes,
    ScriptedVM,
    failure,
    hlt,
    memory_fault,
    mmio_read,
    mmio_write,
    pio_out,
    spin,
)

pytestmark = pytest.mark.usefixtures("sigbus")
WINDOW = 4 * PAGE


@pytest.fixture(scope="session")
def sigbus():
    """Skips where there is no userfaultfd at all."""
    with ScriptedVM() as vm:
        try:
            Pager(vm.memory.add(0, PAGE), bytes(PAGE), mode="faults", vm=vm).close()
        except KvmError as error:
            if error.call != "userfaultfd":
                raise
            pytest.skip("this kernel has no userfaultfd" if error.errno == errno.ENOSYS else "userfaultfd is not permitted here")


def page(number):
    return PATTERN[number * PAGE : (number + 1) * PAGE]


def fault(number, **options):
    return memory_fault(DATA + number * PAGE, private=True, **options)


# ---- KVM says the address: scripted, so that it is so anywhere ----


class Guest:
    """A scripted VM with a slot that a Pager is for."""

    def __init__(self, failures=None):
        self.attributes = RecordedAttributes(failures)
        self.vm = ScriptedVM(attributes=self.attributes)
        self.slot = self.vm.memory.add(DATA, len(PATTERN))
        self.touch = Touch(self.slot.view)

    def pager(self, given=PATTERN, *, hasty=False, **options):
        """hasty: a fault that takes long is raised anew; else, since a script does not do that, it is waited for."""
        made = Pager(self.slot, given, **{"mode": "faults", "vm": self.vm, "window": WINDOW, **options})
        if not hasty:
            made._worker.wait_long(60_000)
        return made

    def vcpu(self, *steps):
        return self.vm.create_vcpu(len(self.vm._scripts), (*steps, hlt()))

    @property
    def calls(self):
        """What became private or shared, in pages."""
        return [((gpa - DATA) // PAGE, size // PAGE, private) for gpa, size, private, error in self.attributes.calls if not error]


@pytest.fixture
def guest():
    made = Guest()
    with made.vm:
        yield made


@pytest.mark.parametrize("kind", ["bytes", "callable", "path", "socket", "pipes"])
def test_a_memory_fault_brings_its_window(guest, kind, tmp_path):
    with source(kind, PATTERN, tmp_path) as given, guest.pager(given) as pager:
        vcpu = guest.vcpu(fault(5), fault(5), fault(6), fault(200))
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert guest.calls == [(0, PAGES, True), (4, 4, False), (200, 4, False)]
        assert pager.stats[:4] == (4, 2, 8, 8 * PAGE)
        for number in (4, 5, 6, 7, 200, 203):
            assert guest.touch(number) == page(number)
        assert guest.touch.fails(3)
        pager.fill_all()
        assert guest.calls[3:] == [(first, 4, False) for first in range(0, PAGES, 4) if first not in (4, 200)]
    assert guest.vm.memory.read(DATA, len(PATTERN)) == PATTERN
    assert guest.calls[-1] == (0, PAGES, False)


def test_what_the_host_reads_is_missing_and_no_zeros(guest):
    with guest.pager() as pager:
        with pytest.raises(KvmError, match="cannot be reached"):
            guest.vm.memory.read(DATA, 1)
        with pytest.raises(KvmError, match="cannot be reached"):
            guest.vm.memory.write(DATA, b"x")
        pager.prefetch(DATA, PAGE)
        assert guest.vm.memory.read(DATA, 7) == PATTERN[:7]


VIEW = """
import resource
from kvmexit import faults
from kvmexit.testing import ScriptedVM
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
vm = ScriptedVM()
slot = vm.memory.add(0, 8192)
with faults.Pager(slot, b"x" * 8192, window=4096, mode="faults", vm=vm) as pager:
    pager.prefetch(0, 4096)
    print(slot[0], flush=True)
    slot[4096]
"""


@unsanitized("it ends the process by a signal")
def test_a_view_of_what_is_missing_is_a_sigbus_and_does_not_wait():
    done = python(VIEW, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, f"{ord('x')}\n")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_in_the_slot_is_completed_as_memory(guest, size):
    at = 9 * PAGE + 24
    with guest.pager() as pager:
        vcpu = guest.vcpu(mmio_read(DATA + at, size), mmio_write(DATA + 20 * PAGE, b"\xa5" * size))
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert guest.vm.script(vcpu).left(0)[0][8 : 8 + size] == PATTERN[at : at + size]
        assert guest.vm.memory.read(DATA + 20 * PAGE, PAGE) == b"\xa5" * size + page(20)[size:]
        assert pager.stats.pages == 8


def test_what_is_not_the_pagers_passes(guest):
    other = guest.vm.memory.add(DATA + len(PATTERN), PAGE)
    with guest.pager() as pager:
        vcpu = guest.vcpu(
            mmio_read(DATA + 2 * PAGE - 4, 8),  # KVM does not do that
            memory_fault(other.gpa, private=True), fault(3, errno=133), failure(errno.EFAULT),
        )  # fmt: skip
        exit = vcpu.run()
        assert isinstance(exit, kvmexit.Mmio)
        exit.data = 0
        assert vcpu.run().gpa == other.gpa
        assert vcpu.run().errno == 133
        assert pager.stats.faults == 0


def test_a_readonly_slot_takes_no_writes(scripted):
    slot = scripted.memory.add(DATA, PAGE, readonly=True)
    with Pager(slot, PATTERN[:PAGE], mode="faults", vm=scripted):
        vcpu = scripted.create_vcpu(0, [mmio_read(DATA, 8), mmio_write(DATA, b"x")])
        assert vcpu.run().is_write
        assert scripted.script(vcpu).left(0)[0][8:16] == PATTERN[:8]


@pytest.mark.parametrize("kind", ["bytes", "path"])
@needs_gil("there is none to hold")
def test_it_needs_no_gil(guest, kind, tmp_path):
    """The vCPU answers faults and MMIO while a thread that does not let go of the GIL waits for that."""
    counter, usual = native.Counter(), sys.getswitchinterval()
    guest.vm.on_pio(0x80, 1, native.Ignore())
    guest.vm.on_pio(0x80, 1, counter)
    with source(kind, PATTERN, tmp_path) as given, guest.pager(given) as pager:
        vcpu = guest.vcpu(*map(fault, range(0, 80, 4)), mmio_read(DATA + 99 * PAGE, 8), pio_out(0x80, b"x"), spin())
        ended = time.monotonic() + 60
        try:
            sys.setswitchinterval(1000)
            thread = in_thread(vcpu.run)
            while not vcpu.running and time.monotonic() < ended:
                time.sleep(0)  # whoever runs has let go of the GIL by itself
            while not counter.writes and time.monotonic() < ended:
                pass
            assert counter.writes == 1
        finally:
            sys.setswitchinterval(usual)
            vcpu.kick()
            thread.join()
        assert pager.stats.pages == 84


def test_two_vcpus_on_one_page_are_one_question(guest):
    asked, both = [], threading.Barrier(2)

    def give(offset, size):
        asked.append(offset)
        both.wait(30)  # the second vCPU has had its fault, or is about to
        return PATTERN[offset : offset + size]

    with guest.pager(give) as pager:
        vcpus = [guest.vcpu(fault(8)), guest.vcpu(pio_out(0x80, b"x"), fault(8))]

        @guest.vm.on_pio(0x80, 1)
        def meet(vcpu, io):
            both.wait(30)

        threads = [in_thread(lambda vcpu=vcpu: vcpu.run()) for vcpu in vcpus]
        for thread in threads:
            thread.join()
        assert asked == [8 * PAGE]
        assert (pager.stats.fetches, pager.stats.pages) == (1, 4)


# ---- sources that fail ----


def fails_at(*numbers):
    bad, error = set(numbers), LookupError("gone")

    def give(offset, size):
        if bad & set(range(offset // PAGE, (offset + size) // PAGE)):
            raise error
        return PATTERN[offset : offset + size]

    give.bad, give.error = bad, error
    return give


@pytest.mark.parametrize("step", [fault(5), mmio_read(DATA + 5 * PAGE + 16, 8)])
def test_run_raises_what_the_source_did_not_give(guest, step):
    give = fails_at(5)
    with guest.pager(give) as pager:
        vcpu = guest.vcpu(step)
        for _ in range(3):  # it is not asked for again, nor does the vCPU go on
            with pytest.raises(PagerError, match=r"it raised LookupError\('gone'\)") as caught:
                vcpu.run()
            assert (caught.value.gpa, caught.value.size, caught.value.offset) == (DATA + 5 * PAGE, PAGE, 5 * PAGE)
            assert caught.value.__cause__ is give.error
            assert pager.stats.errors == 1
        give.bad.clear()
        pager.retry()
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert guest.touch(5) == page(5)


@pytest.mark.parametrize(("give", "why"), [(lambda offset, size: b"", "it gave 0x0 of 0x1000"),
                                           (lambda offset, size: bytes(size + 1), "it gave more than the 0x1000")])  # fmt: skip
def test_too_little_and_too_much(guest, give, why):
    with guest.pager(give), pytest.raises(PagerError, match=why):
        guest.vcpu(fault(0)).run()


def test_a_file_that_was_truncated(guest, tmp_path):
    path, told = tmp_path / "source", []
    path.write_bytes(PATTERN)
    heard = threading.Event()

    def on_error(error):
        told.append(str(error))
        heard.set()

    with guest.pager(path, on_error=on_error) as pager:
        os.truncate(path, 6 * PAGE)
        vcpu = guest.vcpu(fault(5), fault(6), fault(7))
        assert vcpu.run().gpa == DATA + 6 * PAGE  # on_error: it is the caller's, not raised
        assert vcpu.run().gpa == DATA + 7 * PAGE
        assert guest.touch(5) == page(5)  # and its window's others were not
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        ended = time.monotonic() + 30
        while len(told) < 2 and time.monotonic() < ended:
            heard.wait(1)
        assert told == [str(error) for error in pager.errors]
        assert len(told) == 2


def test_with_on_error_the_next_handler_is_asked(guest):
    seen = []

    @guest.vm.on_fault(DATA, len(PATTERN))
    def repair(vcpu, fault):
        seen.append((fault.gpa, type(pager.error_at(fault.gpa).__cause__)))
        give.bad.clear()
        pager.retry()

    give = fails_at(7)
    with guest.pager(give, on_error=lambda error: None) as pager:
        assert isinstance(guest.vcpu(fault(7), fault(7), mmio_read(DATA + 7 * PAGE, 1)).run(), kvmexit.Hlt)
    assert seen == [(DATA + 7 * PAGE, LookupError)]


def test_kvm_refuses_the_attributes(tmp_path):
    before = leaks()[0]
    guest = Guest({1: errno.ENOMEM})
    with guest.vm, pytest.raises(KvmError, match="KVM_SET_MEMORY_ATTRIBUTES"):
        guest.pager()
    assert guest.touch(0) == bytes(PAGE)  # it has not become inaccessible
    del guest.touch
    assert leaks()[0] == before

    guest = Guest({2: errno.ENOMEM, 3: errno.EBUSY})
    with guest.vm, guest.pager() as pager:
        vcpu = guest.vcpu(fault(5), fault(6))
        with pytest.raises(PagerError, match=r"Device or resource busy \(errno 16\) from KVM_SET_MEMORY_ATTRIBUTES"):
            vcpu.run()
        pager.retry()
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert guest.calls[1:] == [(4, 4, False)]
        assert [guest.touch(number) for number in range(4, 8)] == [page(number) for number in range(4, 8)]


def test_a_window_of_which_a_part_came(guest, tmp_path):
    """What came of it is PRIVATE still, until it is asked for."""
    path = tmp_path / "source"
    path.write_bytes(PATTERN)
    with open(path, "r+b") as file:
        given = mmap.mmap(file.fileno(), 0)
        os.truncate(path, 6 * PAGE)
    with guest.pager(given):
        vcpu = guest.vcpu(fault(5), fault(4), fault(6))
        with pytest.raises(PagerError, match="Bad address .* from UFFDIO_COPY") as caught:
            vcpu.run()
        assert caught.value.gpa == DATA + 6 * PAGE
        assert guest.calls[1:] == [(5, 1, False), (4, 1, False)]
        assert (guest.touch(4), guest.touch(5)) == (page(4), page(5))


def test_a_window_that_kvm_refuses_comes_as_a_page():
    guest = Guest({2: errno.ENOMEM})
    with guest.vm, guest.pager() as pager:
        assert isinstance(guest.vcpu(fault(5), fault(6)).run(), kvmexit.Hlt)
        assert guest.calls[1:] == [(5, 1, False), (6, 2, False)]
        assert not pager.errors


# ---- sources that block ----


@pytest.mark.parametrize("step", [fault(5), mmio_read(DATA + 5 * PAGE, 8)])
@pytest.mark.parametrize("how", ["kick", "timeout", "pause", "close"])
def test_a_source_that_blocks_does_not_hold_up_who_wants_the_vcpu(guest, step, how):
    asked, go_on, exits = threading.Event(), threading.Event(), []

    def give(offset, size):
        asked.set()
        go_on.wait(60)
        return PATTERN[offset : offset + size]

    pager = guest.pager(give, hasty=how != "close")
    vcpu = guest.vcpu(*[step] * 3, spin())  # a fault that took long is raised anew
    thread = in_thread(lambda: exits.append(vcpu.run(timeout=0.01 if how == "timeout" else 60)))
    assert asked.wait(30)
    if how == "kick":
        vcpu.kick()
        thread.join()
        assert exits[0].cause == "kick"
    elif how == "timeout":
        thread.join()
        assert exits[0].cause == "timeout"
    elif how == "pause":
        guest.vm.pause()
        assert vcpu.running
        guest.vm.resume()
        vcpu.kick()
        thread.join()
    else:
        faults._pager._PATIENCE, patience = 0.01, faults._pager._PATIENCE
        closer = in_thread(pager.close)
        thread.join(30)  # half of what it would wait for the source
        faults._pager._PATIENCE = patience
        assert exits
        closer.join()
        assert isinstance(exits[0], (kvmexit.MemoryFault, kvmexit.Mmio))
    go_on.set()
    pager.close()


def test_an_mmio_read_that_was_interrupted_is_answered_later(guest):
    asked, go_on = threading.Event(), threading.Event()

    def give(offset, size):
        asked.set()
        go_on.wait(60)
        return PATTERN[offset : offset + size]

    with guest.pager(give, hasty=True):
        vcpu = guest.vcpu(mmio_read(DATA + 5 * PAGE, 8))
        kicker = in_thread(lambda: asked.wait(30) and vcpu.kick())
        assert vcpu.run(timeout=60).cause == "kick"
        kicker.join()
        assert vcpu.run(timeout=0).cause == "timeout"
        go_on.set()
        assert isinstance(vcpu.run(timeout=60), kvmexit.Hlt)
        assert guest.vm.script(vcpu).left(0)[0][8:16] == page(5)[:8]


def test_a_source_that_takes_long_is_no_fault_loop(guest):
    """Each tick re-enters with the same fault: more of them than fault_limit allows."""
    go_on, entered = threading.Event(), threading.Event()

    def give(offset, size):
        go_on.wait(60)
        return PATTERN[offset : offset + size]

    guest.vm.on_pio(0x80, 1, lambda vcpu, io: entered.set())
    with guest.pager(give, hasty=True) as pager:
        vcpu = guest.vcpu(*[fault(5)] * 4, pio_out(0x80, b"x"), fault(5))
        vcpu.fault_limit = 2
        thread = in_thread(vcpu.run)
        assert entered.wait(60)
        go_on.set()
        thread.join()
        assert pager.stats.pages == 4


def test_a_fault_that_the_page_does_not_mend_is_a_fault_loop(guest):
    with guest.pager():
        vcpu = guest.vcpu(*[fault(5)] * 20)
        vcpu.fault_limit = 8
        with pytest.raises(FaultLoopError):
            vcpu.run()


# ---- ends ----


def test_close_leaves_the_rest_inaccessible_and_answers_nothing_any_more(guest):
    pager = guest.pager()
    pager.prefetch(DATA, PAGE)
    pager.close()
    pager.close()
    assert guest.touch(0) == page(0)
    assert guest.touch.fails(1)
    assert guest.calls[-1] == (0, PAGES, False)
    assert guest.vcpu(fault(3)).run().gpa == DATA + 3 * PAGE
    with Pager(guest.vm.memory.add(0, PAGE), PATTERN, mode="faults", vm=guest.vm):
        pass


def test_dropped_without_close(guest):
    before = leaks()[0]
    pager = guest.pager()
    worker, thread, gone = weakref.ref(pager._thread), pager._thread, weakref.ref(pager)
    guest.vcpu(fault(3)).run()
    del pager
    gc.collect()
    assert gone() is None
    thread.join(30)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert worker() is None
    assert leaks()[0] == before  # no route keeps anything of it
    assert guest.vcpu(fault(3)).run().gpa == DATA + 3 * PAGE
    assert guest.touch.fails(4)


def test_the_slot_is_removed_under_it(guest):
    with guest.pager() as pager:
        guest.vm.memory.remove(guest.slot)
        vcpu = guest.vcpu(fault(3), mmio_write(DATA, b"x"))
        assert vcpu.run().gpa == DATA + 3 * PAGE
        assert vcpu.run().slot is None
        pager.fill_all()
        assert pager.stats.missing == 0
    assert guest.calls[-1] == (0, PAGES, False)  # whatever is added there is not private


def test_the_vm_is_closed_under_it(guest):
    pager = guest.pager()
    guest.vm.close()
    pager.fill_all()
    assert guest.calls == [(0, PAGES, True)]  # there is nobody to ask any more
    pager.close()
    assert guest.touch(0) == page(0)


def test_fork(guest):
    with guest.pager() as pager:
        child = os.fork()
        if not child:
            status = 1
            try:
                pager.fill_all()
            except Error:
                pager.close()
                status = 0
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert isinstance(guest.vcpu(fault(3)).run(), kvmexit.Hlt)


@pytest.mark.parametrize("kind", ["bytes", "callable", "path"])
def test_stress_scripted(kind, tmp_path):
    """vCPUs that fault all over the slot, a prefetch, kicks, and a close() under way: each page once, and whole."""
    for round_ in range(stress(20)):
        rng, guest = random.Random(round_), Guest()
        steps = [[fault(rng.randrange(PAGES)) if rng.random() < 0.8 else mmio_read(DATA + rng.randrange(PAGES) * PAGE, 8)
                  for _ in range(300)] for _ in range(3)]  # fmt: skip
        with guest.vm, source(kind, PATTERN, tmp_path) as given, guest.pager(given, hasty=True, window=PAGE << rng.randrange(4)) as pager:
            vcpus = [guest.vcpu(*those) for those in steps]
            ended = []

            def run(vcpu, ended=ended):
                while isinstance(exit := vcpu.run(), kvmexit.Interrupted):
                    pass
                ended.append(exit)

            threads = [in_thread(lambda vcpu=vcpu: run(vcpu)) for vcpu in vcpus]
            for _ in range(20):
                for vcpu in vcpus:
                    vcpu.kick()
            if rng.random() < 0.3:
                pager.close()
            else:
                pager.fill_all()
            for thread in threads:
                thread.join(60)
            assert len(ended) == 3
            if not pager.closed:
                assert all(isinstance(exit, kvmexit.Hlt) for exit in ended)
                assert pager.stats.pages == PAGES
                assert guest.vm.memory.read(DATA, len(PATTERN)) == PATTERN


# ---- arguments ----


def test_bad_arguments(guest, scripted):
    for slot, options, text in (
        (guest.slot, {"mode": "fault"}, "must be 'userfaultfd' or 'faults'"),
        (guest.slot, {"mode": "userfaultfd"}, "vm= is for mode='faults'"), (guest.slot, {"vm": None}, "give their vm="),
        (guest.slot, {"vm": scripted}, "is not in the memory of"),
        (mmap.mmap(-1, PAGE), {}, "give a Slot; plain memory has mode='userfaultfd'"),
        (guest.vm.memory.add(0, PAGE, guest_memfd=True), {}, "has a guest_memfd"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Pager(slot, PATTERN, **{"mode": "faults", "vm": guest.vm, **options})


def test_without_iced_x86_it_says_so(guest, vm, monkeypatch):
    monkeypatch.setitem(sys.modules, "iced_x86", None)
    with guest.pager():
        pass  # KVM says the address
    slot = vm.memory.add(DATA, PAGE)
    with pytest.raises(Error, match=r"kvmexit\[faults\].*or use mode='userfaultfd'"):
        Pager(slot, bytes(PAGE), mode="faults", vm=vm)
    assert Touch(slot.view)(0) == bytes(PAGE)


def test_a_guest_that_shows_nothing():
    with Typed(kvmexit.VMType.SEV, kvmexit.SlotRebind()) as vm, pytest.raises(ValueError, match="a SEV guest's registers do not show"):
        Pager(vm.memory.add(DATA, PAGE), PATTERN, mode="faults", vm=vm)
    vm = Typed(kvmexit.VMType.SNP, RecordedAttributes())
    with vm, Pager(vm.memory.add(DATA, PAGE), PATTERN, mode="faults", vm=vm):
        vcpu = vm.create_vcpu(0, [memory_fault(DATA), failure(errno.EFAULT)])
        assert isinstance(vcpu.run(), kvmexit.UnexplainedFault)


UNPRIVILEGED = """
import os, kvmexit
from kvmexit import faults
from kvmexit.testing import ScriptedVM
os.setgroups([]); os.setgid(65534); os.setuid(65534)
vm = ScriptedVM()
slot = vm.memory.add(0, 4096)
with faults.Pager(slot, b"x" * 4096, mode="faults", vm=vm) as pager:
    pager.fill_all()
    print(vm.memory.read(0, 2))
"""


def test_it_needs_no_privilege():
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    done = python(UNPRIVILEGED)
    assert done.stdout == "b'xx'\n", done


# ---- where KVM says nothing, and explain() finds the page; or it does, on a kernel with private memory ----


@pytest.fixture(params=["bare", "annotated"])
def real(request, kvm):
    """A VM on /dev/kvm whose faults have no address, or have one."""
    if request.param == "bare":
        request.getfixturevalue("iced")
        return request.getfixturevalue("vm")
    vm = request.getfixturevalue("private_vm")

    class Unasked:
        def __init__(self, *anything):
            raise AssertionError("KVM said which page it was")

    request.getfixturevalue("monkeypatch").setattr(faults._pager, "Look", Unasked)
    return vm


@pytest.fixture
def bare(vm, iced):
    """The first of these only."""
    return vm


@pytest.mark.parametrize("cpl", [3, 0])
@pytest.mark.parametrize("kind", ["bytes", "callable", "path", "socket"])
def test_a_guest_walks(real, kind, cpl, tmp_path):
    vcpu = load(real, WALK, cpl=cpl)
    slot = real.memory.add(DATA, len(PATTERN))
    aim(vcpu, PAGES, 37 * PAGE)
    with source(kind, PATTERN, tmp_path) as given, Pager(slot, given, window=16 << 10, mode="faults", vm=real) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words()
        assert pager.stats.pages == PAGES
        assert pager.stats.fetches == PAGES // 4
    assert real.memory.read(DATA, len(PATTERN)) == PATTERN


def test_a_vcpu_that_waits_for_a_page_can_be_kicked(real):
    vcpu = load(real, WALK)
    slot = real.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    asked, go_on = threading.Event(), threading.Event()

    def give(offset, size):
        asked.set()
        go_on.wait(60)
        return PATTERN[offset : offset + size]

    with Pager(slot, give, mode="faults", vm=real) as pager:
        vcpu.fault_limit = 2
        assert vcpu.run(timeout=0.05).cause == "timeout"
        assert asked.wait(30)
        assert vcpu.run(timeout=0.5).cause == "timeout"
        kicker = in_thread(vcpu.kick)
        assert vcpu.run(timeout=60).cause == "kick"
        kicker.join()
        assert pager.stats.pages == 0
        go_on.set()
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words()


def test_run_raises_and_goes_on(real):
    vcpu = load(real, WALK)
    slot = real.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    give = fails_at(20, 21, 200)
    with Pager(slot, give, mode="faults", vm=real) as pager:
        for number in (20, 21, 200):
            for _ in range(2):
                with pytest.raises(PagerError) as caught:
                    vcpu.run(timeout=60)
                assert caught.value.gpa == DATA + number * PAGE
                assert vcpu.regs.rsi == number * PAGE
            give.bad.remove(number)
            pager.retry(DATA + number * PAGE, PAGE)
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words()
        assert pager.stats.errors == 3


def test_the_guest_can_be_told(real, iced):
    """on_error, and a handler that is older than the Pager: here it has the guest pass over what reads a lost page."""
    vcpu = load(real, WALK)
    slot = real.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    told, lost = [], []

    @real.on_fault(DATA, len(PATTERN))
    def tell(vcpu, fault):
        lost.append((fault.gpa, str(pager.error_at(fault.gpa)).partition(": ")[2]))
        fault.skip()

    with Pager(slot, fails_at(20, 77), mode="faults", vm=real, on_error=told.append, window=PAGE) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
    assert lost == [(DATA + number * PAGE, "it raised LookupError('gone')") for number in (20, 77)]
    assert vcpu.regs.rax == words() - sum(int.from_bytes(page(number)[:8], "little") for number in (20, 77)) & (1 << 64) - 1
    assert [error.gpa for error in told] == [gpa for gpa, _ in lost]


def test_discarded_pages_are_zeros(real, iced, monkeypatch):
    monkeypatch.setattr(faults._pager, "Look", faults._explain.Look)  # they are shared, so KVM says nothing
    vcpu = load(real, WALK)
    memory = mmap.mmap(-1, len(PATTERN), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    slot = real.memory.add(DATA, len(PATTERN), buffer=memory)
    with Pager(slot, PATTERN, mode="faults", vm=real) as pager:
        pager.fill_all()
        memory.madvise(mmap.MADV_DONTNEED, 10 * PAGE, 5 * PAGE)
        aim(vcpu)
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == words(PATTERN[: 10 * PAGE] + PATTERN[15 * PAGE :])


def test_after_close_a_guest_gets_no_zeros_and_goes_on(real):
    vcpu = load(real, WALK)
    slot = real.memory.add(DATA, len(PATTERN))
    aim(vcpu)
    with Pager(slot, PATTERN, window=PAGE, mode="faults", vm=real) as pager:
        pager.prefetch(DATA, 10 * PAGE)
    assert isinstance(vcpu.run(timeout=60), kvmexit.UnexplainedFault)
    assert vcpu.regs.rsi == 10 * PAGE
    aim(vcpu, 10)
    assert isinstance(vcpu.run(timeout=60), kvmexit.Io)


def test_what_the_delivery_of_an_exception_needs_is_brought(iced):
    """Not the instruction's own: a descriptor table. Scripted, since with shadow paging KVM looks there itself."""
    with ScriptedVM(attributes=kvmexit.SlotRebind()) as vm:  # which has no memory faults
        vm.memory.add(0, 1 << 16)[CODE : CODE + 2] = bytes.fromhex("0f 0b")  # ud2
        slot = vm.memory.add(DATA, len(PATTERN))
        vcpu = vm.create_vcpu(0, [failure(errno.EFAULT, rip=CODE)] * 3)
        x86_64(vcpu)
        vcpu.sregs.idt.base, vcpu.sregs.idt.limit = DATA + 7 * PAGE, 0xFF
        with Pager(slot, PATTERN, window=PAGE, mode="faults", vm=vm) as pager:
            assert isinstance(vcpu.run(), kvmexit.UnexplainedFault)  # tried once more: it is something else
            assert not pager._worker.lacks(7)
            assert pager.stats.pages == 1


def test_a_page_that_comes_while_it_is_looked_for(iced, monkeypatch):
    """Another vCPU is faster than the handler, twice: with the first page before it looks, with the next while it does."""

    class Overtaken:
        """A worker, but that page 9 has come when it is to be brought."""

        def __init__(self, worker):
            self.worker = worker

        def __getattr__(self, name):
            return getattr(self.worker, name)

        def bring(self, number):
            if number == 9:
                self.worker.prefetch(9, 1)
            return self.worker.bring(number)

    class Slow(faults._pager._Faults):
        def find(self, vcpu):
            self.worker = Overtaken(self.worker)
            return super().find(vcpu)

    monkeypatch.setattr(faults._pager, "_Faults", Slow)
    with ScriptedVM(attributes=kvmexit.SlotRebind()) as vm:
        vm.memory.add(0, 1 << 16)[CODE : CODE + 8] = bytes.fromhex("48 8b 03  48 8b 01  e6 f4")  # rax from [rbx], from [rcx]
        slot = vm.memory.add(DATA, len(PATTERN))
        vcpu = vm.create_vcpu(0, [failure(errno.EFAULT, rip=CODE), failure(errno.EFAULT, rip=CODE + 3), hlt()])
        x86_64(vcpu)
        vcpu.regs.rbx, vcpu.regs.rcx = DATA + 3 * PAGE, DATA + 9 * PAGE
        with Pager(slot, PATTERN, window=PAGE, mode="faults", vm=vm) as pager:
            pager.prefetch(DATA + 3 * PAGE, PAGE)
            assert isinstance(vcpu.run(), kvmexit.Hlt)
            assert pager.stats.pages == 2


OUT = "e6 f4"  # out 0xf4, al
ACCESSES = {
    "fetch": (OUT, [0], {}),
    "fetch over two pages": ("48 b8 88 77 66 55 44 33 22 11" + OUT, [0, 1], {"rip": DATA + PAGE - 4}),
    "operand over two pages": ("48 8b 03" + OUT, [4, 5], {"rbx": DATA + 5 * PAGE - 3}),
    "write": ("48 89 03" + OUT, [9], {"rbx": DATA + 9 * PAGE}),
    "push": ("50" + OUT, [11], {"rsp": DATA + 12 * PAGE}),
    "movsb": ("a4" + OUT, [20, 30], {"rsi": DATA + 20 * PAGE, "rdi": DATA + 30 * PAGE}),
    "rep movsq": ("f3 48 a5" + OUT, [20, 21, 22, 30, 31, 32],
                  {"rsi": DATA + 20 * PAGE + 8, "rdi": DATA + 30 * PAGE + 8, "rcx": 2 * PAGE // 8}),
    "lock add": ("f0 48 01 03" + OUT, [40], {"rbx": DATA + 40 * PAGE + 64}),
    "call through memory": ("ff 13", [50, 0], {"rbx": DATA + 50 * PAGE, "rsp": DATA + 60 * PAGE}),
}  # fmt: skip


def test_code_that_kvm_emulates(bare):
    vcpu = load(bare, b"", cpl=0)
    code = bytes.fromhex("48 ff c0" * 3 + OUT)  # inc rax; ...
    slot = bare.memory.add(DATA, len(PATTERN))
    vcpu.regs.rip, vcpu.regs.rax = DATA + PAGE - 5, 0
    data = bytearray(PATTERN)
    data[PAGE - 5 : PAGE - 5 + len(code)] = code
    with Pager(slot, data, window=PAGE, mode="faults", vm=bare) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert vcpu.regs.rax == 3
        assert pager.stats.pages == 2
        bare.memory.write(DATA, b"\x0f\xff\xff")  # ud0: an emulation that really fails
        vcpu.regs.rip = DATA
        assert not isinstance(vcpu.run(timeout=60), kvmexit.Interrupted)


@pytest.mark.parametrize("what", ACCESSES)
def test_accesses_of_every_kind(real, what):
    text, pages, registers = ACCESSES[what]
    code, data = bytes.fromhex(text), bytearray(PATTERN)
    fetches = what.startswith("fetch")
    vcpu = load(real, code)
    if fetches:
        at = registers.get("rip", DATA) - DATA
        data[at : at + len(code)] = code
        vcpu.regs.rip = DATA
    elif what.startswith("call"):
        data[50 * PAGE : 50 * PAGE + 8] = DATA.to_bytes(8, "little")
        data[:2] = bytes.fromhex(OUT)
        pages = [*pages, 59]
    for name, value in registers.items():
        setattr(vcpu.regs, name, value)
    slot = real.memory.add(DATA, len(PATTERN))
    with Pager(slot, data, window=PAGE, mode="faults", vm=real) as pager:
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert {number for number in range(PAGES) if not pager._worker.lacks(number)} == set(pages)


def test_bare_faults_of_other_memory_are_not_the_pagers(bare):
    """Nor one of a page that came and was protected since: each is tried once more where something has been filled, and then
    it is the caller's."""
    vcpu = load(bare, WALK)
    slot = bare.memory.add(DATA, len(PATTERN))
    other = mmap.mmap(-1, len(PATTERN), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    bare.memory.add(DATA * 2, len(PATTERN), buffer=other)
    with Pager(slot, PATTERN, mode="faults", vm=bare, window=PAGE) as pager:
        assert faults._reach.libc_call("mprotect", _address(other), PAGE, 0) == 0
        aim(vcpu)
        vcpu.regs.rbx = DATA * 2
        assert isinstance(vcpu.run(timeout=60), kvmexit.UnexplainedFault)
        assert pager.stats.faults == 0
        aim(vcpu)
        assert isinstance(vcpu.run(timeout=60), kvmexit.Io)
        assert faults._reach.libc_call("mprotect", slot.hva + 5 * PAGE, PAGE, 0) == 0
        aim(vcpu)
        assert isinstance(vcpu.run(timeout=60), kvmexit.UnexplainedFault)
        assert vcpu.regs.rsi == 5 * PAGE
        assert vcpu.stats.exits < 2 * PAGES


def _address(memory):
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.mark.parametrize("kind", ["bytes", "socket", "callable"])
def test_stress(real, kind, tmp_path):
    """Several vCPUs, each in its own order, while a prefetch runs and kicks come."""
    code = real.memory.add(0, 1 << 20)
    code[CODE : CODE + len(WALK)] = WALK
    vcpus = [real.create_vcpu(i) for i in range(3)]
    for round_ in range(stress(8)):
        rng = random.Random(round_)
        slot = real.memory.add(DATA, len(PATTERN))
        sums, done = {}, threading.Event()
        for vcpu in vcpus:
            kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
            aim(vcpu, PAGES, PAGE * rng.randrange(1, PAGES, 2), PAGE * rng.randrange(PAGES))

        def run(vcpu, sums=sums):
            while not isinstance(exit := vcpu.run(timeout=60), kvmexit.Io):
                assert exit.cause == "kick", exit
            sums[vcpu] = vcpu.regs.rax

        def kick(done=done):
            while not done.wait(0.001):
                for vcpu in vcpus:
                    vcpu.kick()

        window = PAGE << rng.randrange(5)
        with source(kind, PATTERN, tmp_path) as given, Pager(slot, given, window=window, mode="faults", vm=real) as pager:
            threads = [in_thread(lambda vcpu=vcpu: run(vcpu)) for vcpu in vcpus]
            kicker = in_thread(kick)
            pager.prefetch(DATA, len(PATTERN) // 2)
            for thread in threads:
                thread.join(100)
            done.set()
            kicker.join()
            assert pager.stats.pages == PAGES
        assert list(sums.values()) == [words()] * 3
        assert real.memory.read(DATA, len(PATTERN)) == PATTERN
        real.memory.remove(slot)
