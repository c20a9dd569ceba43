"""Putting a vCPU into an x86 mode: the registers of real, protected and long mode.

Source: Intel SDM volume 3, chapters 3 to 5 (segments, paging) and 9 (initial state).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmexit._loop import Vcpu
    from kvmexit._memory import Slot
    from kvmexit._registers import Segment

__all__ = ["PAGE_TABLE_BYTES", "long_mode", "protected_mode", "real_mode"]

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_PRESENT, _WRITABLE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_RFLAGS_RESERVED, _RFLAGS_IOPL_3 = 1 << 1, 3 << 12
_CODE, _DATA, _TSS = 11, 3, 11  # descriptor types: execute/read accessed, read/write accessed, busy TSS

PAGE_TABLE_BYTES = 6 * 4096
"""What long_mode() needs for its tables: a PML4, a PDPT, and four page directories of 2 MiB pages."""


def real_mode(vcpu: Vcpu, entry: int) -> None:
    """16-bit real mode, starting at physical address `entry` (below 1 MiB): CS holds its upper bits, IP the lower 16.

    Raises ValueError for an address that real mode cannot name.
    """
    if not 0 <= entry < 1 << 20:
        raise ValueError(f"entry {entry:#x} is beyond real mode's 1 MiB")
    sregs = vcpu.sregs
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment: Segment = getattr(sregs, name)
        _segment(segment, selector=0, kind=_CODE if name == "cs" else _DATA, limit=0xFFFF)
    sregs.cs.base = entry & 0xF0000
    sregs.cs.selector = sregs.cs.base >> 4
    sregs.cr0 = _CR0_ET
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    _start(vcpu, entry & 0xFFFF, _RFLAGS_RESERVED)


def protected_mode(vcpu: Vcpu, entry: int, *, stack: int | None = None) -> None:
    """32-bit protected mode at CPL 0, flat 4 GiB segments, paging off, starting at `entry`; ESP is `stack` where given.

    Raises ValueError for an address beyond 4 GiB.
    """
    _check_below("entry", entry, 1 << 32)
    sregs = vcpu.sregs
    _flat_segments(vcpu, cpl=0, long=False)
    sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_NE
    sregs.cr3 = sregs.cr4 = sregs.efer = 0
    _start(vcpu, entry, _RFLAGS_RESERVED, stack)


def long_mode(
    vcpu: Vcpu, entry: int, *, cpl: int = 0, stack: int | None = None, tables: int | None = None
) -> None:
    """64-bit long mode at CPL 0 or 3, starting at `entry`; RSP is `stack` where given. SSE is on.

    The low 4 GiB are mapped one to one with 2 MiB pages, user-accessible. The tables, PAGE_TABLE_BYTES long, go to
    guest-physical `tables`, or to the end of the lowest writable slot; no other slot is touched. At CPL 3 IOPL is 3, so
    the guest may use ports (where a nested hypervisor loses IOPL: those below 0x7fc0, by the TSS).

    Raises ValueError for another CPL, an address beyond 4 GiB, and where the tables find no room.
    """
    if cpl not in (0, 3):
        raise ValueError(f"cpl {cpl} is neither 0 nor 3")
    _check_below("entry", entry, 1 << 32)
    root = _write_page_tables(vcpu, tables)
    sregs = vcpu.sregs
    _flat_segments(vcpu, cpl=cpl, long=True)
    # A hypervisor without hardware help was seen to drop IOPL on the first exit and go by the TSS's I/O bitmap. The
    # zeros behind the PML4's one entry serve as a TSS whose bitmap begins at its own base and denies nothing.
    sregs.tr.base = root + 8
    sregs.tr.limit = 4096 - 8 - 1
    sregs.cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE | _CR0_PG
    sregs.cr3 = root
    sregs.cr4 = _CR4_PAE | _CR4_OSFXSR | _CR4_OSXMMEXCPT
    sregs.efer = _EFER_LME | _EFER_LMA
    _start(vcpu, entry, _RFLAGS_RESERVED | (_RFLAGS_IOPL_3 if cpl == 3 else 0), stack)


def _check_below(name: str, value: int, limit: int) -> None:
    if not 0 <= value < limit:
        raise ValueError(f"{name} {value:#x} is not below {limit:#x}")


def _start(vcpu: Vcpu, rip: int, rflags: int, stack: int | None = None) -> None:
    vcpu.regs.rip = rip
    vcpu.regs.rflags = rflags
    if stack is not None:
        vcpu.regs.rsp = stack


def _segment(
    segment: Segment, *, selector: int, kind: int, limit: int, dpl: int = 0, system: bool = False, db: int = 0,
    long: int = 0, granularity: int = 0,
) -> None:
    segment.base = 0
    segment.limit = limit
    segment.selector = selector
    segment.type = kind
    segment.present = 1
    segment.dpl = dpl
    segment.db = db
    segment.s = 0 if system else 1
    segment.l = long
    segment.g = granularity
    segment.avl = 0
    segment.unusable = 0


def _flat_segments(vcpu: Vcpu, *, cpl: int, long: bool) -> None:
    sregs = vcpu.sregs
    _segment(
        sregs.cs, selector=0x08 | cpl, kind=_CODE, limit=0xFFFFFFFF, dpl=cpl, db=int(not long), long=int(long),
        granularity=1,
    )
    for name in ("ds", "es", "fs", "gs", "ss"):
        _segment(getattr(sregs, name), selector=0x10 | cpl, kind=_DATA, limit=0xFFFFFFFF, dpl=cpl, db=1, granularity=1)
    _segment(sregs.tr, selector=0x18, kind=_TSS, limit=0x67, system=True)


def _write_page_tables(vcpu: Vcpu, tables: int | None) -> int:
    memory = vcpu.vm.memory
    if tables is None:
        slot = _lowest_writable(memory.slots)
        tables = slot.gpa + slot.size - PAGE_TABLE_BYTES
    if tables % 4096:
        raise ValueError(f"tables {tables:#x} is not a multiple of the page size")
    links = _PRESENT | _WRITABLE | _USER
    pdpt, directories = tables + 4096, tables + 2 * 4096
    memory.write(tables, struct.pack("<Q", pdpt | links).ljust(4096, b"\0"))
    memory.write(pdpt, struct.pack("<4Q", *(directories + i * 4096 | links for i in range(4))).ljust(4096, b"\0"))
    memory.write(directories, struct.pack("<2048Q", *(i << 21 | links | _LARGE for i in range(2048))))
    return tables


def _lowest_writable(slots: tuple[Slot, ...]) -> Slot:
    for slot in slots:
        if not slot.readonly and slot.size >= PAGE_TABLE_BYTES and slot.gpa + slot.size <= 1 << 52:
            return slot
    raise ValueError(f"no writable slot has {PAGE_TABLE_BYTES:#x} bytes for page tables: add one, or give tables=")
