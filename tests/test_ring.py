"""native.Ring: every write a guest makes comes out, whole, in order and once; what happens when it is full; and being called."""

import asyncio
import errno
import os
import select
import signal
import threading
import time
from collections import Counter

import pytest
from guests import OUT_FOREVER, load, stress
from processes import in_thread, leaks, python, unsanitized
from test_convert import PAGE, machine, private_pages

import kvmexit
from kvmexit import PASS, KvmError, MemoryFault, handlers, native
from kvmexit.testing import (
    ScriptedVM,
    ScriptStep,
    hlt,
    hypercall,
    memory_fault,
    mmio_read,
    mmio_write,
    pio_in,
    pio_out,
    wrmsr,
)

FOR_EVER = 1 << 60
PRIVATE = 8  # KVM_MEMORY_EXIT_FLAG_PRIVATE


def run(vm, *steps, **options):
    """Run a script to its end; nothing of it comes to Python. -> the vCPU."""
    vcpu = vm.create_vcpu(len(vm._scripts), steps, **options)
    with pytest.raises(KvmError) as ended:
        raise AssertionError(vcpu.run())
    assert ended.value.errno == errno.ENODATA
    return vcpu


def everywhere(vm, ring):
    vm.on(kvmexit.Exit, ring)
    return ring


def readable(thing, timeout=0):
    return bool(select.select([thing], [], [], timeout)[0])


def until(condition):
    """Wait for another thread; a test that would wait for ever is ended by its time-out."""
    while not condition():
        time.sleep(0.001)


def values(batch):
    return [entry.data for entry in batch]


def units(data, size):
    """Bytes as numbers of so many."""
    return memoryview(data).cast({1: "B", 2: "H", 4: "I"}[size]).tolist()


# ---- what is noted ----


def test_writes_come_out_as_they_went_in(scripted):
    ring = everywhere(scripted, native.Ring())
    run(scripted, pio_out(0x80, b"\x81"), pio_out(0x3F8, b"\x12\x34", 2), pio_out(0xCF8, b"\1\2\3\xff", 4),
        *[mmio_write(0xFFFF_FFFF_FFFF_F000 + n, bytes(range(0xF0, 0xF0 + n))) for n in range(1, 9)],
        wrmsr(0x10, 0xFEDC_BA98_7654_3210))
    batch = ring.drain()
    assert list(batch) == [
        (0x80, 0x81, 0, 0, 1, 2, 0), (0x3F8, 0x3412, 1, 0, 2, 2, 0), (0xCF8, 0xFF03_0201, 2, 0, 4, 2, 0),
        *[(0xFFFF_FFFF_FFFF_F000 + n, int.from_bytes(range(0xF0, 0xF0 + n), "little"), 2 + n, 0, n, 6, 0) for n in range(1, 9)],
        (0x10, 0xFEDC_BA98_7654_3210, 11, 0, 8, 30, 0)]
    assert batch[0]._fields == ("address", "data", "sequence", "vcpu", "size", "reason", "flags")
    assert (ring.pending, ring.dropped, len(ring.drain())) == (0, 0, 0)


@pytest.mark.parametrize("step", [
    pio_in(0x80), pio_in(0x80, 1, 9), mmio_read(0x1000, 8), hypercall(12, 1), memory_fault(0x1000), hlt(),
    ScriptStep(29, bytes(64)), ScriptStep(errno=14), ScriptStep(6, bytes(16) + b"\xff\0\0\0\1"),
    ScriptStep(2, b"\1\4\0\0\xff\xff\xff\xff" + (4096).to_bytes(8, "little")),
    ScriptStep(2, b"\1\1\0\0\1\0\0\0" + (1 << 63).to_bytes(8, "little")), ScriptStep(2, b"\1\3\0\0\1\0\0\0" + (4096).to_bytes(8, "little")),
    ScriptStep(2, b"\1\1\0\0\0\0\0\0" + (4096).to_bytes(8, "little")),
], ids=["in", "rep in", "read", "hypercall", "fault", "hlt", "rdmsr", "bare", "long mmio", "many out", "far out", "odd out", "no out"])
def test_all_else_passes_and_so_does_rubbish(scripted, step):
    ring = everywhere(scripted, native.Ring())
    exit = scripted.create_vcpu(0, [step]).run()
    assert exit.errno == step.errno
    assert (ring.pending, ring.dropped) == (0, 0)
    assert not readable(ring)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 4096), (2, 2048), (4, 1024), (1, 8192), (4, 3), (2, 129)])
def test_a_string_instruction_is_an_entry_for_each_access(scripted, size, count):
    ring = everywhere(scripted, native.Ring(16384))
    data = bytes(i * 131 + (i >> 8) & 0xFF for i in range(size * count))
    run(scripted, pio_out(0x80, b"!"), pio_out(0x3F8, data, size))
    assert list(ring.drain())[1:] == [(0x3F8, value, 1 + i, 0, size, 2, 0) for i, value in enumerate(units(data, size))]


@unsanitized("NumPy is not installed there")
def test_a_batch_is_a_structured_array(scripted):
    numpy = pytest.importorskip("numpy", reason="numpy is missing")

    ring = everywhere(scripted, native.Ring())
    assert numpy.asarray(ring.drain()).shape == (0,)
    run(scripted, *[mmio_write(0x1000 + i, bytes([i])) for i in range(10)])
    batch = ring.drain()
    array = numpy.asarray(batch)
    assert array.dtype == numpy.dtype(native.Ring.dtype)
    assert array.dtype.itemsize == 32
    assert numpy.frombuffer(batch, native.Ring.dtype).tolist() == array.tolist() == [tuple(entry) for entry in batch]
    assert array["address"].tolist() == [0x1000 + i for i in range(10)]
    view = memoryview(batch)
    assert (view.nbytes, view.itemsize, view.shape, view.strides, view.c_contiguous) == (320, 32, (10,), (32,), True)
    assert bytes(batch) == array.tobytes()
    array["data"] = 7  # its own
    assert values(batch) == [7] * 10
    del batch
    assert array["address"][9] == 0x1009  # kept by what was made of it


def test_a_batch_is_a_sequence(scripted):
    ring = everywhere(scripted, native.Ring())
    run(scripted, *[pio_out(i, b"x") for i in range(3)])
    batch = ring.drain()
    assert [batch[i].address for i in (0, 1, 2, -1, -3)] == [0, 1, 2, 2, 0]
    for i in (3, -4, 1 << 40):
        with pytest.raises(IndexError):
            batch[i]
    with pytest.raises(TypeError, match="drain"):
        native.RingBatch()
    assert repr(batch) == "<RingBatch of 3>"
    assert repr(ring) == "Ring(entries=4096, full='stop', pending=0, dropped=0)"


def test_drain_up_to(scripted):
    ring = everywhere(scripted, native.Ring(16))
    run(scripted, *[pio_out(1, bytes([i])) for i in range(10)])
    assert [values(ring.drain(3)), values(ring.drain(1)), ring.pending, values(ring.drain(100))] == [[0, 1, 2], [3], 6, [*range(4, 10)]]
    for bad in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            ring.drain(bad)
    with pytest.raises(TypeError):
        ring.drain(1.5)


def test_it_goes_round_for_ever(scripted):
    """Every place is used again, by batches of every size."""
    ring, got = everywhere(scripted, native.Ring(8, vcpus=200)), []
    for n in range(200):
        run(scripted, *[mmio_write(0, (n * 10 + i).to_bytes(2, "little")) for i in range(n % 9)])
        got.append(values(ring.drain()))
    assert got == [[n * 10 + i for i in range(n % 9)] for n in range(200)]


def test_lanes_are_for_whoever_comes_first(scripted):
    for ids in (range(4), [5, 105, 205, 1 << 20], [3, 7, 11, 15], [0, 4, 1, 8]):
        with ScriptedVM() as vm:
            ring = everywhere(vm, native.Ring(vcpus=4))
            vcpus = [vm.create_vcpu(id, [pio_out(1, bytes([i])) for i in range(10)], repeat=2) for id in [*ids, 999]]
            last = vcpus.pop()
            for vcpu in vcpus:
                with pytest.raises(KvmError):
                    vcpu.run()
            assert last.run().data == b"\0"  # for the fifth there is none
            entries = list(ring.drain())
            for id in ids:
                assert [entry.data for entry in entries if entry.vcpu == id] == [*range(10)] * 2
                assert [entry.sequence for entry in entries if entry.vcpu == id] == [*range(20)]
            assert ring.pending == 0
            assert ring.vcpus == 4


def test_lanes_take_turns(scripted):
    """One that always has more than is drained does not starve the others."""
    ring = everywhere(scripted, native.Ring(vcpus=3))
    for _ in range(3):
        run(scripted, *[pio_out(1, b"x")] * 100)
    assert [Counter(entry.vcpu for entry in ring.drain(10)) for _ in range(3)] == [{0: 10}, {1: 10}, {2: 10}]
    assert Counter(entry.vcpu for entry in ring.drain(150)) == {0: 90, 1: 60}
    assert Counter(entry.vcpu for entry in ring.drain()) == {2: 90, 1: 30}


def test_several_vms_and_routes_share_it():
    ring = native.Ring()
    with ScriptedVM() as one, ScriptedVM() as other:
        for vm in (one, other):
            vm.on_pio(0, 8, ring)
            vm.on_mmio(0x1000, 8, ring)
        run(one, pio_out(1, b"a"), mmio_write(0x1000, b"b"))
        run(other, pio_out(2, b"c"), mmio_write(0x1001, b"d"))
    batch = ring.drain()
    assert bytes(values(batch)) == b"abcd"
    assert [entry.sequence for entry in batch] == [0, 1, 0, 1]


@pytest.mark.parametrize(("options", "says"), [
    ({"entries": 0}, "power of two"), ({"entries": 1}, "power of two"), ({"entries": 3}, "power of two"), ({"entries": -4}, "power of two"),
    ({"entries": 1 << 25}, "power of two"), ({"vcpus": 0}, "vcpus 0"), ({"vcpus": 65537}, "65536"), ({"full": "block"}, "'wait'"),
    ({"full": None}, "'stop'"), ({"eventfd": 0}, "no eventfd"), ({"eventfd": 1 << 20}, "no eventfd")])
def test_bad_arguments(options, says):
    before = leaks()[0]
    with pytest.raises(ValueError, match=says):
        native.Ring(**options)
    for wrong in ({"entries": 2.5}, {"vcpus": "1"}, {"nothing": 1}, {"eventfd": "x"}):
        with pytest.raises((TypeError, AttributeError)):
            native.Ring(**wrong)
    with pytest.raises(TypeError):
        native.Ring(1, 2)
    assert leaks()[0] == before


@unsanitized("its allocator ends the process")
def test_no_memory_for_it():
    before = leaks()[0]
    with pytest.raises(MemoryError):
        native.Ring(1 << 24, vcpus=1 << 16)  # 32 TiB
    assert leaks()[0] == before


def test_nothing_is_leaked(scripted):
    before = leaks()[0]
    for _ in range(3):
        ring = native.Ring(vcpus=4)
        with scripted.on_pio(1, 1, ring):
            run(scripted, pio_out(1, b"x"))
        ring.drain()
        del ring
    assert leaks()[0] == before


# ---- full ----


@pytest.mark.parametrize("steps", [[pio_out(1, bytes([i])) for i in range(9)], [pio_out(1, bytes(range(5))), pio_out(1, bytes(range(5, 9)))]])
def test_stop_returns_what_finds_no_room(scripted, steps):
    """The caller has it, whole, after what is in the ring; it counts as accepted."""
    ring = everywhere(scripted, native.Ring(8))
    vcpu = scripted.create_vcpu(0, [*steps, pio_out(2, b"\xff"), hlt()])
    exit = vcpu.run()
    got = bytes([*values(ring.drain()), *exit.data])
    assert got == bytes(range(9))
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    [entry] = ring.drain()
    assert (entry.data, entry.address) == (0xFF, 2)
    assert entry.sequence == 9 - len(exit.data)
    assert ring.dropped == 0


def test_stop_goes_on_stopping(scripted):
    """Who does not drain gets one after the other."""
    ring = everywhere(scripted, native.Ring(2))
    vcpu = scripted.create_vcpu(0, [pio_out(1, bytes([i])) for i in range(6)])
    assert [vcpu.run().data for _ in range(3)] == [b"\2", b"\3", b"\4"]
    assert values(ring.drain()) == [0, 1]


def test_drop_counts_and_leaves_a_gap(scripted):
    ring = everywhere(scripted, native.Ring(8, full="drop"))
    run(scripted, *[pio_out(1, bytes([i])) for i in range(7)], pio_out(1, b"abc"), pio_out(1, b"\x07"), pio_out(1, b"d"))
    assert (ring.pending, ring.dropped) == (8, 4)
    assert values(ring.drain()) == [*range(8)]
    run(scripted, *[pio_out(1, b"x")] * 9)
    assert [entry.sequence for entry in ring.drain()] == [*range(8)]
    assert ring.dropped == 5


def test_a_gap_is_where_it_was(scripted):
    ring = native.Ring(2, full="drop")
    scripted.on_pio(1, 1, ring)
    vcpu = scripted.create_vcpu(0, [*[pio_out(1, bytes([i])) for i in range(5)], pio_out(9, b"!")] * 2)
    assert vcpu.run().port == 9
    assert [(e.sequence, e.data) for e in ring.drain()] == [(0, 0), (1, 1)]
    assert vcpu.run().port == 9
    assert [(e.sequence, e.data) for e in ring.drain()] == [(5, 0), (6, 1)]


@pytest.mark.parametrize("full", ["stop", "wait", "drop"])
def test_a_string_instruction_that_never_has_room(scripted, full):
    """Longer than the ring: run() returns it, and "wait" does not wait for ever; or it is dropped."""
    ring = everywhere(scripted, native.Ring(4, full=full))
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"12345"), pio_out(1, b"1234"), hlt()])
    exit = vcpu.run(timeout=20)
    if full != "drop":
        assert exit.data == b"12345"
        exit = vcpu.run(timeout=20)
    assert isinstance(exit, kvmexit.Hlt)
    assert (bytes(values(ring.drain())), ring.dropped) == (b"1234", 5 * (full == "drop"))


class Waiting:
    """A vCPU that waits for room: the ring has `entries`, the guest has written one more. run()'s results come in order."""

    def __init__(self, vm, *rest, more=b"\xee", entries=4, before=()):
        self.vm, self.ring, self.results = vm, native.Ring(entries, full="wait"), []
        self.route = vm.on_pio(1, 1, self.ring)
        for handler in before:
            vm.on_pio(1, 1, handler)
        self.vcpu = vm.create_vcpu(0, [*[pio_out(1, bytes([i])) for i in range(entries)], pio_out(1, more), *rest, hlt()])
        self.go()
        until(lambda: self.ring.pending == entries)
        time.sleep(0.02)  # it may wait already, or will: either has to do

    def go(self, **options):
        self.thread = in_thread(lambda: self.results.append(self.vcpu.run(**options)))

    def result(self):
        self.thread.join(60)
        return self.results.pop()


def test_wait_waits_for_room(scripted):
    waiting = Waiting(scripted)
    assert waiting.results == []
    assert values(waiting.ring.drain(1)) == [0]
    assert isinstance(waiting.result(), kvmexit.Hlt)
    assert values(waiting.ring.drain()) == [1, 2, 3, 0xEE]


def test_a_drain_wakes_who_waits(scripted):
    """Were it only the tick that does, this would take minutes, and time out."""
    ring, got, count = everywhere(scripted, native.Ring(2, full="wait")), [], stress(6000)
    thread = to_the_end(scripted, count)
    while len(got) < count:
        got += values(ring.drain())
    thread.join(40)
    assert got == list(range(count))


def test_wait_waits_for_all_of_a_string_instruction(scripted):
    waiting = Waiting(scripted, more=b"abc")
    for i in range(3):
        assert not waiting.results
        assert waiting.ring.pending == 4 - i
        assert values(waiting.ring.drain(1)) == [i]
    assert isinstance(waiting.result(), kvmexit.Hlt)
    assert values(waiting.ring.drain()) == [3, *b"abc"]


@pytest.mark.parametrize("seconds", [0.0, 0.35])
@pytest.mark.parametrize("behind_python", [False, True])
@pytest.mark.parametrize("how", ["kick", "timeout", "pause", "complete"])
def test_waiting_heeds_what_is_asked(scripted, how, seconds, behind_python):
    """Soon or late; nothing is lost, and the exit is offered again."""
    seen = []
    waiting = Waiting(scripted, before=[lambda vcpu, io: seen.append(io.data) or PASS] if behind_python else [])
    vcpu, ring = waiting.vcpu, waiting.ring
    time.sleep(seconds)
    calls = len(seen)
    assert calls in ((5,) if behind_python else (0,))  # however often the ring was asked again
    if how == "pause":
        scripted.pause()
        assert waiting.results == []
        assert ring.pending == 4
        scripted.resume()
    else:
        vcpu.kick()
        assert waiting.result().cause == "kick"
        assert vcpu.pending.data == b"\xee"
        if how == "timeout":
            assert vcpu.run(timeout=0.05).cause == "timeout"
            assert vcpu.run(timeout=0).cause == "timeout"
        if how == "complete":
            results = []
            thread = in_thread(lambda: results.append(vcpu.complete()))
            time.sleep(seconds)
            vcpu.kick()  # stays for the next run()
            thread.join(60)
            assert results[0] is vcpu.pending
            assert vcpu.run().cause == "kick"
        assert ring.pending == 4
        waiting.go()
    assert values(ring.drain()) == [0, 1, 2, 3]
    assert isinstance(waiting.result(), kvmexit.Hlt)
    assert values(ring.drain()) == [0xEE]


def test_kicks_while_it_waits_are_neither_lost_nor_stale(scripted):
    """One each, as ever; in the end the write is there once."""
    waiting = Waiting(scripted)
    for _ in range(stress(200)):
        waiting.vcpu.kick()
        assert waiting.result().cause == "kick"
        waiting.go()
    assert values(waiting.ring.drain()) == [0, 1, 2, 3]
    assert isinstance(waiting.result(), kvmexit.Hlt)
    assert values(waiting.ring.drain()) == [0xEE]


@pytest.mark.parametrize("behind_python", [False, True])
def test_remove_ends_the_wait(scripted, behind_python):
    """The write goes on to whoever is next: here the caller of run()."""
    waiting = Waiting(scripted, before=[lambda vcpu, io: PASS] if behind_python else [])
    waiting.route.remove()
    assert waiting.result().data == b"\xee"
    assert isinstance(waiting.vcpu.run(), kvmexit.Hlt)
    assert values(waiting.ring.drain()) == [0, 1, 2, 3]


def test_close_ends_the_wait():
    with ScriptedVM() as vm:
        waiting = Waiting(vm)
    assert waiting.result().cause == "kick"
    assert values(waiting.ring.drain()) == [0, 1, 2, 3]


def test_ctrl_c_ends_the_wait(scripted):
    """On the main thread, whose run() waits; the write is offered again."""
    ring = native.Ring(2, full="wait")
    scripted.on_pio(1, 1, ring)
    vcpu = scripted.create_vcpu(0, [pio_out(1, bytes([i])) for i in range(3)] + [hlt()])

    def interrupt():
        until(lambda: ring.pending == 2)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        vcpu.run()
    thread.join(40)
    assert vcpu.pending.data == b"\2"
    assert values(ring.drain()) == [0, 1]
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert values(ring.drain()) == [2]


def test_registers_can_be_written_while_a_write_waits(scripted):
    """They are kept aside until it is complete, which takes an entry with immediate_exit set that is the ring's no reason to
    give up."""
    waiting = Waiting(scripted, pio_out(1, b"\xdd")._replace(second_half=True))
    waiting.vcpu.kick()
    waiting.result()
    waiting.vcpu.regs.rax = 5
    waiting.ring.drain(1)
    waiting.go()
    until(lambda: waiting.ring.pending == 4)
    assert values(waiting.ring.drain()) == [1, 2, 3, 0xEE]
    assert isinstance(waiting.result(), kvmexit.Hlt)
    assert values(waiting.ring.drain()) == [0xDD]
    assert waiting.vcpu.regs.rax == 5


# ---- being called ----


def test_readable_from_the_first_entry_until_nothing_is_found(scripted):
    ring = everywhere(scripted, native.Ring())
    assert not readable(ring)
    for _ in range(3):
        run(scripted, pio_out(1, b"a"))
        assert readable(ring)
        run(scripted, pio_out(1, b"b"), pio_out(1, b"c"))
        assert values(ring.drain(2)) == [*b"ab"]
        assert readable(ring)
        assert values(ring.drain()) == [*b"c"]
        assert readable(ring)
        assert values(ring.drain()) == []
        assert not readable(ring)
        assert values(ring.drain()) == []


def test_writes_call_once(scripted):
    """Not each of them makes a system call: the counter says how many did."""
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    ring = everywhere(scripted, native.Ring(eventfd=eventfd))
    for _ in range(3):
        run(scripted, *[pio_out(1, b"a")] * 50)
        assert os.eventfd_read(eventfd) == 1
        assert len(ring.drain()) == 50
        run(scripted, *[pio_out(1, b"a")] * 50)
        assert not readable(ring)  # nobody has said that nothing was found
        assert len(ring.drain()) == 50
        assert len(ring.drain()) == 0
    os.close(eventfd)
    run(scripted, pio_out(1, b"x"))  # ours is a duplicate
    assert readable(ring)
    assert os.eventfd_read(ring.fileno()) == 1


def test_rings_share_an_eventfd(scripted):
    """Its owner reads it, and then empties each."""
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    rings = [native.Ring(eventfd=eventfd) for _ in range(2)]
    for port, ring in enumerate(rings):
        scripted.on_pio(port, 1, ring)
    for order in ((0, 1), (1, 0), (0, 0), (1, 1)):
        run(scripted, *[pio_out(port, b"x") for port in order])
        assert os.eventfd_read(eventfd) == len(set(order))
        assert [len(ring.drain()) for ring in rings] == [order.count(0), order.count(1)]
        assert [len(ring.drain()) for ring in rings] == [0, 0]
        assert not readable(eventfd)
    os.close(eventfd)


def to_the_end(vm, count, id=0, **options):
    """A thread that runs a vCPU which writes 0, 1, 2, ... `count` in all, four bytes each."""
    steps = [mmio_write(id << 12, i.to_bytes(4, "little")) for i in range(count)]
    vcpu = vm.create_vcpu(id, [*steps, hlt()], keep=False, **options)

    def go():
        assert isinstance(vcpu.run(), kvmexit.Hlt)

    return in_thread(go)


def test_asyncio(scripted):
    """A reader of the loop sees every write; the loop sleeps in between."""
    ring, got, count = everywhere(scripted, native.Ring(64, full="wait")), [], stress(20000)

    async def consume():
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def read():
            got.extend(values(ring.drain()))
            if len(got) == count:
                done.set()

        loop.add_reader(ring, read)
        thread = to_the_end(scripted, count)
        await asyncio.wait_for(done.wait(), 100)
        loop.remove_reader(ring)
        thread.join(40)

    asyncio.run(consume())
    assert got == list(range(count))


@pytest.mark.parametrize("flags", [select.EPOLLIN, select.EPOLLIN | select.EPOLLET], ids=["level", "edge"])
def test_epoll(scripted, flags):
    """Edge-triggered: until nothing is found, as always there."""
    ring, got, count = everywhere(scripted, native.Ring(64, full="wait")), [], stress(20000)
    with select.epoll() as epoll:
        epoll.register(ring, flags)
        thread = to_the_end(scripted, count)
        while len(got) < count:
            assert epoll.poll(60)
            while batch := ring.drain():
                got.extend(values(batch))
        thread.join(40)
        ring.drain()
        assert epoll.poll(0) == []
    assert got == list(range(count))


def test_nobody_sleeps_beside_an_entry(scripted):
    """A consumer that is asleep for each write, or about to be: it is called, or the test hangs."""
    ring = native.Ring()
    scripted.on_pio(1, 1, ring)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), pio_out(2, b"y")], repeat=FOR_EVER, keep=False)
    turns, got = stress(3000), 0
    ready = threading.Semaphore(0)

    def produce():
        for _ in range(turns):
            ready.acquire()
            vcpu.run()

    thread = in_thread(produce)
    ready.release()
    while got < turns:
        while not (batch := ring.drain()):  # most of the time just as it comes
            assert readable(ring, 60)
        got += len(batch)
        ready.release()
    thread.join(40)
    assert got == turns


# ---- several at once ----


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("full", ["wait", "stop", "drop"])
def test_every_write_comes_out_once_and_in_order(full, consumers):
    """Several vCPUs, lanes that fill all the time, string instructions, several consumers."""
    count = stress(4000)
    ring, lock, batches, stop = native.Ring(16, vcpus=4, full=full), threading.Lock(), [], threading.Event()
    returned = {id: [] for id in range(3)}
    with ScriptedVM() as vm:
        everywhere(vm, ring)
        expected, vcpus, threads = {}, [], []
        for id in range(3):
            steps, at = [], 0
            while at < count:
                n = (1, 1, 1, 5, 16, 1, 2)[len(steps) % 7]
                data = b"".join((at + i).to_bytes(4, "little") for i in range(n))
                steps.append(pio_out(id, data, 4))
                at += n
            expected[id] = at
            vcpus.append(vm.create_vcpu(id, [*steps, hlt()], keep=False))

        def produce(vcpu):
            while not isinstance(exit := vcpu.run(), kvmexit.Hlt):
                returned[vcpu.id].append(exit.data)

        def consume():
            while True:
                last = stop.is_set()
                with lock:  # of this test's own book-keeping: batches in the order in which they were taken
                    batch = ring.drain(7)
                    if batch:
                        batches.extend(batch)
                if not batch and last:
                    return
                if not batch:
                    readable(ring, 0.01)

        def another():  # takes no turn in the book-keeping: it looks, arms and disarms
            while not stop.is_set():
                assert ring.pending <= 16 * 4
                assert ring.dropped >= 0

        threads = [in_thread(lambda vcpu=vcpu: produce(vcpu)) for vcpu in vcpus]
        readers = [in_thread(consume) for _ in range(consumers)] + [in_thread(another)]
        for thread in threads:
            thread.join(100)
        stop.set()
        for thread in readers:
            thread.join(100)
        assert not any(thread.is_alive() for thread in [*threads, *readers])
    lost = 0
    for id in range(3):
        mine = [entry for entry in batches if entry.vcpu == id]
        assert {entry.address for entry in mine} == {id}
        got = values(mine)
        sequence = [entry.sequence for entry in mine]
        assert sequence == sorted(set(sequence))
        if full == "drop":
            assert sequence == got  # so gaps are where they belong
            lost += expected[id] - len(got)
        else:
            returned_too = [value for data in returned[id] for value in units(data, 4)]
            assert sorted(got + returned_too) == list(range(expected[id]))
            assert (got, sequence) == (sorted(got), list(range(len(got))))
        assert not returned[id] or full == "stop"
    assert ring.dropped == lost
    assert ring.pending == 0


def test_consumers_share_what_there_is(scripted):
    """Without a lock of theirs: each entry goes to one of them."""
    ring, got, count = everywhere(scripted, native.Ring(256, full="wait")), [], stress(30000)
    stop = threading.Event()

    def consume():
        mine = []
        while not stop.is_set() or ring.pending:
            batch = values(ring.drain(50))
            assert batch == sorted(batch)
            mine += batch
        got.append(mine)

    readers = [in_thread(consume) for _ in range(3)]
    thread = to_the_end(scripted, count)
    thread.join(100)
    stop.set()
    for reader in readers:
        reader.join(100)
    assert sorted(value for mine in got for value in mine) == list(range(count))


def test_a_ring_comes_and_goes_under_vcpus_that_wait(scripted):
    """Removed while a vCPU writes or waits: each write is in the ring, or was returned; never both."""
    vcpu = scripted.create_vcpu(0, [pio_out(1, i.to_bytes(4, "little"), 4) for i in range(1000)], repeat=FOR_EVER, keep=False)
    returned, got, stop = [], [], threading.Event()

    def produce():
        while not stop.is_set():
            exit = vcpu.run()
            if isinstance(exit, kvmexit.Io):
                returned.append(int.from_bytes(exit.data, "little"))
                if len(returned) % 8 == 0:
                    time.sleep(0.0005)

    thread = in_thread(produce)
    try:
        for i in range(stress(60)):
            ring = native.Ring(4, full="wait")
            with scripted.on_pio(1, 1, ring):
                if i % 2:
                    until(lambda ring=ring: ring.pending)
            got += values(ring.drain())
            assert len(ring.drain()) == 0  # afterwards nobody uses it
    finally:
        stop.set()
        vcpu.kick()
        thread.join(60)
    assert not thread.is_alive()
    counts = Counter(returned + got)
    assert max(counts.values()) - min(counts[i] for i in range(1000)) <= 1  # the guest writes them round and round


def test_a_vcpu_goes_from_thread_to_thread(scripted):
    """Its lane goes with it."""
    ring = native.Ring(4096)
    scripted.on_mmio(0, 8, ring)
    vcpu = scripted.create_vcpu(0, [mmio_write(0, b"x"), mmio_write(8, b"y")], repeat=FOR_EVER, keep=False)
    turns, got = stress(300), 0
    for _ in range(turns):
        thread = in_thread(vcpu.run)
        got += len(ring.drain())
        thread.join(40)
    assert got + len(ring.drain()) == turns


def test_a_forked_child_takes_nothing():
    """Nor does it read the parent's eventfd."""
    done = python("""
import os
from kvmexit import Error, native
from kvmexit.testing import ScriptedVM, hlt, pio_out
vm = ScriptedVM()
ring = native.Ring()
vm.on_pio(1, 1, ring)
vm.create_vcpu(0, [pio_out(1, b"x"), hlt()]).run()
if os.fork() == 0:
    try:
        ring.drain()
    except Error as error:
        print(error, flush=True)
    del ring
    os._exit(0)
os.wait()
print(os.eventfd_read(ring.fileno()), len(ring.drain()))
""")
    assert done.stdout == "this ring belongs to the process that made it; after fork() the child must make its own\n1 1\n", done


# ---- a guest ----


@pytest.mark.kvm
@pytest.mark.parametrize("full", ["wait", "drop"])
def test_a_guests_storm(vm, full):
    """At CPL 3, with a consumer beside it: every write, in order. mov eax, 0; again: inc eax; out 0x80, eax; jmp again"""
    ring = native.Ring(256, full=full)
    vm.on_pio(0x80, 1, ring)
    vcpu = load(vm, bytes.fromhex("b8 00 00 00 00 ff c0 e7 80 eb fa"))
    thread = in_thread(vcpu.run)
    got, count = [], stress(20000)
    while len(got) < count:
        assert readable(ring, 60)
        got += [(entry.data, entry.sequence) for entry in ring.drain()]
    vcpu.kick()
    thread.join(60)
    assert not thread.is_alive()
    got += [(entry.data, entry.sequence) for entry in ring.drain()]
    assert all(data == sequence + 1 for data, sequence in got)
    assert len(got) + ring.dropped >= got[-1][0]
    assert [data for data, _ in got] == (sorted({data for data, _ in got}) if full == "drop" else list(range(1, len(got) + 1)))


@pytest.mark.kvm
def test_a_guests_odd_accesses(vm):
    """A string instruction, and a write over two pages without a slot, which KVM splits.

    mov ecx, 3000; mov edx, 0x3f8; mov esi, 0x1000; rep outsb; mov rax, 0x1122334455667788; mov rbx, 0xd0000ffd; mov [rbx], rax; out 0xf4, al
    """
    ring = native.Ring()
    vm.on_pio(0x3F8, 8, ring)
    vm.on_mmio(0xD000_0000, 0x2000, ring)
    code = bytes.fromhex("b9 b8 0b 00 00  ba f8 03 00 00  be 00 10 00 00  f3 6e  48 b8 88 77 66 55 44 33 22 11  "
                         "48 bb fd 0f 00 d0 00 00 00 00  48 89 03  e6 f4")
    vcpu = load(vm, code)
    assert vcpu.run(timeout=20).port == 0xF4
    entries = list(ring.drain())
    assert bytes(entry.data for entry in entries[:3000]) == code.ljust(3000, b"\0")
    assert [(e.address, e.size, e.data) for e in entries[3000:]] == [(0xD000_0FFD, 3, 0x66_7788), (0xD000_1000, 5, 0x11_2233_4455)]


@pytest.mark.kvm
def test_a_guest_waits_and_is_kicked(vm):
    ring = native.Ring(2, full="wait")
    vm.on_pio(0x80, 1, ring)
    vcpu = load(vm, OUT_FOREVER)
    for expected in ([0, 1], [2, 3]):
        while vcpu.pending is None or ring.pending < 2:
            assert vcpu.run(timeout=0.2).cause == "timeout"
        assert vcpu.pending.port == 0x80
        assert [entry.sequence for entry in ring.drain()] == expected


# ---- a journal of conversions ----


@pytest.fixture
def made():
    """-> a scripted VM with test_convert's slots, and its backend."""
    vm, recorded = machine()
    with vm:
        yield vm, recorded


def fault(page, count=1, *, private=True):
    return memory_fault(page * PAGE, count * PAGE, private=private)


def journal_of(vm, full="stop", entries=4096, **options):
    """-> the Ring of a Convert for all of a VM, and that."""
    ring = native.Ring(entries, full=full)
    convert = native.Convert(vm, journal=ring, **options)
    assert convert.journal is ring
    vm.on_memory_fault(handler=convert)
    vm.on_hypercall(12, convert)
    return ring, convert


def noted(ring):
    """-> [(page, pages, private, reason)]."""
    return [(e.address // PAGE, e.data // PAGE, e.flags == PRIVATE, e.reason) for e in ring.drain()]


def test_conversions_are_noted(made):
    """What each fault and hypercall converted; duplicates and refusals convert nothing."""
    vm, _ = made
    ring, convert = journal_of(vm, window=4 * PAGE)
    run(vm, fault(5), fault(6), fault(64, 2, private=True), hypercall(12, 0, 2, 16), hypercall(12, 0, 2, 16), hypercall(12, 4 * PAGE, 1, 0),
        hypercall(12, 1, 1, 0), hypercall(12, 4000 * PAGE, 1, 16))
    entries = list(ring.drain())
    assert [(e.address // PAGE, e.data // PAGE, e.flags, e.reason) for e in entries] == [
        (4, 4, PRIVATE, 39), (64, 4, PRIVATE, 39), (0, 2, PRIVATE, 3), (4, 1, 0, 3)]
    assert {(e.vcpu, e.size) for e in entries} == {(0, 8)}
    assert [e.sequence for e in entries] == [0, 1, 2, 3]
    assert convert.conversions == 4
    assert native.Convert(vm).journal is None
    for wrong in (5, convert):
        with pytest.raises(TypeError):
            native.Convert(vm, journal=wrong)


@pytest.mark.parametrize(("failures", "expected"), [
    ({1: errno.ENOMEM}, [(20, 1, True, 39)]),  # the window, in its first run: the fault alone
    ({2: errno.ENOMEM}, [(16, 2, True, 39), (20, 1, True, 39)]),  # in the second: what came before stays
    ({2: errno.ENOMEM, 3: errno.EIO}, [(16, 2, True, 39)]),  # and the fault, too: for Python
])
def test_failures_and_what_was_done_before_them(failures, expected):
    vm, recorded = machine({n + 1: error for n, error in failures.items()})
    with vm:
        vm.memory.convert(18 * PAGE, PAGE, private=True)
        ring, _ = journal_of(vm, window=16 * PAGE)
        vcpu = vm.create_vcpu(0, [fault(20), hlt()])
        exit = vcpu.run()
        assert isinstance(exit, MemoryFault if len(failures) == 2 else kvmexit.Hlt)
        if 1 in failures:
            assert noted(ring) == expected
        else:
            assert [(first, private, reason) for first, _, private, reason in noted(ring)] == [
                (first, private, reason) for first, _, private, reason in expected]
        assert private_pages(vm) == recorded.private


def test_a_full_journal_stops_before_the_conversion(made):
    """Nothing is converted unnoted. What is returned asks again when the guest runs on, or is offered again."""
    vm, recorded = made
    ring, convert = journal_of(vm, entries=2)
    vcpu = vm.create_vcpu(0, [fault(1), fault(2), fault(2), hypercall(12, 3 * PAGE, 1, 16), hlt()])
    exit = vcpu.run()
    assert (exit.gpa, len(recorded.calls), convert.faults) == (2 * PAGE, 1, 1)  # there may be two to note
    assert noted(ring) == [(1, 1, True, 39)]
    exit = vcpu.run()  # the fault again, converted; and now the hypercall
    assert (exit.nr, len(recorded.calls)) == (12, 2)
    assert vcpu.run() is exit
    assert noted(ring) == [(2, 1, True, 39)]
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert noted(ring) == [(3, 1, True, 3)]
    assert (convert.faults, convert.hypercalls, convert.failed) == (2, 1, 0)


def test_a_full_journal_waits(made):
    vm, recorded = made
    ring, convert = journal_of(vm, full="wait", entries=2)
    vcpu = vm.create_vcpu(0, [fault(1), fault(2), hypercall(12, 3 * PAGE, 1, 16), hlt()])
    assert vcpu.run(timeout=0.05).cause == "timeout"
    assert (vcpu.pending.gpa, len(recorded.calls), convert.faults) == (2 * PAGE, 1, 1)
    results, got = [], []
    thread = in_thread(lambda: results.append(vcpu.run()))
    while len(got) < 3:
        assert readable(ring, 60)
        got += noted(ring)
    thread.join(60)
    assert isinstance(results[0], kvmexit.Hlt)
    assert got == [(1, 1, True, 39), (2, 1, True, 39), (3, 1, True, 3)]


def test_a_full_journal_drops(made):
    vm, recorded = made
    ring, _ = journal_of(vm, full="drop", entries=2)
    run(vm, *[fault(page) for page in range(5)])
    assert (ring.dropped, len(recorded.calls), noted(ring)) == (3, 5, [(0, 1, True, 39), (1, 1, True, 39)])


def test_a_vcpu_without_a_lane_converts_nothing(made):
    """It passes to who comes behind."""
    vm, _ = made
    vm.on_memory_fault(handler=handlers.convert)
    ring = native.Ring(vcpus=1)
    convert = native.Convert(vm, journal=ring)
    vm.on_memory_fault(handler=convert)
    run(vm, fault(1))
    run(vm, fault(2))
    assert (convert.faults, convert.conversions, noted(ring)) == (1, 1, [(1, 1, True, 39)])
    assert private_pages(vm) == {PAGE, 2 * PAGE}


def test_writes_and_conversions_in_one_ring_are_in_order(made):
    vm, _ = made
    ring, _ = journal_of(vm)
    vm.on_pio(1, 1, ring)
    run(vm, pio_out(1, b"a"), fault(1), pio_out(1, b"b"), hypercall(12, PAGE, 1, 0), pio_out(1, b"c"))
    assert [(e.reason, e.address) for e in ring.drain()] == [(2, 1), (39, PAGE), (2, 1), (3, PAGE), (2, 1)]


def test_the_journal_is_what_memory_became(made):
    """Two vCPUs in windows and opposite directions: a page's last entry of either vCPU is what it is, one of the two."""
    vm, recorded = made
    ring, _ = journal_of(vm, full="wait", entries=64, window=4 * PAGE)
    count, batches = stress(2000), []
    steps = [[fault((i * 7 + id) % 128, private=(i + id) % 3 == 0) if i % 5 else hypercall(12, (i * 5 % 128) * PAGE, 1 + i % 2, 16 * (i % 2))
              for i in range(count)] for id in range(2)]
    vcpus = [vm.create_vcpu(id, [*script, hlt()], keep=False) for id, script in enumerate(steps)]
    threads = [in_thread(vcpu.run) for vcpu in vcpus]
    while any(thread.is_alive() for thread in threads) or ring.pending:
        batches += list(ring.drain())
    last = {}
    for entry in batches:
        assert entry.flags in (0, PRIVATE)
        assert entry.address + entry.data <= 129 * PAGE
        for page in range(entry.address, entry.address + entry.data, PAGE):
            last.setdefault(page, {})[entry.vcpu] = entry.flags == PRIVATE
    for page in range(0, 129 * PAGE, PAGE):
        assert vm.memory.is_private(page) in last.get(page, {0: False}).values()
    assert private_pages(vm) == recorded.private
