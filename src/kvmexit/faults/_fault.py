"""Faults, whether KVM says the address or explain() finds it, and what repairs them: for `vm.on_fault()`."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvmexit._exits import MemoryFault, Mmio, UnexplainedFault
from kvmexit.errors import Error
from kvmexit.faults import _inject
from kvmexit.faults._explain import Explanation, as_memory
from kvmexit.faults._reach import PAGE, Cause, Host, libc_call
from kvmexit.handlers import PASS

if TYPE_CHECKING:
    from kvmexit._loop import Vcpu
    from kvmexit._memory import Slot

__all__ = ["Fault", "OnFault"]

_PROT_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _PRIVATE, _ANONYMOUS = 0x10, 0x02, 0x20
# Of two handlers at one page, the second must not drop what a guest has written to the new one.
_renewing = threading.Lock()
_ADVICE = {"MADV_DONTNEED": (24, 4), "MADV_REMOVE": (9,)}  # 24: _LOCKED, what mlock() has, too (Linux 5.18)


class Fault:
    """An access that KVM could not let the guest make. For as long as its handler has not returned.

    vcpu, exit: whose it is, and the MemoryFault, UnexplainedFault or Mmio that it came as. gpa: where; of an
    UnexplainedFault what explain() found, None if it found nothing. explanation: what explain() says, which is asked
    when it is first looked at.

    repair(), and what it is made of, make the page accessible; inject() and skip() tell the guest, or pass over it.
    """

    def __init__(self, vcpu: Vcpu, exit: MemoryFault | UnexplainedFault | Mmio) -> None:
        self.vcpu, self.exit = vcpu, exit

    def __repr__(self) -> str:
        return f"<Fault {self.exit!r} of {self.vcpu!r}>"

    @cached_property
    def explanation(self) -> Explanation:
        """-> Explanation. Raises what explain() does."""
        return self.exit.explain(self.vcpu)

    @property
    def gpa(self) -> int | None:
        """Guest-physical address, None where it is not known."""
        return self.explanation.gpa if isinstance(self.exit, UnexplainedFault) else self.exit.gpa

    @property
    def gva(self) -> int | None:
        """Linear address, where one led there."""
        return self.explanation.gva

    @property
    def access(self) -> str | None:
        """"read", "write", "fetch", or "access" where it is not known."""
        return self.explanation.access

    @property
    def slot(self) -> Slot | None:
        """The memslot."""
        return self.explanation.slot

    @property
    def hva(self) -> int | None:
        """Address in this process."""
        return self.explanation.hva

    @property
    def cause(self) -> Cause:
        """Why the page cannot be reached."""
        return self.explanation.cause

    @property
    def certain(self) -> bool:
        """Whether it is this page and no other."""
        return self.explanation.certain

    # ---- repair ----

    def repair(self) -> None:
        """Do what the cause asks for, where that needs nothing else.

        map() what is unmapped, renew() what is poisoned (its data is lost; inject() tells the guest), protect(),
        convert(), rebind(); nothing where nothing is wrong any more.
        Raises Error for the other causes, with what to do instead, and what the repair raises. One that does not help
        comes again, and ends in a FaultLoopError.
        """
        if self.cause is Cause.NOTHING_FOUND:
            return
        repairs: dict[Cause, Callable[[], object]] = {
            Cause.UNMAPPED: self.map, Cause.POISONED: self.renew, Cause.PROT_NONE: self.protect,
            Cause.PROT_READ: self.protect, Cause.WRONG_SIDE: self.convert, Cause.GUEST_MEMFD_CLOSED: self.rebind,
        }  # fmt: skip
        if self.cause not in repairs:
            raise Error(f"no repair for this by itself: {self.cause.value}; {self.cause.advice}")
        repairs[self.cause]()

    def map(self) -> None:
        """Put a new page of zeros at its host address (mmap with MAP_FIXED): what was there is gone."""
        _map(self._page(), PAGE)

    def renew(self) -> None:
        """Give up the poisoned page for a new one: the data is lost, and reads as zeros, or as its file has it.

        As little as needed: the page is dropped from this process (MADV_DONTNEED); where the file behind it keeps it,
        poisoned, a hole is punched there, for all who share it (MADV_REMOVE; fallocate() of a guest_memfd); a private
        mapping of such a file gets a page of zeros. All that the exit names, and of huge pages (hugetlbfs) each whole:
        it is lost as a whole. Nothing where another vCPU's handler was first. Raises OSError or KvmError.
        """
        slot, size = self._slot(), PAGE
        if isinstance(self.exit, MemoryFault):
            size = max(PAGE, min(self.exit.size, slot.gpa + slot.size - self.exit.gpa))
        with _renewing:
            if isinstance(self.exit, MemoryFault) and self.exit.private:
                if self.vcpu._entered_at == self.vcpu.vm.memory.changes:  # else the access comes again, if need be
                    slot._renew_private(self.exit.gpa // PAGE * PAGE, size)
                return
            first = self._page()
            page = Host().page_size(first)
            for at in range(first // page * page, first + size, page):
                _renew(at, page)

    def protect(self, protection: int = _PROT_READ_WRITE) -> None:
        """mprotect() the page: PROT_READ | PROT_WRITE. Raises OSError where its file was opened for reading only."""
        at = self._page()
        error = libc_call("mprotect", at, PAGE, protection)
        if error:
            raise OSError(error, os.strerror(error), f"mprotect of {at:#x}")

    def extend(self, file: int) -> None:
        """Make the file behind the page long enough for it (ftruncate); `file`: a descriptor of it, open for writing.

        Raises ValueError for another file, OSError where ftruncate() fails.
        """
        at = self._page()
        mapping, found = Host().mapping(at), os.fstat(file)
        # An overlay's files have another device there than in fstat(): that says nothing.
        if mapping is None or (found.st_dev == mapping.device and found.st_ino != mapping.inode):
            raise ValueError(f"descriptor {file} is not of the file that is mapped at {at:#x}")
        end = mapping.offset + at - mapping.start + PAGE
        if found.st_size < end:
            os.ftruncate(file, end)

    def convert(self, private: bool | None = None) -> None:
        """Convert the page, or as much as the exit says, to the side that the guest wants. Raises ConversionError.

        private: to which side, where the exit does not say it.
        """
        if private is None:
            if not isinstance(self.exit, MemoryFault):
                raise ValueError("KVM did not say which side the guest wants: give private=")
            private = self.exit.private
        size = self.exit.size if isinstance(self.exit, MemoryFault) else PAGE
        self.vcpu.vm.memory.convert((self.gpa or 0) // PAGE * PAGE, size, private=private)

    def rebind(self, **options: Any) -> Slot:
        """Take the slot out and add it anew with a guest_memfd of its own; -> the new one, zeros on both sides.

        options: of memory.add(), gmem_flags if not as before; buffer= keeps what the shared side has. Other vCPUs find
        no memory there meanwhile: pause() where that matters. Raises what add() does; the old slot is gone then.
        """
        slot, memory = self._slot(), self.vcpu.vm.memory
        memory.remove(slot)
        return memory.add(slot.gpa, slot.size, guest_memfd=True, **{"gmem_flags": slot.gmem_flags, **options})

    # ---- telling the guest ----

    def inject(self, what: str | int = "#MC", *, error_code: int | None = None, bank: int = 1) -> None:
        """Have the guest take an exception instead: kvmexit.faults.inject(), with this fault's address.

        Of "#PF" the error code says by itself what the access was, from which ring, to a page that is there.
        """
        address = None
        if what in ("#MC", 18):
            address = self.gpa
        elif what in ("#PF", 14):
            address = self.gva
            if error_code is None:
                user = self.vcpu.sregs.ss.dpl == 3  # which is the privilege level
                error_code = 1 | (self.access == "write") << 1 | user << 2 | (self.access == "fetch") << 4
        if address is None and what in ("#MC", 18, "#PF", 14):
            raise Error(f"{what} needs an address, and there is none: {self.explanation}")
        _inject.inject(self.vcpu, what, address=address, error_code=error_code, bank=bank)

    def skip(self) -> None:
        """Go on behind the instruction: kvmexit.faults.skip()."""
        _inject.skip(self.vcpu)

    # ---- what they share ----

    def _slot(self) -> Slot:
        slot = self.slot
        if slot is None:
            raise Error(f"there is no memslot to repair: {self.explanation}")
        return slot

    def _page(self) -> int:
        """The host address of its page."""
        hva = self.hva
        if hva is None:
            raise Error(f"there is no page to repair: {self.explanation}")
        return hva // PAGE * PAGE


def _map(at: int, size: int) -> None:
    error = libc_call("mmap", at, size, _PROT_READ_WRITE, _FIXED | _PRIVATE | _ANONYMOUS, -1, 0, fails=-1)
    if error:
        raise OSError(error, os.strerror(error), f"mmap of {at:#x}")


def _renew(at: int, size: int) -> None:
    """A poisoned page becomes a new one; one that can be reached stays as it is."""
    host = Host()
    if host.cause(at, False, True) is not Cause.POISONED and not host.unsure and not host.has_userfaultfd(at):
        return
    _advise("MADV_DONTNEED", at, size)
    host = Host()
    if host.cause(at, False, True) is not Cause.POISONED:
        return
    mapping = host.mapping(at)
    if mapping is None or mapping.permissions[3] != "s":
        _map(at, size)
        return
    _advise("MADV_REMOVE", at, size)
    _advise("MADV_DONTNEED", at, size)


def _advise(name: str, at: int, size: int) -> None:
    """madvise(); the first of the values that the kernel takes."""
    error = 0
    for value in _ADVICE[name]:
        error = libc_call("madvise", at, size, value)
        if not error:
            return
    raise OSError(error, os.strerror(error), f"madvise({name}) of {at:#x}, size {size:#x}")


class OnFault:
    """The handler behind `vm.on_fault()`: calls `handler(vcpu, fault)` for faults in first..last."""

    def __init__(self, handler: Callable[[Vcpu, Fault], object], first: int, last: int, every: bool) -> None:
        if not callable(handler):
            raise TypeError(f"a handler of faults is a callable taking (vcpu, fault), not {type(handler).__name__}")
        self.handler, self.first, self.last, self.every = handler, first, last, every

    def __call__(self, vcpu: Vcpu, exit: MemoryFault | UnexplainedFault | Mmio) -> object:
        if isinstance(exit, Mmio) and (exit.slot is None or (exit.is_write and exit.slot.readonly)):
            return PASS
        fault = Fault(vcpu, exit)
        if not self.every and (fault.gpa is None or not self.first <= fault.gpa <= self.last):
            return PASS
        verdict = self.handler(vcpu, fault)
        return as_memory(vcpu, exit) if verdict is None and isinstance(exit, Mmio) else verdict
