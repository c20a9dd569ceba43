"""What explain() says of faults whose page is known: instructions x causes, on a real /dev/kvm, 64-bit code at CPL 3.

    PYTHONPATH=src python tests/explain_matrix.py     the table; tests/test_explain.py judges it
"""

import ctypes
import mmap
import os
from typing import NamedTuple

from guests import CODE

import kvmexit
from kvmexit.faults import Cause

PAGE = mmap.PAGESIZE
SPARE, BAD = 0x200000, 0x300000  # pages of data: four that can be reached, and behind one such the one that cannot
STACK = 0x9000
libc = ctypes.CDLL(None, use_errno=True)


class Case(NamedTuple):
    """One instruction. at: where in the bad page it first touches it. kind: "read", "write" or "fetch"."""

    name: str
    code: str
    kind: str
    at: int
    regs: dict = {}  # noqa: RUF012
    fs: int = 0
    memory: tuple = ()  # (gpa, bytes)
    feature: str = ""


B = BAD  # short, for the rows
CASES = [
    Case("mov eax, [rbx]", "8b03", "read", 8, {"rbx": B + 8}),
    Case("mov [rbx], eax", "8903", "write", 8, {"rbx": B + 8}),
    Case("mov [rbx], rax over two pages", "488903", "write", 0, {"rbx": B - 3}),
    Case("mov rax, [rbx] over two pages", "488b03", "read", 0, {"rbx": B - 1}),
    Case("inc byte [rbx]", "fe03", "write", 0xFFF, {"rbx": B + 0xFFF}),
    Case("add eax, [rbx+rcx*4+0x10]", "03448b10", "read", 0x38, {"rbx": B + 8, "rcx": 8}),
    Case("cmp [rbx], al", "3803", "read", 0, {"rbx": B}),
    Case("test [rbx], eax", "8503", "read", 0, {"rbx": B}),
    Case("not qword [rbx]", "48f713", "write", 16, {"rbx": B + 16}),
    Case("shl dword [rbx], 1", "d123", "write", 16, {"rbx": B + 16}),
    Case("imul eax, [rbx]", "0faf03", "read", 4, {"rbx": B + 4}),
    Case("div dword [rbx]", "f733", "read", 4, {"rbx": B + 4}),
    Case("cmovz eax, [rbx]", "0f4403", "read", 4, {"rbx": B + 4}),
    Case("movzx eax, word [rbx]", "0fb703", "read", 4, {"rbx": B + 4}),
    Case("setz [rbx]", "0f9403", "write", 4, {"rbx": B + 4}),
    Case("xchg [rbx], eax", "8703", "write", 4, {"rbx": B + 4}),
    Case("lock xadd [rbx], eax", "f00fc103", "write", 4, {"rbx": B + 4}),
    Case("lock cmpxchg [rbx], ecx", "f00fb10b", "write", 4, {"rbx": B + 4}),
    Case("lock cmpxchg16b [rbx]", "f0480fc70b", "write", 16, {"rbx": B + 16}),
    Case("bts [rbx], rax", "480fab03", "write", 0x100, {"rbx": SPARE, "rax": (B + 0x100 - SPARE) * 8 + 3}),
    Case("bt [rbx], eax, negative", "0fa303", "read", 0xFF0, {"rbx": B + PAGE, "rax": 2**32 - 0x80}),
    Case("btr dword [rbx], 5", "0fba3305", "write", 8, {"rbx": B + 8}),
    Case("mov eax, [rip+...]", "8b05" + (B + 4 - CODE - 6).to_bytes(4, "little").hex(), "read", 4),
    Case("mov eax, [moffs]", "a1" + (B + 12).to_bytes(8, "little").hex(), "read", 12),
    Case("mov eax, fs:[rbx]", "648b03", "read", 0x24, {"rbx": 0x24}, fs=B),
    Case("mov eax, [ebx]", "678b03", "read", 0x24, {"rbx": 0x7_0000_0000 + B + 0x24}),
    Case("push rax", "50", "write", 0x18, {"rsp": B + 0x20}),
    Case("push [rbx]", "ff33", "read", 0x20, {"rbx": B + 0x20}),
    Case("push fs", "0fa0", "write", 0x18, {"rsp": B + 0x20}),
    Case("pushfq", "9c", "write", 0x18, {"rsp": B + 0x20}),
    Case("pop rax", "58", "read", 0x20, {"rsp": B + 0x20}),
    Case("pop [rbx]", "8f03", "write", 0x20, {"rbx": B + 0x20}),
    Case("pop [rsp+8]", "8f442408", "write", 8, {"rsp": B - 8}),
    Case("popfq", "9d", "read", 0x20, {"rsp": B + 0x20}),
    Case("call", "e800000000", "write", 0xFF8, {"rsp": B + PAGE}),
    Case("call [rbx]", "ff13", "read", 0x30, {"rbx": B + 0x30}),
    Case("jmp [rbx]", "ff23", "read", 0x30, {"rbx": B + 0x30}),
    Case("ret", "c3", "read", 0x40, {"rsp": B + 0x40}),
    Case("ret 8", "c20800", "read", 0x40, {"rsp": B + 0x40}),
    Case("iretq", "48cf", "read", 0x40, {"rsp": B + 0x40}),
    Case("leave", "c9", "read", 0x40, {"rbp": B + 0x40}),
    Case("enter 16, 0", "c8100000", "write", 0xFF8, {"rsp": B + PAGE}),
    Case("xlatb", "d7", "read", 0x77, {"rbx": B + 0x70, "rax": 7}),
    Case("lodsq", "48ad", "read", 0x50, {"rsi": B + 0x50}),
    Case("stosd", "ab", "write", 0x50, {"rdi": B + 0x50}),
    Case("scasb", "ae", "read", 0x50, {"rdi": B + 0x50}),
    Case("movsb, from", "a4", "read", 0x50, {"rsi": B + 0x50, "rdi": SPARE}),
    Case("movsb, to", "a4", "write", 0x50, {"rsi": SPARE, "rdi": B + 0x50}),
    Case("cmpsb, second", "a6", "read", 0x50, {"rsi": SPARE, "rdi": B + 0x50}),
    Case("rep movsb into it", "f3a4", "write", 0, {"rsi": SPARE, "rdi": B - 200, "rcx": 400}),
    Case("rep movsq out of it", "f348a5", "read", 0, {"rsi": B - 64, "rdi": SPARE, "rcx": 100}),
    Case("rep stosq downwards", "f348ab", "write", 0xFF8, {"rdi": B + PAGE + 16, "rcx": 40, "rflags": 0x3402}),
    Case("repe cmpsb", "f3a6", "read", 0, {"rsi": SPARE, "rdi": B - 16, "rcx": 50}),
    Case("movaps xmm0, [rbx]", "0f2803", "read", 0x10, {"rbx": B + 0x10}),
    Case("movups [rbx], xmm0 over two pages", "0f1103", "write", 0, {"rbx": B - 8}),
    Case("movnti [rbx], eax", "0fc303", "write", 0x10, {"rbx": B + 0x10}),
    Case("fld tbyte [rbx]", "db2b", "read", 0x10, {"rbx": B + 0x10}),
    Case("fstp qword [rbx]", "dd1b", "write", 0x10, {"rbx": B + 0x10}),
    Case("fxsave [rbx]", "0fae03", "write", 0x400, {"rbx": B + 0x400}),
    Case("fnstenv [rbx]", "d933", "write", 0x400, {"rbx": B + 0x400}),
    Case("stmxcsr [rbx]", "0fae1b", "write", 0x400, {"rbx": B + 0x400}),
    Case("maskmovdqu xmm0, xmm0", "660ff7c0", "write", 0x10, {"rdi": B + 0x10}, memory=((SPARE, b"\x80" * 16),)),
    Case("vmovdqu ymm0, [rbx]", "c5fe6f03", "read", 0x10, {"rbx": B + 0x10}, feature="avx2"),
    Case("vpgatherdd xmm3, [rbx+xmm0*4], xmm1", "c4e271901c83", "read", 0x40, {"rbx": SPARE},
         memory=((SPARE, (0).to_bytes(4, "little") * 2 + ((B + 0x40 - SPARE) // 4).to_bytes(4, "little") + bytes(4)),),
         feature="avx2"),
    Case("vpmaskmovd [rbx], xmm1, xmm2", "c4e2718e13", "write", 0x10, {"rbx": B + 0x10}, feature="avx2"),
    Case("fetch", "", "fetch", 0x123, {"rip": B + 0x123}),
    Case("fetch over two pages", "", "fetch", 0, {"rip": B - 2}, memory=((B - 2, bytes.fromhex("8b05")),)),
]  # fmt: skip
CAUSES = {
    "unmapped": Cause.UNMAPPED, "PROT_NONE": Cause.PROT_NONE, "PROT_READ": Cause.PROT_READ, "truncated": Cause.BEYOND_EOF,
}  # fmt: skip


class Result(NamedTuple):
    """What became of one case and cause. said: the Explanation, None where the exit was `exit`, no bare fault."""

    case: Case
    cause: str
    exit: str
    said: object

    @property
    def right(self):
        """Whether the answer, certain or not, begins with the truth."""
        said = self.said
        return (said.gpa, said.gva, said.access, said.cause) == (
            BAD + self.case.at, BAD + self.case.at, self.case.kind, CAUSES[self.cause])  # fmt: skip

    @property
    def word(self):
        """For the table."""
        if self.said is None:
            return self.exit
        return ("ok" if self.right else "WRONG") if self.said.certain else ("uncertain" if self.right else "uncertain, wrong")


def causes(case):
    """Those that stop this instruction."""
    return [cause for cause in CAUSES if cause != "PROT_READ" or case.kind == "write"]


def spoil(cause, hva, fd):
    """Make one page unreachable."""
    at, size = ctypes.c_void_p(hva), ctypes.c_size_t(PAGE)
    if cause == "unmapped":
        assert libc.munmap(at, size) == 0
    elif cause == "truncated":
        os.ftruncate(fd, PAGE)
    else:
        assert libc.mprotect(at, size, {"PROT_NONE": 0, "PROT_READ": 1}[cause]) == 0


def avx2():
    """Whether this machine has what some rows need."""
    with open("/proc/cpuinfo") as file:
        return " avx2 " in file.read()


def fault(vm, case, cause):
    """-> a vCPU that has run into it, and the exit."""
    ram = vm.memory.add(0, 1 << 20)
    prologue, code = b"", bytes.fromhex(case.code)
    if case.feature == "avx2":  # vmovdqu xmm0, [SPARE]: a gather's indices; vpcmpeqd xmm1, xmm1, xmm1: its mask
        prologue = bytes.fromhex("c5fa6f0425" + SPARE.to_bytes(4, "little").hex() + "c5f176c9")
    elif "xmm0, xmm0" in case.name:  # movups xmm0, [SPARE]
        prologue = bytes.fromhex("0f100425" + SPARE.to_bytes(4, "little").hex())
    ram[CODE - len(prologue) : CODE + len(code)] = prologue + code
    vm.memory.add(SPARE, 4 * PAGE)
    fd = os.memfd_create("explained")
    os.ftruncate(fd, 2 * PAGE)
    slot = vm.memory.add(BAD - PAGE, 2 * PAGE, fd=fd)
    vm.memory.add(BAD + PAGE, PAGE)
    for gpa, data in case.memory:
        vm.memory.write(gpa, data)
    vcpu = vm.create_vcpu()
    kvmexit.x86.long_mode(vcpu, CODE - len(prologue), cpl=3, stack=STACK)
    if case.feature == "avx2":
        vcpu.sregs.cr4 |= 1 << 18
        xcrs = bytearray(392)
        xcrs[0:4] = (1).to_bytes(4, "little")
        xcrs[16:24] = (7).to_bytes(8, "little")
        vcpu.ioctl(0x4188AEA7, xcrs)
    for name, value in case.regs.items():
        setattr(vcpu.regs, name, value)
    vcpu.sregs.fs.base = case.fs
    spoil(cause, slot.hva + PAGE, fd)
    os.close(fd)
    return vcpu, vcpu.run(timeout=20)


def results(cases=CASES):
    """Run them."""
    for case in cases:
        if case.feature == "avx2" and not avx2():
            continue
        for cause in causes(case):
            with kvmexit.VM() as vm:
                vcpu, exit = fault(vm, case, cause)
                said = exit.explain(vcpu) if isinstance(exit, kvmexit.UnexplainedFault) else None
                yield Result(case, cause, type(exit).__name__, said)


def table(found):
    """-> a row for each instruction, a column for each cause."""
    words = {(result.case.name, result.cause): result.word for result in found}
    names = list(dict.fromkeys(result.case.name for result in found))
    lines = [f"{'instruction':38}" + "".join(f"{cause:>18}" for cause in CAUSES)]
    lines += [f"{name:38}" + "".join(f"{words.get((name, cause), '-'):>18}" for cause in CAUSES) for name in names]
    explained = [result for result in found if result.said is not None]
    certain = [result for result in explained if result.said.certain]
    lines.append(
        f"{len({result.case.name for result in explained})} instructions, {len(explained)} faults: "
        f"{sum(result.right for result in certain)} right and certain, {sum(not result.right for result in certain)} wrong "
        f"and certain, {len(explained) - len(certain)} uncertain")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(table(list(results(CASES[::step]))))
