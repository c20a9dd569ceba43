"""A vCPU's registers as they are, copied once, so that what is asked of KVM later changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmexit.errors import KvmError

if TYPE_CHECKING:
    from kvmexit._loop import Vcpu

_GET_XSAVE, _GET_NESTED_STATE, _TRANSLATE = 0x9000AEA4, 0xC080AEBE, 0xC018AE85
_CR0_PE, _CR0_PG = 1 << 0, 1 << 31
_CR3_LAM = 3 << 61
_CR4_PSE, _CR4_PAE, _CR4_LA57, _CR4_CET, _CR4_LAM = 1 << 4, 1 << 5, 1 << 12, 1 << 23, 1 << 28
_EFER_LMA = 1 << 10
_RFLAGS_VM = 1 << 17
_NESTED_GUEST_MODE = 1
_XSAVE_YMM_HIGH = 576  # the first component behind the legacy area and the header
_GENERAL = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    "rflags",
)  # fmt: skip


class SegmentState(NamedTuple):
    """What addresses depend on."""

    base: int
    limit: int
    db: int
    present: bool
    selector: int


class State:
    """The registers that addresses depend on.

    regs: the general ones by name. bits: of the code, 16, 32 or 64. stack_bits: of the stack pointer. paging: "none",
    "32-bit", "PAE", "4-level" or "5-level". delivering: an exception or interrupt is on its way.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.regs: dict[str, int] = {name: getattr(vcpu.regs, name) for name in _GENERAL}
        sregs = vcpu.sregs
        self.cr3, self.cr4 = sregs.cr3, sregs.cr4
        protected, paging, long = sregs.cr0 & _CR0_PE != 0, sregs.cr0 & _CR0_PG != 0, sregs.efer & _EFER_LMA != 0
        self.real = not protected or self.regs["rflags"] & _RFLAGS_VM != 0
        self.protected, self.long = protected, long
        self.segments = {}
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "ldt", "tr"):
            s = getattr(sregs, name)
            self.segments[name] = SegmentState(s.base, s.limit, s.db, bool(s.present and not s.unusable), s.selector)
        self.gdt = (sregs.gdt.base, sregs.gdt.limit)
        self.idt = (sregs.idt.base, sregs.idt.limit)
        self.bits = 64 if long and sregs.cs.l else 32 if sregs.cs.db else 16
        self.stack_bits = 64 if self.bits == 64 else 32 if sregs.ss.db else 16
        if not paging:
            self.paging = "none"
        elif not self.cr4 & _CR4_PAE:
            self.paging = "32-bit"
        elif not long:
            self.paging = "PAE"
        else:
            self.paging = "5-level" if self.cr4 & _CR4_LA57 else "4-level"
        self.large_pages = self.cr4 & _CR4_PSE != 0
        events = vcpu.events
        self.delivering = bool(events.exception.injected or events.interrupt.injected or events.nmi.injected)
        self.smm = bool(events.smi.smm)

    @property
    def mask(self) -> int:
        """Of linear addresses."""
        return (1 << 64) - 1 if self.bits == 64 else (1 << 32) - 1

    def beyond(self) -> list[str]:
        """What there is that addresses do not show, in words: then nothing is certain."""
        found = []
        if self.smm:
            found.append("the vCPU is in system management mode, which has memory of its own")
        if self.cr4 & _CR4_CET:
            found.append("shadow stacks may be in use (CR4.CET)")
        if self.long and (self.cr4 & _CR4_LAM or self.cr3 & _CR3_LAM):
            found.append("addresses may carry tags (LAM)")
        state = bytearray(1 << 14)
        state[4:8] = len(state).to_bytes(4, "little")
        try:
            self._vcpu.ioctl(_GET_NESTED_STATE, state)
            nested = state[0] & _NESTED_GUEST_MODE
        except KvmError as error:
            nested = error.errno == 7  # E2BIG: only a nested guest has so much
        if nested:
            found.append("a nested guest was running")
        return found

    def vector_register(self, number: int) -> bytes:
        """-> the 32 bytes of YMM0 to YMM15. Raises KvmError where KVM does not show them."""
        area = bytearray(4096)
        self._vcpu.ioctl(_GET_XSAVE, area)
        low, high = 160 + 16 * number, _XSAVE_YMM_HIGH + 16 * number
        return bytes(area[low : low + 16] + area[high : high + 16])

    def translate(self, gva: int) -> int | bool | None:
        """What KVM says of an address: the gpa; None where it is not mapped; False where KVM says nothing."""
        answer = bytearray(gva.to_bytes(8, "little") + bytes(16))
        try:
            self._vcpu.ioctl(_TRANSLATE, answer)
        except KvmError:
            return False
        return int.from_bytes(answer[8:16], "little") if answer[16] else None
