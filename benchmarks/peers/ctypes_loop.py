"""ctypes: libc's ioctl(), and kvm_run as a Structure."""

import ctypes
import os
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from by_hand import EXIT_IO, KVM_RUN, vcpu


class KvmRun(ctypes.Structure):
    """As far as an OUT needs it."""

    _fields_ = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
        ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("direction", c_uint8), ("size", c_uint8),
        ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    ]  # fmt: skip


libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
fd, page, kept = vcpu()
run = KvmRun.from_buffer(page)
while True:
    if libc.ioctl(fd, KVM_RUN, 0) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if run.exit_reason != EXIT_IO:
        raise SystemExit(f"exit {run.exit_reason}")
    if run.port == 0xF4:
        break
