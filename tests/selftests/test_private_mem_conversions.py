"""After tools/testing/selftests/kvm/x86_64/private_mem_conversions_test.c.

It requires of userspace: to answer a guest's KVM_HC_MAP_GPA_RANGE by setting attributes, with or without giving memory back, so
that memory is shared at first; a range (4 KiB, 2 MiB, at odd places, over two memslots of one guest_memfd) that was asked to be
private holds what the guest wrote there and the host goes on seeing the shared side; the pages around it keep theirs; odd
pages in a private range can be shared, and everything back again. A hole in the guest_memfd is zeros to the guest. Several
vCPUs do so at once. The guest_memfd outlives the VM.

Here the answer is one of kvmexit's two handlers. What differs: a conversion gives back the side that goes out of use unless the slot
says discard=False, so with it the host then sees zeros, where the kernel's test always has what was there.
"""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from guests import stress
from memory_guest import GUEST_MEMFD, MIB, PAGE, Guest, create_guest_memfd, fallocate, punch_hole, set_region

import kvmexit
from kvmexit import AdoptedSlot, VMType, handlers, native

BASE, CHUNK, SIZE = 0x1000_0000, 4 * MIB, 2 * MIB + PAGE  # of each vCPU: where, how much there is, how much it uses
RANGES = [(0, PAGE), (0, 2 * MIB), (PAGE, PAGE), (PAGE, 2 * MIB), (2 * MIB, PAGE)]
MAPPED, INITIAL = 0xAA, 0xCC
ENCRYPTED = 1 << 4


class Machine:
    """A VM with `slots` memslots for `vcpus` chunks, its guests, and the guest_memfd of each slot.

    one_file: all slots are bound to one guest_memfd, at different offsets: made by hand, and adopted, since memory.add() makes a
    guest_memfd for each.
    """

    def __init__(self, vm, how, vcpus, slots, *, one_file=False, discard=False):
        size = vcpus * CHUNK // slots
        where = [BASE + n * size for n in range(slots)]
        if one_file:
            ram = vm.memory.add(0, MIB)
            self.backing = mmap.mmap(-1, slots * size)
            hva = ram_address(self.backing)
            fd = create_guest_memfd(vm, slots * size)
            self.files = [(fd, n * size) for n in range(slots)]
            adopted = [AdoptedSlot(ram.number, 0, MIB, ram.hva)]
            for n, gpa in enumerate(where):
                set_region(vm, 10 + n, GUEST_MEMFD, gpa, size, hva + n * size, fd, n * size)
                adopted.append(AdoptedSlot(10 + n, gpa, size, hva + n * size, fd, n * size, discard))
            vm = kvmexit.VM.adopt(vm.fd, type=VMType.SW_PROTECTED, slots=adopted)
        else:
            made = [vm.memory.add(gpa, size, guest_memfd=True, discard=discard) for gpa in where]
            self.files = [(slot.guest_memfd, 0) for slot in made]
        self.vm, self.size, self.discard = vm, size, discard
        self.native = native.Convert(vm) if how == "native" else None
        vm.on_hypercall(12, self.native or handlers.map_gpa_range)
        self.guests = [Guest(vm, id, cpl=0) for id in range(vcpus)]
        self.asked = 0

    def ask(self, guest, gpa, size, *, private):
        """The guest's KVM_HC_MAP_GPA_RANGE, which is to succeed."""
        self.asked += 1
        assert guest.do("ask", rax=12, rbx=gpa, rcx=size // PAGE, rdx=ENCRYPTED * private).rax == 0

    def host_sees(self, gpa, size, byte):
        return self.vm.memory.read(gpa, size) == bytes([byte]) * size

    def host_writes(self, gpa, size, byte):
        self.vm.memory.write(gpa, bytes([byte]) * size)

    def free(self, gpa, size):
        """Holes in the guest_memfd, without a conversion."""
        while size:
            number, offset = divmod(gpa - BASE, self.size)
            fd, begin = self.files[number]
            part = min(size, self.size - offset)
            punch_hole(fd, begin + offset, part)
            gpa, size = gpa + part, size - part

    def all_at_once(self, script):
        """Each guest in a thread of its own, with its chunk."""
        with ThreadPoolExecutor(len(self.guests)) as pool:
            list(pool.map(lambda guest: script(self, guest, BASE + guest.vcpu.id * CHUNK), self.guests))


def ram_address(buffer):
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def convert_ranges(machine, guest, base):
    """What the kernel's guest does."""
    guest.fill(base, SIZE, MAPPED)
    assert guest.holds(base, SIZE, MAPPED)
    assert machine.host_sees(base, SIZE, MAPPED)
    machine.host_writes(base, SIZE, INITIAL)
    assert guest.holds(base, SIZE, INITIAL)
    for offset, size in RANGES:
        gpa, end = base + offset, base + offset + size
        guest.fill(gpa, size, 0x11)
        machine.ask(guest, gpa, size, private=True)
        shared = 0 if machine.discard else 0x11
        guest.fill(gpa, size, 0x22)
        assert machine.host_sees(gpa, size, shared)
        assert guest.holds(gpa, size, 0x22)
        for begin, length in ((base, offset), (end, base + SIZE - end)):
            assert guest.holds(begin, length, INITIAL)
            assert machine.host_sees(begin, length, INITIAL)
        for page in odd_pages(gpa, size):
            machine.ask(guest, page, PAGE, private=False)
            assert machine.host_sees(page, PAGE, shared)
            machine.host_writes(page, PAGE, 0x33)
            assert guest.holds(page, PAGE, 0x33)
            for even in (page - PAGE, page + PAGE):
                assert even >= end or guest.holds(even, PAGE, 0x22)
                assert even >= end or machine.host_sees(even, PAGE, shared)
        machine.ask(guest, gpa, size, private=False)
        assert guest.holds(gpa, PAGE, shared)
        for page in {gpa, end - PAGE}:  # the private side: gone, or still there
            machine.ask(guest, page, PAGE, private=True)
            assert guest.holds(page, PAGE, 0 if machine.discard else 0x22)
            machine.ask(guest, page, PAGE, private=False)
        guest.fill(gpa, size, 0x33)
        assert machine.host_sees(gpa, size, 0x33)
        machine.host_writes(gpa, size, 0x44)
        assert guest.holds(gpa, size, 0x44)
        guest.fill(gpa, size, INITIAL)
        machine.free(base, SIZE)


def odd_pages(gpa, size):
    """-> the addresses of every other page: all at KVMEXIT_STRESS=1, else the first and the last few."""
    pages = range(gpa + PAGE, gpa + size, 2 * PAGE)
    few = max(stress(len(pages)) // 2, 2)
    return sorted({*pages[:few], *pages[-few:]})


# vCPUs, memslots, of one guest_memfd; who answers, whether the other side is given back.
CASES = [
    (1, 1, False, "python", False), (1, 2, False, "native", True), (1, 2, True, "python", True), (2, 1, False, "native", False),
    (2, 2, True, "native", True),
]  # fmt: skip


def name(value):
    return value if isinstance(value, str) else str(int(value))


@pytest.mark.parametrize(("vcpus", "slots", "one_file", "how", "discard"), CASES, ids=name)
def test_explicit_conversion(private_vm, how, vcpus, slots, one_file, discard):
    """The guest asks; what it and the host see."""
    machine = Machine(private_vm, how, vcpus, slots, one_file=one_file, discard=discard)
    machine.all_at_once(convert_ranges)
    private = [at for at in machine.vm.memory.ranges() if at.private]
    assert private == []
    if how == "native":
        assert machine.native.hypercalls == machine.asked
        assert machine.native.failed == 0


@pytest.mark.parametrize(("vcpus", "slots", "one_file", "precise"), [(1, 1, False, True), (2, 2, True, False)], ids=name)
def test_punch_hole(private_vm, vcpus, slots, one_file, precise):
    """A hole in private memory takes it from the guest, and what comes instead is zeros. precise: only what is punched was there."""

    def punch(machine, guest, base):
        machine.ask(guest, base, SIZE, private=True)
        for offset, size in RANGES:
            gpa = base + offset
            machine.free(base, SIZE)
            filled = (gpa, size) if precise else (base, SIZE)
            guest.fill(*filled, INITIAL)
            assert guest.holds(*filled, INITIAL)
            machine.free(gpa, size)
            assert guest.holds(gpa, size, 0)

    Machine(private_vm, "native", vcpus, slots, one_file=one_file).all_at_once(punch)


@pytest.mark.parametrize("one_file", [False, True])
def test_the_guest_memfd_outlives_its_vm(private_vm, one_file):
    """Memory in it can be freed and had when the VM's descriptor is closed."""
    machine = Machine(private_vm, "python", 1, 2, one_file=one_file)
    guest, fd = machine.guests[0], os.dup(machine.files[0][0])
    machine.ask(guest, BASE, SIZE, private=True)
    guest.fill(BASE, SIZE, 1)
    machine.vm.close()
    private_vm.close()
    size = os.fstat(fd).st_size
    punch_hole(fd, 0, size)
    fallocate(fd, 1, 0, size)
    os.close(fd)


def test_the_guest_s_words(private_vm):
    """The exit's arguments are what the guest asked for."""
    seen = []

    @private_vm.on_hypercall(12)
    def note(vcpu, exit):
        seen.append((exit.nr, exit.args[:3], exit.flags & 1))
        exit.ret = 0

    private_vm.memory.add(BASE, CHUNK, guest_memfd=True)
    guest = Guest(private_vm, cpl=0)
    for gpa, pages, attributes in ((BASE, 1, ENCRYPTED), (BASE + PAGE, 512, 0), (BASE, 1, 7)):
        assert guest.do("ask", rax=12, rbx=gpa, rcx=pages, rdx=attributes).rax == 0
    assert seen == [(12, (BASE, 1, ENCRYPTED), 1), (12, (BASE + PAGE, 512, 0), 1), (12, (BASE, 1, 7), 1)]
