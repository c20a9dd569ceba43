"""After tools/testing/selftests/kvm/x86_64/hyperv_features.c: what of Hyper-V a guest may use.

Required of userspace: to show the guest features by CPUID, and with KVM_CAP_HYPERV_ENFORCE_CPUID to have KVM hold it to
them. A register or hypercall whose feature is not shown is refused (#GP, a status), and answered by KVM where it is, with
no exit for userspace. Left out: the invariant TSC's control, which wants a TSC that the lab's processor has not.
"""

import pytest
from exit_guest import (
    EAX,
    EBX,
    EDX,
    FEATURES,
    FREE,
    GP,
    GUEST_OS_ID,
    HYPERCALL_PAGE,
    HYPERV_ENFORCE_CPUID,
    LINUX,
    RECOMMENDATIONS,
    SYNDBG,
    UD,
    Guest,
    enable,
    hyperv,
    hyperv_call,
)  # fmt: skip

HYPERV_SYNIC2 = 148
LEAVES = FEATURES, RECOMMENDATIONS, SYNDBG
HYPERCALLS = FEATURES, EAX, 5
SYNIC = FEATURES, EAX, 2
TIMERS = FEATURES, EAX, 3
DEBUGGING = SYNDBG, EAX, 1
READ = None


@pytest.fixture
def guests(vm):
    """-> a function: a guest that is shown these features, and held to them."""
    if not vm.check(HYPERV_ENFORCE_CPUID):
        pytest.skip("this kernel's KVM has no Hyper-V")
    vm.create_irqchip()
    made = []

    def make(*features, synic=False):
        guest = Guest(vm, len(made))
        made.append(guest)
        enable(guest.vcpu, HYPERV_ENFORCE_CPUID, 1)
        if synic:
            enable(guest.vcpu, HYPERV_SYNIC2)
        hyperv(guest, *features, without=LEAVES)
        return guest

    return make


# register, the features that give it, and what may be done with them: a read or a write, and whether it is refused
MSRS = {
    "GUEST_OS_ID": (0x4000_0000, [HYPERCALLS], [(LINUX, False), (READ, False)]),
    "HYPERCALL": (0x4000_0001, [HYPERCALLS], [(READ, False)]),
    "VP_RUNTIME": (0x4000_0010, [(FEATURES, EAX, 0)], [(READ, False), (1, True)]),
    "TIME_REF_COUNT": (0x4000_0020, [(FEATURES, EAX, 1)], [(READ, False), (1, True)]),
    "VP_INDEX": (0x4000_0002, [(FEATURES, EAX, 6)], [(READ, False), (1, True)]),
    "RESET": (0x4000_0003, [(FEATURES, EAX, 7)], [(READ, False), (0, False)]),
    "REFERENCE_TSC": (0x4000_0021, [(FEATURES, EAX, 9)], [(READ, False), (0, False)]),
    "EOM": (0x4000_0084, [SYNIC], [(READ, False), (0, False)]),
    "STIMER0_CONFIG": (0x4000_00B0, [SYNIC, TIMERS], [(READ, False), (0, False), (1 << 12, True)]),
    "STIMER0_CONFIG, direct": (0x4000_00B0, [SYNIC, TIMERS, (FEATURES, EDX, 19)], [(1 << 12, False)]),
    "EOI": (0x4000_0070, [(FEATURES, EAX, 4)], [(1, False)]),
    "TSC_FREQUENCY": (0x4000_0022, [(FEATURES, EAX, 11)], [(READ, False), (1, True)]),
    "REENLIGHTENMENT_CONTROL": (0x4000_0106, [(FEATURES, EAX, 13)], [(READ, False), (1, False)]),
    "TSC_EMULATION_STATUS": (0x4000_0108, [(FEATURES, EAX, 13)], [(1, True)]),
    "CRASH_P0": (0x4000_0100, [(FEATURES, EDX, 10)], [(READ, False), (1, False)]),
    "SYNDBG_STATUS": (0x4000_00F2, [(FEATURES, EDX, 11), DEBUGGING], [(READ, False), (0, False)]),
}


@pytest.mark.parametrize("synic", [False, True])
def test_msrs_without_their_features(guests, synic):
    """None of them can be read, nor with the interrupt controller that userspace enabled and CPUID does not show."""
    guest = guests(synic=synic)
    assert {name: guest.caught(guest.rdmsr(msr)) for name, (msr, _, _) in MSRS.items()} == dict.fromkeys(MSRS, GP)


def test_msrs_with_their_features(guests):
    """Each by its own is there, and takes what it takes."""
    for name, (msr, features, accesses) in MSRS.items():
        guest = guests(*features, synic=SYNIC in features)
        for value, refused in accesses:
            exit = guest.rdmsr(msr) if value is READ else guest.wrmsr(msr, value)
            assert guest.caught(exit) == (GP if refused else None), (name, value)


FAST = 1 << 16
SUCCESS, NO_CODE, NO_INPUT, NO_PARAMETER, ACCESS_DENIED, OPERATION_DENIED = 0, 2, 3, 5, 6, 8
FLUSH, FLUSH_EX, SEND_IPI, SEND_IPI_EX, LONG_SPIN_WAIT = 0x02, 0x13, 0x0B, 0x15, 0x08
POST_MESSAGE, SIGNAL_EVENT, RESET_DEBUG_SESSION, EXT_QUERY_CAPABILITIES = 0x5C, 0x5D, 0x6B, 0x8001
REMOTE_FLUSH, PROCESSOR_MASKS, CLUSTER_IPI = [(RECOMMENDATIONS, EAX, bit) for bit in (2, 11, 10)]
# hypercall, the features it is made with, and the status it gets, or the exception
CALLS = [
    (0xBEEF, [], NO_CODE),
    (POST_MESSAGE, [], ACCESS_DENIED),
    (POST_MESSAGE, [(FEATURES, EBX, 4)], NO_INPUT),
    (SIGNAL_EVENT, [], ACCESS_DENIED),
    (SIGNAL_EVENT, [(FEATURES, EBX, 5)], NO_INPUT),
    (RESET_DEBUG_SESSION, [], NO_CODE),
    (RESET_DEBUG_SESSION, [DEBUGGING], ACCESS_DENIED),
    (RESET_DEBUG_SESSION, [DEBUGGING, (FEATURES, EBX, 11)], OPERATION_DENIED),
    (FLUSH, [], ACCESS_DENIED),
    (FLUSH, [REMOTE_FLUSH], SUCCESS),
    (FLUSH_EX, [REMOTE_FLUSH], ACCESS_DENIED),
    (FLUSH_EX, [REMOTE_FLUSH, PROCESSOR_MASKS], SUCCESS),
    (SEND_IPI, [], ACCESS_DENIED),
    (SEND_IPI, [CLUSTER_IPI], NO_INPUT),
    (SEND_IPI_EX, [CLUSTER_IPI, PROCESSOR_MASKS], SUCCESS),  # to nobody
    (LONG_SPIN_WAIT, [], ACCESS_DENIED),
    (LONG_SPIN_WAIT, [(RECOMMENDATIONS, EBX, 0)], SUCCESS),
    (FLUSH | FAST, [REMOTE_FLUSH], "#UD"),  # its input is in XMM registers
    (FLUSH | FAST, [REMOTE_FLUSH, (FEATURES, EDX, 4)], SUCCESS),
    (EXT_QUERY_CAPABILITIES, [], ACCESS_DENIED),
    (EXT_QUERY_CAPABILITIES | FAST, [(FEATURES, EBX, 20)], NO_PARAMETER),
]


def test_hypercalls(guests, hypercalls):
    """Each with and without what it takes."""
    got = []
    for control, features, _ in CALLS:
        guest = guests(HYPERCALLS, *features)
        assert guest.caught(guest.wrmsr(GUEST_OS_ID, LINUX)) is None
        assert guest.caught(guest.wrmsr(HYPERCALL_PAGE, FREE)) is None
        guest.vm.memory.write(FREE, bytes(0x2000))
        fast = control & FAST
        exit = hyperv_call(guest, control, 0 if fast else FREE, 0 if fast else FREE + 0x1000)
        vector = guest.caught(exit)
        got.append((control, features, {UD: "#UD", None: guest.vcpu.regs.rax}[vector]))
    assert got == CALLS
