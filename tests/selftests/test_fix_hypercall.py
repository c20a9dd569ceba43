"""After tools/testing/selftests/kvm/x86_64/fix_hypercall_test.c: the other vendor's hypercall instruction.

Required: KVM writes this processor's instruction in its place, and carries it out; where userspace disables that quirk
(KVM_CAP_DISABLE_QUIRKS2), the guest takes #UD, and its code stays as it was.
"""

import pytest
from exit_guest import HYPERCALL, OTHERS_HYPERCALL, UD, Guest
from guests import CODE

DISABLE_QUIRKS2, FIX_HYPERCALL_INSN = 213, 1 << 5
SCHED_YIELD = 11
pytestmark = pytest.mark.usefixtures("hypercalls")


@pytest.fixture
def guest(vm):
    """One that can be told to leave the instruction alone."""
    if not vm.check(DISABLE_QUIRKS2) & FIX_HYPERCALL_INSN:
        pytest.skip("this kernel has no KVM_CAP_DISABLE_QUIRKS2 for this quirk")
    vm.create_irqchip()
    return Guest(vm)


def yielded(guest, code):
    """Have it yield to its own processor; -> the exception that was, what it was given, and its code afterwards."""
    vector = guest.caught(guest.step(code, rax=SCHED_YIELD, rbx=0))
    return vector, guest.vcpu.regs.rax, guest.vm.memory.read(CODE, 3).hex(" ")


def test_enable_quirk(guest):
    """Patched, and done."""
    assert yielded(guest, OTHERS_HYPERCALL) == (None, 0, HYPERCALL)


def test_disable_quirk(guest):
    """Not patched: an instruction there is none of. The right one works still."""
    guest.vm.enable(DISABLE_QUIRKS2, FIX_HYPERCALL_INSN)
    assert yielded(guest, OTHERS_HYPERCALL) == (UD, SCHED_YIELD, OTHERS_HYPERCALL)
    assert yielded(guest, HYPERCALL) == (None, 0, HYPERCALL)
