"""After tools/testing/selftests/kvm/x86_64/private_mem_kvm_exits_test.c.

It requires of userspace: KVM_RUN fails with EFAULT and says KVM_EXIT_MEMORY_FAULT, flags exactly PRIVATE, with the page's address and
size, where a guest touches private memory whose memslot is deleted while the vCPU runs, and where the slot has no guest_memfd.

A machine without private memory has two relatives of it: a guest_memfd that goes (flags 0), and a slot that goes (MMIO).
"""

import errno

import pytest
from memory_guest import GUEST_MEMFD, MIB, PAGE, PRIVATE, Guest, set_attributes, set_region
from processes import in_thread

import kvmexit
from kvmexit import ConversionError, ExitReason, GuestMemfdFlags, MemoryFault, Mmio, handlers

GPA = 0xC000_0000
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED


def reads_for_ever(guest):
    """-> (thread in which it reads [GPA] until run() returns, the list for what comes); it is reading already."""
    guest.begin("spin", rdi=GPA, rbx=0x7000, rax=0)
    results = []
    thread = in_thread(lambda: results.append(guest.vcpu.run(timeout=60)))
    while int.from_bytes(guest.vcpu.vm.memory.read(0x7000, 8), "little") < 2:
        assert not results, results
    return thread, results


def is_private_fault(exit):
    """EFAULT, flags PRIVATE and nothing else, the one page."""
    assert isinstance(exit, MemoryFault), exit
    assert (exit.reason, exit.errno) == (ExitReason.MEMORY_FAULT, errno.EFAULT)
    assert (exit.flags, exit.private, exit.gpa, exit.size) == (PRIVATE, True, GPA, PAGE)


def test_private_access_memslot_deleted(private_vm):
    """Under the running vCPU, by KVM's own call, so that the page stays private; run() says it again each time."""
    slot = private_vm.memory.add(GPA, PAGE, guest_memfd=True)
    private_vm.memory.convert(GPA, PAGE, private=True)
    guest = Guest(private_vm)
    thread, results = reads_for_ever(guest)
    set_region(private_vm, slot.number, GUEST_MEMFD, GPA, 0)
    thread.join(60)
    is_private_fault(results[0])
    is_private_fault(guest.vcpu.run(timeout=60))
    set_attributes(private_vm, GPA, PAGE, 0)
    exit = guest.vcpu.run(timeout=60)
    assert (type(exit), exit.gpa, exit.size, exit.slot) == (Mmio, GPA, 8, slot)


def test_private_access_memslot_removed(private_vm):
    """The same by memory.remove(), which makes the hole shared: the fault where the vCPU is faster, and then MMIO for good."""
    slot = private_vm.memory.add(GPA, PAGE, guest_memfd=True)
    private_vm.memory.convert(GPA, PAGE, private=True)
    guest = Guest(private_vm)
    thread, results = reads_for_ever(guest)
    private_vm.memory.remove(slot)
    thread.join(60)
    if isinstance(results[0], MemoryFault):
        is_private_fault(results[0])
        results[0] = guest.vcpu.run(timeout=60)
    assert (type(results[0]), results[0].gpa, results[0].size) == (Mmio, GPA, 8)


def test_private_access_memslot_not_private(private_vm):
    """The slot cannot be private: kvmexit refuses to make it so, and where somebody else did, the exit says it."""
    private_vm.memory.add(GPA, PAGE)
    with pytest.raises(ConversionError, match="has no guest_memfd"):
        private_vm.memory.convert(GPA, PAGE, private=True)
    set_attributes(private_vm, GPA, PAGE, PRIVATE)
    guest = Guest(private_vm)
    guest.begin("add up", rdi=GPA, rsi=GPA + PAGE, rdx=PAGE, rax=0)
    is_private_fault(guest.vcpu.run(timeout=60))
    with private_vm.on_memory_fault(handler=handlers.convert), pytest.raises(ConversionError, match="has no guest_memfd"):
        guest.vcpu.run(timeout=60)
    private_vm.memory.write(GPA, (7).to_bytes(8, "little"))
    set_attributes(private_vm, GPA, PAGE, 0)
    assert isinstance(guest.vcpu.run(timeout=60), MemoryFault)  # its handler raised: the same exit is offered again
    assert guest.go_on().rax == 7


def test_a_guest_memfd_closed_under_a_running_vcpu(vm):
    """An ordinary VM's whole guest_memfd is shared: flags 0. The exit comes again until there is memory."""
    if vm.check(244) & MMAP_SHARED != MMAP_SHARED:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    slot = vm.memory.add(GPA, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    guest = Guest(vm)
    thread, results = reads_for_ever(guest)
    slot.close_guest_memfd()
    thread.join(60)
    for exit in (results[0], guest.vcpu.run(timeout=60)):
        assert (exit.reason, exit.errno) == (ExitReason.MEMORY_FAULT, errno.EFAULT)
        assert (exit.flags, exit.private, exit.gpa, exit.size) == (0, False, GPA, PAGE)
    vm.memory.remove(slot)
    vm.memory.add(GPA, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)[0] = 1
    assert guest.go_on().rcx == 1


def test_memslot_removed_under_a_running_vcpu(vm):
    """Ordinary memory: MMIO with the access's own address and size, and the answer is what the guest reads."""
    slot = vm.memory.add(GPA, MIB)
    guest = Guest(vm)
    thread, results = reads_for_ever(guest)
    vm.memory.remove(slot)
    thread.join(60)
    exit = results[0]
    assert isinstance(exit, kvmexit.Mmio), exit
    assert (exit.gpa, exit.size, exit.is_write) == (GPA, 8, False)
    assert exit.slot in (None, slot)  # it may exit before remove() has come that far
    exit.data = 5
    assert guest.go_on().rcx == 5
