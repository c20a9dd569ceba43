"""The 16550A: each register by the data sheet, Linux's detection of it, and where its bytes go."""

import errno
import fcntl
import os
import select
import socket
import time
import tty
from collections import Counter

import pytest
from guests import CODE, load, stress
from processes import in_thread, leaks

import kvmexit
from kvmexit import KvmError, native
from kvmexit.testing import ScriptStep, hlt, hypercall, memory_fault, mmio_read, mmio_write, pio_in, pio_out

BASE, GPA = 0x3F8, 0xD000_0000
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = EFR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DLAB, LOOP = 0x80, 0x10


class Chip:
    """A Serial16550 that writes to a pipe, and a guest that accesses it."""

    def __init__(self, vm, mmio=False, blocking=False):
        self.vm, self.mmio = vm, mmio
        self.reader, self.writer = os.pipe2(0 if blocking else os.O_NONBLOCK)
        self.serial = native.Serial16550(self.writer)
        vm.on_pio(BASE, 16, self.serial)
        vm.on_mmio(GPA, 16, self.serial)

    def run(self, *steps):
        """-> what PIO and MMIO reads were answered, in order."""
        vcpu = self.vm.create_vcpu(len(self.vm._scripts), steps)
        with pytest.raises(KvmError) as ended:
            raise AssertionError(vcpu.run())
        assert ended.value.errno == errno.ENODATA
        lefts = [self.vm.script(vcpu).left(i) for i in range(len(steps))]
        return [data if step.reason == 2 else union[8 : 8 + union[16]]
                for step, (union, data) in zip(steps, lefts, strict=True)]

    def read(self, offset, size=1):
        [data] = self.run(mmio_read(GPA + offset, size) if self.mmio else pio_in(BASE + offset, size))
        return int.from_bytes(data, "little")

    def write(self, offset, value, size=1):
        data = value.to_bytes(size, "little")
        self.run(mmio_write(GPA + offset, data) if self.mmio else pio_out(BASE + offset, data, size))

    def written(self):
        """What has come through the pipe."""
        if not self.serial.sent:
            return b""
        try:
            return os.read(self.reader, 1 << 20)
        except BlockingIOError:
            return b""


@pytest.fixture
def chip(scripted):
    made = Chip(scripted)
    yield made
    for fd in (made.reader, made.writer):
        os.close(fd)


@pytest.fixture(params=["pio", "mmio"])
def either(chip, request):
    """Reached by ports, or by memory."""
    chip.mmio = request.param == "mmio"
    return chip


# ---- registers ----


def test_after_a_reset(either):
    """Data sheet, table III; the divisor, which a reset leaves alone, is 9600 baud's: guests divide by it."""
    assert [either.read(offset) for offset in range(10)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0, 0xFF, 0xFF]
    either.write(LCR, DLAB)
    assert (either.read(DLL), either.read(DLM)) == (12, 0)


@pytest.mark.parametrize(("offset", "writable"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF), (LSR, 0), (MSR, 0),
                                                  (8, 0), (15, 0)])
def test_what_can_be_written(either, offset, writable):
    before = either.read(offset)
    for value in (0xFF, 0xA5, 0x5A, 0):
        either.write(offset, value)
        assert either.read(offset) == (value & writable if writable else before)
    assert either.serial.sent == 0


def test_the_divisor_is_behind_dlab(either):
    either.write(IER, 5)
    either.write(LCR, DLAB | 3)
    either.write(DLL, 0x34)
    either.write(DLM, 0x12)
    either.write(SCR, 0x77)  # the others are where they were
    assert [either.read(offset) for offset in (DLL, DLM, LCR, SCR)] == [0x34, 0x12, 0x83, 0x77]
    either.write(LCR, 3)
    assert (either.read(RBR), either.read(IER)) == (0, 5)
    assert either.serial.sent == 0
    either.write(LCR, DLAB)
    assert (either.read(DLL), either.read(DLM)) == (0x34, 0x12)


def test_bytes_go_out(either):
    for byte in b"hello":
        either.write(THR, byte)
        assert either.read(LSR) == 0x60
    assert either.written() == b"hello"
    assert (either.serial.sent, either.serial.dropped, either.serial.pending) == (5, 0, 0)
    assert repr(either.serial) == "Serial16550(sent=5, dropped=0, pending=0)"


@pytest.mark.parametrize(("fcr", "bits"), [(0, 0), (1, 0xC0), (0xC7, 0xC0), (0x21, 0xC0), (0xC6, 0)])
def test_the_fifo_shows_in_iir(either, fcr, bits):
    """Bits 2 to 7 of FCR mean nothing without bit 0; bit 5 is not a 16550A's."""
    for dlab in (0, DLAB, 0xBF):
        either.write(LCR, dlab)
        either.write(FCR, fcr)
        assert either.read(IIR) == bits | 1


def test_receiving(either):
    assert either.serial.feed(b"ab") == 2
    assert either.serial.feed(b"") == 0
    assert either.serial.feed(bytearray(b"c")) == 1
    got = b""
    while either.read(LSR) & 1:
        assert either.serial.pending == 3 - len(got)
        got += bytes([either.read(RBR)])
    assert got == b"abc"
    assert either.read(RBR) == 0
    assert (either.serial.pending, either.serial.sent) == (0, 0)
    for bad in ("str", 5, None):
        with pytest.raises(TypeError):
            either.serial.feed(bad)


@pytest.mark.parametrize(("fcr", "depth"), [(0, 1), (1, 16)])
def test_the_receiver_is_bounded_and_nothing_taken_is_lost(chip, fcr, depth):
    chip.write(FCR, fcr)
    data = bytes(i * 7 & 0xFF for i in range(5000))
    assert chip.serial.feed(data) == 4096
    chip.run(*[pio_in(BASE)] * 5)
    taken = 4096 + chip.serial.feed(data[4096:])
    assert taken == 4096 + depth + 5  # what is in the receiver is no longer in the queue
    [got] = chip.run(pio_in(BASE, 1, taken - 5 + 3))
    assert got == data[5:taken] + bytes(3)
    assert chip.read(LSR) == 0x60


def test_resetting_the_receiver(chip):
    """What is in it goes, and what waits comes."""
    chip.write(FCR, 1)
    chip.serial.feed(bytes(range(40)))
    chip.write(FCR, 5)  # the transmitter's
    assert chip.serial.pending == 40
    chip.write(FCR, 3)
    assert chip.read(RBR) == 16
    chip.write(FCR, 0)  # a change of mode does it, too
    assert chip.serial.pending == 40 - 16 - 16 - 1
    assert chip.read(RBR) == 33
    chip.write(FCR, 2)  # means nothing without bit 0
    assert chip.read(RBR) == 34


# ---- loopback ----


def test_loopback_of_data(either):
    either.write(MCR, LOOP)
    either.serial.feed(b"line")
    either.write(THR, 0x41)
    assert either.read(LSR) == 0x61
    assert either.read(RBR) == 0x41
    assert either.read(LSR) == 0x60  # the line is cut off
    either.write(MCR, 0)
    assert either.read(LSR) == 0x61
    assert either.read(RBR) == ord("l")
    assert either.serial.sent == 0


@pytest.mark.parametrize(("fcr", "kept"), [(0, b"z"), (1, b"abcdefghijklmnop")])
def test_an_overrun(chip, fcr, kept):
    """Data sheet 8.4: of a FIFO what comes is lost, without one what is there."""
    chip.write(FCR, fcr)
    chip.write(MCR, LOOP)
    chip.run(pio_out(BASE, b"abcdefghijklmnop"[: len(kept)]))
    assert chip.read(LSR) == 0x61
    chip.write(THR, ord("z"))
    chip.write(IER, 0x0F)
    assert chip.read(IIR) & 0x0F == 6
    assert chip.read(LSR) == 0x63
    assert chip.read(LSR) == 0x61  # until read
    assert chip.read(IIR) & 0x0F == 4
    assert chip.run(pio_in(BASE, 1, len(kept)))[0] == kept
    assert chip.read(LSR) == 0x60


def test_loopback_of_modem_lines(either):
    """RTS is CTS, DTR is DSR, OUT1 is RI, OUT2 is DCD; then their changes, of RI only the end."""
    before = 0xB0
    for mcr in [*range(LOOP, 2 * LOOP), *range(2 * LOOP - 1, LOOP - 1, -3), 0x1A, 0, 0x0F]:
        either.write(MCR, mcr)
        lines = sum(line for bit, line in [(2, 0x10), (1, 0x20), (4, 0x40), (8, 0x80)] if mcr & bit) if mcr & LOOP else 0xB0
        changed = ((before ^ lines) & 0xB0 | before & ~lines & 0x40) >> 4
        assert either.read(MSR) == lines | changed
        assert either.read(MSR) == lines
        before = lines


def test_changes_of_modem_lines_add_up(chip):
    for mcr in (LOOP, LOOP | 4, LOOP):  # DCD, DSR and CTS off; RI on, and off
        chip.write(MCR, mcr)
    assert chip.read(MSR) == 0x0F


# ---- IIR: what would interrupt ----


def test_iir_goes_by_ier_and_priority(chip):
    """All at once, then one after another as they are dealt with: data sheet, table IV."""
    chip.write(MCR, LOOP)
    chip.run(pio_out(BASE, b"xy"))  # received, overrun, transmitter empty, modem lines
    assert chip.read(IIR) == 1
    causes = []
    for ier in range(16):
        chip.write(IER, 0)
        chip.write(IER, ier)
        causes.append(chip.read(IIR))
    assert causes == [1, 4, 2, 4, 6, 6, 6, 6, 0, 4, 2, 4, 6, 6, 6, 6]
    chip.write(IER, 0)
    chip.write(IER, 0x0F)
    seen = [chip.read(IIR)]
    for offset in (LSR, RBR, IIR, MSR):
        chip.read(offset)
        seen.append(chip.read(IIR) if offset != RBR else 2)  # reading it is what clears that one
    assert seen == [6, 4, 2, 0, 1]


def test_the_transmitter_is_empty_once(chip):
    """Told when the guest enables it, and after each byte; reading IIR is the acknowledgement."""
    chip.write(IER, 2)
    assert [chip.read(IIR), chip.read(IIR)] == [2, 1]
    chip.write(IER, 3)  # no rising edge
    assert chip.read(IIR) == 1
    chip.write(THR, 0x41)
    assert [chip.read(IIR), chip.read(IIR)] == [2, 1]
    chip.write(IER, 0)
    chip.write(IER, 2)
    assert chip.read(IIR) == 2


def test_a_read_of_a_higher_cause_acknowledges_no_lower(chip):
    chip.serial.feed(b"x")
    chip.write(IER, 3)
    assert [chip.read(IIR), chip.read(IIR)] == [4, 4]
    chip.read(RBR)
    assert [chip.read(IIR), chip.read(IIR)] == [2, 1]


# ---- wide accesses and string instructions ----


def test_a_wide_access_is_one_of_each_register(either):
    either.write(THR, 0x0541, 2)  # 'A', and IER
    assert either.written() == b"A"
    assert either.read(IER) == 5
    either.write(LCR, 0x1F03, 2)  # and MCR, which is loopback
    assert (either.read(LCR), either.read(MCR)) == (3, 0x1F)
    either.write(THR, 0x42)
    assert either.read(RBR, 4) == 0x03_01_05_42  # RBR popped, IER, IIR, LCR
    assert either.read(LSR) == 0x60
    assert either.read(SCR, 2) == 0xFF00
    either.write(SCR, 0xEE77, 2)
    assert either.read(SCR, 4) == 0xFFFFFF77
    assert either.read(9, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize("size", [3, 5, 6, 7, 8])
def test_the_widths_of_memory(chip, size):
    chip.mmio = True
    chip.write(SCR, 0xC3)
    assert chip.read(0, size) == 0xC3_B0_60_00_00_01_00_00 & (1 << 8 * size) - 1
    chip.write(0, 0x99_00_00_10_1B_00_0F_41 & (1 << 8 * size) - 1, size)
    assert chip.written() == b"A"
    assert [chip.read(offset) for offset in (IER, LCR, MCR, SCR)] == [
        0x0F, *[value if offset < size else old for offset, value, old in [(LCR, 0x1B, 0), (MCR, 0x10, 0), (SCR, 0x99, 0xC3)]]]


def test_the_widths_of_memory_across_the_end(chip):
    chip.mmio = True
    assert chip.read(6, 8) == 0xFFFFFFFF_FFFF_00_B0


def test_string_instructions(chip):
    """Of bytes to THR one write; of words each low byte, while the high ones go to IER."""
    for size in (4095, 4096, 4097, 5000):  # KVM gives 4096 at most
        text = bytes(i % 251 for i in range(size))
        chip.run(pio_out(BASE, text))
        assert chip.written() == text
    chip.run(pio_out(BASE, b"a\x01b\x02c\x04", 2))
    assert chip.written() == b"abc"
    assert chip.read(IER) == 4
    chip.run(pio_out(BASE, b"a\x01\x00\x03b\x04\x00\x83", 4))  # the second comes with DLAB
    chip.run(pio_out(BASE, b"c\x02", 2))
    assert chip.written() == b"ab"
    assert chip.run(pio_in(BASE, 2, 2)) == [b"c\x02c\x02"]
    chip.write(LCR, 3)
    chip.serial.feed(b"xyz")
    assert chip.run(pio_in(BASE, 1, 4)) == [b"xyz\0"]
    assert chip.run(pio_in(BASE + LSR, 1, 3), pio_in(BASE + 12, 2, 2)) == [b"\x60" * 3, b"\xff" * 4]


def test_other_exits_pass(chip):
    chip.vm.on(kvmexit.Exit, chip.serial)
    for i, step in enumerate([hypercall(0), memory_fault(0), hlt(), ScriptStep(30, bytes(24))]):
        assert chip.vm.create_vcpu(i, [step]).run().reason == step.reason


# ---- Linux ----


def test_linux_detects_a_16550a(either):
    """drivers/tty/serial/8250/8250_port.c, autoconfig(), for a port without UPF_SKIP_TEST; step by step."""
    read, write = either.read, either.write

    def divisor():
        return read(DLL) | read(DLM) << 8

    def set_divisor(value):
        write(DLL, value & 0xFF)
        write(DLM, value >> 8)

    def size_fifo():
        old_lcr = read(LCR)
        write(LCR, 0)
        old_fcr, old_mcr = read(FCR), read(MCR)
        write(FCR, 0x07)
        write(MCR, LOOP)
        write(LCR, 0x80)
        old_divisor = divisor()
        set_divisor(1)
        write(LCR, 3)
        for count in range(256):
            write(THR, count)
        count = 0
        while read(LSR) & 1 and count < 256:
            assert read(RBR) == count
            count += 1
        write(FCR, old_fcr)
        write(MCR, old_mcr)
        write(LCR, 0x80)
        set_divisor(old_divisor)
        write(LCR, old_lcr)
        return count

    # is it there
    save_ier = read(IER)
    write(IER, 0)
    assert read(IER) == 0
    write(IER, 0x0F)
    assert read(IER) == 0x0F
    write(IER, save_ier)
    save_mcr, save_lcr = read(MCR), read(LCR)
    write(MCR, LOOP | 0x0A)
    assert read(MSR) & 0xF0 == 0x90
    write(MCR, save_mcr)
    # which one
    write(LCR, 0xBF)
    write(EFR, 0)
    write(LCR, 0)
    write(FCR, 1)
    assert read(IIR) >> 6 == 3  # a 16550A at least; autoconfig_16550a()
    write(LCR, 0x80)
    assert read(EFR) != 0  # no EFR (16650)
    write(LCR, 0xBF)
    assert read(EFR) != 0  # nor there (16650V2)
    write(LCR, 0)
    status1 = read(MCR)
    write(LCR, 0xE0)
    if not (read(2) ^ status1) & LOOP:  # no bank 2 (NS16550A): IIR does not follow MCR
        write(LCR, 0)
        write(MCR, status1 ^ LOOP)
        write(LCR, 0xE0)
        status2 = read(2)
        write(LCR, 0)
        write(MCR, status1)
        assert not (status2 ^ status1) & LOOP
    status = []
    for lcr in (0, 0x80):
        write(LCR, lcr)
        write(FCR, 0x21)
        status.append(read(IIR) >> 5)
        write(FCR, 1)
    write(LCR, 0)
    assert status == [6, 6]  # no 64 byte FIFO (16750)
    save_ier = read(IER)
    write(IER, save_ier & ~0x40)
    assert not read(IER) & 0x40
    write(IER, save_ier | 0x40)
    assert not read(IER) & 0x40  # no UUE (Xscale)
    write(IER, save_ier)
    assert size_fifo() == 16  # not 64 (U6_16550A)
    # autoconfig() ends
    write(LCR, save_lcr)
    write(MCR, save_mcr)
    for fcr in (1, 7, 0):
        write(FCR, fcr)
    read(RBR)
    write(IER, 0)
    assert [read(offset) for offset in (RBR, IER, IIR, LCR, MCR, LSR)] == [0, 0, 1, 0, 0, 0x60]
    write(LCR, 0x80)
    assert divisor() == 12
    assert either.serial.sent == 0


def test_linux_finds_no_bugs_at_startup(chip):
    """serial8250_do_startup() and serial8250_THRE_test(): neither UART_BUG_THRE nor UART_BUG_TXEN."""
    chip.write(IER, 2)
    chip.write(IER, 0)
    chip.read(LSR)
    chip.read(RBR)
    chip.read(IIR)
    chip.read(MSR)
    chip.write(IER, 2)
    iir1 = chip.read(IIR)
    chip.write(IER, 0)
    chip.write(IER, 2)
    iir = chip.read(IIR)
    chip.write(IER, 0)
    assert not (not iir1 & 1 and iir & 1)
    chip.write(IER, 2)
    lsr, iir = chip.read(LSR), chip.read(IIR)
    chip.write(IER, 0)
    assert not (lsr & 0x40 and iir & 1)


# ---- the descriptor ----


def to_the_end(vcpu):
    """-> a thread that runs a script to its end."""

    def run():
        with pytest.raises(KvmError):
            vcpu.run()

    return in_thread(run)


def fill(fd):
    """Fill a pipe; -> how many bytes."""
    flags, filled = fcntl.fcntl(fd, fcntl.F_GETFL), 0
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    try:
        while True:
            filled += os.write(fd, bytes(4096))
    except BlockingIOError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return filled


def test_a_full_pipe_that_does_not_block_drops(chip):
    fcntl.fcntl(chip.writer, fcntl.F_SETPIPE_SZ, 4096)
    fill(chip.writer)
    assert len(os.read(chip.reader, 4096)) == 4096
    text = bytes(range(256)) * 16
    chip.run(pio_out(BASE, text[:3000]), pio_out(BASE, text[:3000]), pio_out(BASE, b"z"))
    assert chip.serial.sent + chip.serial.dropped == 6001
    assert chip.serial.dropped >= 1904
    got = chip.written()
    assert got[:3000] == text[:3000]
    assert len(got) == chip.serial.sent
    chip.write(THR, ord("!"))
    assert chip.written() == b"!"


def test_a_full_socket_that_does_not_block_drops(chip):
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    left.setblocking(False)
    serial = native.Serial16550(left)
    chip.vm.on_pio(BASE, 1, serial)
    left.close()
    text = b"".join(bytes([i]) * 4096 for i in range(40))
    chip.run(*[pio_out(BASE, text[i : i + 4096]) for i in range(0, len(text), 4096)])
    assert serial.sent + serial.dropped == len(text)
    assert serial.dropped
    got = b""
    while len(got) < serial.sent:
        got += right.recv(1 << 16)
    assert list(got) == sorted(got)
    right.close()


@pytest.mark.parametrize("waits", [False, True])
def test_partial_writes(scripted, waits):
    """A terminal takes what fits of a write. Where it was blocking when the chip was made, the rest comes after it."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(slave, waits)
    serial = native.Serial16550(slave)
    os.set_blocking(slave, False)
    scripted.on_pio(BASE, 8, serial)
    texts = [bytes([i]) + bytes(range(250)) * 16 for i in range(100, 140)]
    thread = to_the_end(scripted.create_vcpu(0, [pio_out(BASE, text) for text in texts]))
    thread.join(0.2 if waits else 10)  # the terminal is full; what is dropped is the end of a text
    got = b""
    while thread.is_alive() or len(got) < serial.sent:
        if select.select([master], [], [], 0.01)[0]:  # the thread may be alive with nothing left to write
            got += os.read(master, 1000)
    assert serial.sent + serial.dropped == sum(map(len, texts))
    assert len(got) == serial.sent
    if waits:
        assert got == b"".join(texts)
    else:
        assert serial.dropped
        while got:
            text = next(text for text in texts if text[0] == got[0])
            size = next(size for size in range(min(len(text), len(got)), 0, -1) if got[:size] == text[:size])
            got = got[size:]
    os.close(master)
    os.close(slave)


@pytest.fixture
def blocked(scripted):
    """A chip whose pipe is full and blocks, and a vCPU that waits for it; -> with what its run() says, and its thread."""
    chip = Chip(scripted, blocking=True)
    fcntl.fcntl(chip.writer, fcntl.F_SETPIPE_SZ, 4096)
    assert fill(chip.writer) == 4096
    vcpu = scripted.create_vcpu(0, [pio_out(BASE, bytes(range(256)) * 16), pio_out(BASE, b"z"), ScriptStep(spin=True)])
    results = []
    thread = in_thread(lambda: results.append(vcpu.run()))
    while not scripted.script(vcpu).entries:
        time.sleep(0.001)
    time.sleep(0.05)
    yield chip, vcpu, results, thread
    os.close(chip.reader)  # EPIPE ends what still waits
    os.close(chip.writer)
    vcpu.kick()
    thread.join(10)
    assert not thread.is_alive()


def test_a_full_pipe_that_blocks_is_waited_for(blocked):
    chip, vcpu, results, thread = blocked
    time.sleep(1.2)  # nobody wants it: no patience is lost
    assert (chip.serial.sent, chip.serial.dropped) == (0, 0)
    assert chip.serial.feed(b"x") == 1  # the lock is not held meanwhile
    assert chip.serial.pending == 1
    assert os.read(chip.reader, 4096) == bytes(4096)
    got = b""
    while len(got) < 4097:
        got += os.read(chip.reader, 1 << 16)
    assert got == bytes(range(256)) * 16 + b"z"
    vcpu.kick()
    thread.join(10)
    assert results[0].cause == "kick"
    assert (chip.serial.sent, chip.serial.dropped) == (4097, 0)


def test_a_kick_lets_the_reader_a_second(blocked):
    chip, vcpu, results, thread = blocked
    begun = time.monotonic()
    vcpu.kick()
    time.sleep(0.3)
    assert chip.serial.dropped == 0
    thread.join(10)
    assert results[0].cause == "kick"
    assert 0.3 < time.monotonic() - begun < 5
    assert chip.serial.dropped == 4096
    os.read(chip.reader, 4096)
    assert vcpu.run(timeout=0.1).cause == "timeout"
    assert os.read(chip.reader, 10) == b"z"


def test_the_main_thread_comes_back_at_its_deadline(scripted):
    """From a guest that prints for ever, to a pipe nobody reads."""
    chip = Chip(scripted, blocking=True)
    vcpu = scripted.create_vcpu(0, [pio_out(BASE, b"spam" * 1000)], repeat=1 << 60, keep=False)
    begun = time.monotonic()
    assert vcpu.run(timeout=0.2).cause == "timeout"
    assert time.monotonic() - begun < 5
    assert chip.serial.sent >= 60000
    assert chip.serial.dropped == 4000
    os.close(chip.reader)
    os.close(chip.writer)


@pytest.mark.parametrize("blocking", [False, True])
def test_nobody_reads_any_more(scripted, blocking):
    """EPIPE, and no SIGPIPE: Python ignores it."""
    chip = Chip(scripted, blocking=blocking)
    os.close(chip.reader)
    chip.run(pio_out(BASE, b"abc"), pio_out(BASE, b"d"))
    assert (chip.serial.sent, chip.serial.dropped) == (0, 4)
    os.close(chip.writer)


def test_a_file(scripted, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        serial = native.Serial16550(log)
    scripted.on_pio(BASE, 8, serial)
    vcpu = scripted.create_vcpu(0, [pio_out(BASE, b"a"), pio_out(BASE, b"bc"), hlt()])
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert (tmp_path / "log").read_bytes() == b"abc"


def test_its_descriptor_is_its_own(chip):
    before = leaks()
    native.Serial16550(chip.writer)
    assert leaks() == before
    with pytest.raises(ValueError, match="cannot be written to"):
        native.Serial16550(chip.reader)
    with pytest.raises(OSError, match="Bad file"):
        native.Serial16550(1 << 20)
    for bad in (None, "1"):
        with pytest.raises((AttributeError, TypeError)):
            native.Serial16550(bad)
    assert leaks() == before


# ---- several threads ----


def test_several_vcpus_print(scripted):
    """Each one's bytes arrive in its order, and none is lost or counted twice."""
    chip = Chip(scripted, blocking=True)
    count = stress(500)
    steps = [[pio_out(BASE, bytes([who << 6 | i & 0x3F]) * (1 + i % 9)) for i in range(count)] for who in range(3)]
    sizes = sum(1 + i % 9 for i in range(count)) * 3
    vcpus = [scripted.create_vcpu(who, steps[who]) for who in range(3)]
    got = b""
    threads = [to_the_end(vcpu) for vcpu in vcpus]
    while len(got) < sizes:
        got += os.read(chip.reader, 1 << 16)
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    for who in range(3):
        assert bytes(b for b in got if b >> 6 == who) == b"".join(step.data for step in steps[who])
    assert (chip.serial.sent, chip.serial.dropped) == (sizes, 0)
    os.close(chip.reader)
    os.close(chip.writer)


def test_several_vcpus_share_the_receiver(chip):
    """What is fed is read by one of them, once. They begin with a full queue, which is fed on."""
    chip.write(FCR, 1)
    fed, got, pattern = 0, Counter(), bytes(i % 255 + 1 for i in range(255 * 20))
    for _ in range(stress(10)):
        vcpus = [chip.vm.create_vcpu(len(chip.vm._scripts), [pio_in(BASE, 1, 64)] * 300) for _ in range(2)]
        fed += chip.serial.feed(pattern[fed % 255 :])
        threads = [to_the_end(vcpu) for vcpu in vcpus]
        while any(thread.is_alive() for thread in threads):
            fed += chip.serial.feed(pattern[fed % 255 :][:100])
        for vcpu in vcpus:
            for i in range(300):
                got.update(chip.vm.script(vcpu).left(i)[1])
    got.update(b"".join(chip.run(*[pio_in(BASE, 1, 4000)] * 2)))
    assert chip.serial.pending == 0
    del got[0]  # nothing there
    assert got == Counter(i % 255 + 1 for i in range(fed))


# ---- a guest ----

TEXT, STRING = b"Polled, a byte at a time.\n", b"And in one go.\n"

# next: mov dx, 0x3fd; wait: in al, dx; test al, 0x20; jz wait; mov dx, 0x3f8; lodsb; out dx, al; dec ecx; jnz next
PRINT = bytes.fromhex("66 ba fd 03 ec a8 20 74 fb 66 ba f8 03 ac ee ff c9 75 ed")
# mov dx, 0x3f8; rep outsb
PRINT_STRING = bytes.fromhex("66 ba f8 03 f3 6e")
# mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; out dx, al; cmp al, 10; jne
ECHO = bytes.fromhex("66 ba fd 03 ec a8 01 74 fb 66 ba f8 03 ec ee 3c 0a 75 ed")
# mov byte [0xd0000000], '!'; out 0xf4, al
MMIO_AND_END = bytes.fromhex("bb 00 00 00 d0 c6 03 21 e6 f4")


def test_a_guest_prints(vm):
    def count(address, size):  # mov esi, address; mov ecx, size
        return b"\xbe" + address.to_bytes(4, "little") + b"\xb9" + size.to_bytes(4, "little")

    reader, writer = os.pipe()
    serial = native.Serial16550(writer)
    vm.on_pio(BASE, 8, serial)
    vm.on_mmio(GPA, 8, serial)
    data = CODE + 0x1000
    vcpu = load(vm, count(data, len(TEXT)) + PRINT + count(data + len(TEXT), len(STRING)) + PRINT_STRING + ECHO + MMIO_AND_END)
    vm.memory.write(data, TEXT + STRING)
    assert serial.feed(b"echo\n") == 5
    exit = vcpu.run(timeout=20)
    assert isinstance(exit, kvmexit.Io)
    assert exit.port == 0xF4
    os.close(writer)
    assert os.read(reader, 4096) == TEXT + STRING + b"echo\n!"
    assert serial.pending == 0
    os.close(reader)
