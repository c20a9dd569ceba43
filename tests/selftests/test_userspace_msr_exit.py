"""After tools/testing/selftests/kvm/x86_64/userspace_msr_exit_test.c: userspace as the one that has the MSRs.

Required of it: to say which accesses it wants (an MSR that KVM has, one that KVM has not, one that nobody has), to be
given each of those and no other, with the reason, to answer with data or with an error that the guest takes as #GP, and
to change its mind between two accesses. And of KVM, to refuse flags it does not know. Left out: the same through the
forced emulation prefix, which is a module parameter; where there is no hardware virtualisation all of it is emulated
anyway.
"""

import ctypes
import errno
import struct

import pytest
from exit_guest import GP, Guest

from kvmexit import KvmError, MsrExitReason, MsrRange, Rdmsr, Wrmsr

XSS, FLUSH_CMD, NON_EXISTENT = 0xDA0, 0x10B, 0x474F_4F00
SYSCALL_MASK, FS_BASE, GS_BASE, POWER_CTL, DEADBEEF = 0xC000_0084, 0xC000_0100, 0xC000_0101, 0x1FC, 0xDEAD_BEEF
USER_SPACE_MSR, SET_MSR_FILTER = 188, 0x4188AEC6


def test_msr_filter_allow(vm):
    """Three MSRs are userspace's, the rest KVM's. What userspace refuses is #GP."""
    vm.filter_msrs([MsrRange(msr, 1, False, False) for msr in (XSS, FLUSH_CMD, NON_EXISTENT)])
    guest = Guest(vm)
    kept = {}
    seen = []

    @vm.on(Rdmsr)
    def read(vcpu, exit):
        seen.append(("read", exit.index))
        assert exit.why == MsrExitReason.FILTER
        if exit.index == FLUSH_CMD:
            exit.error = 1
            return None
        return kept.get(exit.index, 0)

    @vm.on(Wrmsr)
    def write(vcpu, exit):
        seen.append(("write", exit.index, exit.data))
        assert exit.why == MsrExitReason.FILTER
        if exit.data != {XSS: 0, FLUSH_CMD: 1}.get(exit.index, exit.data):
            exit.error = 1
        kept[exit.index] = exit.data

    def outcome(exit):
        return guest.caught(exit), guest.edx_eax()

    assert outcome(guest.rdmsr(XSS)) == (None, 0)
    assert guest.caught(guest.wrmsr(XSS, 0)) is None
    assert guest.caught(guest.wrmsr(XSS, 1)) == GP
    assert guest.caught(guest.rdmsr(FLUSH_CMD)) == GP
    assert guest.caught(guest.wrmsr(FLUSH_CMD, 0)) == GP
    assert guest.caught(guest.wrmsr(FLUSH_CMD, 1)) is None
    assert guest.caught(guest.wrmsr(NON_EXISTENT, 0x2_0000_0003)) is None
    assert outcome(guest.rdmsr(NON_EXISTENT)) == (None, 0x2_0000_0003)
    assert seen == [
        ("read", XSS), ("write", XSS, 0), ("write", XSS, 1),
        ("read", FLUSH_CMD), ("write", FLUSH_CMD, 0), ("write", FLUSH_CMD, 1),
        ("write", NON_EXISTENT, 0x2_0000_0003), ("read", NON_EXISTENT),
    ]  # fmt: skip
    assert guest.caught(guest.wrmsr(SYSCALL_MASK, 0)) is None
    assert len(seen) == 8


def all_but(first, *denied):
    """-> the bitmap of 0x3000 MSRs from `first`, without some of them."""
    bits = (1 << 0x3000) - 1
    for msr in denied:
        bits &= ~(1 << (msr - first))
    return bits.to_bytes(0x600, "little")


def test_msr_filter_deny(vm):
    """All is denied but what bitmaps allow, each kind of access by its own; what nobody has is an exit of another reason,
    and the only one left once there is no filter."""
    guest = Guest(vm)
    exits = []

    @vm.on_msr(0, 1 << 32)
    def each(vcpu, exit):
        exits.append((exit.index, exit.why, exit.data if isinstance(exit, Wrmsr) else None))
        return exit.index if isinstance(exit, Rdmsr) else None

    def calls():
        """-> what the reads gave."""
        exits.clear()
        got = []
        assert guest.caught(guest.wrmsr(SYSCALL_MASK, 0)) is None
        for msr in (SYSCALL_MASK, GS_BASE):
            assert guest.caught(guest.rdmsr(msr)) is None
            got.append(guest.edx_eax())
        assert guest.caught(guest.wrmsr(POWER_CTL, 0x1234)) is None
        assert guest.caught(guest.rdmsr(POWER_CTL)) is None
        assert guest.caught(guest.rdmsr(DEADBEEF)) is None
        got.append(guest.edx_eax())
        assert guest.caught(guest.wrmsr(DEADBEEF, 0x1234)) is None
        return got

    vm.filter_msrs([
        MsrRange(0, 0x3000, True, all_but(0, POWER_CTL)),
        MsrRange(0x4000_0000, 0x3000, True, True),
        MsrRange(0xC000_0000, 0x3000, all_but(0xC000_0000, SYSCALL_MASK, GS_BASE), True),
        MsrRange(DEADBEEF, 1, True, True),
    ], default_allow=False)  # fmt: skip
    assert calls() == [SYSCALL_MASK, GS_BASE, DEADBEEF]
    unknown = [(DEADBEEF, MsrExitReason.UNKNOWN, None), (DEADBEEF, MsrExitReason.UNKNOWN, 0x1234)]
    assert exits == [
        (SYSCALL_MASK, MsrExitReason.FILTER, None), (GS_BASE, MsrExitReason.FILTER, None),
        (POWER_CTL, MsrExitReason.FILTER, 0x1234), *unknown]  # fmt: skip
    vm.filter_msrs()
    assert calls() == [0, 0, DEADBEEF]
    assert exits == unknown


def test_msr_permission_bitmap(vm):
    """A filter in place of another, between two steps of the guest: what the first denied is KVM's again. These are MSRs
    that the hardware lets a guest read without an exit, until a filter says otherwise."""
    guest = Guest(vm)
    for mine, other in ((FS_BASE, GS_BASE), (GS_BASE, FS_BASE)):
        vm.filter_msrs([MsrRange(mine, 1, read=False)])
        exit = guest.rdmsr(mine)
        assert (type(exit), exit.index, exit.why) == (Rdmsr, mine, MsrExitReason.FILTER)
        exit.data = mine
        assert guest.caught(guest.go_on()) is None
        assert guest.edx_eax() == mine
        assert guest.caught(guest.rdmsr(other)) is None
        assert guest.edx_eax() == 0


def allowed(call, *arguments):
    """Whether KVM takes it; what it does not take is EINVAL."""
    try:
        call(*arguments)
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def test_user_exit_msr_flags(vm):
    """Of each field of flags KVM takes what it knows, bit by bit."""
    assert [bit for bit in range(64) if allowed(vm.enable, USER_SPACE_MSR, 1 << bit)] == [0, 1, 2]
    with pytest.raises(KvmError):
        vm.enable(USER_SPACE_MSR, MsrExitReason.FILTER | 1 << 3)
    bitmap = ctypes.c_uint64(0)

    def taken(flags, range_flags):
        rule = struct.pack("<IIIxxxxQ", range_flags, 1, 0, ctypes.addressof(bitmap))
        return allowed(vm.ioctl, SET_MSR_FILTER, struct.pack("<Ixxxx", flags) + rule.ljust(16 * 24, b"\0"))

    assert [bit for bit in range(32) if taken(1 << bit, 1)] == [0]
    assert [bit for bit in range(32) if taken(0, 1 << bit)] == [0, 1]
