"""Which pages a guest wrote to: the dirty log of KVM's bitmaps and of its rings, against what the guest did."""

import errno
import gc
import random
import signal
import struct
import threading

import pytest
from guests import CODE, load, stress
from processes import in_thread, leaks

import kvmexit
from kvmexit import DirtyRange, KvmError, handlers

PAGE, GPA, PAGES = 4096, 0x1000_0000, 200

# again: mov [rbx], rax; add rbx, rdx; dec ecx; jnz again; out 0xf4, al
WRITE = bytes.fromhex("48 89 03 48 01 d3 ff c9 75 f6 e6 f4")


def make(vm, how):
    """Turn one of the ways on; before the first vCPU."""
    if how == "ring":
        vm.enable_dirty_ring(1024)
        vm.on(kvmexit.DirtyRingFull, handlers.collect_dirty)


both_ways = pytest.mark.parametrize("how", ["log", "ring"])


class Writer:
    """A guest that writes where it is told."""

    def __init__(self, vm, gpa=GPA, pages=PAGES):
        self.vcpu = load(vm, WRITE)
        self.slot = vm.memory.add(gpa, pages * PAGE, log_dirty=True)
        self.gpa = gpa

    def write(self, first, count=1, step=1):
        """To `count` pages from the slot's `first`, each `step`th."""
        regs = self.vcpu.regs
        regs.rip, regs.rbx, regs.rdx, regs.rcx = CODE, self.gpa + first * PAGE, step * PAGE, count
        assert self.vcpu.run(timeout=30).port == 0xF4

    def pages(self, *runs):
        """-> [DirtyRange] of runs of (first, count)."""
        return [DirtyRange(self.gpa + first * PAGE, count * PAGE) for first, count in runs]


@both_ways
def test_what_the_guest_wrote_is_said_once(vm, how):
    """As runs, by address; and again only once it writes again. What the host writes is not noted."""
    make(vm, how)
    guest = Writer(vm)
    assert guest.slot.dirty() == []
    guest.write(3)
    guest.write(63, 2)
    guest.write(130)
    guest.write(PAGES - 1)
    guest.slot[10 * PAGE] = 1
    vm.memory.write(GPA + 11 * PAGE, b"x")
    assert guest.slot.dirty() == guest.pages((3, 1), (63, 2), (130, 1), (PAGES - 1, 1))
    assert guest.slot.dirty() == []
    guest.write(3)
    assert guest.slot.dirty() == guest.pages((3, 1))
    guest.write(0, PAGES)
    assert guest.slot.dirty() == guest.pages((0, PAGES))


@both_ways
def test_it_comes_as_a_bitmap_and_as_numbers_too(vm, how):
    """Whole 64-bit words; addresses as array("Q")."""
    make(vm, how)
    guest = Writer(vm)
    guest.write(1, 50, 4)
    bitmap = guest.slot.dirty_bitmap()
    assert (type(bitmap), len(bitmap)) == (bytearray, 32)
    assert [page for page in range(256) if bitmap[page // 8] >> page % 8 & 1] == [*range(1, 201, 4)]
    assert guest.slot.dirty_bitmap() == bytes(32)
    guest.write(1, 50, 4)
    pages = vm.memory.dirty_pages()
    assert (pages.typecode, pages.tolist()) == ("Q", [GPA + page * PAGE for page in range(1, 201, 4)])
    assert len(vm.memory.dirty_pages()) == 0


def test_numpy_takes_both_without_a_copy(vm):
    """As the documentation says."""
    numpy = pytest.importorskip("numpy", reason="numpy is missing")
    guest = Writer(vm)
    guest.write(1, 50, 4)
    bits = numpy.unpackbits(numpy.frombuffer(guest.slot.dirty_bitmap(), "u1"), bitorder="little", count=PAGES)
    assert [*numpy.flatnonzero(bits)] == [*range(1, 201, 4)]
    guest.write(1, 50, 4)
    assert numpy.frombuffer(vm.memory.dirty_pages(), "u8").max() == GPA + 197 * PAGE


@both_ways
def test_memory_says_it_of_all_slots_that_log(vm, how):
    """By address, and runs go over slots that adjoin. The others are left out."""
    make(vm, how)
    guest = Writer(vm)
    vm.memory.add(GPA + PAGES * PAGE, 4 * PAGE, log_dirty=True)
    vm.memory.add(GPA + (PAGES + 4) * PAGE, 4 * PAGE)
    vm.memory.add(GPA + (PAGES + 8) * PAGE, 4 * PAGE, log_dirty=True)
    guest.write(PAGES - 2, 14)
    assert vm.memory.dirty() == guest.pages((PAGES - 2, 6), (PAGES + 8, 4))
    assert vm.memory.dirty() == []
    guest.write(PAGES - 2, 14)
    assert vm.memory.dirty_pages().tolist() == [
        GPA + page * PAGE for page in (*range(PAGES - 2, PAGES + 4), *range(PAGES + 8, PAGES + 12))]  # fmt: skip


@both_ways
def test_it_is_the_model_s_answer(vm, how):
    """Writes and questions at random, against a set."""
    make(vm, how)
    guest = Writer(vm)
    rng = random.Random(how)
    expected = set()
    for _ in range(stress(150)):
        first, step = rng.randrange(PAGES), rng.choice([1, 1, 3, 64])
        count = rng.randrange(1, max(2, (PAGES - first) // step))
        guest.write(first, count, step)
        expected |= {GPA + page * PAGE for page in range(first, first + count * step, step)}
        question = rng.randrange(4)
        if question == 0:
            assert vm.memory.dirty_pages().tolist() == sorted(expected)
            expected.clear()
        elif question == 1:
            assert {at for gpa, size in guest.slot.dirty() for at in range(gpa, gpa + size, PAGE)} == expected
            expected.clear()
        elif question == 2 and how == "ring":
            vm.memory.collect_dirty()


@both_ways
def test_no_write_escapes_while_the_guest_runs(vm, how):
    """A copy that is made page by page, of what was said to be dirty, ends as the guest's memory."""
    make(vm, how)
    # again: inc rax; mov rcx, rax; imul rcx, rcx, 0x9e3779b1; shr rcx, 8; and ecx, 0x7f000; mov [rbx+rcx], rax; jmp again
    code = bytes.fromhex("48 ff c0  48 89 c1  48 69 c9 b1 79 37 1e  48 c1 e9 08  81 e1 00 f0 07 00  48 89 04 0b  eb e4")
    vcpu = load(vm, code)
    slot = vm.memory.add(GPA, 128 * PAGE, log_dirty=True)
    vcpu.regs.rbx = GPA
    copy = bytearray(slot.size)
    thread = in_thread(lambda: vcpu.run(timeout=100))

    def follow():
        runs = slot.dirty()
        for gpa, size in runs:
            copy[gpa - GPA : gpa - GPA + size] = vm.memory.read(gpa, size)
        return runs

    while not copy.strip(b"\0"):
        follow()
    for _ in range(stress(50)):
        follow()
    vm.pause()
    follow()
    assert copy == slot.view
    assert follow() == []
    vm.resume()
    vcpu.kick()
    thread.join(30)


def test_only_slots_that_log_it_are_asked(vm, scripted):
    """The error says how; a slot that was removed has nothing any more."""
    plain = vm.memory.add(GPA, PAGE)
    for call in (plain.dirty, plain.dirty_bitmap, plain.clear_dirty):
        with pytest.raises(kvmexit.Error, match="add it with log_dirty=True"):
            call()
    gone = vm.memory.add(GPA + PAGE, PAGE, log_dirty=True)
    vm.memory.remove(gone)
    with pytest.raises(kvmexit.Error, match="was removed"):
        gone.dirty()
    slot = vm.memory.add(GPA + PAGE, PAGE, log_dirty=True)
    vm.close()
    for call in (slot.dirty, vm.memory.dirty, vm.memory.dirty_pages):
        with pytest.raises(kvmexit.Error, match="closed"):
            call()
    slot = scripted.memory.add(GPA, PAGE, log_dirty=True)
    scripted.enable_dirty_ring()
    slot.clear_dirty()
    assert (slot.dirty(), scripted.memory.dirty()) == ([], [])


# ---- the log alone ----


def test_manual_protection_keeps_it_until_cleared(vm):
    """Pages that are cleared are noted anew, and no others."""
    vm.manual_dirty_protect()
    guest = Writer(vm)
    guest.write(0, PAGES)
    assert guest.slot.dirty() == guest.slot.dirty() == guest.pages((0, PAGES))
    guest.slot.clear_dirty(GPA + 70 * PAGE, 3 * PAGE)
    guest.slot.clear_dirty(GPA + (PAGES - 1) * PAGE, PAGE)
    guest.slot.clear_dirty(GPA, PAGE)
    assert guest.slot.dirty() == guest.pages((1, 69), (73, PAGES - 74))
    guest.write(71)
    assert guest.slot.dirty() == guest.pages((1, 69), (71, 1), (73, PAGES - 74))
    guest.slot.clear_dirty()
    assert guest.slot.dirty() == []


def test_a_slot_can_begin_dirty(vm):
    """So that the first copy is no special case."""
    vm.manual_dirty_protect(initially_set=True)
    guest = Writer(vm)
    assert guest.slot.dirty() == guest.pages((0, PAGES))


@pytest.mark.parametrize(
    "range_", [(GPA,), (GPA, 0), (GPA + 1, PAGE), (GPA, 100), (GPA - PAGE, PAGE), (GPA, (PAGES + 1) * PAGE), (-PAGE, PAGE)])
def test_only_pages_of_the_slot_are_cleared(scripted, range_):
    """Bad ranges are refused."""
    slot = scripted.memory.add(GPA, PAGES * PAGE, log_dirty=True)
    with pytest.raises(ValueError, match="gpa|size"):
        slot.clear_dirty(*range_)


# ---- rings alone ----


def test_a_full_ring_exits_until_it_is_emptied(vm):
    """What the handler collected is not lost: the answer has all of it."""
    vm.enable_dirty_ring(1024)
    guest = Writer(vm, pages=3000)
    full = []

    @vm.on(kvmexit.DirtyRingFull)
    def collect(vcpu, exit):
        full.append(vcpu.vm.memory.collect_dirty())

    guest.write(0, 3000)
    assert len(full) >= 2
    assert all(0 < entries <= 1024 for entries in full)
    assert guest.slot.dirty() == guest.pages((0, 3000))
    vm.on(kvmexit.DirtyRingFull, lambda vcpu, exit: kvmexit.STOP)
    regs = guest.vcpu.regs
    regs.rip, regs.rbx, regs.rdx, regs.rcx = CODE, GPA, PAGE, 3000
    assert isinstance(guest.vcpu.run(timeout=30), kvmexit.DirtyRingFull)
    assert isinstance(guest.vcpu.run(timeout=30), kvmexit.DirtyRingFull)  # nothing was done about it
    assert vm.memory.collect_dirty() > 0
    assert not isinstance(guest.vcpu.run(timeout=30), kvmexit.Interrupted)


def test_signals_do_not_interrupt_what_gives_rings_back(vm):
    """KVM_RESET_DIRTY_RINGS that is interrupted leaves pages unprotected: what is written to them then would not be said."""
    make(vm, "ring")
    guest = Writer(vm)
    main, done = threading.main_thread().ident, threading.Event()

    def bother():
        while not done.wait(0.0001):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *args: None)
    bothering = in_thread(bother)
    try:
        for _ in range(stress(300)):
            guest.write(0, PAGES)
            assert guest.slot.dirty() == guest.pages((0, PAGES))
    finally:
        done.set()
        bothering.join()
        signal.signal(signal.SIGUSR1, before)


def test_rings_of_several_vcpus_are_one_answer(vm):
    """Each vCPU has its own; a page that both wrote to comes once. Their exits collect at the same time."""
    make(vm, "ring")
    vm.memory.add(0, 1 << 20)[CODE : CODE + len(WRITE)] = WRITE
    slot = vm.memory.add(GPA, 4000 * PAGE, log_dirty=True)
    vcpus = [vm.create_vcpu(id) for id in range(2)]
    for vcpu in vcpus:
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
    for _ in range(stress(5)):
        for vcpu in vcpus:
            regs = vcpu.regs
            regs.rip, regs.rbx, regs.rdx, regs.rcx = CODE, GPA + vcpu.id * 1000 * PAGE, PAGE, 3000
        threads = [in_thread(lambda vcpu=vcpu: vcpu.run(timeout=60)) for vcpu in vcpus]
        for thread in threads:
            thread.join(70)
        assert slot.dirty() == [DirtyRange(GPA, 4000 * PAGE)]


def test_a_number_used_again_is_not_taken_for_the_slot_before(vm):
    """What the rings still have of a removed slot goes with it."""
    make(vm, "ring")
    guest = Writer(vm)
    guest.write(5, 3)
    vm.memory.remove(guest.slot)
    again = vm.memory.add(GPA, PAGES * PAGE, log_dirty=True)
    assert again.number == guest.slot.number
    assert again.dirty() == []


@pytest.mark.parametrize("entries", [0, 1, 128, 1000, -1024])
def test_a_ring_has_a_power_of_two_of_entries(scripted, entries):
    """256 at least: a page."""
    with pytest.raises(ValueError, match="a power of two"):
        scripted.enable_dirty_ring(entries)


def test_rings_come_before_vcpus_and_once(vm):
    """The error says so; too large a ring is refused with what is possible."""
    with pytest.raises(ValueError, match="more than KVM takes, 65536"):
        vm.enable_dirty_ring(1 << 20)
    with pytest.raises(kvmexit.Error, match=r"call vm.enable_dirty_ring\(\)"):
        vm.memory.collect_dirty()
    vm.enable_dirty_ring()
    with pytest.raises(KvmError, match="before the first vCPU") as caught:
        vm.enable_dirty_ring()
    assert caught.value.errno == errno.EINVAL
    with kvmexit.VM() as other:
        other.create_vcpu(0)
        with pytest.raises(KvmError, match="before the first vCPU"):
            other.enable_dirty_ring()


def test_a_log_is_not_kept_beside_rings(vm):
    """KVM refuses to clear what it has not: in words."""
    vm.enable_dirty_ring()
    slot = vm.memory.add(GPA, PAGE, log_dirty=True)
    with pytest.raises(KvmError, match="there is nothing to clear") as caught:
        slot.clear_dirty()
    assert caught.value.errno == errno.ENXIO


def test_an_adopted_vm_has_a_harvester(vm):
    """Its owner."""
    with kvmexit.VM.adopt(vm.fd) as ours, pytest.raises(kvmexit.Error, match="one harvester"):
        ours.enable_dirty_ring()


def test_a_vm_with_rings_adopts_no_vcpu(vm):
    """Whose ring nobody would empty."""
    vm.enable_dirty_ring(1024)
    with pytest.raises(kvmexit.Error, match=r"use create_vcpu\(\)"):
        vm.adopt_vcpu(vm.create_vcpu(0).fd)


def test_older_kernels_say_so(kvm):
    """With the version that has it."""

    class Old(kvmexit.VM):
        def check(self, cap):
            return 0 if cap in (168, 192, 223) else super().check(cap)

    with Old() as old:
        for call, version in ((old.manual_dirty_protect, "5.0"), (old.enable_dirty_ring, "5.11")):
            with pytest.raises(KvmError, match=f"Linux {version}") as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP


def test_nothing_is_left_of_a_vm_with_rings(kvm):
    """Descriptors and mappings go, closed or dropped."""
    kvmexit.VM().close()
    gc.collect()
    before = leaks()
    for closed in (True, False):
        vm = kvmexit.VM()
        make(vm, "ring")
        guest = Writer(vm)
        guest.write(0)
        guest.slot.dirty()
        if closed:
            vm.close()
        del vm, guest
        assert leaks() == before


# ---- rings of our own making ----

DIRTY, RESET = 1, 2


def ring(entries, *written, begin=0):
    """-> a ring that has these entries: (flags, slot, offset)."""
    image = bytearray(16 * entries)
    for i, entry in enumerate(written):
        struct.pack_into("<IIQ", image, (begin + i) % entries * 16, *entry)
    return image


@pytest.fixture
def slot(scripted):
    """A slot of a VM that is about to have rings."""
    scripted.memory.dirty_log.use_rings(256)
    return scripted.memory.add(GPA, PAGES * PAGE, log_dirty=True)


def test_rings_go_round(scripted, slot):
    """KVM fills on where it was; what was taken is marked for it."""
    image = ring(256)
    scripted.memory.dirty_log.add_ring(image)
    at = 0
    for _ in range(10):
        written = [(at + i) % PAGES for i in range(100)]
        for i, page in enumerate(written):
            struct.pack_into("<IIQ", image, (at + i) % 256 * 16, DIRTY, slot.number, page)
        assert scripted.memory.collect_dirty() == 100
        assert scripted.memory.dirty_pages().tolist() == sorted({GPA + page * PAGE for page in written})
        assert {image[(at + i) % 256 * 16] for i in range(100)} == {RESET}
        at += 100


def test_a_ring_that_is_dirty_all_round_is_taken_once(scripted, slot):
    """256 entries, not more."""
    scripted.memory.dirty_log.add_ring(ring(256, *[(DIRTY, slot.number, i % PAGES) for i in range(256)]))
    assert scripted.memory.collect_dirty() == 256
    assert scripted.memory.collect_dirty() == 0
    assert slot.dirty() == [DirtyRange(GPA, PAGES * PAGE)]


def test_what_names_no_page_is_passed_over(scripted, slot):
    """Of slots that are gone, of another address space, beyond the slot's end: no bit anywhere; the entries after them count."""
    wrong = [(slot.number + 1, 0), (slot.number | 1 << 16, 0), (2**32 - 1, 0), (slot.number, PAGES), (slot.number, 2**64 - 1)]
    entries = [(DIRTY, *entry) for entry in wrong] + [(DIRTY, slot.number, 7)]
    scripted.memory.dirty_log.add_ring(ring(256, *entries))
    assert scripted.memory.collect_dirty() == 6
    assert slot.dirty() == [DirtyRange(GPA + 7 * PAGE, PAGE)]


@pytest.mark.parametrize("flags", [0, RESET, DIRTY | RESET, 4, 2**32 - 1])
def test_only_what_kvm_has_given_is_taken(scripted, slot, flags):
    """In order: nothing behind an entry that is not ours."""
    scripted.memory.dirty_log.add_ring(ring(256, (flags, slot.number, 1), (DIRTY, slot.number, 2)))
    assert scripted.memory.collect_dirty() == 0
    assert slot.dirty() == []


def test_questions_and_slots_from_several_threads(scripted, slot):
    """While slots come and go and rings are emptied: each entry is said by one of those who ask, and nothing is used too late."""
    image = ring(256)
    scripted.memory.dirty_log.add_ring(image)
    stop = threading.Event()
    found = []

    def ask():
        while not stop.is_set():
            found.extend(slot.dirty())

    def churn():
        while not stop.is_set():
            other = scripted.memory.add(GPA * 2, PAGES * PAGE, log_dirty=True)
            scripted.memory.dirty()
            scripted.memory.remove(other)

    threads = [in_thread(ask) for _ in range(2)] + [in_thread(churn)]
    said = 0
    for at in range(stress(2000)):
        words = memoryview(image).cast("I")  # whose stores are single ones, as KVM's
        words[at % 256 * 4 + 1], words[at % 256 * 4 + 2] = slot.number, 1
        words[at % 256 * 4] = DIRTY
        while image[at % 256 * 16] == DIRTY:
            scripted.memory.collect_dirty()
        said += 1
    stop.set()
    for thread in threads:
        thread.join(30)
    assert {*found} <= {DirtyRange(GPA + PAGE, PAGE)}
    assert said == stress(2000)
