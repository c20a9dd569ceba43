"""Telling the guest: an exception at the vCPU's next entry, or the faulting instruction skipped.

Source: Intel SDM volume 3, chapters 6 (exceptions) and 16 (machine checks); arch/x86/kvm/x86.c, functions
kvm_vcpu_ioctl_x86_set_mce() and kvm_vcpu_ioctl_x86_set_vcpu_events().
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmexit.errors import Error, KvmError
from kvmexit.faults import _operands
from kvmexit.faults._operands import LONGEST, linear
from kvmexit.faults._state import State
from kvmexit.faults._tables import walk

if TYPE_CHECKING:
    from kvmexit._loop import Vcpu

__all__ = ["enable_machine_checks", "inject", "skip"]

_SETUP_MCE, _SET_MCE, _GET_MSRS = 0x4008AE9C, 0x4040AE9E, 0xC008AE88
_MCG_CAP, _MCG_STATUS, _MCIP = 0x179, 0x17A, 1 << 2
_MCG_SER_P = 1 << 24  # it has recoverable machine checks
_CR0_PE, _CR4_MCE = 1 << 0, 1 << 6
_DOUBLE_FAULT, _PAGE_FAULT, _MACHINE_CHECK = 8, 14, 18
_WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}

# What a processor says of a load of data that it may not have: valid, uncorrected, enabled, MISC and ADDR valid, to be
# seen to by software now (signalled, action required), a load from the nearest cache.
_SRAR_LOAD = 1 << 63 | 1 << 61 | 1 << 60 | 1 << 59 | 1 << 58 | 1 << 56 | 1 << 55 | 0x134
_PHYSICAL_PAGE = 2 << 6 | 12  # MISC: the address is physical, to the page
_EIPV = 1 << 1  # MCG_STATUS: rip is of the instruction that wanted the data, which did not happen

_NAMES = {
    "#DE": 0, "#DB": 1, "#BP": 3, "#OF": 4, "#BR": 5, "#UD": 6, "#NM": 7, "#DF": 8, "#TS": 10, "#NP": 11, "#SS": 12,
    "#GP": 13, "#PF": 14, "#MF": 16, "#AC": 17, "#MC": 18, "#XM": 19, "#VE": 20, "#CP": 21,
}  # fmt: skip


def inject(
    vcpu: Vcpu, what: str | int, *, address: int | None = None, error_code: int | None = None, bank: int = 1
) -> None:
    """Have the guest take an exception when the vCPU is entered next, instead of what it was about to do.

    what: "#MC", "#PF", "#GP", "#AC" and so on, or a vector. error_code: 0 where the vector has one and none is given.
    address: of "#PF" the linear address (CR2), of "#MC" the guest-physical one, which both need. "#MC" reports, in
    `bank`, data that cannot be had (MCACOD 0x134, action required), to guests that enable_machine_checks() was for.

    In a handler, or after run() returned. Raises ValueError for what is no such exception; Error, and nothing changes,
    where the guest could not take it: another exception is on its way, and for a machine check CR4.MCE clear, or one
    not seen to yet (MCG_STATUS.MCIP), which would be triple faults, or a bank that is off.
    """
    vector = _NAMES.get(what, -1) if isinstance(what, str) else what
    if not isinstance(vector, int) or not 0 <= vector < 32 or vector == 2:
        names = ", ".join(_NAMES)
        raise ValueError(f"{what!r} is no exception: give one of {names}, or a vector below 32 (2 is vcpu.nmi())")
    if (address is None) is (vector in (_PAGE_FAULT, _MACHINE_CHECK)):
        raise ValueError(f"{what} {'needs' if address is None else 'has no'} address")
    if address is not None and not 0 <= address < 1 << 64:
        raise ValueError(f"address {address:#x} is not one of 64 bits")
    if error_code is not None and (vector not in _WITH_ERROR_CODE or not 0 <= error_code < 1 << 32):
        raise ValueError(f"{what} has no error code {error_code}")
    exception = vcpu.events.exception
    if (exception.injected or exception.pending) and vector != _DOUBLE_FAULT:
        raise Error(f"exception {exception.nr} is on its way to {vcpu!r} already: with {what} on top it would be a "
                    'double fault; inject "#DF" if that is meant')  # fmt: skip
    if vector == _MACHINE_CHECK:
        _machine_check(vcpu, address or 0, bank)
        return
    if vector == _PAGE_FAULT:
        vcpu.sregs.cr2 = address or 0
    events = vcpu.events.exception
    events.nr, events.injected, events.pending = vector, 1, 0
    events.has_error_code = int(vector in _WITH_ERROR_CODE and vcpu.sregs.cr0 & _CR0_PE != 0)
    events.error_code = error_code or 0


def enable_machine_checks(vcpu: Vcpu, banks: int = 10) -> None:
    """Give the guest so many banks, switched on, and say that it has recoverable machine checks (KVM_X86_SETUP_MCE).

    Once, before it starts: what the guest has written to its banks is lost. It takes machine checks once it sets
    CR4.MCE. Raises KvmError where KVM refuses, as it does beyond 32 banks.
    """
    vcpu.ioctl(_SETUP_MCE, bytearray(struct.pack("<Q", _MCG_SER_P | banks)))


def _machine_check(vcpu: Vcpu, gpa: int, bank: int) -> None:
    if not vcpu.sregs.cr4 & _CR4_MCE:
        raise Error(f"the guest of {vcpu!r} takes no machine checks (CR4.MCE is clear): it would be a triple fault")
    banks, status = _msr(vcpu, _MCG_CAP) & 0xFF, _msr(vcpu, _MCG_STATUS)
    if not 0 <= bank < banks:
        raise ValueError(f"there is no bank {bank}: {vcpu!r} has {banks}, counted from 0")
    if status & _MCIP:
        raise Error(f"the guest of {vcpu!r} has a machine check that it has not seen to (MCG_STATUS.MCIP): "
                    "another would be a triple fault")  # fmt: skip
    vcpu.ioctl(_SET_MCE, bytearray(struct.pack("<4QB31x", _SRAR_LOAD, gpa, _PHYSICAL_PAGE, _MCIP | _EIPV, bank)))
    exception = vcpu.events.exception
    if exception.nr != _MACHINE_CHECK or not (exception.injected or exception.pending):
        raise Error(f"the guest of {vcpu!r} has switched machine checks off in bank {bank} (MCi_CTL) or all (MCG_CTL)")


def skip(vcpu: Vcpu, size: int | None = None) -> None:
    """Go on behind the instruction that the vCPU is at, as if it had happened and changed nothing.

    size: its bytes; None: found by iced-x86 (pip install 'kvmexit[faults]'). In a handler, or after run() returned.
    Raises ValueError for a size that no instruction has; Error, and nothing changes, where it cannot be read or
    decoded, and where an exception or interrupt was being delivered: then it is not the instruction that failed.
    """
    state = State(vcpu)
    if size is None:
        size = _size(vcpu, state)
    if not 0 < size <= LONGEST:
        raise ValueError(f"no instruction has {size} bytes: 1 to {LONGEST}")
    if state.delivering:
        raise Error(f"{vcpu!r} was delivering an exception or interrupt, no instruction that could be skipped")
    vcpu.regs.rip = state.regs["rip"] + size & (1 << state.bits) - 1
    vcpu.events.interrupt.shadow = 0


def _size(vcpu: Vcpu, state: State) -> int:
    if _operands.decoder_missing():
        raise Error("iced-x86 knows how long it is (pip install 'kvmexit[faults]'); or give skip() its size")

    def read(gpa: int, count: int) -> bytes | None:
        try:
            return vcpu.vm.memory.read(gpa, count)
        except (KvmError, ValueError):
            return None

    code, at = b"", linear(state, "cs", state.regs["rip"])
    while len(code) < LONGEST:
        gpa = walk(state, at & state.mask, read).gpa
        data = None if gpa is None else read(gpa, min(LONGEST - len(code), 4096 - gpa % 4096))
        if not data:
            break
        code, at = code + data, at + len(data)
    if not code:
        raise Error(f"the instruction of {vcpu!r} at rip {state.regs['rip']:#x} cannot be read")
    size = _operands.length(state, code)
    if not size:
        raise Error(f"{code.hex(' ')} at rip {state.regs['rip']:#x} is no instruction that could be skipped")
    return size


def _msr(vcpu: Vcpu, index: int) -> int:
    asked = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
    if vcpu.ioctl(_GET_MSRS, asked) != 1:
        return 0
    return int.from_bytes(asked[16:24], "little")
