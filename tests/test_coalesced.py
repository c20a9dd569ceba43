"""Posted writes: each reaches its handler, in order, before anything else is done about a return of KVM_RUN."""

import ctypes
import errno
import fcntl
import gc
import os
import random
import struct
import threading

import pytest
from guests import CODE, load, stress
from processes import compiled, in_thread, leaks

import kvmexit
from kvmexit import CoalescedZone, KvmError, native
from kvmexit.testing import ScriptedVM, ScriptStep, hlt, memory_fault, mmio_read, mmio_write, pio_out

GPA, PORT, PAGE, ROOM = 0x1000_0000, 0x80, 4096, 1024
IO, MMIO = 2, 6


class Write(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("address", "base", "size", "value")] + [
        (name, ctypes.c_uint32) for name in ("reason", "vcpu", "posted", "wrong")]  # fmt: skip


class Log(ctypes.Structure):
    """What the handler `keep` was called with."""

    _fields_ = [("count", ctypes.c_uint64), ("writes", Write * ROOM)]

    def __iter__(self):
        assert not any(write.wrong for write in self.writes[: self.count])
        return iter(self.writes[: self.count])

    def seen(self):
        """-> (address, size, value) of each write."""
        return [(write.address, write.size, write.value) for write in self]


class Counts(ctypes.Structure):
    _fields_ = [("last", ctypes.c_uint64 * 4), ("rounds", ctypes.c_uint64 * 4)] + [
        (name, ctypes.c_uint64) for name in ("limit", "out_of_order", "late")]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Handlers in C: tests/coalesced_handlers.c."""
    library = ctypes.CDLL(str(compiled(tmp_path_factory, "coalesced_handlers")))
    for name in ("keep", "wait", "use", "follow", "check", "rubbish"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return library


@pytest.fixture
def log(library):
    """A log, and `log.handler` that writes to it."""
    made = Log()
    made.handler = native.Function(library.keep, made)
    return made


# ---- on KVM ----

# mov rbx, GPA; mov eax, 0x11223344; mov [rbx], eax; mov [rbx+8], rax; out 0x80, al; mov [rbx+1], al; out 0x82, ax; out 0xf4, al
WRITES = bytes.fromhex(
    "48 c7 c3 00 00 00 10  b8 44 33 22 11  89 03  48 89 43 08  e6 80  88 43 01  66 e7 82  e6 f4")
WRITTEN = [
    (GPA, 4, 0x11223344), (GPA + 8, 8, 0x11223344), (PORT, 1, 0x44), (GPA + 1, 1, 0x44), (PORT + 2, 2, 0x3344)]  # fmt: skip


def test_writes_are_handled_in_their_order_before_the_exit(vm, log):
    """Both buses in one order, none an exit, and all of them done when run() returns the exit after them."""
    vcpu = load(vm, WRITES)
    mmio, pio = vm.coalesce_mmio(GPA, 16, log.handler), vm.coalesce_pio(PORT, 4, log.handler)
    exits = native.Counter()
    vm.on_mmio(GPA, 16, exits)
    vm.on_pio(PORT, 4, exits)
    vm.on_pio(0xF4, 1, lambda vcpu, io: assert_equal(log.seen(), WRITTEN) or kvmexit.STOP)
    assert vcpu.run(timeout=10).port == 0xF4
    assert log.seen() == WRITTEN
    assert [(write.reason, write.base, write.posted) for write in log] == [
        (MMIO, GPA, 1), (MMIO, GPA, 1), (IO, PORT, 1), (MMIO, GPA, 1), (IO, PORT, 1)]  # fmt: skip
    assert (mmio.posted, pio.posted, mmio.declined, exits.writes) == (3, 2, 0, 0)
    assert repr(pio) == f"CoalescedZone(port=0x80, size=0x4, {log.handler!r})"


def assert_equal(one, other):
    assert one == other


def test_without_zones_all_are_exits(vm, log):
    """Before the zones are there, and after they have gone."""
    vcpu = load(vm, WRITES)

    def exits():
        vcpu.regs.rip = CODE
        found = []
        while True:
            exit = vcpu.run(timeout=10)
            if isinstance(exit, kvmexit.Io) and exit.port == 0xF4:
                return found
            where = exit.port if isinstance(exit, kvmexit.Io) else exit.gpa
            found.append((where, exit.size, int.from_bytes(exit.data, "little")))

    assert exits() == WRITTEN
    with vm.coalesce_mmio(GPA, 16, log.handler), vm.coalesce_pio(PORT, 4, log.handler) as pio:
        assert exits() == []
    pio.remove()
    assert exits() == WRITTEN
    assert log.seen() == WRITTEN


# mov rbx, GPA; mov ecx, 400; again: inc eax; mov [rbx], eax; dec ecx; jnz again; out 0xf4, al
MANY = bytes.fromhex("48 c7 c3 00 00 00 10  b9 90 01 00 00  ff c0  89 03  ff c9  75 f8  e6 f4")


def test_a_full_ring_exits_and_keeps_the_order(vm, log):
    """The 170th write exits: the 169 before it come first. So again, and the last 60 wait for the exit after them. Off the main
    thread, whose tick would end KVM_RUN and so drain the ring sooner."""
    vcpu = load(vm, MANY)
    zone = vm.coalesce_mmio(GPA, 16, log.handler)
    exits = native.Counter()
    vm.on_mmio(GPA, 16, exits)
    ports = []
    in_thread(lambda: ports.append(vcpu.run(timeout=60).port)).join(60)
    assert ports == [0xF4]
    assert [value for _, _, value in log.seen()] == list(range(1, 401))
    assert (zone.posted, exits.writes) == (398, 2)
    assert [i for i, write in enumerate(log) if not write.posted] == [169, 339]


def test_a_read_sees_what_was_written(vm):
    """It exits, and the writes before it are in the registers by then."""
    # mov rbx, GPA; mov eax, 0x55; mov [rbx+4], eax; mov [rbx], al; mov rax, [rbx]; mov [0x3000], rax; out 0xf4, al
    vcpu = load(vm, bytes.fromhex("48 c7 c3 00 00 00 10  b8 55 00 00 00  89 43 04  88 03  48 8b 03  48 89 04 25 00 30 00 00  e6 f4"))
    zone = vm.coalesce_mmio(GPA, 8, native.Registers(bytearray(8)))
    assert vcpu.run(timeout=10).port == 0xF4
    assert vm.memory.read(0x3000, 8) == b"\x55\0\0\0\x55\0\0\0"
    assert zone.posted == 2


def test_a_write_that_reaches_beyond_the_zone_exits(vm, log):
    """To the same handler, in its place among the others."""
    # mov rbx, GPA; mov eax, 7; mov [rbx+8], al; mov [rbx+13], eax; mov [rbx+15], al; out 0xf4, al
    vcpu = load(vm, bytes.fromhex("48 c7 c3 00 00 00 10  b8 07 00 00 00  88 43 08  89 43 0d  88 43 0f  e6 f4"))
    vm.coalesce_mmio(GPA, 16, log.handler)
    assert vcpu.run(timeout=10).port == 0xF4
    assert log.seen() == [(GPA + 8, 1, 7), (GPA + 13, 4, 7), (GPA + 15, 1, 7)]
    assert [write.posted for write in log] == [1, 0, 1]


# mov rbx, GPA; mov [rbx], al; mov [0x3000], 1; jmp $
POST_AND_SPIN = bytes.fromhex("48 c7 c3 00 00 00 10  88 03  c6 04 25 00 30 00 00 01  eb fe")


def spinning(vm, vcpu):
    """Run it in a thread until it has posted; -> the thread, and what run() will return."""
    ends = []
    thread = in_thread(lambda: ends.append(vcpu.run(timeout=60)))
    ram = vm.memory.slots[0].view
    while not ram[0x3000]:
        thread.join(0.001)
    return thread, ends


@pytest.mark.parametrize("by", ["kick", "drain", "pause", "remove", "timeout"])
def test_what_was_posted_needs_no_exit(vm, log, by):
    """The guest spins: the write is handled when somebody asks, and before run() and pause() return."""
    vcpu = load(vm, POST_AND_SPIN)
    zone = vm.coalesce_mmio(GPA, 16, log.handler)
    if by == "timeout":
        assert vcpu.run(timeout=0.5).cause == "timeout"
        assert log.count == 1
        return
    thread, ends = spinning(vm, vcpu)
    if by == "drain":
        assert vm.drain_coalesced() == 1
        assert vm.drain_coalesced() == 0
    elif by == "pause":
        vm.pause()
        assert log.count == 1
        vm.resume()
    elif by == "remove":
        zone.remove()
    if by != "kick":
        assert log.count == 1
    vcpu.kick()
    thread.join(30)
    assert (log.count, ends[0].cause) == (1, "kick")


def test_every_vcpu_finds_its_writes_done_at_its_exits(vm, library):
    """Two vCPUs fill one ring: none is lost, doubled or out of order, and at each exit what its guest wrote has arrived."""
    # again: movzx ecx, al; inc ecx; more: inc rax; mov [rbx], rax; dec ecx; jnz more; out 0xf4, eax; jmp again
    code = bytes.fromhex("0f b6 c8 ff c1  48 ff c0 48 89 03 ff c9 75 f6  e7 f4  eb ed")
    counts = Counts(limit=10 + stress(50))  # the ninth round fills the ring
    zone = vm.coalesce_mmio(GPA, 32, native.Function(library.follow, counts))
    exits = native.Counter()
    vm.on_mmio(GPA, 32, exits)
    vm.on_pio(0xF4, 1, native.Function(library.check, counts))
    vm.memory.add(0, 1 << 20)[CODE : CODE + len(code)] = code
    vcpus = [vm.create_vcpu(id) for id in range(2)]
    for vcpu in vcpus:
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
        vcpu.regs.rbx = GPA + 8 * vcpu.id
    threads = [in_thread(lambda vcpu=vcpu: vcpu.run(timeout=60)) for vcpu in vcpus]
    for thread in threads:
        thread.join(70)
    assert (counts.out_of_order, counts.late) == (0, 0)
    assert [*counts.rounds] == [counts.limit] * 2 + [0, 0]
    assert zone.posted + exits.writes == sum(counts.last)
    assert zone.posted > exits.writes > 0


def test_zones_come_and_go_under_running_vcpus(vm, library):
    """Two vCPUs go on counting meanwhile: posted or exits, no write is lost or out of order."""
    code = bytes.fromhex("0f b6 c8 ff c1  48 ff c0 48 89 03 ff c9 75 f6  e7 f4  eb ed")  # as above
    counts = Counts(limit=1 << 62)
    handler = native.Function(library.follow, counts)
    vm.on_mmio(GPA, 32, handler)
    vm.on_pio(0xF4, 1, native.Function(library.check, counts))
    vm.memory.add(0, 1 << 20)[CODE : CODE + len(code)] = code
    vcpus = [vm.create_vcpu(id) for id in range(2)]
    for vcpu in vcpus:
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
        vcpu.regs.rbx = GPA + 8 * vcpu.id
    threads = [in_thread(lambda vcpu=vcpu: vcpu.run(timeout=100)) for vcpu in vcpus]
    posted = 0
    for _ in range(stress(30)):
        zone = vm.coalesce_mmio(GPA, 32, handler)
        while not zone.posted:
            threads[0].join(0.001)
        zone.remove()
        posted += zone.posted
        before = zone.posted
        rounds = [*counts.rounds]
        while any(now == then for now, then in zip(counts.rounds[:2], rounds[:2], strict=True)):
            threads[0].join(0.001)
        assert zone.posted == before
    for vcpu in vcpus:
        vcpu.kick()
    for thread in threads:
        thread.join(30)
    assert (counts.out_of_order, counts.late) == (0, 0)
    assert posted > 0


def test_an_adopted_vm_has_a_drainer(vm, log):
    """Its owner: two would take each other's writes."""
    with kvmexit.VM.adopt(vm.fd) as ours, pytest.raises(kvmexit.Error, match="one ring, one drainer"):
        ours.coalesce_mmio(GPA, 16, log.handler)


def test_a_kernel_without_says_so(kvm, log):
    """And nothing stays registered."""

    class Old(kvmexit.VM):
        def check(self, cap):
            return 0 if cap in (15, 162) else super().check(cap)

    with Old() as old:
        for coalesce in (old.coalesce_mmio, old.coalesce_pio):
            with pytest.raises(KvmError, match="answer them with a route") as caught:
                coalesce(0x80, 4, log.handler)
            assert caught.value.errno == errno.EOPNOTSUPP


def test_a_refusal_of_kvm_leaves_nothing(kvm, log):
    """Neither zone nor route: the bus is full, after a thousand of somebody's zones."""
    with kvmexit.VM() as vm:

        def fill():
            for i in range(2000):
                vm.ioctl(0x4010AE67, struct.pack("<QII", 2 * GPA + 16 * i, 16, 0))  # KVM_REGISTER_COALESCED_MMIO

        with pytest.raises(KvmError):
            fill()
        with pytest.raises(KvmError) as caught:
            vm.coalesce_mmio(GPA, 16, log.handler)
        assert (caught.value.call, caught.value.errno) == ("KVM_REGISTER_COALESCED_MMIO", errno.ENOSPC)
        # mov [rbx], al; out 0xf4, al
        vcpu = load(vm, bytes.fromhex("88 03 e6 f4"))
        vcpu.regs.rbx = GPA
        assert isinstance(vcpu.run(timeout=10), kvmexit.Mmio)
        vm.ioctl(0x4010AE68, struct.pack("<QII", 2 * GPA, 16, 0))  # KVM_UNREGISTER_COALESCED_MMIO: one fits again
        vm.coalesce_mmio(GPA, 16, log.handler)
        vcpu.regs.rip = CODE
        assert vcpu.run(timeout=10).port == 0xF4
        assert log.seen() == [(GPA, 1, 0)]


def test_nothing_is_left_of_a_vm_that_is_dropped(kvm, log):
    """A zone keeps its handler, and the VM its zones; neither keeps the VM."""
    kvmexit.VM().close()
    gc.collect()
    before = leaks()
    vm = kvmexit.VM()
    zone = vm.coalesce_mmio(GPA, 16, log.handler)
    del vm
    assert leaks() == before
    zone.remove()
    vm = kvmexit.VM()
    zone = vm.coalesce_mmio(GPA, 16, log.handler)
    vm.close()
    zone.remove()
    for call in (lambda: vm.coalesce_mmio(GPA, 16, log.handler), vm.drain_coalesced):
        with pytest.raises(kvmexit.Error, match="closed"):
            call()


# ---- on rings of our own making ----


def ring(*writes, first=0, last=None):
    """-> the bytes of a ring that has these entries: (address, data) or (address, data, pio, len)."""
    image = bytearray(PAGE)
    for i, (address, data, *rest) in enumerate(writes):
        pio, length = [*rest, *(0, len(data))[len(rest) :]]
        struct.pack_into("<QII8s", image, 8 + 24 * ((first + i) % 170), address, length, pio, data)
    struct.pack_into("<II", image, 0, first, (first + len(writes)) % 170 if last is None else last)
    return bytes(image)


def after(image, step=None):
    """-> the step, with this ring beside it."""
    step = step or hlt()
    return step._replace(data=step.data.ljust(PAGE, b"\0") + image)


def left(vm, vcpu, i=0):
    """-> (first, last) of the ring that step i left."""
    return struct.unpack_from("<II", vm.script(vcpu).left(i)[1], PAGE)


@pytest.mark.parametrize(
    "step", [
        hlt(), pio_out(0x3F8, b"x"), mmio_write(GPA + 8, b"x"), mmio_read(GPA + 8, 4), memory_fault(0x5000),
        ScriptStep(errno=errno.EFAULT), ScriptStep(errno=errno.EAGAIN), ScriptStep(errno=errno.EINTR), ScriptStep(errno=errno.ENOMEM),
        ScriptStep(errno=errno.EINVAL), ScriptStep(None),
    ])  # fmt: skip
def test_each_return_of_kvm_run_drains(scripted, log, step):
    """Whatever it says: an exit, a fault, an interruption, an error. Before handlers see it, and once."""
    scripted.coalesce_mmio(GPA, 8, log.handler)
    counts = []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: counts.append(log.count) or kvmexit.STOP)
    vcpu = scripted.create_vcpu(0, [after(ring((GPA, b"a"), (GPA + 1, b"b")), step), hlt()])
    try:
        vcpu.run()
    except KvmError as error:
        counts.append(error.errno and log.count)
    assert counts == [2]
    assert log.seen() == [(GPA, 1, 0x61), (GPA + 1, 1, 0x62)]


def test_complete_drains_too(scripted, log):
    """An entry is an entry."""
    scripted.coalesce_mmio(GPA, 8, log.handler)
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x"), after(ring((GPA, b"a")), hlt()._replace(second_half=True))])
    vcpu.run()
    assert log.count == 0
    assert isinstance(vcpu.complete(), kvmexit.Hlt)
    assert log.count == 1


def test_a_ring_goes_round(scripted, log):
    """From its end to its beginning; and the place where KVM may write on is passed on."""
    scripted.coalesce_mmio(GPA, 8, log.handler)
    vcpu = scripted.create_vcpu(0, [after(ring(*[(GPA, bytes([i])) for i in range(5)], first=167)), hlt()])
    vcpu.run()
    vcpu.run()
    assert [value for _, _, value in log.seen()] == list(range(5))
    assert left(scripted, vcpu) == (2, 2)


@pytest.mark.parametrize(
    "image", [
        ring((GPA, b"a"), last=170), ring((GPA, b"a"), last=2**32 - 1), struct.pack("<II", 170, 0), struct.pack("<II", 2**32 - 1, 5),
        struct.pack("<II", 171, 171), ring((GPA, b"a", 0, 0)), ring((GPA, b"a", 0, 9)), ring((GPA, b"a", 0, 2**32 - 1)),
        ring((GPA, b"a", 1)), ring((GPA + 8, b"a")), ring((GPA + 7, b"ab")), ring((GPA - 1, b"a")), ring((2**64 - 1, b"abcdefgh")),
        ring((0, b"a", 1)),
    ])  # fmt: skip
def test_a_ring_that_lies_is_not_followed(scripted, log, image):
    """Indices outside it, impossible lengths, addresses and buses that nobody asked for: no handler is called."""
    scripted.coalesce_mmio(GPA, 8, log.handler)
    vcpu = scripted.create_vcpu(0, [after(image.ljust(PAGE, b"\0"))])
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert log.count == 0


@pytest.mark.parametrize("length", [0, 9, 16, PAGE, PAGE + 1, 2**32 - 1])
def test_no_length_reads_beyond_an_entry(scripted, log, length):
    """Also in a zone that is large enough for it."""
    scripted.coalesce_mmio(GPA, PAGE, log.handler)
    vcpu = scripted.create_vcpu(0, [after(ring((GPA, b"a", 0, length)).ljust(PAGE, b"\0"))])
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert log.count == 0


def test_no_ring_can_do_harm(scripted, log):
    """Random pages: whatever the handler is called with lies in its zone."""
    scripted.coalesce_mmio(GPA, 8, log.handler)
    scripted.coalesce_pio(PORT, 4, log.handler)
    rng = random.Random(1)
    steps = []
    for _ in range(stress(300)):
        image = bytearray(rng.randbytes(PAGE))
        struct.pack_into("<II", image, 0, rng.choice([0, 1, 169, 170, rng.getrandbits(32)]), rng.choice([5, 168, 170, rng.getrandbits(32)]))
        for i in range(170):
            if rng.random() < 0.5:
                address = rng.choice([GPA, PORT]) + rng.randrange(-2, 10)
                struct.pack_into("<QII", image, 8 + 24 * i, address, rng.choice([0, 1, 2, 4, 8, 9, 2**31]), rng.choice([0, 1, 2, 2**31]))
        steps.append(after(bytes(image)))
    vcpu = scripted.create_vcpu(0, steps)
    for _ in steps:
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        for write in log:
            low, size = (PORT, 4) if write.reason == IO else (GPA, 8)
            assert write.base == low <= write.address
            assert write.address + write.size <= low + size
        log.count = 0


@pytest.mark.parametrize(("handler", "declined"), [(native.Ignore(), 0), (native.Stop(), 2), (native.Counter(), 2)])
def test_what_a_handler_says_is_counted(scripted, handler, declined):
    """A posted write is done, whatever it says; nobody else is asked."""
    asked = native.Counter()
    zone = scripted.coalesce_mmio(GPA, 8, handler)
    scripted.on_mmio(GPA, 8, asked)
    vcpu = scripted.create_vcpu(0, [after(ring((GPA, b"a"), (GPA, b"b")))])
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert (zone.posted, zone.declined, asked.writes) == (2, declined, 0)


@pytest.mark.parametrize("full", ["stop", "drop", "wait"])
def test_a_ring_of_ours_takes_what_kvm_has_posted(scripted, full):
    """Beside the vCPU's own writes, in a place of its own. What finds no room is dropped: there is no exit to wait or return."""
    own = native.Ring(4, vcpus=1, full=full)
    scripted.coalesce_mmio(GPA, 8, own)
    posted = [(GPA + i, bytes([i])) for i in range(6)]
    vcpu = scripted.create_vcpu(0, [mmio_write(GPA, b"x"), after(ring(*posted))])
    assert isinstance(vcpu.run(timeout=60), kvmexit.Hlt)
    assert [(e.address, e.data, e.sequence) for e in own.drain()] == [(GPA, ord("x"), 0), *[(GPA + i, i, i) for i in range(4)]]
    assert (own.pending, own.dropped, own.vcpus) == (0, 2, 1)


def test_a_serial_port_that_nobody_reads_drops_what_kvm_has_posted(scripted):
    """At once: all vCPUs of the VM would wait for it."""
    reader, writer = os.pipe()
    assert os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))) == fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
    serial = native.Serial16550(writer)
    scripted.coalesce_mmio(GPA, 8, serial)
    vcpu = scripted.create_vcpu(0, [after(ring((GPA, b"a")))])
    assert isinstance(vcpu.run(timeout=60), kvmexit.Hlt)
    assert (serial.sent, serial.dropped) == (0, 1)
    os.close(reader)
    os.close(writer)


def test_a_handler_that_returns_rubbish_is_counted_too(scripted, library):
    """An exit would stay pending, and run() raise; here the guest has gone on."""
    zone = scripted.coalesce_mmio(GPA, 8, native.Function(library.rubbish))
    scripted.create_vcpu(0, [after(ring((GPA, b"a")))]).run()
    assert (zone.posted, zone.declined) == (1, 1)


def test_zones_are_told_apart(scripted, library):
    """By bus and address, each with its own handler and beginning."""
    logs = [Log() for _ in range(3)]
    handlers = [native.Function(library.keep, log) for log in logs]
    scripted.coalesce_mmio(PORT, 8, handlers[0])
    scripted.coalesce_pio(PORT, 8, handlers[1])
    scripted.coalesce_mmio(PORT + 8, 8, handlers[2])
    writes = [(PORT + 8, b"2"), (PORT + 1, b"1", 1), (PORT + 1, b"0"), (PORT + 15, b"2"), (PORT + 7, b"1", 1)]
    scripted.create_vcpu(3, [after(ring(*writes))]).run()
    assert [[chr(value) for _, _, value in log.seen()] for log in logs] == [["0"], ["1", "1"], ["2", "2"]]
    assert [{write.base for write in log} for log in logs] == [{PORT}, {PORT}, {PORT + 8}]
    assert {write.vcpu for log in logs for write in log} == {3}


def test_a_vcpu_waits_for_another_that_drains(scripted, library):
    """It has writes of its own in the ring; those before it are not done yet."""
    words = (ctypes.c_uint32 * 3)()
    scripted.coalesce_mmio(GPA, 8, native.Function(library.wait, words))
    log = Log()
    scripted.coalesce_pio(PORT, 8, native.Function(library.keep, log))
    one = scripted.create_vcpu(0, [after(ring((GPA, b"a")))])
    other = scripted.create_vcpu(1, [after(ring((PORT, b"a", 1)))])
    idle = scripted.create_vcpu(2, [after(ring())])
    gone = []
    scripted.on(kvmexit.Hlt, lambda vcpu, exit: gone.append((vcpu.id, words[1])) or kvmexit.STOP)
    first = in_thread(one.run)
    while not words[0]:
        first.join(0.001)
    idle.run()  # its ring is empty: it needs not wait
    second = in_thread(other.run)
    second.join(0.2)
    meanwhile = log.count, [*gone]
    words[1] = 1
    first.join(30)
    second.join(30)
    assert meanwhile == (0, [(2, 0)])
    assert (log.count, sorted(gone)) == (1, [(0, 1), (1, 1), (2, 0)])


def test_ctrl_c_ends_a_wait_for_the_ring(scripted, library):
    """Somebody's handler blocks: drain_coalesced() and remove() can be interrupted, and tried again."""
    words = (ctypes.c_uint32 * 3)()
    zone = scripted.coalesce_mmio(GPA, 8, native.Function(library.wait, words))
    vcpu = scripted.create_vcpu(0, [after(ring((GPA, b"a")))])
    idle = scripted.create_vcpu(2, [])
    thread = in_thread(vcpu.run)
    while not words[0]:
        thread.join(0.001)
    for call in (scripted.drain_coalesced, zone.remove):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            call()
        timer.join()
    words[1] = 1
    thread.join(30)
    zone.remove()
    vcpu = scripted.create_vcpu(1, [after(ring((GPA, b"a")))])
    vcpu.run()
    assert (zone.posted, idle.pending) == (1, None)


def test_nobody_uses_a_handler_that_was_removed(scripted, library):
    """Zones come and go while vCPUs drain: a handler is never called after remove() has returned, and always before."""
    handlers = [(ctypes.c_uint32 * 3)() for _ in range(4)]
    stop = threading.Event()

    def churn(i):
        words = handlers[i]
        handler = native.Function(library.use, words)
        for _ in range(stress(150)):
            words[0] = 1
            zone = scripted.coalesce_mmio(GPA + 8 * i, 8, handler)
            while not zone.posted and not stop.wait(0.0005):
                pass
            zone.remove()
            words[0] = 0

    image = ring(*[(GPA + 8 * (i % 4), b"a") for i in range(20)])
    vcpus = [scripted.create_vcpu(i, [after(image, pio_out(0x80, b"x"))], repeat=1 << 60, keep=False) for i in range(2)]
    scripted.on_pio(0x80, 1, native.Ignore())
    running = [in_thread(lambda vcpu=vcpu: vcpu.run(timeout=100)) for vcpu in vcpus]
    while not all(vcpu.running for vcpu in vcpus):
        stop.wait(0.001)
    churning = [in_thread(lambda i=i: churn(i)) for i in range(4)]
    for thread in churning:
        thread.join(100)
    stop.set()
    for vcpu in vcpus:
        vcpu.kick()
    for thread in running:
        thread.join(30)
    assert not any(thread.is_alive() for thread in [*churning, *running])
    assert [words[2] for words in handlers] == [0] * 4
    assert all(words[1] for words in handlers)


# ---- what is refused ----


@pytest.mark.parametrize("handler", [lambda vcpu, exit: None, print])
def test_python_handlers_are_refused(scripted, handler):
    """They would take the GIL in the burst; the error says what would do."""
    with pytest.raises(TypeError, match=r"give a native handler \(kvmexit.native\)"):
        scripted.coalesce_mmio(GPA, 8, handler)


@pytest.mark.parametrize(
    ("call", "error"), [
        (lambda vm, h: vm.coalesce_mmio(GPA, 0, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio(GPA, -1, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio(-1, 8, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio(2**64 - 4, 8, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio(0, 2**31, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio(2**64 - 8, 8, h), ValueError),
        (lambda vm, h: vm.coalesce_pio(0xFFFF, 2, h), ValueError),
        (lambda vm, h: vm.coalesce_mmio("x", 2, h), TypeError),
        (lambda vm, h: vm.coalesce_mmio(GPA, 8, None), TypeError),
        (lambda vm, h: vm.coalesce_mmio(GPA, 8, 5), TypeError),
        (lambda vm, h: CoalescedZone(), TypeError),
    ])  # fmt: skip
def test_wrong_zones_are_refused(scripted, call, error):
    """With a clear error, and nothing is registered."""
    with pytest.raises(error):
        call(scripted, native.Ignore())
    assert isinstance(scripted.create_vcpu(0, [mmio_write(GPA, b"x")]).run(), kvmexit.Mmio)


def test_zones_do_not_overlap(scripted):
    """KVM takes back every zone that has what is taken back: so each address has one."""
    zone = scripted.coalesce_mmio(GPA, 8, native.Ignore())
    with pytest.raises(ValueError, match="overlaps CoalescedZone"):
        scripted.coalesce_mmio(GPA + 7, 8, native.Ignore())
    scripted.coalesce_mmio(GPA + 8, 8, native.Ignore())
    scripted.coalesce_pio(0, 0x1_0000, native.Ignore())
    zone.remove()
    scripted.coalesce_mmio(GPA - 1, 9, native.Ignore())


def test_a_vm_without_zones_reads_no_ring(log):
    """The page belongs to nobody then: an adopted VM's owner drains it."""
    with ScriptedVM() as vm:
        vcpu = vm.create_vcpu(0, [after(ring((GPA, b"a"))), hlt()])
        vcpu.run()
        vcpu.run()
        assert left(vm, vcpu) == (0, 1)
        zone = vm.coalesce_mmio(GPA, 8, log.handler)
        zone.remove()
        assert log.count == 1  # the scripted ring still has it: remove() drains
