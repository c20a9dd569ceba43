"""A guest that does one thing at a time: a few instructions at CPL 0, and what became of them.

Where the kernel's tests compile a guest that asserts, these have userspace hand it each step and look at its registers. An
exception in the guest is an exit, too: each vector has a handler that writes to a port of its own.
"""

import struct

from guests import CODE, load

import kvmexit

DONE = 0x80  # out: the step was carried out
CAUGHT = 0xA0  # and the vector: out, the guest took an exception
DB, UD, GP = 1, 6, 13
GDT, IDT, HANDLERS, STACK = 0x8000, 0x9000, 0xA000, 0xC000
FREE = 0x10000  # from here on, what a test wants


class Guest:
    """`vcpu` in 64-bit mode at CPL 0, with an IDT."""

    def __init__(self, vm):
        self.vm = vm
        self.vcpu = vcpu = load(vm, b"", cpl=0)
        # null; 64-bit code; data
        vm.memory.write(GDT, struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
        for vector in range(32):
            at = HANDLERS + 16 * vector
            vm.memory.write(at, bytes([0xE6, CAUGHT + vector, 0xF4]))  # out CAUGHT + vector, al; hlt
            # an interrupt gate: CPL 0, selector 8
            vm.memory.write(IDT + 16 * vector, struct.pack("<HHBBHII", at & 0xFFFF, 8, 0, 0x8E, at >> 16, 0, 0))
        vcpu.sregs.gdt.base, vcpu.sregs.gdt.limit = GDT, 3 * 8 - 1
        vcpu.sregs.idt.base, vcpu.sregs.idt.limit = IDT, 32 * 16 - 1

    def step(self, code, **registers):
        """Have the guest carry out `code` (hex) with these registers; -> the exit: the end of the step, or what came before."""
        code = bytes.fromhex(code) + bytes([0xE6, DONE])
        self.vm.memory.write(CODE, code)
        regs = self.vcpu.regs
        regs.rip, regs.rsp, regs.rflags = CODE, STACK, 2
        for name, value in registers.items():
            setattr(regs, name, value)
        return self.go_on()

    def go_on(self):
        """-> the next exit."""
        return self.vcpu.run(timeout=20)

    def caught(self, exit):
        """-> the vector of the exception that the guest took, or None where it came to the end of its step."""
        assert isinstance(exit, kvmexit.Io), exit
        if exit.port == DONE:
            return None
        assert CAUGHT <= exit.port < CAUGHT + 32, exit
        return exit.port - CAUGHT

    def rdmsr(self, msr):
        """-> the exit."""
        return self.step("0f 32", rcx=msr, rax=0, rdx=0)

    def wrmsr(self, msr, value):
        """-> the exit."""
        return self.step("0f 30", rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)

    def edx_eax(self):
        """What rdmsr gave the guest."""
        return self.vcpu.regs.rdx << 32 | self.vcpu.regs.rax


def amd():
    """Whether the processor is AMD's: its hypercall is vmmcall."""
    with open("/proc/cpuinfo") as cpuinfo:
        return "AuthenticAMD" in cpuinfo.read()


VMCALL, VMMCALL = "0f 01 c1", "0f 01 d9"
