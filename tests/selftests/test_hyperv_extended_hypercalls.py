"""After tools/testing/selftests/kvm/x86_64/hyperv_extended_hypercalls.c, and its neighbours that KVM gives to userspace,
too.

Required of userspace: to be given the hypercall with the guest's input and the addresses of its pages, to answer into its
page and with a status, and the guest goes on with both. Beside it here are the other exits of Hyper-V: a message that is
posted, the synthetic interrupt controller's registers, and the synthetic debugger's, whose status userspace answers.
"""

import pytest
from exit_guest import (
    EAX,
    EBX,
    FEATURES,
    FREE,
    GUEST_OS_ID,
    HYPERCALL_PAGE,
    HYPERV_CPUID,
    LINUX,
    SYNDBG,
    Guest,
    enable,
    hyperv,
    hyperv_call,
)  # fmt: skip

from kvmexit import Hyperv, NotPendingError

HYPERV_SYNIC2 = 148
TYPE_SYNIC, TYPE_HCALL, TYPE_SYNDBG = 1, 2, 3
QUERY_CAPABILITIES, POST_MESSAGE = 0x8001, 0x5C
INPUT, OUTPUT = FREE, FREE + 0x1000
CAPABILITIES = 0xB


@pytest.fixture
def guest(vm):
    """One that is shown all of Hyper-V that KVM has."""
    if not vm.check(HYPERV_CPUID):
        pytest.skip("this kernel's KVM has no Hyper-V")
    vm.create_irqchip()
    made = Guest(vm)
    enable(made.vcpu, HYPERV_SYNIC2)
    hyperv(made, (FEATURES, EBX, 20), (SYNDBG, EAX, 1))
    assert made.caught(made.wrmsr(GUEST_OS_ID, LINUX)) is None
    assert made.caught(made.wrmsr(HYPERCALL_PAGE, FREE)) is None
    return made


def told(exit):
    """-> what an exit of Hyper-V says: the fields that its type has."""
    assert isinstance(exit, Hyperv), exit
    names = "msr", "control", "evt_page", "msg_page", "input", "params", "send_page", "recv_page"
    return {"type": exit.type} | {name: getattr(exit, name) for name in names if getattr(exit, name) is not None}


@pytest.mark.usefixtures("hypercalls")
@pytest.mark.parametrize("status", [0, 0xFFFF_0006])
def test_extended_hypercall(vm, guest, status):
    """Userspace's page and status are what the guest finds; and it is not entered before it has them."""
    exit = hyperv_call(guest, QUERY_CAPABILITIES, INPUT, OUTPUT)
    assert told(exit) == {"type": TYPE_HCALL, "input": QUERY_CAPABILITIES, "params": (INPUT, OUTPUT)}
    assert guest.go_on() is exit
    vm.memory.write(exit.params[1], CAPABILITIES.to_bytes(8, "little"))
    exit.result = status
    assert guest.caught(guest.go_on()) is None
    assert guest.vcpu.regs.rax == status
    assert vm.memory.read(OUTPUT, 8) == CAPABILITIES.to_bytes(8, "little")
    with pytest.raises(NotPendingError):
        exit.result = 1


@pytest.mark.usefixtures("hypercalls")
def test_extended_hypercall_by_a_handler(vm, guest):
    """The return value is the status. Another hypercall that KVM forwards: a message to a port it does not know."""
    calls = []

    @vm.on(Hyperv)
    def hypercall(vcpu, exit):
        calls.append((exit.type, exit.input, *exit.params))
        return len(calls)

    for i, control in enumerate((QUERY_CAPABILITIES, POST_MESSAGE), 1):
        assert guest.caught(hyperv_call(guest, control, INPUT, OUTPUT)) is None
        assert guest.vcpu.regs.rax == i
    assert calls == [(TYPE_HCALL, control, INPUT, OUTPUT) for control in (QUERY_CAPABILITIES, POST_MESSAGE)]


def test_synic(guest):
    """The guest's writes to its control, event page and message page are told, each with all three as they are then. KVM has
    taken them: there is nothing to answer."""
    control, events, messages = 0x4000_0080, 0x4000_0082, 0x4000_0083
    so_far = {"control": 1, "evt_page": 0, "msg_page": 0}  # KVM enables it, whatever a guest would expect
    writes = (events, "evt_page", FREE + 0x2001), (messages, "msg_page", FREE + 0x3001), (control, "control", 0)
    for msr, name, value in writes:
        exit = guest.wrmsr(msr, value)
        so_far[name] = value
        assert told(exit) == {"type": TYPE_SYNIC, "msr": msr, **so_far}
        assert exit.result is exit.status is exit.pending_page is None
        assert guest.caught(guest.go_on()) is None
        assert guest.caught(guest.rdmsr(msr)) is None
        assert guest.edx_eax() == value


def test_syndbg(guest):
    """What the guest writes to the debugger's control is userspace's to carry out: it answers a status, which the guest then
    reads, with the pages that were set before."""
    control, status, send, receive, pending = range(0x4000_00F1, 0x4000_00F6)
    for msr, page in ((send, FREE + 0x4000), (receive, FREE + 0x5000)):
        assert guest.caught(guest.wrmsr(msr, page)) is None
    pages = {"send_page": FREE + 0x4000, "recv_page": FREE + 0x5000}
    exit = guest.wrmsr(pending, FREE + 0x6000)
    assert told(exit) == {"type": TYPE_SYNDBG, "msr": pending, "control": 0, **pages}
    assert exit.pending_page == FREE + 0x6000
    exit.status = 0
    assert guest.caught(guest.go_on()) is None
    exit = guest.wrmsr(control, 0x0020_0001)  # send, 32 bytes
    assert told(exit) == {"type": TYPE_SYNDBG, "msr": control, "control": 0x0020_0001, **pages}
    assert guest.go_on() is exit  # not without a status
    exit.status = 0x1234_0003
    assert guest.caught(guest.go_on()) is None
    assert guest.caught(guest.rdmsr(status)) is None
    assert guest.edx_eax() == 0x1234_0003
