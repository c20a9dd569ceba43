"""cffi in ABI mode: libc's ioctl(), and kvm_run as a struct."""

import os

import cffi
from by_hand import EXIT_IO, KVM_RUN, vcpu

ffi = cffi.FFI()
ffi.cdef("""
    int ioctl(int, unsigned long, unsigned long);
    typedef struct {
        uint8_t request_interrupt_window, immediate_exit, padding1[6];
        uint32_t exit_reason;
        uint8_t ready_for_interrupt_injection, if_flag;
        uint16_t flags;
        uint64_t cr8, apic_base;
        uint8_t direction, size;
        uint16_t port;
        uint32_t count;
        uint64_t data_offset;
    } kvm_run;
""")
libc = ffi.dlopen(None)
fd, page, kept = vcpu()
run = ffi.cast("kvm_run *", ffi.from_buffer(page))
while True:
    if libc.ioctl(fd, KVM_RUN, 0) < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    if run.exit_reason != EXIT_IO:
        raise SystemExit(f"exit {run.exit_reason}")
    if run.port == 0xF4:
        break
