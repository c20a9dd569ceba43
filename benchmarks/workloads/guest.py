"""The guest of all workloads: it does what a table in its memory says, step by step, and notes there what it read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from kvmexit import VM, Vcpu, x86
from kvmexit.bench.cells import on_amd

CODE, TEXT, TABLE, RAM = 0x1000, 0x2000, 0x10_0000, 0x40_0000
REGION = 0x1000_0000  # where devices, or memory that can be converted, begin
LSR, THR, END = 0x3FD, 0x3F8, 0xF4  # ports
MAP_GPA_RANGE, ENCRYPTED = 12, 1 << 4

NEXT = "48 83 c6 20  ff 26"  # add rsi, 32; jmp [rsi]: an entry's first word is the address of its routine
ROUTINES = {
    # A console's: mov rdi, [rsi+8]; mov rcx, [rsi+16]; poll: mov edx, 0x3fd; in al, dx; test al, 0x20; jz poll;
    # mov al, [rdi]; mov dl, 0xf8; out dx, al; inc rdi; dec rcx; jnz poll
    "send": "48 8b 7e 08  48 8b 4e 10  ba fd 03 00 00  ec  a8 20  74 f6  8a 07  b2 f8  ee  48 ff c7  48 ff c9  75 e9",
    "out": "8b 56 08  8b 46 10  ee",  # mov edx, [rsi+8]; mov eax, [rsi+16]; out dx, al
    "in": "8b 56 08  31 c0  ec  48 89 46 18",  # mov edx, [rsi+8]; xor eax, eax; in al, dx; mov [rsi+24], rax
    "write": "48 8b 7e 08  8b 46 10  89 07",  # mov rdi, [rsi+8]; mov eax, [rsi+16]; mov [rdi], eax
    "read": "48 8b 7e 08  8b 07  48 89 46 18",  # mov rdi, [rsi+8]; mov eax, [rdi]; mov [rsi+24], rax
    # mov rbx, [rsi+8]; mov ecx, [rsi+16]; mov edx, [rsi+20]; mov eax, 12; vmcall; mov [rsi+24], rax
    "call": "48 8b 5e 08  8b 4e 10  8b 56 14  b8 0c 00 00 00  0f 01 c1  48 89 46 18",
    "end": "e6 f4",  # out 0xf4, al; when it is entered again, it goes on
}
ADDRESSES = {name: CODE + 64 * i for i, name in enumerate(ROUTINES)}
VMCALL, VMMCALL = bytes.fromhex("0f 01 c1"), bytes.fromhex("0f 01 d9")


class Step(NamedTuple):
    """What the guest does, with 32 bits, ports with 8; and what it has to have read, where it reads.

    send: `value` bytes of the text from `address` on. out, in, write, read: a port or an address. call:
    KVM_HC_MAP_GPA_RANGE of the address, `value` being pages | attributes << 32. end: OUT to port 0xf4.
    """

    do: str
    address: int = 0
    value: int = 0
    answer: int = 0


def start(vm: VM, steps: Sequence[Step], text: bytes, cpl: int) -> Vcpu:
    """-> a vCPU of a VM without memory at 0, about to do all that."""
    table = b"".join(struct.pack("<4Q", ADDRESSES[step.do], step.address, step.value, 0) for step in steps)
    if TEXT + len(text) > TABLE or TABLE + len(table) > RAM - x86.PAGE_TABLE_BYTES:
        raise ValueError(f"{len(steps)} steps and {len(text)} bytes do not fit into the guest")
    vm.memory.add(0, RAM)
    for name, code in ROUTINES.items():
        routine = bytes.fromhex(code + NEXT)
        vm.memory.write(ADDRESSES[name], routine.replace(VMCALL, VMMCALL) if on_amd() else routine)
    vm.memory.write(TEXT, text)
    vm.memory.write(TABLE, table)
    vcpu = vm.create_vcpu()
    x86.long_mode(vcpu, ADDRESSES[steps[0].do], cpl=cpl)
    vcpu.regs.rsi = TABLE
    vcpu.run(timeout=0)  # enters no guest, but KVM has the registers then, for loops that are not kvmexit's
    return vcpu


def answers(vm: VM, steps: int) -> list[int]:
    """What the guest noted, by step; 0 where it reads nothing."""
    return [answer for _, _, _, answer in struct.iter_unpack("<4Q", vm.memory.read(TABLE, 32 * steps))]
