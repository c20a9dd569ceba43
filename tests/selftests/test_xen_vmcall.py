"""After tools/testing/selftests/kvm/x86_64/xen_vmcall_test.c: hypercalls of a Xen guest.

Required of userspace: having asked for them (KVM_XEN_HVM_CONFIG), to be given each with its number, six arguments, mode and
privilege, whether the guest makes it itself or by the page that KVM filled in for it, and to answer. Hyper-V beside it stays
KVM's: its page is another, and its calls do not become Xen's.
"""

import struct

import pytest
from exit_guest import (
    FREE,
    GP,
    GUEST_OS_ID,
    HYPERCALL,
    HYPERCALL_PAGE,
    Guest,
    hyperv,
)

from kvmexit import NotPendingError, Xen

XEN_HVM, INTERCEPT_HCALL = 38, 1 << 1
XEN_HVM_CONFIG = 0x4038AE7A
XEN_MSR = 0x4000_0200
TYPE_HCALL = 1
NUMBER, RESULT = 17, 0xCAFE_F00D_FBFB_FFFF
ARGUMENTS = tuple(0xDEAD_BEEF_5A5A_0000 + i for i in range(1, 7))
XEN_PAGE, HYPERV_PAGE = FREE, FREE + 0x1000
REGISTERS = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), ARGUMENTS, strict=True))
INVALID_ALIGNMENT, SIGNAL_EVENT = 4, 0x5D

pytestmark = pytest.mark.usefixtures("hypercalls")


@pytest.fixture
def guest(vm):
    """One whose Xen hypercalls are userspace's, and that is shown Hyper-V, too."""
    if not vm.check(XEN_HVM) & INTERCEPT_HCALL:
        pytest.skip("this kernel's KVM has no Xen")
    made = Guest(vm)
    hyperv(made)
    vm.ioctl(XEN_HVM_CONFIG, struct.pack("<II48x", INTERCEPT_HCALL, XEN_MSR))
    return made


def call_at(guest, address, **registers):
    """Have the guest call an address: call r11."""
    return guest.step("41 ff d3", r11=address, **registers)


def is_call(exit):
    """Whether it is that call, made by 64-bit code at CPL 0."""
    return isinstance(exit, Xen) and (exit.type, exit.cpl, exit.longmode, exit.input, exit.params) == (
        TYPE_HCALL, 0, 1, NUMBER, ARGUMENTS)  # fmt: skip


def test_vmcall(guest):
    """By the instruction; it is not entered without a result, and its result is the guest's RAX."""
    exit = guest.step(HYPERCALL, rax=NUMBER, **REGISTERS)
    assert is_call(exit)
    assert guest.go_on() is exit
    exit.result = RESULT
    assert guest.caught(guest.go_on()) is None
    assert guest.vcpu.regs.rax == RESULT
    with pytest.raises(NotPendingError):
        exit.result = 0


def test_hypercall_page(vm, guest):
    """KVM fills the page in, an entry of 32 bytes for each number; answered by a handler. Hyper-V's hypercalls, by a page
    of its own, are not Xen's: KVM answers this one itself, as its input is not aligned."""
    calls = []
    vm.on(Xen, lambda vcpu, exit: calls.append(is_call(exit)) or RESULT)
    assert guest.caught(guest.wrmsr(XEN_MSR, XEN_PAGE)) is None
    assert guest.caught(guest.wrmsr(GUEST_OS_ID, 0x5A)) is None
    assert guest.caught(guest.wrmsr(HYPERCALL_PAGE, HYPERV_PAGE | 1)) is None
    entry = vm.memory.read(XEN_PAGE + 32 * NUMBER, 5)
    assert entry == b"\xb8" + NUMBER.to_bytes(4, "little")  # mov eax, NUMBER
    assert guest.caught(call_at(guest, XEN_PAGE + 32 * NUMBER, rax=0, **REGISTERS)) is None
    assert (guest.vcpu.regs.rax, calls) == (RESULT, [True])
    assert guest.caught(call_at(guest, HYPERV_PAGE, rax=0, rcx=SIGNAL_EVENT, rdx=0x5A5A_5A5A, r8=0)) is None
    assert (guest.vcpu.regs.rax, calls) == (INVALID_ALIGNMENT, [True])


def test_a_page_that_is_not_there(guest):
    """Outside of memory there is no page to fill in."""
    assert guest.caught(guest.wrmsr(XEN_MSR, 0x1000_0000)) == GP
