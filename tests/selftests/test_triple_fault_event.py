"""After tools/testing/selftests/kvm/x86_64/triple_fault_event_test.c: a triple fault as an event that userspace gives.

Required: with KVM_CAP_X86_TRIPLE_FAULT_EVENT, a triple fault that userspace makes pending stays pending while KVM
completes an exit, and is delivered at the next entry: as KVM_EXIT_SHUTDOWN, or, where a guest's guest has it and the
guest intercepts shutdowns, as an exit of that. The original's second half for VMX is left out: the lab's processor has
SVM.
"""

import errno
import struct

import pytest
from exit_guest import FREE, Guest, amd

from kvmexit import KvmError, Shutdown

TRIPLE_FAULT_EVENT, NESTED_STATE = 218, 157
VALID_TRIPLE_FAULT = 1 << 5
GET_VCPU_EVENTS, SET_VCPU_EVENTS = 0x8040AE9F, 0x4040AEA0
PORT = 0x2000
EFER_SVME, VM_HSAVE_PA = 1 << 12, 0xC001_0117
VMCB, HOST_SAVE, INNER, INNER_STACK = FREE, FREE + 0x1000, FREE + 0x2000, FREE + 0x4000
INTERCEPT_SHUTDOWN, EXIT_SHUTDOWN = 1 << 31, 0x7F


def by_view(vcpu):
    """Kept aside by kvmexit until KVM has completed the exit."""
    vcpu.events.flags |= VALID_TRIPLE_FAULT
    vcpu.events.triple_fault_pending = 1


def by_ioctl(vcpu):
    """In KVM's own order, before."""
    events = bytearray(64)
    vcpu.ioctl(GET_VCPU_EVENTS, events)
    events[20] |= VALID_TRIPLE_FAULT
    events[28] = 1
    vcpu.ioctl(SET_VCPU_EVENTS, events)


@pytest.fixture(params=[by_view, by_ioctl])
def give(request):
    """How userspace gives it."""
    return request.param


@pytest.fixture
def guest(vm):
    """One that may be given triple faults."""
    if not vm.check(TRIPLE_FAULT_EVENT):
        pytest.skip("this kernel has no KVM_CAP_X86_TRIPLE_FAULT_EVENT")
    vm.enable(TRIPLE_FAULT_EVENT, 1)
    return Guest(vm)


def deliver(guest, exit, give):
    """At an input, give it a triple fault; -> the exit after that."""
    vcpu = guest.vcpu
    assert (exit.port, exit.is_write) == (PORT, False)
    exit.data = 0
    give(vcpu)
    assert vcpu.complete() is None
    assert vcpu.events.flags & VALID_TRIPLE_FAULT
    assert vcpu.events.triple_fault_pending == 1
    return guest.go_on()


def test_triple_fault(guest, give):
    """A guest of no guest is shut down."""
    assert isinstance(deliver(guest, guest.step("ec", rdx=PORT), give), Shutdown)  # in al, dx


def test_none_is_pending_by_itself(guest):
    """The field is there, and says so; without it the guest goes on."""
    exit = guest.step("ec", rdx=PORT)
    assert (guest.vcpu.events.flags & VALID_TRIPLE_FAULT, guest.vcpu.events.triple_fault_pending) == (VALID_TRIPLE_FAULT, 0)
    exit.data = 0
    assert guest.caught(guest.go_on()) is None


def test_without_the_capability(vm):
    """KVM refuses it, and does not show the field."""
    guest = Guest(vm)
    guest.step("90")
    assert not guest.vcpu.events.flags & VALID_TRIPLE_FAULT
    with pytest.raises(KvmError) as caught:
        by_ioctl(guest.vcpu)
    assert caught.value.errno == errno.EINVAL


def inner_guest(guest, intercepts):
    """A VMCB for 64-bit code like the guest's own, with its tables; and what the processor wants of the guest before it."""
    vm, sregs = guest.vm, guest.vcpu.sregs
    sregs.efer |= EFER_SVME
    vmcb = bytearray(0x1000)

    def put(offset, form, *values):
        struct.pack_into(f"<{form}", vmcb, offset, *values)

    put(0x0C, "II", intercepts, 1)  # VMRUN has to be among them
    put(0x58, "I", 1)  # an address space of its own
    data, code, tss = 0xC93, 0xA9B, 0x8B
    # selector, attributes, limit, base of es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr
    segments = [(0x10, data), (0x08, code), *[(0x10, data)] * 4, (0, 0), (0, 0), (0, 0), (0x18, tss)]
    for i, (selector, attributes) in enumerate(segments):
        put(0x400 + 16 * i, "HHIQ", selector, attributes, 0xFFFF_FFFF if attributes & 0x800 else 0x67, 0)
    put(0x4D0, "Q", sregs.efer)
    put(0x548, "QQQQQQQ", sregs.cr4, sregs.cr3, sregs.cr0, 0x400, 0xFFFF_0FF0, 2, INNER)  # then dr7, dr6, rflags, rip
    put(0x5D8, "Q", INNER_STACK)
    vm.memory.write(VMCB, bytes(vmcb))
    vm.memory.write(INNER, bytes.fromhex("ec f4"))  # in al, dx; hlt
    assert guest.caught(guest.wrmsr(VM_HSAVE_PA, HOST_SAVE)) is None


@pytest.mark.parametrize("intercepted", [False, True])
def test_triple_fault_in_a_nested_guest(vm, guest, give, intercepted):
    """Its guest's, unless it wants to know of those: then that exits to it, and it goes on itself."""
    if not (vm.check(NESTED_STATE) and amd()):
        pytest.skip("a guest has no SVM on this machine")
    inner_guest(guest, INTERCEPT_SHUTDOWN if intercepted else 0)
    exit = deliver(guest, guest.step("0f 01 d8", rax=VMCB, rdx=PORT), give)  # vmrun
    if not intercepted:
        assert isinstance(exit, Shutdown)
        return
    assert guest.caught(exit) is None
    assert vm.memory.read(VMCB + 0x70, 8) == EXIT_SHUTDOWN.to_bytes(8, "little")
