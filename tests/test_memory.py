"""Memslots: what they are made of, how they are read, what is refused, and that nothing is left behind."""

import contextlib
import errno
import gc
import mmap
import os

import pytest
from guests import CODE, load
from processes import leaks

import kvmexit
from kvmexit import GuestMemfdFlags, KvmError
from kvmexit.testing import RecordedAttributes

PAGE = 4096
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED

# mov al, [0x200000]; out 0x80, al
READ_AND_OUT = bytes.fromhex("8a 04 25 00 00 20 00  e6 80")
# mov byte [0x200000], 0x5a; out 0x80, al
WRITE_AND_OUT = bytes.fromhex("c6 04 25 00 00 20 00 5a  e6 80")


@pytest.fixture
def file():
    """A memfd of four pages, page n filled with n + 1."""
    fd = os.memfd_create("test")
    os.write(fd, b"".join(bytes([n + 1]) * PAGE for n in range(4)))
    yield fd
    os.close(fd)


# ---- backing ----


def test_anonymous_memory_starts_as_zeros_and_is_shared_with_views(scripted):
    """Slices are zero-copy views of one memory."""
    ram = scripted.memory.add(0x10000, 2 * PAGE)
    ram[8:12] = b"abcd"
    view = memoryview(ram)
    assert (len(ram), ram[0], bytes(view[8:12]), view.readonly) == (2 * PAGE, 0, b"abcd", False)
    view[9] = 0x5A
    assert bytes(ram[8:12]) == b"a\x5acd"


def test_a_file_is_mapped_shared_from_its_offset(scripted, file):
    """What the host writes to the slot is in the file, and the other way round."""
    ram = scripted.memory.add(0, 2 * PAGE, fd=file, offset=PAGE)
    assert (ram[0], ram[PAGE]) == (2, 3)
    ram[1] = 0x77
    os.pwrite(file, b"\x66", PAGE + 2)
    assert (os.pread(file, 1, PAGE + 1), ram[2]) == (b"\x77", 0x66)


def test_a_callers_buffer_is_used_in_place_and_kept(scripted):
    """The buffer is exported for as long as the slot lives."""
    buffer = mmap.mmap(-1, 4 * PAGE)
    ram = scripted.memory.add(0, 2 * PAGE, buffer=buffer, offset=PAGE)
    buffer[PAGE] = 9
    assert ram[0] == 9
    with pytest.raises(BufferError):
        buffer.close()
    scripted.memory.remove(ram)
    buffer.close()


def test_releasing_a_view_does_not_release_the_slots_memory(scripted):
    """KVM goes on using it, so the caller's buffer stays exported."""
    buffer = mmap.mmap(-1, PAGE)
    slot = scripted.memory.add(0, PAGE, buffer=buffer)
    with slot.view as view:
        view[0] = 1
    exporter = memoryview(slot).obj
    exporter.release()
    assert slot[0] == 1
    with pytest.raises(BufferError):
        buffer.close()


def test_the_guest_sees_what_the_host_wrote(vm):
    """Memory of a slot added later is the guest's memory."""
    vcpu = load(vm, READ_AND_OUT)
    vm.memory.add(0x200000, PAGE)[0] = 0x42
    assert vcpu.run(timeout=10).data == b"\x42"


def test_a_write_to_a_readonly_slot_is_mmio_within_it(vm):
    """KVM reports it as MMIO though a slot is there, and the exit says which."""
    vcpu = load(vm, WRITE_AND_OUT)
    rom = vm.memory.add(0x200000, PAGE, readonly=True)
    exit = vcpu.run(timeout=10)
    assert (exit, exit.gpa, exit.data, exit.slot) == (exit, 0x200000, b"\x5a", rom)
    assert vcpu.run(timeout=10).port == 0x80
    assert rom[0] == 0


def test_a_hole_is_mmio_without_a_slot(vm):
    """Nothing covers the address."""
    exit = load(vm, READ_AND_OUT).run(timeout=10)
    assert (exit.gpa, exit.size, exit.is_write, exit.slot) == (0x200000, 1, False, None)


def test_a_dirty_log_sees_the_guests_write(vm):
    """KVM_GET_DIRTY_LOG on a slot with log_dirty has the page's bit."""
    vcpu = load(vm, WRITE_AND_OUT)
    slot = vm.memory.add(0x200000, 64 * PAGE, log_dirty=True)
    assert vcpu.run(timeout=10).port == 0x80
    bitmap = bytearray(8)
    address = memory_address(bitmap)
    argument = bytearray(slot.number.to_bytes(8, "little") + address.to_bytes(8, "little"))
    vm.ioctl(0x4010AE42, argument)  # KVM_GET_DIRTY_LOG
    assert bitmap == b"\x01" + bytes(7)


def memory_address(buffer):
    """Where a buffer is."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def needs_gmem(vm):
    """Skips where a guest_memfd cannot be mapped in an ordinary VM."""
    if vm.check(244) & MMAP_SHARED != MMAP_SHARED:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")


def test_a_mapped_guest_memfd_is_the_slots_memory(vm):
    """With MMAP, host and guest see the guest_memfd's pages."""
    needs_gmem(vm)
    vcpu = load(vm, WRITE_AND_OUT)
    slot = vm.memory.add(0x200000, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    assert vcpu.run(timeout=10).port == 0x80
    assert slot[0] == 0x5A
    assert not os.get_inheritable(slot.guest_memfd)


def test_a_closed_guest_memfd_is_a_memory_fault(vm):
    """Reason 39, EFAULT, flags 0; rebinding repairs it."""
    needs_gmem(vm)
    vcpu = load(vm, READ_AND_OUT)
    slot = vm.memory.add(0x200000, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    slot.close_guest_memfd()
    fault = vcpu.run(timeout=10)
    assert (type(fault).__name__, fault.gpa, fault.size, fault.private, fault.errno) == (
        "MemoryFault", 0x200000, PAGE, False, 14)
    vm.memory.remove(slot)
    vm.memory.add(0x200000, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)[0] = 7
    assert vcpu.run(timeout=10).data == b"\x07"


def test_the_place_of_a_closed_guest_memfd_stays_taken(vm):
    """KVM uses the host address for emulated accesses, so nobody else's memory may come to lie there before the slot goes."""
    needs_gmem(vm)
    slot = vm.memory.add(0x200000, 16 * PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    hva = slot.hva
    slot.close_guest_memfd()
    assert permissions(hva) == "---p"
    vm.memory.remove(slot)
    assert permissions(hva) != "---p"


def permissions(address):
    """What /proc/self/maps says of an address, or None."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= address < last:
                return line.split()[1]
    return None


def test_closing_a_guest_memfd_under_a_view_is_refused(vm):
    """A mapping keeps the file alive, so the caller is told instead of fooled."""
    needs_gmem(vm)
    slot = vm.memory.add(0x200000, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    view = slot[0:8]
    with pytest.raises(BufferError, match="release them first"):
        slot.close_guest_memfd()
    assert slot[0] == 0
    view.release()
    slot.close_guest_memfd()
    with pytest.raises(kvmexit.Error, match="has no guest_memfd"):
        slot.close_guest_memfd()


def test_flags_that_the_kernel_does_not_know_are_refused(vm):
    """KvmError names the call, and no descriptor stays behind."""
    if not vm.check(234):
        pytest.skip("this kernel has no guest_memfd")
    before = leaks()
    with pytest.raises(KvmError) as caught:
        vm.memory.add(0x200000, PAGE, guest_memfd=True, gmem_flags=1 << 40)
    assert caught.value.call == "KVM_CREATE_GUEST_MEMFD"
    assert leaks() == before


# ---- read and write ----


def test_read_and_write_cross_slots(scripted):
    """Adjacent slots are one address range."""
    scripted.memory.add(0, PAGE)
    scripted.memory.add(PAGE, PAGE)
    scripted.memory.write(PAGE - 3, b"abcdef")
    assert scripted.memory.read(PAGE - 4, 8) == b"\0abcdef\0"


def test_reading_a_hole_says_where_it_begins(scripted):
    """The error names the address and how far it got."""
    scripted.memory.add(0, PAGE)
    with pytest.raises(ValueError, match=r"no slot covers gpa 0x1000; 2 of 4 bytes done"):
        scripted.memory.read(PAGE - 2, 4)


def test_a_truncated_file_is_an_error_and_no_sigbus(scripted, file):
    """EFAULT from the kernel, not a signal."""
    scripted.memory.add(0, 4 * PAGE, fd=file)
    os.ftruncate(file, PAGE)
    assert scripted.memory.read(0, 1) == b"\x01"
    for access in (lambda: scripted.memory.read(PAGE, 1), lambda: scripted.memory.write(PAGE, b"x")):
        with pytest.raises(KvmError) as caught:
            access()
        assert caught.value.errno == 14
        assert "gpa 0x1000" in str(caught.value)


@pytest.mark.parametrize(("gpa", "n"), [(-1, 1), (1 << 64, 1), ((1 << 64) - 1, 2), (0, -1)])
def test_addresses_outside_64_bits_are_refused(scripted, gpa, n):
    """Nothing wraps."""
    with pytest.raises(ValueError, match=r"64 bits|negative"):
        scripted.memory.read(gpa, n)


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gpa": 1, "size": PAGE}, "gpa 0x1 is not a multiple"),
        ({"gpa": -PAGE, "size": PAGE}, "no 64-bit address"),
        ({"gpa": 1 << 64, "size": PAGE}, "no 64-bit address"),
        ({"gpa": 0, "size": 0}, "positive multiple"),
        ({"gpa": 0, "size": -PAGE}, "positive multiple"),
        ({"gpa": 0, "size": PAGE + 1}, "positive multiple"),
        ({"gpa": (1 << 64) - PAGE, "size": 2 * PAGE}, r"wraps around 2\*\*64"),
        ({"gpa": 0, "size": PAGE, "offset": PAGE}, "offset without"),
        ({"gpa": 0, "size": PAGE, "gmem_flags": 1}, "gmem_flags without"),
        ({"gpa": 0, "size": PAGE, "guest_memfd": True, "readonly": True}, "neither readonly nor log_dirty"),
        ({"gpa": 0, "size": PAGE, "guest_memfd": True, "log_dirty": True}, "neither readonly nor log_dirty"),
        ({"gpa": 0, "size": PAGE, "buffer": bytes(PAGE)}, "read-only"),
        ({"gpa": 0, "size": 2 * PAGE, "buffer": mmap.mmap(-1, PAGE)}, "too short"),
        ({"gpa": 0, "size": PAGE, "buffer": mmap.mmap(-1, 2 * PAGE), "offset": 8}, "not page-aligned"),
        ({"gpa": 0, "size": PAGE, "buffer": mmap.mmap(-1, PAGE), "fd": 0}, "give one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(scripted, arguments, says):
    """The value, and what would be right; and no slot comes of it."""
    with pytest.raises(ValueError, match=says):
        scripted.memory.add(**arguments)
    assert scripted.memory.slots == ()


def test_what_is_no_buffer_is_a_type_error(scripted):
    """Not everything has bytes."""
    with pytest.raises(TypeError, match="buffer"):
        scripted.memory.add(0, PAGE, buffer=object())


@pytest.mark.parametrize(("gpa", "size"), [(0x10000, PAGE), (0x0F000, 2 * PAGE), (0x11000, PAGE), (0, 0x100000)])
def test_an_overlap_names_the_slot(scripted, gpa, size):
    """Of several, the one in the way."""
    scripted.memory.add(0x400000, PAGE)
    scripted.memory.add(0x10000, 2 * PAGE)
    with pytest.raises(ValueError, match=r"overlaps Slot\(gpa=0x10000, size=0x2000, number=1\)"):
        scripted.memory.add(gpa, size)


@pytest.mark.parametrize(("gpa", "size"), [(2**64 - PAGE, PAGE), (2**64 - 2 * PAGE, PAGE), (2**64 - 3 * PAGE, 2 * PAGE)])
def test_an_overlap_with_the_last_addresses_there_are_is_seen(scripted, gpa, size):
    """A slot's end, 2**64, is no 64-bit number."""
    scripted.memory.add(2**64 - 2 * PAGE, 2 * PAGE)
    with pytest.raises(ValueError, match="overlaps Slot"):
        scripted.memory.add(gpa, size)
    scripted.memory.add(2**64 - 3 * PAGE, PAGE)


def test_a_file_too_short_or_not_writable_is_refused(scripted, file, tmp_path):
    """With its size; and a read-only descriptor serves a read-only slot."""
    with pytest.raises(ValueError, match=r"0x4000 bytes, too short"):
        scripted.memory.add(0, 2 * PAGE, fd=file, offset=3 * PAGE)
    with pytest.raises(ValueError, match="offset 0x8 must be a multiple"):
        scripted.memory.add(0, PAGE, fd=file, offset=8)
    path = tmp_path / "rom"
    path.write_bytes(b"R" * PAGE)
    with open(path, "rb") as rom:
        with pytest.raises(ValueError, match="readonly=True"):
            scripted.memory.add(0, PAGE, fd=rom.fileno())
        assert scripted.memory.add(0, PAGE, fd=rom.fileno(), readonly=True)[0] == ord("R")


def test_removing_what_is_not_there_is_refused(scripted):
    """By address or by slot, once."""
    slot = scripted.memory.add(0, PAGE)
    scripted.memory.remove(0xFFF)
    for gone in (slot, 0, -1, 1 << 64):
        with pytest.raises(ValueError, match="no such slot"):
            scripted.memory.remove(gone)
    with pytest.raises(kvmexit.Error, match="no memory any more"):
        slot[0]


def test_views_outlive_their_slot_and_the_vm(kvm):
    """The mapping goes with the last view."""
    with kvmexit.VM() as vm:
        view = vm.memory.add(0, PAGE)[0:8]
        vm.memory.remove(0)
        other = memoryview(vm.memory.add(0, PAGE))
    view[0] = other[0] = 1
    assert (view[0], other[0]) == (1, 1)


def test_slots_are_found_by_address_however_many_there_are(scripted):
    """Both ends of each slot belong to it, and the page between two slots to none."""
    slots = [scripted.memory.add(0x100000 + 2 * n * PAGE, PAGE) for n in range(50)]
    for slot in slots:
        for gpa, found in ((slot.gpa, True), (slot.gpa + PAGE - 1, True), (slot.gpa + PAGE, False)):
            with contextlib.nullcontext() if found else pytest.raises(ValueError, match="no slot"):
                scripted.memory.read(gpa, 1)
    for slot in slots[::2]:
        scripted.memory.remove(slot)
    assert scripted.memory.slots == tuple(slots[1::2])


def test_finalizers_may_remove_slots_while_others_are_added(scripted):
    """The collector may run one in the middle of add(): no deadlock, and neither change is lost."""

    class Device:
        def __init__(self, gpa):
            self.itself = self
            self.slot = scripted.memory.add(gpa, PAGE)

        def __del__(self):
            scripted.memory.remove(self.slot)

    threshold = gc.get_threshold()
    gc.freeze()  # the collections are of what is made here
    try:
        for n in range(200):
            gc.disable()
            Device(0x100000 + PAGE * n)
            gc.set_threshold(gc.get_count()[0] + n % 50)
            gc.enable()
            slot = scripted.memory.add(0, PAGE)
            gc.disable()
            gc.collect()
            assert scripted.memory.slots == (slot,)
            scripted.memory.remove(slot)
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
        gc.unfreeze()


def test_the_older_ioctl_serves_where_the_newer_is_missing(vm):
    """KVM_SET_USER_MEMORY_REGION takes the newer struct's beginning."""
    old = kvmexit._memory.Memory(kvmexit._ioctl.Handle(os.dup(vm.fd), "a test"), vm.type, False, range(100, 110))
    old.add(0, 1 << 20)[CODE : CODE + len(READ_AND_OUT)] = READ_AND_OUT
    old.add(0x200000, PAGE)[0] = 0x33
    vm.memory.adopt(90, 0, 1 << 20, old.slots[0].hva, None, 0, False)
    vcpu = vm.create_vcpu()
    kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
    assert vcpu.run(timeout=10).data == b"\x33"
    old.withdraw()


def test_a_slot_that_cannot_be_given_up_is_kept(vm):
    """Its private pages cannot be made shared (an adopted VM that died, say): the converter goes on knowing it, so it stays."""
    if not vm.check(234):
        pytest.skip("this kernel has no guest_memfd")
    recorded = RecordedAttributes({2: errno.EIO})
    ours = kvmexit._memory.Memory(kvmexit._ioctl.Handle(os.dup(vm.fd), "a test"), vm.type, True, range(100, 110), recorded)
    ours.add(0, 4 * PAGE, guest_memfd=True, discard=False)
    ours.add(1 << 20, PAGE)
    ours.convert(0, PAGE, private=True)
    ours.withdraw()
    assert [slot.gpa for slot in ours.slots] == [0]
    assert ours.ranges() == [(0, PAGE, True), (PAGE, 3 * PAGE, False)]
    ours.withdraw()
    assert (ours.slots, ours.ranges()) == ((), [])


def test_failures_leave_nothing_behind(vm, file):
    """Descriptors and mappings are as many as before."""
    vm.memory.add(0, PAGE)
    bad = [
        {"gpa": 0, "size": PAGE},
        {"gpa": PAGE, "size": PAGE, "fd": file, "offset": 8 * PAGE},
        {"gpa": PAGE, "size": PAGE, "fd": 9999},
        {"gpa": PAGE, "size": PAGE, "guest_memfd": True, "gmem_flags": 1 << 30},
        {"gpa": 1 << 62, "size": PAGE},
    ]
    before = leaks()
    for arguments in bad * 3:
        with contextlib.suppress(ValueError, OSError):
            vm.memory.add(**arguments)
    assert leaks() == before
    assert len(vm.memory.slots) <= 2
