"""After tools/testing/selftests/kvm/x86_64/exit_on_emulation_failure_test.c: an instruction that KVM cannot emulate.

Required of userspace: with KVM_CAP_EXIT_ON_EMULATION_FAILURE, to be given the instruction's bytes with the exit, to step
over it, and to have the guest go on behind it. Without it a guest at CPL 3 has to take #UD, and userspace hears of
nothing.
"""

import pytest
from guests import CODE, load

import kvmexit
from kvmexit import InternalError

EXIT_ON_EMULATION_FAILURE = 204
EMULATION = 1
HOLE = 0x1000_0000
# flds [rax]; out 0x80, al: the access has to be emulated, as nothing is there, and the emulator has no flds
FLDS = bytes.fromhex("d9 00  e6 80")


@pytest.fixture(params=[0, 3])
def cpl(request):
    """A kernel, and a program."""
    return request.param


@pytest.fixture
def vcpu(vm, cpl):
    """About to do it."""
    if not vm.check(EXIT_ON_EMULATION_FAILURE):
        pytest.skip("this kernel has no KVM_CAP_EXIT_ON_EMULATION_FAILURE")
    made = load(vm, FLDS, cpl=cpl)
    made.regs.rax = HOLE
    return made


def go_over(vcpu):
    """By the registers."""
    vcpu.regs.rip += 2


def skip(vcpu):
    """By kvmexit.faults, told how long it is."""
    kvmexit.faults.skip(vcpu, 2)


@pytest.mark.parametrize("over", [go_over, skip])
def test_emulation_failure(vm, vcpu, over):
    """The exit has the two bytes of flds at least, and it comes again as long as nobody does anything about it."""
    vm.enable(EXIT_ON_EMULATION_FAILURE, 1)
    for _ in range(2):
        exit = vcpu.run(timeout=20)
        assert isinstance(exit, InternalError)
        assert exit.suberror == EMULATION
        assert len(exit.data) >= 3
        assert exit.data[0] & 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        assert exit.insn_bytes[:2] == FLDS[:2]
        assert exit.insn_bytes == vm.memory.read(CODE, len(exit.insn_bytes))
        assert vcpu.regs.rip == CODE
    over(vcpu)
    assert vcpu.run(timeout=20).port == 0x80


def test_without_the_capability(vcpu, cpl):
    """KVM tells of a kernel's instruction. A program's is #UD in the guest, a triple fault in one that has no IDT; where
    there is no hardware virtualisation KVM was seen to tell of that as well."""
    exit = vcpu.run(timeout=20)
    if isinstance(exit, InternalError):
        assert (exit.suberror, exit.insn_bytes[:2]) == (EMULATION, FLDS[:2])
    else:
        assert isinstance(exit, kvmexit.Shutdown)
        assert cpl == 3
