"""The guest's page tables, walked as the processor does. Source: Intel SDM volume 3, chapter 5.

The tables are the guest's: they may point anywhere, at each other or at themselves. A walk reads one entry a level,
five at most, and only through `read`, which says None for what cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvmexit.faults._state import State

__all__ = ["Walk", "walk"]

_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS = ((1 << 52) - 1) & ~0xFFF

Reader = Callable[[int, int], "bytes | None"]


class Walk(NamedTuple):
    """Where an address leads.

    gpa: None where it is not mapped, or a table could not be read. tables: (level, gpa of the entry), those looked at,
    the root first; where `stuck` the last of them is the one that could not be read.
    """

    gpa: int | None
    tables: tuple[tuple[int, int], ...]
    stuck: bool = False


def walk(state: State, gva: int, read: Reader) -> Walk:
    """Translate a linear address."""
    if state.paging == "none":
        return Walk(gva & 0xFFFFFFFF, ())
    if state.paging == "32-bit":
        return _walk_32_bit(state, gva & 0xFFFFFFFF, read)
    if state.paging == "PAE":
        return _walk_wide(gva & 0xFFFFFFFF, state.cr3 & 0xFFFFFFE0, 3, read, pae=True)
    levels = 5 if state.paging == "5-level" else 4
    top = gva >> (11 + 9 * levels)
    if top not in (0, (1 << (53 - 9 * levels)) - 1):
        return Walk(None, ())  # not canonical
    return _walk_wide(gva, state.cr3 & _ADDRESS, levels, read)


def _walk_32_bit(state: State, gva: int, read: Reader) -> Walk:
    at = (state.cr3 & 0xFFFFF000) + (gva >> 22) * 4
    tables = [(2, at)]
    data = read(at, 4)
    if data is None:
        return Walk(None, tuple(tables), True)
    entry = int.from_bytes(data, "little")
    if not entry & _PRESENT:
        return Walk(None, tuple(tables))
    if entry & _LARGE and state.large_pages:
        base = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32  # PSE-36
        return Walk(base | gva & 0x3FFFFF, tuple(tables))
    at = (entry & 0xFFFFF000) + (gva >> 12 & 0x3FF) * 4
    tables.append((1, at))
    data = read(at, 4)
    if data is None:
        return Walk(None, tuple(tables), True)
    entry = int.from_bytes(data, "little")
    return Walk(entry & 0xFFFFF000 | gva & 0xFFF if entry & _PRESENT else None, tuple(tables))


def _walk_wide(gva: int, table: int, levels: int, read: Reader, pae: bool = False) -> Walk:
    tables: list[tuple[int, int]] = []
    for level in range(levels, 0, -1):
        shift = 3 + 9 * level
        at = table + (gva >> shift & (3 if pae and level == 3 else 0x1FF)) * 8
        tables.append((level, at))
        data = read(at, 8)
        if data is None:
            return Walk(None, tuple(tables), True)
        entry = int.from_bytes(data, "little")
        if not entry & _PRESENT:
            return Walk(None, tuple(tables))
        if level == 1 or (entry & _LARGE and (level == 2 or (level == 3 and not pae))):
            size = 1 << shift
            return Walk(entry & _ADDRESS & -size | gva & (size - 1), tuple(tables))
        if entry & _LARGE and level > 3:
            return Walk(None, tuple(tables))  # reserved there
        table = entry & _ADDRESS
    raise AssertionError("level 1 has returned")
