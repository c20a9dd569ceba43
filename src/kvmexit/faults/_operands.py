"""What an instruction touches: linear addresses, from its bytes and the registers as they are before it.

iced-x86 names the operands, implicit ones too. Added here: where a bit offset in a register leads, the present
iteration of a string instruction, a gather's lanes, and what iced leaves out. What none of this covers makes the answer
incomplete.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kvmexit.errors import KvmError
from kvmexit.faults._state import State

__all__ = ["Access", "Decoded", "decode", "decoder_missing", "is_short", "linear"]

LONGEST = 15  # bytes, an instruction
_STRING_GROUP = 64  # bytes that microcode may move before it writes the registers back
_XSAVE_AREA = 3 * 4096  # the largest there is, AMX included
_DIRECTION = 1 << 10
AHEAD = "string operand, further on"


class Access(NamedTuple):
    """`size` bytes at linear address `gva`.

    kind: "read", "write" or "fetch". what: in words. sure: the instruction cannot go by without it.
    """

    gva: int
    size: int
    kind: str
    what: str
    sure: bool = True


class Decoded(NamedTuple):
    """text: the instruction. complete: None, or why there may be more accesses than these."""

    text: str
    length: int
    accesses: tuple[Access, ...]
    incomplete: str | None


def decoder_missing() -> bool:
    """Whether there is no iced-x86."""
    try:
        import iced_x86  # noqa: F401
    except ImportError:
        return True
    return False


def is_short(state: State, code: bytes) -> bool:
    """Whether the instruction goes on behind these bytes."""
    import iced_x86

    decoder = iced_x86.Decoder(state.bits, code, ip=state.regs["rip"])
    decoder.decode()
    return len(code) < LONGEST and decoder.last_error == iced_x86.DecoderError.NO_MORE_BYTES


def decode(state: State, code: bytes) -> Decoded:
    """What the instruction that these bytes begin with touches, in the order in which it does, more or less."""
    import iced_x86

    decoder = iced_x86.Decoder(state.bits, code, ip=state.regs["rip"])
    instruction = decoder.decode()
    if instruction.code == iced_x86.Code.INVALID:
        return Decoded("an unknown instruction", len(code), (), "the instruction is not one that iced-x86 knows")
    return _Operands(state, instruction, iced_x86).decoded()


class _Operands:
    def __init__(self, state: State, instruction: Any, iced: Any) -> None:
        self.state, self.i, self.iced = state, instruction, iced
        self.incomplete: str | None = _incomplete(state, instruction, iced)
        self.registers = _register_names(iced)

    def decoded(self) -> Decoded:
        try:
            accesses = tuple(self.accesses())
        except KvmError as error:
            self.incomplete, accesses = f"vector registers cannot be read: {error}", ()
        # What is read is read before anything is written.
        ordered = tuple(sorted(accesses, key=lambda access: access.kind == "write"))
        return Decoded(str(self.i), self.i.len, ordered, self.incomplete)

    def accesses(self) -> Iterator[Access]:
        op = self.iced.OpAccess
        writing = (op.WRITE, op.COND_WRITE, op.READ_WRITE, op.READ_COND_WRITE)
        conditional = (op.COND_READ, op.COND_WRITE)
        for used in self.iced.InstructionInfoFactory().info(self.i).used_memory():
            kind = "write" if used.access in writing else "read"
            sure = used.access not in conditional
            size = self.iced.MemorySizeExt.size(used.memory_size)
            if used.vsib_size:
                yield from self.gathered(used, kind, size)
            elif self.i.is_string_instruction:
                yield from self.string(used, kind)
            elif not size and used.memory_size in (self.iced.MemorySize.XSAVE, self.iced.MemorySize.XSAVE64):
                yield Access(self.address(used), 576, kind, "operand", sure)
                yield Access(self.address(used, 576), _XSAVE_AREA - 576, kind, "extended state", False)
            elif not size:
                self.incomplete = "it is not known how many bytes it touches"
                yield Access(self.address(used), 1, kind, "operand", sure)
            else:
                stack = self.registers.get(used.base, ("", 0))[0] == "rsp" and self.i.is_stack_instruction
                at = self.address(used, self.bit_offset(size))
                yield Access(at, size, kind, "stack" if stack else "operand", sure)
        yield from self.unnamed()

    def value(self, register: int) -> int:
        if register == self.iced.Register.NONE:
            return 0
        name, size = self.registers[register]
        return self.state.regs[name] & ((1 << 8 * size) - 1)

    def address(self, used: Any, more: int = 0, index: int | None = None) -> int:
        """The linear address of a memory operand. more: bytes on, within its segment."""
        if index is None:
            index = self.value(used.index)
        size = self.iced.CodeSize
        offset = self.value(used.base) + index * used.scale + used.displacement + more
        offset &= {size.CODE16: 0xFFFF, size.CODE32: 0xFFFFFFFF}.get(used.address_size, (1 << 64) - 1)
        return linear(self.state, _SEGMENTS[used.segment - self.iced.Register.ES], offset)

    def bit_offset(self, size: int) -> int:
        """BT and its kin take bit offsets beyond their operand, from a register, and signed."""
        m, i = self.iced.Mnemonic, self.i
        if i.mnemonic not in (m.BT, m.BTS, m.BTR, m.BTC) or i.op1_kind != self.iced.OpKind.REGISTER:
            return 0
        bits = 8 * size
        offset: int = self.value(i.op1_register)
        if offset >> (bits - 1):
            offset -= 1 << bits
        return offset // bits * size

    def string(self, used: Any, kind: str) -> Iterator[Access]:
        """The registers stand at the present iteration."""
        size, count = self.iced.MemorySizeExt.size(self.i.memory_size), 1
        if self.i.has_rep_prefix or self.i.has_repne_prefix:
            counter = {self.iced.CodeSize.CODE16: 2, self.iced.CodeSize.CODE32: 4}.get(used.address_size, 8)
            count = self.state.regs["rcx"] & (1 << 8 * counter) - 1
        if not count:
            return
        what = f"string operand, {count} left" if count > 1 else "string operand"
        yield Access(self.address(used), size, kind, what)
        ahead = min((count - 1) * size, _STRING_GROUP)
        if ahead:
            down = self.state.regs["rflags"] & _DIRECTION
            yield Access(self.address(used, -ahead if down else size), ahead, kind, AHEAD, False)

    def gathered(self, used: Any, kind: str, size: int) -> Iterator[Access]:
        """Where each lane's index leads, of those that the mask has."""
        registers = self.iced.Register
        first = registers.YMM0 if used.index >= registers.YMM0 else registers.XMM0
        number, length = used.index - first, 32 if used.index >= registers.YMM0 else 16
        if number > 15 or self.i.op_mask != registers.NONE or self.i.encoding != self.iced.EncodingKind.VEX:
            self.incomplete = "its vector registers are not looked at (AVX-512)"
            return
        data = self.state.vector_register(number)
        mask_register = self.i.op2_register
        wide = mask_register >= registers.YMM0
        mask = self.state.vector_register(mask_register - (registers.YMM0 if wide else registers.XMM0))
        for lane in range(min(length // used.vsib_size, (32 if wide else 16) // size)):
            if mask[(lane + 1) * size - 1] & 0x80:
                index = int.from_bytes(data[lane * used.vsib_size : (lane + 1) * used.vsib_size], "little", signed=True)
                yield Access(self.address(used, index=index), size, kind, f"element {lane}")

    def unnamed(self) -> Iterator[Access]:
        m, i = self.iced.Mnemonic, self.i
        if i.mnemonic in (m.CLZERO, m.MONITOR, m.MONITORX):
            rax = self.state.regs["rax"] & (1 << self.state.bits) - 1
            zero = i.mnemonic == m.CLZERO
            yield Access(linear(self.state, "ds", rax & -64 if zero else rax), 64 if zero else 1,
                         "write" if zero else "read", "operand", sure=zero)  # fmt: skip
            if i.segment_prefix != self.iced.Register.NONE:
                self.incomplete = "its segment is not looked at"
        elif i.mnemonic == m.ENTER:  # which looks whether its frame can be written
            depth = (i.immediate8_2nd % 32 + 1) * (self.state.bits // 8)
            sp = (self.state.regs["rsp"] - depth - i.immediate16) & (1 << self.state.stack_bits) - 1
            yield Access(linear(self.state, "ss", sp), 1, "write", "stack", False)


_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


def linear(state: State, segment: str, offset: int) -> int:
    """The linear address of an offset in a segment."""
    if state.bits == 64 and segment not in ("fs", "gs"):
        return offset & state.mask
    return (state.segments[segment].base + offset) & state.mask


def _incomplete(state: State, i: Any, iced: Any) -> str | None:
    """Why an instruction may touch more than its operands, what its exceptions need, and descriptors."""
    flow, m = iced.FlowControl, iced.Mnemonic
    if i.flow_control == flow.EXCEPTION and i.mnemonic not in (m.UD0, m.UD1, m.UD2):
        return "it is one whose accesses are not known"
    far = i.is_jmp_far or i.is_call_far or i.flow_control == flow.INTERRUPT or i.mnemonic in (
        m.IRET, m.IRETD, m.IRETQ, m.RETF)  # fmt: skip
    if far and state.protected and not state.long:
        return "a task switch has further accesses"
    if state.bits != 64 and state.stack_bits != state.bits and i.is_stack_instruction:
        return "the stack's width is not the code's"
    name = _mnemonic_name(i.mnemonic, iced)
    if name in _UNKNOWN or name.startswith(("ENCL", "TILE", "SEAM")):
        return "it is one whose accesses are not known"
    return None


_UNKNOWN = {
    "ERETS", "ERETU", "GETSEC", "GETSECQ", "INVEPT", "INVPCID", "INVVPID", "LKGS", "LOADALL", "LOADIWKEY",
    "MONTMUL", "PBNDKB", "PCONFIG", "PSMASH", "PVALIDATE", "RMPADJUST", "RMPQUERY", "RMPUPDATE", "RSM", "SENDUIPI",
    "SKINIT", "STGI", "TDCALL", "UIRET", "VMCALL", "VMCLEAR", "VMFUNC", "VMGEXIT", "VMLAUNCH", "VMLOAD", "VMMCALL",
    "VMPTRLD", "VMPTRST", "VMREAD", "VMRESUME", "VMRUN", "VMSAVE", "VMWRITE", "VMXOFF", "VMXON", "WBINVD", "XSHA1",
    "XSHA256", "XSHA512", "XSHA512_ALT", "XSTORE", "XSTORE_ALT",
}  # fmt: skip


def _mnemonic_name(mnemonic: int, iced: Any) -> str:
    if not _NAMES:
        _NAMES.update({value: name for name, value in vars(iced.Mnemonic).items() if isinstance(value, int)})
    return _NAMES[mnemonic]


_NAMES: dict[int, str] = {}
_REGISTERS: dict[int, tuple[str, int]] = {}


def _register_names(iced: Any) -> dict[int, tuple[str, int]]:
    """-> of each general register's number, the name of the whole one, and its bytes."""
    if not _REGISTERS:
        found: dict[int, tuple[str, int]] = {}
        for name in ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"):
            whole = "r" + name.lower()
            for prefix, size in (("R", 8), ("E", 4), ("", 2)):
                found[getattr(iced.Register, prefix + name)] = (whole, size)
        for number in range(8, 16):
            for suffix, size in (("", 8), ("D", 4), ("W", 2), ("L", 1)):
                found[getattr(iced.Register, f"R{number}{suffix}")] = (f"r{number}", size)
        found[iced.Register.AL] = ("rax", 1)
        found[iced.Register.RIP], found[iced.Register.EIP] = ("rip", 8), ("rip", 4)
        _REGISTERS.update(found)
    return _REGISTERS
