"""Conversion against a simple model: scripted VMs with a recorded backend, and memslots rebound on the real /dev/kvm."""

import errno
import mmap
import os
import random
import threading

import pytest
from guests import CODE, load, stress
from processes import in_thread

import kvmexit
from kvmexit import ConversionError, SlotRebind, handlers
from kvmexit.testing import RecordedAttributes, ScriptedVM, hlt, hypercall, memory_fault

PAGE = 4096
TOP = (1 << 64) - 70 * PAGE
# where, how many pages, with guest_memfd: the first two adjoin, then a hole
SLOTS = [(0, 65, True), (65 * PAGE, 64, True), (200 * PAGE, 3, False), (300 * PAGE, 128, True), (TOP, 70, True)]


def machine(failures=None):
    """-> a scripted VM with SLOTS, and its backend."""
    recorded = RecordedAttributes(failures)
    vm = ScriptedVM(attributes=recorded)
    for gpa, pages, private in SLOTS:
        vm.memory.add(gpa, pages * PAGE, guest_memfd=private, discard=False)
    return vm, recorded


def private_pages(vm):
    return {gpa for r in vm.memory.ranges() if r.private for gpa in range(r.gpa, r.gpa + r.size, PAGE)}


def a_range(chance):
    gpa, pages, _ = chance.choice(SLOTS)
    first = chance.randrange(pages)
    count = chance.choice([1, 2, 63, 64, 65, pages, 140])
    return gpa + first * PAGE, min(count * PAGE, (1 << 64) - gpa - first * PAGE)


def convertible(gpa, size):
    able = {page for at, pages, private in SLOTS if private for page in range(at, at + pages * PAGE, PAGE)}
    return all(page in able for page in range(gpa, gpa + size, PAGE))


@pytest.mark.parametrize("failing", [False, True])
def test_the_shadow_is_what_the_backend_holds(failing):
    """Thousands of random ranges: shadow, backend and model agree after each, also where the backend failed; a call is a run
    that had the other state, as long as it can be."""
    chance = random.Random(7)
    failures = {n: errno.ENOMEM for n in range(1, 100000) if chance.random() < 0.2} if failing else {}
    vm, recorded = machine(failures)
    model, failed, calls = set(), 0, 0
    with vm:
        for _ in range(stress(3000)):
            gpa, size = a_range(chance)
            private = chance.random() < 0.5
            pages = range(gpa, gpa + size, PAGE)
            try:
                vm.memory.convert(gpa, size, private=private)
                done = size
            except ConversionError as error:
                done = error.done
                if error.errno is None:
                    assert private
                    assert not convertible(gpa, size)
                    done = 0
                else:
                    failed += error.errno == errno.ENOMEM
            else:
                assert not private or convertible(gpa, size)
            for page in pages[: done // PAGE]:
                owned = any(at <= page < at + n * PAGE and able for at, n, able in SLOTS)
                (model.add if private and owned else model.discard)(page)
            assert private_pages(vm) == recorded.private == model
            assert vm.memory.is_private(gpa) == (gpa in model)
            log = recorded.calls
            for at, length, _, _ in log[calls:]:
                assert gpa <= at
                assert at + length <= gpa + size
            calls = len(log)
    assert bool(failed) == failing


def test_runs_are_merged_across_slots_and_nothing_is_asked_twice():
    """One call over two adjoining slots; what is so already costs none; a hole parts them."""
    vm, recorded = machine()
    with vm:
        vm.memory.convert(60 * PAGE, 20 * PAGE, private=True)
        vm.memory.convert(60 * PAGE, 20 * PAGE, private=True)
        assert recorded.calls == [(60 * PAGE, 20 * PAGE, True, 0)]
        vm.memory.convert(300 * PAGE, PAGE, private=True)
        vm.memory.convert(0, 400 * PAGE, private=False)
        assert recorded.calls[2:] == [(60 * PAGE, 20 * PAGE, False, 0), (300 * PAGE, PAGE, False, 0)]


def test_huge_ranges_go_in_steps(scripted):
    """A failure in the third step says how far it got, and asking again goes on from there."""
    recorded = RecordedAttributes({3: errno.ENOMEM})
    with ScriptedVM(attributes=recorded) as vm:
        vm.memory.add(0, 1 << 30, guest_memfd=True)
        with pytest.raises(ConversionError, match="Cannot allocate memory") as caught:
            vm.memory.convert(0, 1 << 30, private=True)
        assert (caught.value.done, caught.value.errno) == (2 << 26, errno.ENOMEM)
        assert vm.memory.ranges()[0] == (0, 2 << 26, True)
        vm.memory.convert(0, 1 << 30, private=True)
        assert vm.memory.ranges() == [(0, 1 << 30, True)]
        assert {size for _, size, _, _ in recorded.calls} == {1 << 26}


@pytest.mark.parametrize(
    ("gpa", "size", "error", "says"),
    [
        (1, PAGE, ValueError, "multiple"), (0, 0, ValueError, "positive"), (0, PAGE + 1, ValueError, "positive"),
        (-PAGE, PAGE, ValueError, "64-bit"), ((1 << 64) - PAGE, 2 * PAGE, ValueError, "wraps"),
        (129 * PAGE, PAGE, ConversionError, "no slot covers gpa 0x81000"), (0, 130 * PAGE, ConversionError, "no slot"),
        (200 * PAGE, PAGE, ConversionError, "add it with guest_memfd=True"),
    ],
)  # fmt: skip
def test_bad_ranges_are_named_and_nothing_is_done(gpa, size, error, says):
    """Before the first call."""
    vm, recorded = machine()
    with vm:
        with pytest.raises(error, match=says):
            vm.memory.convert(gpa, size, private=True)
        with pytest.raises(TypeError, match="True or False"):
            vm.memory.convert(0, PAGE, private=1)
        assert recorded.calls == []


def test_a_vm_without_private_memory_says_so(vm):
    """To-shared is a no-op; to-private a ConversionError with what to do."""
    if vm.check(233):
        pytest.skip("this VM type has private memory")
    vm.memory.add(0, PAGE)
    vm.memory.convert(0, 1 << 30, private=False)
    with pytest.raises(ConversionError, match=r"KVM_CAP_MEMORY_ATTRIBUTES.*SlotRebind"):
        vm.memory.convert(0, PAGE, private=True)


def backing(kind):
    """-> add() arguments, and what reads the shared side's byte 0 of page 1 from outside."""
    if kind == "fd":
        fd = os.memfd_create("shared")
        os.ftruncate(fd, 3 * PAGE)
        return {"fd": fd}, lambda: os.pread(fd, 1, PAGE)
    flags = mmap.MAP_SHARED if kind == "shared buffer" else mmap.MAP_PRIVATE
    buffer = mmap.mmap(-1, 3 * PAGE, flags=flags | mmap.MAP_ANONYMOUS)
    return {"buffer": buffer}, lambda: buffer[PAGE : PAGE + 1]


@pytest.mark.parametrize("kind", ["fd", "shared buffer", "private buffer"])
@pytest.mark.parametrize("discard", [True, False, None])
def test_a_callers_memory_is_discarded_only_where_it_was_said(scripted, kind, discard):
    """And only the pages converted; without a word they cannot become private."""
    arguments, read = backing(kind)
    slot = scripted.memory.add(0, 3 * PAGE, guest_memfd=True, discard=discard, **arguments)
    slot[0] = slot[PAGE] = slot[2 * PAGE] = 0x41
    if discard is None:
        with pytest.raises(ConversionError, match="discard=True or False"):
            scripted.memory.convert(PAGE, PAGE, private=True)
    else:
        scripted.memory.convert(PAGE, PAGE, private=True)
    assert read() == (b"\0" if discard else b"A")
    assert (slot[0], slot[2 * PAGE]) == (0x41, 0x41)


def test_both_sides_are_discarded(scripted):
    """Anonymous memory, and the private side's file: zeros after a round trip, the blocks given back."""
    slot = scripted.memory.add(0, 3 * PAGE, guest_memfd=True)
    slot[PAGE] = 1
    scripted.memory.convert(0, 3 * PAGE, private=True)
    assert slot[PAGE] == 0
    os.pwrite(slot.guest_memfd, b"x" * 3 * PAGE, 0)
    scripted.memory.convert(PAGE, PAGE, private=False)
    assert os.pread(slot.guest_memfd, 3 * PAGE, 0) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert os.fstat(slot.guest_memfd).st_blocks == 2 * PAGE // 512


def test_a_discard_that_fails_puts_the_attributes_back():
    """Locked pages cannot be dropped: the guest stays where its data is."""
    recorded = RecordedAttributes()
    with ScriptedVM(attributes=recorded) as vm:
        buffer = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        slot = vm.memory.add(0, PAGE, guest_memfd=True, buffer=buffer, discard=True)
        slot[0] = 9
        lock(slot.hva, PAGE)
        with pytest.raises(ConversionError, match="attributes were put back") as caught:
            vm.memory.convert(0, PAGE, private=True)
        assert (caught.value.errno, caught.value.done) == (errno.EINVAL, 0)
        assert (slot[0], vm.memory.is_private(0), recorded.private) == (9, False, set())


def lock(address, size):
    import ctypes

    sys_mlock = ctypes.c_long(149)  # not libc's mlock(): under a sanitizer that does nothing
    assert ctypes.CDLL(None).syscall(sys_mlock, ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


# ---- memslots rebound ----

# mov al, [rdi]; out 0x80, al; jmp back
READ = bytes.fromhex("8a 07  e6 80  eb fa")


@pytest.fixture
def rebinding(kvm):
    with kvmexit.VM(attributes=SlotRebind()) as made:
        yield made


def test_a_guest_sees_the_side_that_the_shadow_says(rebinding):
    """After hundreds of random conversions, every page; memory outside the range keeps its data."""
    vcpu = load(rebinding, READ)
    slot = rebinding.memory.add(0x200000, 32 * PAGE, guest_memfd=True, discard=False)
    for page in range(32):
        slot[page * PAGE] = 0x11
        os.pwrite(slot.guest_memfd, b"\x22", page * PAGE)
    chance = random.Random(3)
    model = [False] * 32
    for _ in range(stress(150)):
        first = chance.randrange(32)
        count = chance.randrange(1, 33 - first)
        private = chance.random() < 0.5
        rebinding.memory.convert(0x200000 + first * PAGE, count * PAGE, private=private)
        model[first : first + count] = [private] * count
    for page in range(32):
        vcpu.regs.rip, vcpu.regs.rdi = CODE, 0x200000 + page * PAGE
        assert vcpu.run(timeout=10).data == (b"\x22" if model[page] else b"\x11")
        assert rebinding.memory.is_private(0x200000 + page * PAGE) == model[page]


def test_memslot_numbers_come_back_and_run_out(scripted):
    """Each run takes one; without any left a ConversionError, and nothing changed."""
    memory = kvmexit.Memory(kvmexit._ioctl.Handle(-1, "a test"), kvmexit.VMType.DEFAULT, True, range(4), SlotRebind(),
                            kvmexit._vcpus.Vcpus(kvmexit._ioctl.Handle(-1, "a test")))
    slot = memory.add(0, 8 * PAGE, guest_memfd=True)
    for _ in range(3):
        memory.convert(2 * PAGE, PAGE, private=True)  # three memslots now
        with pytest.raises(ConversionError, match="No space left"):
            memory.convert(5 * PAGE, PAGE, private=True)
        assert memory.ranges() == [(0, 2 * PAGE, False), (2 * PAGE, PAGE, True), (3 * PAGE, 5 * PAGE, False)]
        memory.convert(0, 8 * PAGE, private=False)
    memory.remove(slot)
    assert [memory.add(n << 20, PAGE).number for n in range(4)] == [0, 1, 2, 3]


def test_a_backend_serves_one_vm(scripted):
    """A second VM is refused, and so is what is no backend."""
    shared = RecordedAttributes()
    with ScriptedVM(attributes=shared), pytest.raises(ValueError, match="another VM"):
        ScriptedVM(attributes=shared)
    with pytest.raises(TypeError, match="KvmAttributes"):
        ScriptedVM(attributes=kvmexit._convert.AttributesBackend())


# ---- handlers ----


@pytest.mark.parametrize(
    ("gpa", "pages", "attributes", "ret"),
    [
        (0, 1, 16, 0), (0, 129, 17, 0), (PAGE, 5, 0x1F, 0), (150 * PAGE, 10, 0, 0), (150 * PAGE, 10, 16, -22), (1, 1, 16, -22),
        (0, 0, 16, -22), (0, 1 << 52, 0, 0), (0, 1 << 52, 16, -22), (0, (1 << 52) + 1, 0, -22), (0, (1 << 64) - 1, 16, -22), (0, 1, 1 << 5, -22), (TOP, 70, 16, 0), (TOP, 71, 0, -22),
    ],
)  # fmt: skip
def test_the_ready_made_handler_answers_the_guest(gpa, pages, attributes, ret):
    """0, or -EINVAL as 64 bits; private exactly what was asked."""
    vm, recorded = machine()
    with vm:
        vm.on_hypercall(12, handlers.map_gpa_range)
        vcpu = vm.create_vcpu(0, [hypercall(12, gpa, pages, attributes), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        left, _ = vm.script(vcpu).left(0)
        assert int.from_bytes(left[56:64], "little") == ret % (1 << 64)
        asked = range(gpa, gpa + pages * PAGE, PAGE) if ret == 0 and attributes & 16 else ()
        assert recorded.private == set(asked)


@pytest.mark.parametrize(("error", "ret"), [(errno.ENOMEM, -11), (errno.EBUSY, -11), (errno.EIO, None)])
def test_a_failing_host_is_told_or_raised(error, ret):
    """EAGAIN where asking again can help; what cannot is the host's, and the exit stays."""
    vm, _ = machine({1: error})
    with vm:
        vm.on_hypercall(12, handlers.map_gpa_range)
        vcpu = vm.create_vcpu(0, [hypercall(12, 0, 1, 16), hlt()])
        if ret is None:
            with pytest.raises(ConversionError):
                vcpu.run()
            assert isinstance(vcpu.pending, kvmexit.Hypercall)
        else:
            vcpu.run()
            assert int.from_bytes(vm.script(vcpu).left(0)[0][56:64], "little") == ret % (1 << 64)


def test_faults_are_converted_as_asked():
    """handlers.convert; and EHWPOISON reaches the handlers like any other."""
    vm, recorded = machine()
    with vm:
        seen = []
        vm.on_memory_fault(0, PAGE, handlers.convert)
        vm.on_memory_fault(handler=lambda vcpu, fault: seen.append(fault.errno))
        vcpu = vm.create_vcpu(0, [memory_fault(0, private=True), memory_fault(PAGE, errno=133), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert (recorded.private, seen) == ({0}, [133])


# ---- races ----


def test_threads_convert_while_slots_come_and_go():
    """Opposite directions, neighbouring ranges, add and remove, ranges(): only typed errors, and in the end shadow equals backend."""
    vm, recorded = machine()
    strange, stop = [], threading.Event()

    def work(seed):
        chance = random.Random(seed)
        while not stop.is_set():
            try:
                vm.memory.convert(*a_range(chance), private=bool(seed % 2))
            except ConversionError as error:
                if error.errno is not None:
                    strange.append(error)

    def churn():
        while not stop.is_set():
            vm.memory.remove(vm.memory.add(1 << 30, 4 * PAGE, guest_memfd=True))
            vm.memory.ranges()

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(3)] + [in_thread(churn)]
    stop.wait(stress(2))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert strange == []
    assert private_pages(vm) == recorded.private
    vm.close()


def test_close_waits_for_a_conversion():
    """Which ends with a typed error, and says how far it got."""
    with ScriptedVM() as vm:
        vm.memory.add(0, 1 << 40, guest_memfd=True, discard=False)
        caught = []

        def convert():
            try:
                while True:
                    vm.memory.convert(0, 1 << 40, private=True)
                    vm.memory.convert(0, 1 << 40, private=False)
            except kvmexit.Error as error:
                caught.append(error)

        thread = in_thread(convert)
        while vm.memory.changes < 3:
            pass
        vm.close()
        thread.join(30)
        assert not thread.is_alive()
        assert "closed" in str(caught[0])
