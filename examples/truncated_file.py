"""A file that is a guest's memory is truncated while the guest reads it: the guest survives.

    python examples/truncated_file.py repair    the file is made longer again: the guest reads zeros there
    python examples/truncated_file.py inject    the guest is told by a machine check, and its own handler deals with it

The guest adds up the first byte of each of 16 pages, at CPL 3; 7 of them are gone. Its handler, at CPL 0, reads the
address from the bank, reports it on port 0x82, and goes on behind the loss. It is what a virtiofs guest may meet;
docs/faults.md has more. Needs iced-x86: pip install 'kvmexit[faults]'.
"""

import os
import struct
import sys

import kvmexit
from kvmexit import faults

PAGE, PAGES, LEFT = 4096, 16, 9
CODE, HANDLER, GDT, IDT, TSS, STACK, FILE = 0x1000, 0x1800, 0x2000, 0x3000, 0x4000, 0x9000, 0x10_0000
KERNEL_CODE, CR4_MCE = 0x28, 1 << 6

# again:  mov al, [rbx];  add dl, al
# next:   add rbx, 4096;  dec ecx;  jnz again
#         mov al, dl
# done:   out 0x81, al;  jmp done
GUEST = bytes.fromhex("8a 03 00 c2 48 81 c3 00 10 00 00 ff c9 75 f1 88 d0 e6 81 eb fc")
NEXT = CODE + 4

# push rax, rcx, rdx
# mov ecx, 0x406 (MC1_ADDR);  rdmsr;  out 0x82, eax
# mov ecx, 0x17a (MCG_STATUS);  xor eax, eax;  xor edx, edx;  wrmsr    it is seen to
# pop rdx, rcx, rax;  mov [rsp], r15 (NEXT);  iretq
MACHINE_CHECK = bytes.fromhex(
    "50 51 52 b9 06 04 00 00 0f 32 e7 82 b9 7a 01 00 00 31 c0 31 d2 0f 30 5a 59 58 4c 89 3c 24 48 cf")


def main(way: str) -> None:
    """Run the guest, and lose its pages."""
    with kvmexit.VM() as vm:
        vm.memory.add(0, 1 << 20)
        file = os.memfd_create("data")
        os.ftruncate(file, PAGES * PAGE)
        for page in range(PAGES):
            os.pwrite(file, bytes([page + 1]), page * PAGE)
        vm.memory.add(FILE, PAGES * PAGE, fd=file)
        vcpu = kernel_and_user(vm)
        os.ftruncate(file, LEFT * PAGE)

        @vm.on_fault(FILE, PAGES * PAGE)
        def lost(vcpu: kvmexit.Vcpu, fault: faults.Fault) -> None:
            if way == "repair":
                fault.extend(file)
            else:
                fault.inject("#MC")

        @vm.on_pio(0x82, 4)
        def told(vcpu: kvmexit.Vcpu, io: kvmexit.Io) -> None:
            print(f"the guest's handler: lost {int.from_bytes(io.data, 'little'):#x}")

        print(f"the guest finished: {vcpu.run(timeout=60).data[0]}, of {sum(range(1, LEFT + 1))} that were left")
    os.close(file)


def kernel_and_user(vm: kvmexit.VM) -> kvmexit.Vcpu:
    """A vCPU about to run GUEST at CPL 3, with descriptor tables that lead machine checks to MACHINE_CHECK at CPL 0."""
    code, data = 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF  # 64-bit code, data; flat
    user, limit = 3 << 45, 0x68 + 8192  # DPL; of the TSS: 8 KiB and a byte of zeros behind it deny no port
    tss = (limit & 0xFFFF) | TSS << 16 | 0x8B << 40
    vm.memory.write(CODE, GUEST)
    vm.memory.write(HANDLER, MACHINE_CHECK)
    vm.memory.write(GDT, struct.pack("<6Q", 0, code | user, data | user, tss, 0, code))
    vm.memory.write(IDT + 18 * 16, struct.pack("<HHBBHII", HANDLER, KERNEL_CODE, 0, 0x8E, 0, 0, 0))
    vm.memory.write(TSS, struct.pack("<4xQ90xH", STACK, 0x68) + bytes(8192) + b"\xff")
    vcpu = vm.create_vcpu(0)
    faults.enable_machine_checks(vcpu)
    kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
    vcpu.sregs.gdt.base, vcpu.sregs.gdt.limit = GDT, 6 * 8 - 1
    vcpu.sregs.idt.base, vcpu.sregs.idt.limit = IDT, 32 * 16 - 1
    vcpu.sregs.tr.base, vcpu.sregs.tr.limit = TSS, limit
    vcpu.sregs.cr4 |= CR4_MCE
    vcpu.regs.rbx, vcpu.regs.rcx, vcpu.regs.rdx, vcpu.regs.r15 = FILE, PAGES, 0, NEXT
    return vcpu


if __name__ == "__main__":
    main(*sys.argv[1:] or ["repair"])
