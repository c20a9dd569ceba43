"""Which MSRs a guest may access: KVM_X86_SET_MSR_FILTER. Cold code."""

import enum
from operator import index
from typing import NamedTuple

cimport cython
from libc.stdint cimport uint8_t

from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport (
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_MSR_FILTER_DEFAULT_ALLOW,
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES, KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE, KVM_X86_SET_MSR_FILTER, kvm_msr_filter_range,
)


class MsrExitReason(enum.IntFlag):
    """Why an access to an MSR is an exit, Rdmsr.why and Wrmsr.why: KVM_MSR_EXIT_REASON_* of include/uapi/linux/kvm.h."""

    INVALID = KVM_MSR_EXIT_REASON_INVAL
    """KVM knows the MSR, and refuses the value or the access."""
    UNKNOWN = KVM_MSR_EXIT_REASON_UNKNOWN
    """KVM does not know the MSR."""
    FILTER = KVM_MSR_EXIT_REASON_FILTER
    """vm.filter_msrs() denies it."""


class MsrRange(NamedTuple):
    """What vm.filter_msrs() says of `nmsrs` MSRs from `first`. read, write: True allows, False denies, None says nothing;
    bytes: a bit for each MSR, the lowest first, set where allowed."""

    first: int
    nmsrs: int
    read: bool | bytes | None = None
    write: bool | bytes | None = None


_MOST = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8
_X2APIC = range(0x800, 0x900)  # arch/x86/kvm/x86.c, kvm_msr_allowed


def _bitmap(verdict, count, what):
    """-> one bit for each MSR, whole words of them: KVM reads longs."""
    size = -(-count // 8)
    if isinstance(verdict, bool):
        bits = (b"\xff" if verdict else b"\0") * size
    else:
        bits = bytes(memoryview(verdict))
        if len(bits) != size:
            raise ValueError(f"{what} has a bitmap of {len(bits)} bytes, {count} MSRs take {size}")
    return bits.ljust(-(-size // 8) * 8, b"\0")


def _rules(number, msrs):
    """-> KVM's ranges for one of ours: [(flags, first, count, bitmap)]."""
    first, count = index(msrs.first), index(msrs.nmsrs)
    what = f"MSR range {number} ({first:#x} + {count:#x})"
    if not 0 < count <= _MOST:
        raise ValueError(f"{what} has {count} MSRs: 1 to {_MOST:#x} are possible")
    if first < 0 or first + count > 1 << 32:
        raise ValueError(f"{what} is outside 0..0xffffffff")
    if first in _X2APIC and first + count - 1 in _X2APIC:
        raise ValueError(f"{what} is the x2APIC's, which KVM does not filter")
    verdicts = (KVM_MSR_FILTER_READ, msrs.read), (KVM_MSR_FILTER_WRITE, msrs.write)
    kinds = [(flag, _bitmap(verdict, count, what)) for flag, verdict in verdicts if verdict is not None]
    if not kinds:
        raise ValueError(f"{what} says nothing of reads or writes")
    if len(kinds) == 2 and kinds[0][1] == kinds[1][1]:
        kinds = [(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, kinds[0][1])]
    return [(flags, first, count, bits) for flags, bits in kinds]


cdef bint _denies(bits, count):
    """Whether any of the first `count` bits is clear."""
    return int.from_bytes(bits, "little") & (1 << count) - 1 != (1 << count) - 1


@cython.final
cdef class MsrFilter:
    """Internal: a filter, checked, ready for KVM."""

    def __init__(self, ranges, default_allow):
        cdef kvm_msr_filter_range *range_
        rules = []
        for number, msrs in enumerate(ranges):
            for rule in _rules(number, MsrRange(*msrs)):
                for flags, first, count, _ in rules:  # KVM would take the first one that decides
                    if rule[0] & flags and rule[1] < first + count and first < rule[1] + rule[2]:
                        raise ValueError(f"MSR range {number} ({rule[1]:#x} + {rule[2]:#x}) overlaps "
                                         f"{first:#x} + {count:#x} in what it decides")
                rules.append(rule)
        if len(rules) > KVM_MSR_FILTER_MAX_RANGES:
            raise ValueError(f"{len(rules)} ranges, where KVM takes {KVM_MSR_FILTER_MAX_RANGES}; those whose read and write "
                             "differ count twice. One range with a bitmap can say what several do")
        if not rules and not default_allow:
            raise ValueError("KVM does not deny every MSR: give a range, if only one that denies, too")
        self.argument.flags = KVM_MSR_FILTER_DEFAULT_ALLOW if default_allow else KVM_MSR_FILTER_DEFAULT_DENY
        self.bitmaps = [bytearray(bits) for _, _, _, bits in rules]
        self.denies = not default_allow or any([_denies(bits, count) for _, _, count, bits in rules])
        for i, (flags, first, count, _) in enumerate(rules):
            range_ = &self.argument.ranges[i]
            range_.flags, range_.base, range_.nmsrs = flags, first, count
            range_.bitmap = _address(self.bitmaps[i])

    cdef int install(self, Handle handle) except -1:
        if handle.fd >= 0:
            handle.call("KVM_X86_SET_MSR_FILTER", KVM_X86_SET_MSR_FILTER, &self.argument)
        return 0


cdef uint8_t *_address(bytearray data) except NULL:
    """Where its bytes are: they stay there, as nobody else has it."""
    cdef uint8_t[::1] view = data
    return &view[0]
