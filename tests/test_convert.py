"""Conversion on scripted VMs with a recorded backend, and memslots rebound on the real /dev/kvm."""

import errno
import mmap
import os
import random
import threading

import pytest
from guests import CODE, Typed, load, stress
from processes import compiled, in_thread, leaks, needs_gil, preload, python, unsanitized

import kvmexit
from kvmexit import ConversionError, SlotRebind, handlers
from kvmexit.testing import RecordedAttributes, ScriptedVM, hlt, hypercall, memory_fault

PAGE = 4096
TOP = (1 << 64) - 70 * PAGE
# where, how many pages, with guest_memfd: the first two adjoin, then a hole
SLOTS = [(0, 65, True), (65 * PAGE, 64, True), (200 * PAGE, 3, False), (300 * PAGE, 128, True), (TOP, 70, True)]


def machine(failures=None, type=kvmexit.VMType.DEFAULT):
    """-> a scripted VM with SLOTS, and its backend."""
    recorded = RecordedAttributes(failures)
    vm = Typed(type, recorded)
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


def test_a_closed_guest_memfd_keeps_nothing_to_discard(scripted):
    """So its private pages can become shared."""
    slot = scripted.memory.add(0, 3 * PAGE, guest_memfd=True)
    scripted.memory.convert(0, 3 * PAGE, private=True)
    slot.close_guest_memfd()
    scripted.memory.convert(PAGE, PAGE, private=False)
    assert private_pages(scripted) == {0, 2 * PAGE}
    scripted.memory.remove(slot)


@needs_gil("its allocator calls madvise(), too")
def test_an_interrupted_call_is_made_again(tmp_path_factory):
    """Attributes and both discards; and what KVM is told, in its own struct."""
    done = python("""
import ctypes, os
from kvmexit import VMType
from kvmexit._convert import KvmAttributes
from kvmexit._ioctl import Handle
from kvmexit._memory import Memory

memory = Memory(Handle(os.open("/dev/null", os.O_RDWR), "a test"), VMType.DEFAULT, True, [], KvmAttributes())
size, fd = 3 * 4096, os.memfd_create("theirs")
os.pwrite(fd, b"p" * size, 0)
data = ctypes.create_string_buffer(size + 4096)
hva = ctypes.addressof(data) + 4095 & ~4095
slot = memory.adopt(0, 0x10000, size, hva, fd, 0, True)
slot[:] = b"s" * size
lib = ctypes.CDLL(None)
noted, interruptions = (ctypes.c_uint64 * 4).in_dll(lib, "noted"), ctypes.c_uint.in_dll(lib, "interruptions")
memory.convert(0x11000, 0x1000, private=True)
assert (list(noted), interruptions.value) == ([0x11000, 0x1000, 8, 0], 2), (list(noted), interruptions)
assert slot[:] == b"s" * 4096 + bytes(4096) + b"s" * 4096
memory.convert(0x11000, 0x2000, private=False)
assert (list(noted), interruptions.value) == ([0x11000, 0x2000, 0, 0], 4), (list(noted), interruptions)
assert os.pread(fd, size, 0) == b"p" * 4096 + bytes(8192)
print("done")
""", env=preload(compiled(tmp_path_factory, "interrupted")))
    assert (done.stdout, done.stderr) == ("done\n", "")


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


@pytest.mark.parametrize("stuck", [False, True])
def test_a_discard_that_fails_half_way_keeps_what_was_done_before(stuck):
    """Three slots that adjoin are one call; the second's pages are locked: the first is done, and from the second on the
    attributes are put back. Where that fails as well, they stay, and the shadow says so."""
    recorded = RecordedAttributes({2: errno.EIO} if stuck else {})
    with ScriptedVM(attributes=recorded) as vm:
        slots = []
        for first, count in [(0, 2), (2, 3), (5, 2)]:
            buffer = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            slots.append(vm.memory.add(first * PAGE, count * PAGE, guest_memfd=True, buffer=buffer, discard=True))
            slots[-1][:] = b"x" * count * PAGE
        lock(slots[1].hva, 3 * PAGE)
        says = r"at gpa 0x2000: .* the attributes " + ("could not be put back, either" if stuck else "were put back")
        with pytest.raises(ConversionError, match=says) as caught:
            vm.memory.convert(PAGE, 5 * PAGE, private=True)
        assert (caught.value.gpa, caught.value.size, caught.value.done, caught.value.errno) == (PAGE, 5 * PAGE, PAGE, errno.EINVAL)
        assert recorded.calls == [(PAGE, 5 * PAGE, True, 0), (2 * PAGE, 4 * PAGE, False, errno.EIO if stuck else 0)]
        assert private_pages(vm) == recorded.private == set(range(PAGE, 6 * PAGE if stuck else 2 * PAGE, PAGE))
        assert [bytes(slot.view[::PAGE]) for slot in slots] == [b"x\0", b"xxx", b"xx"]
        lock(slots[1].hva, 3 * PAGE, "munlock")
        vm.memory.convert(PAGE, 5 * PAGE, private=True)
        assert recorded.calls[2:] == ([] if stuck else [(2 * PAGE, 4 * PAGE, True, 0)])
        assert [bytes(slot.view[::PAGE]) for slot in slots] == [b"x\0", b"xxx", b"xx"] if stuck else [b"x\0", bytes(3), b"\0x"]


@pytest.mark.parametrize("private", [True, False])
def test_attributes_that_fail_cost_no_data(private):
    """The discard comes last."""
    with ScriptedVM(attributes=RecordedAttributes({1 if private else 2: errno.ENOMEM})) as vm:
        slot = vm.memory.add(0, 3 * PAGE, guest_memfd=True)
        if not private:
            vm.memory.convert(0, 3 * PAGE, private=True)
        slot[:] = b"s" * 3 * PAGE
        os.pwrite(slot.guest_memfd, b"p" * 3 * PAGE, 0)
        with pytest.raises(ConversionError, match="Cannot allocate"):
            vm.memory.convert(0, 3 * PAGE, private=private)
        assert slot[:] == b"s" * 3 * PAGE
        assert os.pread(slot.guest_memfd, 3 * PAGE, 0) == b"p" * 3 * PAGE


def test_what_is_so_already_keeps_its_data():
    """Only runs that change are discarded: not what is private already, nor its neighbours."""
    with ScriptedVM() as vm:
        slot = vm.memory.add(0, 140 * PAGE, guest_memfd=True)
        vm.memory.convert(63 * PAGE, 3 * PAGE, private=True)
        slot[:] = b"s" * 140 * PAGE  # the shared side, also of what is private
        os.pwrite(slot.guest_memfd, b"p" * 140 * PAGE, 0)
        vm.memory.convert(60 * PAGE, 80 * PAGE, private=True)
        assert bytes(slot.view[::PAGE]) == b"s" * 60 + bytes(3) + b"s" * 3 + bytes(74)
        assert os.pread(slot.guest_memfd, 140 * PAGE, 0)[::PAGE] == b"p" * 140
        slot[:] = b"s" * 140 * PAGE
        vm.memory.convert(0, 128 * PAGE, private=False)
        assert bytes(slot.view[::PAGE]) == b"s" * 140
        assert os.pread(slot.guest_memfd, 140 * PAGE, 0)[::PAGE] == b"p" * 60 + bytes(68) + b"p" * 12
        vm.memory.remove(slot)
        vm.memory.add(0, PAGE, guest_memfd=True)
        assert not vm.memory.is_private(0)


def lock(address, size, call="mlock"):
    import ctypes

    number = ctypes.c_long({"mlock": 149, "munlock": 150}[call])  # not libc's function: under a sanitizer that does nothing
    assert ctypes.CDLL(None).syscall(number, ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


RESIDENT = """
import kvmexit
from kvmexit.testing import ScriptedVM

PAGE, some = 4096, 4 << 20  # what Python takes and gives back meanwhile


def resident():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Rss:"))


scripted = ScriptedVM()
"""  # in a process of its own: what else a long run of tests gives back would be counted, too


@unsanitized("what is freed is kept for a while")
def test_the_shadow_costs_a_bit_a_page_and_only_where_it_was_written():
    """1 TiB: nothing for a slot that is shared, also when looked at; 32 KiB for 1 GiB private at its end; 32 MiB in all."""
    done = python(RESIDENT + """
size = 1 << 40
before = resident()
scripted.memory.add(0, size, guest_memfd=True, discard=False)
scripted.memory.convert(0, size, private=False)
assert scripted.memory.ranges() == [(0, size, False)]
assert resident() - before < some
scripted.memory.convert(size - (1 << 30), 1 << 30, private=True)
assert resident() - before < some
scripted.memory.convert(0, size, private=True)
assert scripted.memory.ranges() == [(0, size, True)]
taken = resident() - before
assert abs(taken - size // PAGE // 8) < some, taken
scripted.memory.remove(0)
assert resident() - before < some
print("measured")
""")
    assert done.stdout == "measured\n", done.stderr


@unsanitized("what is freed is kept for a while")
def test_ranges_keeps_no_memory():
    """8192 runs, 200 times: 40 MiB if they stayed."""
    done = python(RESIDENT + """
scripted.memory.add(0, 8192 * PAGE, guest_memfd=True, discard=False)
for page in range(0, 8192, 2):
    scripted.memory.convert(page * PAGE, PAGE, private=True)
assert len(scripted.memory.ranges()) == 8192
before = resident()
for _ in range(200):
    scripted.memory.ranges()
assert resident() - before < 2 * some
print("measured")
""")
    assert done.stdout == "measured\n", done.stderr


# ---- memslots that somebody else made ----


@pytest.fixture
def adopted():
    """-> what notes a memslot of 130 pages at 4 pages as VM.adopt() does; its memory, its guest_memfd's number."""
    memory = mmap.mmap(-1, 130 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"s" * 130 * PAGE
    fd = os.memfd_create("theirs")
    os.pwrite(fd, b"p" * 140 * PAGE, 0)
    recorded = RecordedAttributes()
    with ScriptedVM(attributes=recorded) as vm:
        hva = vm.memory.add(1 << 40, 130 * PAGE, buffer=memory).hva

        def adopt(*, guest_memfd=True, discard=False):
            return vm.memory.adopt(
                7, 4 * PAGE, 130 * PAGE, hva, fd if guest_memfd else None, 8 * PAGE if guest_memfd else 0, discard)

        yield vm, recorded, adopt, memory, fd
    os.fstat(fd)  # the caller's own
    os.close(fd)


def test_what_an_adopted_page_is_gets_known_by_converting_it(adopted):
    """Not known is neither private nor shared, and no range; what is asked for is asked of the kernel, once."""
    vm, recorded, adopt, _, _ = adopted
    slot = adopt()
    assert (slot.number, slot.guest_memfd is None) == (7, False)
    before = leaks()
    assert [vm.memory.is_private(page * PAGE) for page in (3, 4, 133, 134)] == [False, None, None, False]
    for page, private in [(4, True), (4 + 63, False), (4 + 64, True), (133, False)]:
        vm.memory.convert(page * PAGE, PAGE, private=private)
        assert vm.memory.is_private(page * PAGE + 5) is private
    assert [vm.memory.is_private(page * PAGE) for page in (5, 66, 69, 132)] == [None] * 4
    theirs = [(4 * PAGE, PAGE, True), (67 * PAGE, PAGE, False), (68 * PAGE, PAGE, True), (133 * PAGE, PAGE, False)]
    assert [r for r in vm.memory.ranges() if r.gpa < 1 << 40] == theirs
    assert recorded.calls == [(*r, 0) for r in theirs]
    vm.memory.convert(0, 1 << 30, private=False)
    assert recorded.calls[4:] == [(4 * PAGE, 63 * PAGE, False, 0), (68 * PAGE, 65 * PAGE, False, 0)]
    vm.memory.convert(0, 1 << 30, private=False)
    assert len(recorded.calls) == 6
    assert [r for r in vm.memory.ranges() if r.gpa < 1 << 40] == [(4 * PAGE, 130 * PAGE, False)]
    vm.memory.convert(4 * PAGE, 130 * PAGE, private=True)
    assert [r for r in vm.memory.ranges() if r.gpa < 1 << 40] == [(4 * PAGE, 130 * PAGE, True)]
    assert leaks() == before


@pytest.mark.parametrize("discard", [False, True])
def test_adopted_memory_is_discarded_only_where_its_owner_said(adopted, discard):
    """AdoptedSlot.discard: the pages asked for, on the side that goes out of use; the guest_memfd's from gmem_offset on."""
    vm, _, adopt, memory, fd = adopted
    adopt(discard=discard)
    vm.memory.convert(6 * PAGE, 2 * PAGE, private=True)
    assert memory[: 5 * PAGE : PAGE] == (b"ss\0\0s" if discard else b"sssss")
    assert os.pread(fd, 140 * PAGE, 0) == b"p" * 140 * PAGE
    memory[:] = b"s" * 130 * PAGE
    vm.memory.convert(7 * PAGE, 2 * PAGE, private=False)
    assert memory[:] == b"s" * 130 * PAGE
    expected = b"p" * 11 + b"\0\0" + b"p" * 127 if discard else b"p" * 140
    assert os.pread(fd, 140 * PAGE, 0)[::PAGE] == expected


def test_a_discard_of_adopted_memory_that_fails_turns_no_page_around(adopted):
    """Nobody knows what they were: pages that are private already would become shared, and the guest lose what it has there."""
    vm, recorded, adopt, _, _ = adopted
    slot = adopt(discard=True)
    lock(slot.hva, PAGE)
    with pytest.raises(ConversionError, match="could not be put back") as caught:
        vm.memory.convert(slot.gpa, 3 * PAGE, private=True)
    lock(slot.hva, PAGE, "munlock")
    assert (caught.value.errno, caught.value.done) == (errno.EINVAL, 0)
    assert recorded.calls == [(slot.gpa, 3 * PAGE, True, 0)]
    assert [vm.memory.is_private(slot.gpa + page * PAGE) for page in range(4)] == [True] * 3 + [None]


def test_removing_an_adopted_slot_leaves_its_owner_the_data(adopted):
    """Private pages become shared, as for any slot, but nothing is discarded: the guest_memfd is not ours to empty."""
    vm, recorded, adopt, memory, fd = adopted
    slot = adopt(discard=True)
    vm.memory.convert(6 * PAGE, 2 * PAGE, private=True)
    vm.memory.remove(slot)
    assert recorded.calls[1:] == [(4 * PAGE, 130 * PAGE, False, 0)]
    assert os.pread(fd, 140 * PAGE, 0) == b"p" * 140 * PAGE
    assert memory[: 5 * PAGE : PAGE] == b"ss\0\0s"


def test_an_adopted_slot_without_a_guest_memfd_can_only_be_shared(adopted):
    """Asked for private memory it is a ConversionError, and still not known."""
    vm, recorded, adopt, _, _ = adopted
    slot = adopt(guest_memfd=False, discard=True)
    assert slot.guest_memfd is None
    with pytest.raises(ConversionError, match="has no guest_memfd"):
        vm.memory.convert(5 * PAGE, PAGE, private=True)
    assert (vm.memory.is_private(5 * PAGE), recorded.calls) == (None, [])
    vm.memory.convert(5 * PAGE, PAGE, private=False)
    assert (vm.memory.is_private(5 * PAGE), recorded.calls) == (False, [(5 * PAGE, PAGE, False, 0)])


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
        slot[page * PAGE] = page
        os.pwrite(slot.guest_memfd, bytes([0x80 | page]), page * PAGE)
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
        assert vcpu.run(timeout=10).data == bytes([0x80 | page if model[page] else page])
        assert rebinding.memory.is_private(0x200000 + page * PAGE) == model[page]


def test_memslots_are_rebound_on_kernels_without_guest_memfd(kvm):
    """SlotRebind's private side is a file of its own, and the older KVM_SET_USER_MEMORY_REGION will do."""

    class Old(kvmexit.VM):
        def check(self, cap):
            return 0 if cap in (231, 233, 234) else super().check(cap)  # USER_MEMORY2, MEMORY_ATTRIBUTES, GUEST_MEMFD

    with Old(attributes=SlotRebind()) as vm:
        vcpu = load(vm, READ)
        slot = vm.memory.add(0x200000, 2 * PAGE, guest_memfd=True, discard=False)
        os.pwrite(slot.guest_memfd, b"\x22", 0)
        vm.memory.convert(0x200000, PAGE, private=True)
        vcpu.regs.rdi = 0x200000
        assert vcpu.run(timeout=10).data == b"\x22"
    with Old() as vm, pytest.raises(kvmexit.KvmError, match=r"guest_memfd needs Linux 6\.8"):
        vm.memory.add(0, PAGE, guest_memfd=True)


def test_memslots_that_cannot_be_made_or_deleted_leave_the_old_ones(tmp_path_factory):
    """KVM fails at the first, second, ... call of a conversion: afterwards it has the memslots from before, and all numbers are
    free that were."""
    done = python("""
import ctypes, os
from kvmexit import ConversionError, SlotRebind, VMType
from kvmexit._ioctl import Handle
from kvmexit._memory import Memory
from kvmexit._vcpus import Vcpus

lib = ctypes.CDLL(None)
memslots = (ctypes.c_uint64 * 64).in_dll(lib, "memslots")
fail_at = ctypes.c_uint.in_dll(lib, "fail_at")
interruptions = ctypes.c_uint.in_dll(lib, "interruptions")
for n in range(1, 6):
    handle = Handle(os.open("/dev/null", os.O_RDWR), "a test")
    memory = Memory(handle, VMType.DEFAULT, True, range(8), SlotRebind(), Vcpus(handle))
    slot = memory.add(0x10000, 8 * 4096, guest_memfd=True)
    memory.convert(0x12000, 0x2000, private=True)
    before, ranges = list(memslots), memory.ranges()
    fail_at.value = n
    try:
        memory.convert(0x15000, 0x1000, private=True)
        print("not failed at", n)
        break
    except ConversionError as error:
        assert (error.errno, error.done) == (12, 0), error
    assert sorted(before) == sorted(memslots), (n, before, list(memslots))
    assert (memory.ranges(), memory.is_private(0x15000)) == (ranges, False)
    memory.convert(0x15000, 0x1000, private=True)
    sides = {memslots[2 * i + 1] - memslots[2 * i] for i in range(8) if memslots[2 * i + 1]}
    assert len(sides) == 2 and slot.hva - 0x10000 in sides  # an address belongs to its side at its own offset
    memory.convert(0x10000, 8 * 4096, private=False)
    memory.remove(slot)
    assert not any(memslots)
    assert sorted(memory.add(0x100000 * i, 4096).number for i in range(8)) == list(range(8))
    for slot in memory.slots:
        memory.remove(slot)
print(n, interruptions.value > 20)
""", env=preload(compiled(tmp_path_factory, "interrupted")))
    assert (done.stdout, done.stderr) == ("not failed at 5\n5 True\n", "")  # one deleted, three made


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


# -1: Linux's convention, an error in RAX is negative; 1: svm/sev.c and vmx/tdx.c take it positive
SIGN = {type: 1 if type.name in ("SNP", "TDX") else -1 for type in kvmexit.VMType}
types = pytest.mark.parametrize("type", kvmexit.VMType)


@types
@pytest.mark.parametrize(
    ("gpa", "pages", "attributes", "error"),
    [
        (0, 1, 16, 0), (0, 129, 17, 0), (PAGE, 5, 0x1F, 0), (PAGE, 5, 0xF, 0), (2 * PAGE, 1, 18, 0), (TOP, 70, 16, 0),
        # the guest's word for the page size is a wish; a hole is shared already, and so is most of all there is
        (150 * PAGE, 10, 0, 0), (0, 1 << 52, 0, 0), (100 * PAGE, 1 << 40, 2, 0), (TOP, 70, 0, 0), ((1 << 64) - PAGE, 1, 0, 0),
        # no slot; no guest_memfd
        (150 * PAGE, 10, 16, 22), (128 * PAGE, 2, 16, 22), (200 * PAGE, 1, 16, 22), (0, 1 << 52, 16, 22),
        # unaligned, empty, wrapping, reserved bits
        (1, 1, 16, 22), (PAGE - 1, 1, 0, 22), ((1 << 64) - 1, 1, 0, 22), (0, 0, 16, 22), (PAGE, 0, 0, 22), (TOP, 71, 0, 22),
        (TOP, 71, 16, 22), (0, (1 << 52) + 1, 0, 22), (PAGE, 1 << 52, 0, 22), (0, (1 << 64) - 1, 16, 22), (0, 1 << 63, 0, 22),
        (0, 1, 1 << 5, 22), (0, 1, 16 | 1 << 5, 22), (0, 1, 16 | 1 << 63, 22), (0, 1, (1 << 64) - 1, 22),
    ],
)  # fmt: skip
def test_the_ready_made_handler_answers_the_guest(type, gpa, pages, attributes, error):
    """0, or EINVAL the way this type of VM takes it; private exactly what was asked."""
    vm, recorded = machine(type=type)
    with vm:
        vm.on_hypercall(12, handlers.map_gpa_range)
        vcpu = vm.create_vcpu(0, [hypercall(12, gpa, pages, attributes), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert returned(vm, vcpu) == SIGN[type] * error
        asked = range(gpa, gpa + pages * PAGE, PAGE) if not error and attributes & 16 else ()
        assert recorded.private == set(asked)


def returned(vm, vcpu):
    """What the first step's hypercall gave the guest, signed."""
    return int.from_bytes(vm.script(vcpu).left(0)[0][56:64], "little", signed=True)


@types
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EBUSY, errno.EAGAIN])
def test_a_host_that_cannot_just_now_has_the_guest_ask_again(type, error):
    """EAGAIN; asking again goes on from there."""
    vm, recorded = machine({2: error}, type)
    with vm:
        vm.memory.convert(PAGE, PAGE, private=True)
        vm.on_hypercall(12, handlers.map_gpa_range)
        vcpu = vm.create_vcpu(0, [hypercall(12, 0, 3, 16)] * 2 + [hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert returned(vm, vcpu) == SIGN[type] * errno.EAGAIN
        assert int.from_bytes(vm.script(vcpu).left(1)[0][56:64], "little") == 0
        assert recorded.calls[1:] == [(0, PAGE, True, error), (0, PAGE, True, 0), (2 * PAGE, PAGE, True, 0)]


@types
@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EPERM, errno.ENOSPC])
def test_a_host_that_cannot_at_all_is_told_so(type, error):
    """It is not the guest's doing: ConversionError out of run(), and the exit stays."""
    vm, _ = machine({1: error}, type)
    with vm:
        vm.on_hypercall(12, handlers.map_gpa_range)
        vcpu = vm.create_vcpu(0, [hypercall(12, 0, 1, 16), hlt()])
        with pytest.raises(ConversionError):
            vcpu.run()
        assert isinstance(vcpu.pending, kvmexit.Hypercall)
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert (returned(vm, vcpu), vm.memory.is_private(0)) == (0, True)


def test_other_hypercalls_are_not_the_ready_made_handlers(scripted):
    """Registered for all numbers it passes on what it does not know."""
    scripted.on(kvmexit.Hypercall, handlers.map_gpa_range)
    exit = scripted.create_vcpu(0, [hypercall(11, 1, 1, 16)]).run()
    assert (type(exit), exit.nr) == (kvmexit.Hypercall, 11)


def test_faults_are_converted_as_asked():
    """handlers.convert: the pages that hold the range; EHWPOISON reaches the handlers like any other."""
    vm, recorded = machine()
    with vm:
        seen = []
        vm.on_memory_fault(0, 100 * PAGE, handlers.convert)
        vm.on_memory_fault(handler=lambda vcpu, fault: seen.append(fault.errno))
        steps = [(0, 1, True), (2 * PAGE + 5, PAGE, True), (10 * PAGE, 70 * PAGE, True), (20 * PAGE - 1, 2, False)]
        faults = [memory_fault(gpa, size, private=private) for gpa, size, private in steps]
        vcpu = vm.create_vcpu(0, [*faults, memory_fault(100 * PAGE, errno=133), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert recorded.private == {page * PAGE for page in [0, 2, 3, *range(10, 19), *range(21, 80)]}
        assert seen == [133]


@pytest.mark.parametrize(
    ("gpa", "size", "error"),
    [(0, 0, ValueError), ((1 << 64) - PAGE, 2 * PAGE, ValueError), (150 * PAGE, PAGE, ConversionError)]
)
def test_a_fault_that_cannot_be_converted_stays_pending(gpa, size, error):
    """KVM gives no such ones for a guest with memory; it comes out of run(), and nothing was asked."""
    vm, recorded = machine()
    with vm, vm.on_memory_fault(handler=handlers.convert):
        vcpu = vm.create_vcpu(0, [memory_fault(gpa, size, private=True), hlt()])
        with pytest.raises(error):
            vcpu.run()
        assert (vcpu.pending.gpa, vcpu.pending.size, recorded.calls) == (gpa, size, [])


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
