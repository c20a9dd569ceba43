"""Post-copy migration: a guest's memory comes from another process while it runs, page by page as it is touched.

    python postcopy.py 256 busy

moves so many MiB (256) over a socket pair: a guest adds up all its memory, in an order that read-ahead does not guess.
Then again while another thread moves what the guest has not touched yet; and with a Python thread that answers the
userfaultfd, for comparison. The memory is compared each time, byte for byte. busy: a Python thread computes meanwhile.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time

import kvmexit
from kvmexit import faults

PAGE, DATA, CODE = 4096, 0x1000_0000, 0x1000
ADD_UP = bytes.fromhex(  # each page's words; then the page `rdx` bytes further on, around the end of memory
    "49 89 f0"  # page: mov r8, rsi
    "49 81 c8 f8 0f 00 00"  # or r8, 0xff8
    "4a 03 04 03"  # word: add rax, [rbx + r8]
    "49 83 e8 08"  # sub r8, 8
    "49 39 f0"  # cmp r8, rsi
    "7d f3"  # jge word
    "48 01 d6"  # add rsi, rdx
    "48 21 fe"  # and rsi, rdi
    "48 ff c9"  # dec rcx
    "75 de"  # jnz page
    "e6 f4"  # out 0xf4, al
)


def image(size):
    """What the guest's memory is on the old host."""
    return hashlib.shake_128(b"guest").digest(1 << 20) * (size >> 20)


def serve(connection, size):
    """The old host: 16 bytes ask for an offset and a size, and get just these bytes."""
    memory = memoryview(image(size))
    while question := connection.recv(16, socket.MSG_WAITALL):
        offset, length = struct.unpack("<QQ", question)
        connection.sendall(memory[offset : offset + length])


@contextlib.contextmanager
def old_host(size):
    """A process that has the memory; -> the socket that leads there."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        serve(theirs, size)
        os._exit(0)
    theirs.close()
    with ours:
        yield ours
    os.waitpid(child, 0)


def new_host(size, pager):
    """Run the guest with its memory filled by `pager(slot, connection)`; -> seconds."""
    with kvmexit.VM() as vm, old_host(size) as connection:
        vm.memory.add(0, 1 << 20)[CODE : CODE + len(ADD_UP)] = ADD_UP
        slot = vm.memory.add(DATA, size)
        vcpu = vm.create_vcpu()
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
        vcpu.regs.rbx, vcpu.regs.rsi, vcpu.regs.rdi = DATA, 0, size - 1
        vcpu.regs.rcx, vcpu.regs.rdx = size // PAGE, 77 * PAGE
        began = time.monotonic()
        with pager(slot, connection) as filler:
            assert isinstance(vcpu.run(timeout=600), kvmexit.Io)
            seconds = time.monotonic() - began
            filler.finish() if isinstance(filler, PythonLoop) else filler.fill_all()
        words = memoryview(image(size)[: 1 << 20]).cast("Q")
        assert vcpu.regs.rax == sum(words) * (size >> 20) % 2**64, "the guest saw something else"
        assert vm.memory.read(DATA, size) == image(size), "the memory is not the same"
    return seconds


class PythonLoop:
    """The same, in Python: a thread that reads faults, asks the old host, and fills in 64 KiB."""

    WINDOW = 64 << 10

    def __init__(self, slot, connection):
        self.slot, self.connection, self.done = slot, connection, threading.Event()
        self.uffd = ctypes.CDLL(None, use_errno=True).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self.uffd, 0xC018AA3F, struct.pack("<QQQ", 0xAA, 0, 0))
        fcntl.ioctl(self.uffd, 0xC020AA00, struct.pack("<QQQQ", slot.hva, slot.size, 1, 0))
        self.thread = threading.Thread(target=self.loop)

    def loop(self):
        """Answer faults until the guest is done."""
        have = set()
        buffer = mmap.mmap(-1, self.WINDOW)
        view = memoryview(buffer)
        source = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        while not self.done.is_set():
            if not select.select([self.uffd], [], [], 0.1)[0]:
                continue
            with contextlib.suppress(BlockingIOError):
                event, _, address, _ = struct.unpack("<QQQQ", os.read(self.uffd, 32))
                assert event & 0xFF == 0x12
                offset = (address - self.slot.hva) & -self.WINDOW
                if offset in have:
                    continue
                self.connection.sendall(struct.pack("<QQ", offset, self.WINDOW))
                got = 0
                while got < self.WINDOW:
                    got += self.connection.recv_into(view[got:])
                copy = struct.pack("<QQQQq", self.slot.hva + offset, source, self.WINDOW, 0, 0)
                fcntl.ioctl(self.uffd, 0xC028AA03, copy)
                have.add(offset)

    def __enter__(self):
        self.thread.start()
        return self

    def finish(self):
        """The guest has touched it all."""

    def __exit__(self, *exc_info):
        self.done.set()
        self.thread.join()
        os.close(self.uffd)


def spin():
    """A Python thread that computes."""
    while True:
        pass


def main():
    """Move the guest three times."""
    size = int(sys.argv[1]) << 20 if len(sys.argv) > 1 else 256 << 20
    if "busy" in sys.argv:
        threading.Thread(target=spin, daemon=True).start()

    def pulled(slot, connection):
        return faults.Pager(slot, connection)

    @contextlib.contextmanager
    def pushed(slot, connection):
        with faults.Pager(slot, connection) as pager:
            push = threading.Thread(target=pager.fill_all)
            push.start()
            yield pager
            push.join()

    pages, busy = size // PAGE, ", a busy thread" if "busy" in sys.argv else ""
    new_host(size, pulled)  # not counted: the machine may have to find the memory first
    for name, pager in (("a Pager", pulled), ("a Pager with fill_all()", pushed), ("a Python loop", PythonLoop)):
        seconds = new_host(size, pager)
        speed = f"{seconds:.2f} s, {pages / seconds:,.0f} pages/s"
        print(f"postcopy: {size >> 20} MiB by {name}{busy}: {speed}, the same byte for byte")


if __name__ == "__main__":
    main()
