"""What the Python peers without kvmexit have in common: a VM and a vCPU by ioctls. Their loops are their own."""

import ctypes
import fcntl
import mmap
import os
import struct
import sys

KVM_RUN = 0xAE80
BASE, SIZE = 0xF0000, 0x10000
REASON, IO = 8, 32  # kvm_run.exit_reason, and the union
EXIT_IO = 2


def vcpu():
    """-> a vCPU's descriptor and kvm_run, about to run the ROM that the command line names; and what has to be kept."""
    memory = mmap.mmap(-1, SIZE)
    with open(sys.argv[1], "rb") as rom:
        memory[:] = rom.read()
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
    fcntl.ioctl(vm, 0xAE47, 0x7000_0000)  # KVM_SET_TSS_ADDR: Intel's processors want it for real mode
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, BASE, SIZE, address))  # KVM_SET_USER_MEMORY_REGION
    fd = fcntl.ioctl(vm, 0xAE41, 0)  # KVM_CREATE_VCPU
    run = mmap.mmap(fd, fcntl.ioctl(kvm, 0xAE04, 0))  # KVM_GET_VCPU_MMAP_SIZE
    sregs = bytearray(312)
    fcntl.ioctl(fd, 0x8138AE83, sregs)  # KVM_GET_SREGS
    struct.pack_into("<Q", sregs, 0, BASE)  # cs.base
    struct.pack_into("<H", sregs, 12, BASE >> 4)  # cs.selector
    fcntl.ioctl(fd, 0x4138AE84, sregs)  # KVM_SET_SREGS
    regs = bytearray(144)
    struct.pack_into("<Q", regs, 136, 2)  # rflags
    fcntl.ioctl(fd, 0x4090AE82, regs)  # KVM_SET_REGS
    return fd, run, (memory, kvm, vm)
