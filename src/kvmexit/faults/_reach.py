"""Whether a host page can be reached, as KVM reaches it: by get_user_pages on a memslot's hva.

What costs least is asked first: the mappings, the file's size, the page tables; last, and only of a page that the guest
was about to touch anyway, the kernel itself (MADV_POPULATE_*: it allocates). That would wait for ever on a page that a
userfaultfd holds back, so it is never asked where one is registered. Source: mm/gup.c, mm/madvise.c, proc_pid_maps(5).
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Cause", "Host"]

PAGE = mmap.PAGESIZE
_POPULATE_READ, _POPULATE_WRITE = 22, 23
_EHWPOISON = 133
_PRESENT, _SWAPPED, _WRITE_PROTECTED = 1 << 63, 1 << 62, 1 << 57  # Documentation/admin-guide/mm/pagemap.rst
_USERFAULTFD = {b"um", b"ui", b"uw"}  # of VmFlags: missing, minor, write-protected pages


class Cause(enum.Enum):
    """Why a page of guest memory cannot be reached. The value says it in words."""

    UNMAPPED = "nothing is mapped at its host address"
    PROT_NONE = "its mapping may not be read (PROT_NONE)"
    PROT_READ = "its mapping may not be written (PROT_READ)"
    BEYOND_EOF = "its mapping goes beyond the end of the file"
    IO_ERROR = "the file behind it gives no page: an I/O error, or no space"
    USERFAULTFD = "it is missing, and a userfaultfd that does not answer the kernel holds it back"
    POISONED = "its memory is poisoned (a hardware error)"
    GUEST_MEMFD_CLOSED = "it is in the slot's guest_memfd, which was closed"
    WRONG_SIDE = "the guest wants it private and it is shared, or the other way round"
    READONLY_SLOT = "the slot is read-only: an ordinary write to a ROM or a device, no fault"
    NO_SLOT = "no slot covers it"
    PRIVATE_HOLE = "no slot covers it, and the guest or its attribute has it private"
    NOTHING_FOUND = "every page that the instruction may touch can be reached now"

    @property
    def advice(self) -> str:
        """What to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Cause.UNMAPPED: "map memory there again (mmap with MAP_FIXED), or remove the slot; then run() again",
    Cause.PROT_NONE: "mprotect() it PROT_READ | PROT_WRITE, then run() again",
    Cause.PROT_READ: "mprotect() it PROT_READ | PROT_WRITE, or add the slot with readonly=True; then run() again",
    Cause.BEYOND_EOF: "extend the file (os.ftruncate) and run() again; or tell the guest that its data is gone",
    Cause.IO_ERROR: "see to the file system or device behind the file, then run() again",
    Cause.USERFAULTFD: "give the page (UFFDIO_COPY, _ZEROPAGE, _CONTINUE, or _WRITEPROTECT), then run() again",
    Cause.POISONED: "the data is lost: punch a hole or map a new page, and tell the guest by a machine check",
    Cause.GUEST_MEMFD_CLOSED: "remove the slot and add it anew; or, if it is private, convert the range to shared",
    Cause.WRONG_SIDE: "convert it (vm.memory.convert, handlers.convert), then run() again",
    Cause.READONLY_SLOT: "handle the write with vm.on_mmio(), or ignore it as a ROM does",
    Cause.NO_SLOT: "add memory there, or handle the access with vm.on_mmio()",
    Cause.PRIVATE_HOLE: "add memory with a guest_memfd there; or clear its attribute (KVM_SET_MEMORY_ATTRIBUTES), "
                        "and it is an Mmio",
    Cause.NOTHING_FOUND: "run() again: it was repaired meanwhile, or the host was short of memory; if it repeats, the "
                         "cause is none that can be seen from here",
}  # fmt: skip


class _Mapping(NamedTuple):
    start: int
    end: int
    permissions: str
    offset: int
    device: int
    inode: int
    path: str


class _Details(NamedTuple):
    flags: set[bytes]
    page_size: int


class Host:
    """The mappings of this process as they are when first asked for.

    unsure: whether something could not be asked, so that a page that was found reachable may not be.
    """

    def __init__(self) -> None:
        self.unsure = False
        self._lines: list[bytes] | None = None
        self._starts: list[int] = []
        self._details: dict[int, _Details] = {}
        self._smaps = _read_smaps()
        self._sizes: dict[tuple[int, int], int | None] = {}

    def cause(self, hva: int, write: bool, probe: bool) -> Cause | None:
        """Why the page at `hva` cannot be read, or written; None where it can. probe: the kernel may be asked."""
        hva -= hva % PAGE
        at = self.mapping(hva)
        if at is None:
            return Cause.UNMAPPED
        if at.permissions[0] != "r":
            return Cause.PROT_NONE
        if write and at.permissions[1] != "w":
            return Cause.PROT_READ
        if at.inode:
            size = self._file_size(at)
            if size is not None and at.offset + (hva - at.start) >= size:
                return Cause.BEYOND_EOF
        entry = _pagemap(hva)
        if entry & _PRESENT and not (write and (entry & _WRITE_PROTECTED or at.inode)):
            return None
        details = self._details_of(at)
        if details is None:
            self.unsure = True  # a userfaultfd may be there
            return None
        flags = details.flags
        if flags & _USERFAULTFD:
            missing = b"um" in flags and not entry & (_PRESENT | _SWAPPED) and not _resident(hva)
            unseen = b"ui" in flags and not entry & _PRESENT
            protected = b"uw" in flags and write and entry & _WRITE_PROTECTED
            return Cause.USERFAULTFD if missing or unseen or protected else None
        if not at.inode and not entry & _SWAPPED:
            return None  # anonymous memory that nobody has touched
        if flags & {b"io", b"pf"}:
            self.unsure = True  # a device's memory: the kernel does not populate it
            return None
        return self._populate(hva, write) if probe else None

    def mapping(self, hva: int) -> _Mapping | None:
        """-> the mapping that this address is in."""
        if self._lines is None:
            with open("/proc/self/maps", "rb") as file:
                self._lines = file.readlines()
            self._starts = [int(line[: line.index(b"-")], 16) for line in self._lines]
        i = bisect_right(self._starts, hva) - 1
        if i < 0:
            return None
        where, permissions, offset, device, inode, *path = self._lines[i].split(None, 5)
        start, end = (int(part, 16) for part in where.split(b"-"))
        if hva >= end:
            return None
        major, minor = (int(part, 16) for part in device.split(b":"))
        return _Mapping(
            start, end, permissions.decode(), int(offset, 16), os.makedev(major, minor), int(inode),
            os.fsdecode(path[0].rstrip(b"\n")) if path else "",
        )  # fmt: skip

    def page_size(self, hva: int) -> int:
        """Bytes of a page there: more than PAGE in hugetlbfs."""
        at = self.mapping(hva)
        details = None if at is None else self._details_of(at)
        return PAGE if details is None else details.page_size

    def has_userfaultfd(self, hva: int) -> bool:
        """Whether one is registered there: such pages are not probed."""
        at = self.mapping(hva)
        details = None if at is None else self._details_of(at)
        return details is not None and not details.flags.isdisjoint(_USERFAULTFD)

    def _file_size(self, at: _Mapping) -> int | None:
        """Of the regular file mapped there; None where it is another kind, or none that can be found."""
        key = (at.device, at.inode)
        if key not in self._sizes:
            self._sizes[key] = _find_size(at)
        return self._sizes[key]

    def _details_of(self, at: _Mapping) -> _Details | None:
        """Read no further than to that mapping: for each one the kernel looks at all its pages."""
        while at.start not in self._details:
            found = next(self._smaps, None)
            if found is None:
                return None
            self._details[found[0]] = found[1]
        return self._details[at.start]

    def _populate(self, hva: int, write: bool) -> Cause | None:
        error = libc_call("madvise", hva, PAGE, _POPULATE_WRITE if write else _POPULATE_READ)
        if error == _EHWPOISON:
            return Cause.POISONED
        if error == errno.EFAULT:
            return Cause.IO_ERROR
        if error:
            self.unsure = True  # a kernel before 5.14, or things changed meanwhile
        return None


def _read_smaps() -> Iterator[tuple[int, _Details]]:
    """-> each mapping's start, and what it says of it, by address."""
    try:
        with open("/proc/self/smaps", "rb") as file:
            start, page_size = 0, PAGE
            for line in file:
                if line.startswith(b"KernelPageSize:"):
                    page_size = int(line.split()[1]) * 1024
                elif line.startswith(b"VmFlags:"):
                    yield start, _Details(set(line.split()[1:]), page_size)
                elif not line[:1].isupper():
                    start = int(line[: line.index(b"-")], 16)
    except OSError:
        pass


def _find_size(at: _Mapping) -> int | None:
    def fits(found: os.stat_result) -> bool:
        return (found.st_dev, found.st_ino) == (at.device, at.inode)

    for path in (f"/proc/self/map_files/{at.start:x}-{at.end:x}", at.path):  # the first needs privileges
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            continue
        if fits(found):
            return _rounded_size(found)
    for name in os.listdir("/proc/self/fd"):
        try:
            found = os.fstat(int(name))
        except OSError:
            continue
        if fits(found):
            return _rounded_size(found)
    return None


def _rounded_size(found: os.stat_result) -> int | None:
    return found.st_size + -found.st_size % PAGE if stat.S_ISREG(found.st_mode) else None


def _pagemap(hva: int) -> int:
    """The page's entry, 0 where it cannot be had: as of a page that is not there."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int.from_bytes(os.pread(fd, 8, hva // PAGE * 8), "little")
    except OSError:
        return 0
    finally:
        os.close(fd)


def _resident(hva: int) -> bool:
    """Whether the page is in memory, though perhaps not in our page tables."""
    import ctypes

    answer = ctypes.c_ubyte()
    return libc_call("mincore", hva, PAGE, ctypes.byref(answer)) == 0 and answer.value & 1 == 1


def libc_call(name: str, *arguments: object, fails: int | None = None) -> int:
    """Call mmap(), mprotect(), madvise() and the like; -> 0, or errno. fails: what says so, where it is not "not 0"."""
    import ctypes

    function = ctypes.CDLL(None, use_errno=True)[name]  # [name]: not the one that others may have declared
    function.restype = ctypes.c_ssize_t
    done = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    return ctypes.get_errno() if (done == fails if fails is not None else done != 0) else 0
