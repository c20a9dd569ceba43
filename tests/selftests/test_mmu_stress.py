"""After tools/testing/selftests/kvm/mmu_stress_test.c (until 6.13 max_guest_memory_test.c, without the part about EFAULT).

It requires of userspace: vCPUs that write all of a large memory, again with KVM's paging set up anew (CR0.WP changes), and read it.
Meanwhile the host makes its mapping read-only: a write is EFAULT then, each one, and kvm_run has the registers on that error
return too, so that userspace can put rip behind the instruction and go on to the next. Writable again, the guest writes on where it
was. In the end slots go, and half of the memory under them, before the VM does.

Here EFAULT without an exit is an UnexplainedFault. The memory is one file in several slots, as there, but megabytes.
"""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from guests import stress
from memory_guest import FLAG, PAGE, Guest, mprotect

import kvmexit
from kvmexit import UnexplainedFault

GPA, SLOTS = 0x1000_0000, 4
SLOT = max(stress(512), 32) // 2 * 2 * PAGE
PROT_NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_WRITE
WP = 1 << 16  # in CR0
INSTRUCTION = 3  # bytes of mov [rax], rax


class Machine:
    """A file, mapped once, as the memory of four slots; two vCPUs, each with two of them."""

    def __init__(self, vm, vcpus):
        self.vm = vm
        self.memory = mmap.mmap(-1, SLOT)
        self.slots = [vm.memory.add(GPA + n * SLOT, SLOT, buffer=self.memory) for n in range(SLOTS)]
        self.guests = [Guest(vm, id) for id in range(vcpus)]
        self.size = SLOTS // vcpus * SLOT
        self.hva = self.slots[0].hva

    def each(self, function):
        """function(guest, where its memory is) in a thread for each."""
        with ThreadPoolExecutor(len(self.guests)) as pool:
            return list(pool.map(lambda guest: function(guest, GPA + guest.vcpu.id * self.size), self.guests))

    def protect(self, protection):
        mprotect(self.hva, SLOT, protection)


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("how", ["caller", "handler", "skip"])
def test_mmu_stress(vm, how, vcpus):
    """All stages; the faults skipped by whoever called run(), by a handler, or by faults.skip()."""
    machine = Machine(vm, vcpus)
    size = machine.size
    machine.each(lambda guest, gpa: guest.write(gpa, size))
    for guest in machine.guests:
        guest.vcpu.sregs.cr0 ^= WP
    machine.each(lambda guest, gpa: guest.write(gpa, size))
    sums = machine.each(lambda guest, gpa: guest.add_up(gpa, size))
    # The slots are one memory, so that each place has what was written there last.
    words = [int.from_bytes(machine.memory[at : at + 8], "little") for at in range(0, SLOT, PAGE)]
    assert all((word - GPA) % SLOT == n * PAGE for n, word in enumerate(words))
    if vcpus == 1:
        assert sums == [sum(words) * SLOTS]

    # Read-only while they write. It is done when FLAG says so; each write from then on is a fault.
    faults = {guest.vcpu: [] for guest in machine.guests}
    fell = threading.Barrier(vcpus + 1)

    def skip(vcpu, fault):
        assert (type(fault), fault.reason, fault.errno) == (UnexplainedFault, None, 14)
        assert fault.rip == vcpu.regs.rip
        faults[vcpu].append(vcpu.regs.rax)
        if how == "skip":
            kvmexit.faults.skip(vcpu, INSTRUCTION)
        else:
            vcpu.regs.rip += INSTRUCTION
        if len(faults[vcpu]) == 1:
            fell.wait(60)  # until FLAG is set, so that a whole round comes behind it

    def write_until(guest, gpa):
        guest.begin("write until", rdi=gpa, rsi=gpa + size, rdx=PAGE, rbx=FLAG)
        while isinstance(exit := guest.vcpu.run(timeout=60), UnexplainedFault):
            skip(guest.vcpu, exit)
        assert exit.port == 0xF4, exit

    route = vm.on(UnexplainedFault, skip) if how != "caller" else None
    vm.memory.write(FLAG, b"\0")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(machine.each, write_until)
        try:
            machine.protect(READ)
            fell.wait(60)  # each has had a fault, so that all of it is read-only
            before = bytes(machine.memory[:])
        finally:
            vm.memory.write(FLAG, b"\1")
        writing.result(120)
    for guest in machine.guests:
        gpa, seen = GPA + guest.vcpu.id * size, faults[guest.vcpu]
        assert seen[0] in range(gpa, gpa + size, PAGE)
        # From the first fault on every write is one, in order, to the end of the round in which FLAG was seen.
        expected = [gpa + (seen[0] - gpa + n * PAGE) % size for n in range(len(seen))]
        assert seen == expected
        assert seen[-1] == gpa + size - PAGE
    assert machine.memory[:] == before  # none of them took place
    machine.each(lambda guest, gpa: guest.add_up(gpa, size))  # reading is no fault
    if route is not None:
        route.remove()

    # Writable again while they write: where they were, without losing a write.
    first = threading.Barrier(vcpus + 1)

    def write(guest, gpa):
        guest.begin("write", rdi=gpa, rsi=gpa + size, rdx=PAGE)
        exit = guest.vcpu.run(timeout=60)
        assert isinstance(exit, UnexplainedFault), exit
        assert guest.vcpu.regs.rdi == gpa
        first.wait(60)
        while isinstance(exit := guest.vcpu.run(timeout=60), UnexplainedFault):
            pass
        assert exit.port == 0xF4, exit

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(machine.each, write)
        first.wait(60)
        machine.protect(READ | WRITE)
        writing.result(120)
    last = {GPA + (n + 1) * machine.size - SLOT for n in range(vcpus)}  # the slot that each wrote last
    for n in range(0, SLOT, PAGE):
        assert int.from_bytes(machine.memory[n : n + 8], "little") - n in last


def test_memory_goes_before_the_vm(vm):
    """Every other slot, then half of the memory of what is left: the guest finds MMIO, and EFAULT; the VM closes."""
    machine = Machine(vm, 2)
    machine.each(lambda guest, gpa: guest.write(gpa, machine.size))
    for slot in machine.slots[1::2]:
        vm.memory.remove(slot)
    mprotect(machine.hva, SLOT // 2, PROT_NONE)
    for guest in machine.guests:
        gpa = GPA + guest.vcpu.id * machine.size
        guest.begin("add up", rdi=gpa, rsi=gpa + 1, rdx=PAGE, rax=0)
        assert isinstance(guest.vcpu.run(timeout=60), UnexplainedFault)
        assert guest.add_up(gpa + SLOT // 2, SLOT // 2) > 0
        guest.begin("add up", rdi=gpa + SLOT, rsi=gpa + SLOT + 1, rdx=PAGE, rax=0)
        exit = guest.vcpu.run(timeout=60)
        assert (type(exit), exit.gpa, exit.slot) == (kvmexit.Mmio, gpa + SLOT, None)
    vm.close()
    machine.protect(READ | WRITE)
