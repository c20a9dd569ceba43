"""What the memory tests share: a guest that is told by registers what to do, and the system calls that kvmexit does not wrap."""

import ctypes
import errno
import os
import struct

from guests import CODE

import kvmexit

PAGE, MIB = 4096, 1 << 20
CREATE_GUEST_MEMFD, SET_USER_MEMORY_REGION, SET_USER_MEMORY_REGION2 = 0xC040AED4, 0x4020AE46, 0x40A0AE49
SET_MEMORY_ATTRIBUTES, PRIVATE = 0x4020AED2, 1 << 3
LOG_DIRTY, READONLY, GUEST_MEMFD = 1, 2, 4  # a memslot's flags
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)

# Each ends with `out 0xf4, al`. ask: vmmcall.
PROGRAMS = {
    # rep stosq
    "fill": "f3 48 ab",
    # cmp eax, eax; repe scasq; setne dl
    "find": "39 c0  f3 48 af  0f 95 c2",
    # vmmcall
    "ask": "0f 01 d9",
    # again: add rax, [rdi]; add rdi, rdx; cmp rdi, rsi; jb again
    "add up": "48 03 07  48 01 d7  48 39 f7  72 f5",
    # again: mov [rdi], rdi; add rdi, rdx; cmp rdi, rsi; jb again
    "write": "48 89 3f  48 01 d7  48 39 f7  72 f5",
    # again: mov rcx, [rdi]; inc qword [rbx]; cmp rcx, rax; je again
    "spin": "48 8b 0f  48 ff 03  48 39 c1  74 f5",
    # over: mov rax, rdi; again: mov [rax], rax; add rax, rdx; cmp rax, rsi; jb again; cmp byte [rbx], 0; je over
    "write until": "48 89 f8  48 89 00  48 01 d0  48 39 f0  72 f5  80 3b 00  74 ed",
    # again: mov rax, [rdi]; jmp again
    "read for ever": "48 8b 07  eb fb",
}
ENTRY = {name: CODE + 0x40 * n for n, name in enumerate(PROGRAMS)}
FLAG = 0x7000  # shared memory that no program uses by itself


class Guest:
    """A vCPU of `vm`, which gets 1 MiB of memory with the programs at 0, unless another Guest of it did that."""

    def __init__(self, vm, id=0, *, cpl=3):
        if not any(slot.gpa == 0 for slot in vm.memory.slots):
            vm.memory.add(0, MIB)
        for name, code in PROGRAMS.items():
            vm.memory.write(ENTRY[name], bytes.fromhex(code + "e6 f4"))
        self.vcpu = vm.create_vcpu(id)
        kvmexit.x86.long_mode(self.vcpu, CODE, cpl=cpl, tables=0x80000 + id * 0x10000)

    def begin(self, program, **registers):
        self.vcpu.regs.rip = ENTRY[program]
        for name, value in registers.items():
            setattr(self.vcpu.regs, name, value)

    def go_on(self):
        """Run to the program's end; -> the registers."""
        exit = self.vcpu.run(timeout=60)
        assert isinstance(exit, kvmexit.Io), exit
        assert exit.port == 0xF4
        return self.vcpu.regs

    def do(self, program, **registers):
        """One of PROGRAMS; -> the registers."""
        self.begin(program, **registers)
        return self.go_on()

    def fill(self, gpa, size, byte):
        """With that byte."""
        self.do("fill", rdi=gpa, rcx=size // 8, rax=byte * 0x0101_0101_0101_0101)

    def holds(self, gpa, size, byte):
        """-> whether the guest finds nothing else there."""
        return self.do("find", rdi=gpa, rcx=size // 8, rax=byte * 0x0101_0101_0101_0101, rdx=0).rdx == 0

    def add_up(self, gpa, size, step=PAGE):
        """-> the sum of each `step`th 64-bit number."""
        return self.do("add up", rdi=gpa, rsi=gpa + size, rdx=step, rax=0).rax

    def write(self, gpa, size, step=PAGE):
        """To each `step` its address."""
        self.do("write", rdi=gpa, rsi=gpa + size, rdx=step)


def create_guest_memfd(vm, size, flags=0):
    """-> a descriptor, the caller's."""
    return vm.ioctl(CREATE_GUEST_MEMFD, bytearray(struct.pack("<QQ", size, flags).ljust(64, b"\0")))


def set_region(vm, number, flags, gpa, size, hva=0, gmem=-1, offset=0):
    """KVM_SET_USER_MEMORY_REGION2."""
    vm.ioctl(SET_USER_MEMORY_REGION2, struct.pack("<IIQQQQi", number, flags, gpa, size, hva, offset, gmem).ljust(160, b"\0"))


def set_region_1(vm, number, flags, gpa, size, hva=0):
    """KVM_SET_USER_MEMORY_REGION."""
    vm.ioctl(SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", number, flags, gpa, size, hva))


def set_attributes(vm, gpa, size, attributes):
    """KVM_SET_MEMORY_ATTRIBUTES, of which kvmexit's converter knows nothing."""
    vm.ioctl(SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", gpa, size, attributes, 0))


_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd, mode, offset, size):
    """fallocate(2), which Python has without modes. Begun again where a signal ended it, as Python's own calls are: on the main
    thread the tick for Ctrl-C may be one. Raises OSError."""
    while _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


def punch_hole(fd, offset, size):
    fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, size)


def mprotect(address, size, protection):
    """mprotect(2)."""
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
