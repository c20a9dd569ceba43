"""A guest that does one thing at a time: a few instructions at CPL 0, and what became of them.

Where the kernel's tests compile a guest that asserts, these have userspace hand it each step and look at its registers. An
exception in the guest is an exit, too: each vector has a handler that writes to a port of its own.
"""

import struct

from guests import CODE

import kvmexit

DONE = 0x80  # out: the step was carried out
CAUGHT = 0xA0  # and the vector: out, the guest took an exception
DB, UD, GP = 1, 6, 13
GDT, IDT, HANDLERS, STACK = 0x8000, 0x9000, 0xA000, 0xC000
SET_MP_STATE = 0x4004AE99
FREE = 0x10000  # from here on, what a test wants


def lay_out(vm):
    """A megabyte that has descriptors, an IDT, and its handlers."""
    vm.memory.add(0, 1 << 20)
    # null; 64-bit code; data
    vm.memory.write(GDT, struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
    for vector in range(32):
        at = HANDLERS + 16 * vector
        vm.memory.write(at, bytes([0xE6, CAUGHT + vector, 0xF4]))  # out CAUGHT + vector, al; hlt
        # an interrupt gate: CPL 0, selector 8
        vm.memory.write(IDT + 16 * vector, struct.pack("<HHBBHII", at & 0xFFFF, 8, 0, 0x8E, at >> 16, 0, 0))


class Guest:
    """`vcpu` in 64-bit mode at CPL 0, with an IDT. Those of one VM share its memory, and take turns."""

    def __init__(self, vm, id=0):
        self.vm = vm
        if not vm.memory.slots:
            lay_out(vm)
        self.vcpu = vcpu = vm.create_vcpu(id)
        kvmexit.x86.long_mode(vcpu, CODE)
        vcpu.sregs.gdt.base, vcpu.sregs.gdt.limit = GDT, 3 * 8 - 1
        vcpu.sregs.idt.base, vcpu.sregs.idt.limit = IDT, 32 * 16 - 1
        if id:
            vcpu.ioctl(SET_MP_STATE, struct.pack("<I", 0))  # with an in-kernel interrupt controller it waits to be started

    def step(self, code, **registers):
        """Have the guest carry out `code` (hex) with these registers; -> the exit: the end of the step, or what came
        before."""
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
    """Whether the processor is AMD's."""
    with open("/proc/cpuinfo") as cpuinfo:
        return "AuthenticAMD" in cpuinfo.read()


VMCALL, VMMCALL = "0f 01 c1", "0f 01 d9"
HYPERCALL, OTHERS_HYPERCALL = (VMMCALL, VMCALL) if amd() else (VMCALL, VMMCALL)  # this processor's, and the other's


# ---- Hyper-V, which a guest sees by CPUID ----

ENABLE_CAP, GET_CPUID2, SET_CPUID2, GET_SUPPORTED_HV_CPUID = 0x4068AEA3, 0xC008AE91, 0x4008AE90, 0xC008AEC1
HYPERV_CPUID, HYPERV_ENFORCE_CPUID = 167, 199
FEATURES, RECOMMENDATIONS, SYNDBG = 0x4000_0003, 0x4000_0004, 0x4000_0082  # leaves
EAX, EBX, ECX, EDX = range(4)
GUEST_OS_ID, HYPERCALL_PAGE = 0x4000_0000, 0x4000_0001
LINUX = 0x8100 << 48  # a GUEST_OS_ID


def enable(vcpu, cap, *args):
    """KVM_ENABLE_CAP on a vCPU."""
    vcpu.ioctl(ENABLE_CAP, struct.pack("<II4Q64x", cap, 0, *args, *[0] * (4 - len(args))))


def cpuid(vcpu, call):
    """-> {(leaf, index): [eax, ebx, ecx, edx, flags]} by one of the ioctls that tell."""
    table = bytearray(struct.pack("<II", 256, 0) + bytes(256 * 40))
    vcpu.ioctl(call, table)
    entries = [struct.unpack_from("<7I", table, 8 + 40 * i) for i in range(struct.unpack_from("<I", table)[0])]
    return {(leaf, index): [*registers, flags] for leaf, index, flags, *registers in entries}


def hyperv(guest, *features, without=()):
    """Show the guest all of Hyper-V that KVM has but what is `without`, leaves; and there only `features`, (leaf, register,
    bit) each. In place of KVM's own leaves."""
    leaves = {key: entry for key, entry in cpuid(guest.vcpu, GET_CPUID2).items() if not 0x4000_0000 <= key[0] < 0x4000_0100}
    leaves |= cpuid(guest.vcpu, GET_SUPPORTED_HV_CPUID)
    for leaf in without:
        leaves[leaf, 0] = [0] * 5
    for leaf, register, bit in features:
        leaves[leaf, 0][register] |= 1 << bit
    table = b"".join(
        struct.pack("<7I12x", leaf, index, entry[4], *entry[:4]) for (leaf, index), entry in sorted(leaves.items()))
    guest.vcpu.ioctl(SET_CPUID2, struct.pack("<II", len(leaves), 0) + table)


def hyperv_call(guest, control, input, output):
    """The guest's Hyper-V hypercall; -> the exit. What it gives is in RAX."""
    return guest.step(HYPERCALL, rcx=control, rdx=input, r8=output, rax=2**64 - 14)
