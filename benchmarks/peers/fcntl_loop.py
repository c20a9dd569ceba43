"""fcntl.ioctl() and struct: the loop that people write in Python."""

from fcntl import ioctl
from struct import unpack_from

from by_hand import EXIT_IO, IO, KVM_RUN, REASON, vcpu

fd, run, kept = vcpu()
while True:
    ioctl(fd, KVM_RUN)
    (reason,) = unpack_from("<I", run, REASON)
    if reason != EXIT_IO:
        raise SystemExit(f"exit {reason}")
    direction, size, port, count, offset = unpack_from("<BBHIQ", run, IO)
    if port == 0xF4:
        break
