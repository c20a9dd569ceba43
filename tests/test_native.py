"""Native handlers: what they answer, in which order they come, and that nobody uses one that was removed."""

import ctypes
import errno
import gc
import os
import select
import subprocess
import sys
import threading
import time
import weakref

import pytest
from guests import OUT_FOREVER, load, stress
from processes import in_thread, leaks, unsanitized

import kvmexit
from kvmexit import PASS, STOP, KvmError, Route, native
from kvmexit._routes import Entry, RouteTable
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
)

FOR_EVER = 1 << 60


class Exit(ctypes.Structure):
    """struct kvmexit_exit of include/kvmexit/kvmexit.h."""

    _fields_ = [
        ("version", ctypes.c_uint32), ("reason", ctypes.c_uint32), ("error", ctypes.c_int32), ("vcpu", ctypes.c_uint32),
        ("address", ctypes.c_uint64), ("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("count", ctypes.c_uint32),
        ("is_write", ctypes.c_uint32), ("owes", ctypes.c_uint32), ("reserved", ctypes.c_uint32), ("data", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("run", ctypes.c_void_p),
    ]  # fmt: skip


def run(vm, *steps, **options):
    """Run a script to its end, with no exit left over; -> what userspace left: [(union, PIO data)]."""
    vcpu = vm.create_vcpu(len(vm._scripts), steps, **options)
    with pytest.raises(KvmError) as ended:
        raise AssertionError(vcpu.run())
    assert ended.value.errno == errno.ENODATA
    return [vm.script(vcpu).left(i) for i in range(len(steps))]


def answered(step, left):
    """What a script's step was answered: PIO data, MMIO data, or a hypercall's result."""
    union, data = left
    if step.reason == 2:
        return data
    return union[8 : 8 + union[16]] if step.reason == 6 else union[56:64]


# ---- what each answers ----


@pytest.mark.parametrize("value", [0, 0x12, 0x8877665544332211, -1, -2, (1 << 64) - 1, -(1 << 63)])
@pytest.mark.parametrize(
    ("step", "size", "count"),
    [
        (pio_in(0x80), 1, 1), (pio_in(0x80, 2), 2, 1), (pio_in(0x80, 4), 4, 1), (pio_in(0x80, 1, 5), 1, 5),
        (pio_in(0x80, 2, 3), 2, 3), (pio_in(0x80, 4, 1024), 4, 1024), *[(mmio_read(0x80, n), n, 1) for n in range(1, 9)],
        (hypercall(12, 1, 2, 3), 8, 1),
    ],
)  # fmt: skip
def test_ignore_answers_each_access_with_a_constant(scripted, value, step, size, count):
    for register in (scripted.on_pio, scripted.on_mmio):
        register(0x80, 1, native.Ignore(value))
    scripted.on_hypercall(12, native.Ignore(value))
    [left] = run(scripted, step)
    assert answered(step, left) == (value & (1 << 64) - 1).to_bytes(8, "little")[:size] * count


@pytest.mark.parametrize("step", [pio_out(0x80, b"ab", 2), pio_out(0x80, b"abcd", 1), mmio_write(0x80, b"x"), hlt(),
                                  ScriptStep(30, bytes(24)), ScriptStep(8)])
def test_ignore_swallows_what_is_not_read(scripted, step):
    scripted.on(kvmexit.Exit, native.Ignore())
    [(union, data)] = run(scripted, step)
    assert union == step.payload.ljust(256, b"\0")
    assert data == step.data


@pytest.mark.parametrize("step", [
    ScriptStep(34, bytes(256)), ScriptStep(27, b"\2".ljust(8, b"\0")), ScriptStep(40, bytes(64)), ScriptStep(43, bytes(64)),
    ScriptStep(2, bytes(16)), ScriptStep(6, bytes(24))], ids=["xen", "hyperv", "tdx", "snp", "malformed io", "malformed mmio"])
def test_ignore_does_not_answer_what_it_does_not_know(scripted, step):
    """KVM would complete it with whatever bytes are there."""
    scripted.on(kvmexit.Exit, native.Ignore(0x55))
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    assert [vcpu.run().reason for _ in range(2)] == [step.reason] * 2


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1])
def test_ignore_has_eight_bytes(value):
    with pytest.raises(OverflowError):
        native.Ignore(value)


def test_stop_returns_what_an_older_handler_would_have_taken(scripted):
    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_pio(0x80, 1, native.Stop())
    vcpu = scripted.create_vcpu(0, [pio_in(0x80), pio_out(0x80, b"x"), memory_fault(0x1000), hlt()])
    exit = vcpu.run()
    assert isinstance(exit, kvmexit.Io)
    assert not exit.is_write
    assert vcpu.pending is exit
    exit.data = b"7"
    assert vcpu.run().data == b"x"
    assert scripted.script(vcpu).left(0)[1] == b"7"
    scripted.on_memory_fault(handler=native.Stop())
    assert vcpu.run().gpa == 0x1000
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_stopped_read_is_offered_again_until_it_is_answered(scripted):
    """From the first handler on: this vCPU has nothing left of the table that stopped it."""
    counter = native.Counter()
    with scripted.on_pio(0x80, 1, native.Stop()):
        scripted.on_pio(0x80, 1, counter)
        vcpu = scripted.create_vcpu(0, [pio_in(0x80), hlt()])
        exits = [vcpu.run() for _ in range(3)]
    gc.collect()
    assert exits == [vcpu.run()] * 3  # nobody stops it, and nobody takes it
    assert counter.reads == 4
    scripted.on_pio(0x80, 1, native.Ignore(5))
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert scripted.script(vcpu).left(0)[1] == b"\x05"


def test_counter_passes_on(scripted):
    counter, seen = native.Counter(), []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: seen.append(type(exit).__name__) or (b"1" if exit.reason == 2 else None))
    scripted.on_pio(0, 1 << 16, counter)
    scripted.on_mmio(0, 1 << 20, counter)
    scripted.on_memory_fault(handler=counter)
    vcpu = scripted.create_vcpu(0, [pio_in(1), mmio_write(1, b"x"), mmio_write(1 << 20, b"x"), memory_fault(0)])
    with pytest.raises(KvmError):
        vcpu.run()
    assert seen == ["Io", "Mmio", "Mmio", "MemoryFault"]
    assert (counter.reads, counter.writes, counter.others) == (1, 1, 1)
    assert repr(counter) == "Counter(reads=1, writes=1, others=1)"


def test_a_doorbell_counts_accesses(scripted):
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    doorbell = native.EventFd(fd)
    scripted.on_pio(0x80, 1, doorbell)
    scripted.on_pio(0x80, 8, lambda vcpu, io: b"r")
    lefts = run(scripted, pio_out(0x80, b"x"), pio_out(0x80, b"abcdef", 2), pio_in(0x80))
    assert select.select([fd], [], [], 0)[0] == [fd]
    assert os.eventfd_read(fd) == 1 + 3
    assert lefts[2][1] == b"r"
    before = leaks()
    native.EventFd(fd)
    assert leaks() == before
    os.close(fd)
    with pytest.raises(ValueError, match="no eventfd"), open("/dev/null") as null:
        native.EventFd(null)


@pytest.mark.parametrize("register", ["on_pio", "on_mmio"])
def test_registers_are_a_buffer(scripted, register):
    """At every offset and size, beyond the end and over it."""
    memory = bytearray(range(16))
    getattr(scripted, register)(0x80, 32, native.Registers(memory))
    sizes = (1, 2, 4) if register == "on_pio" else range(1, 9)
    read, write = (pio_in, pio_out) if register == "on_pio" else (mmio_read, mmio_write)
    for size in sizes:
        for offset in range(24):
            memory[:] = bytes(range(16))
            expected = (bytes(range(16)) + b"\xff" * 32)[offset : offset + size]
            step = read(0x80 + offset, size)
            assert answered(step, run(scripted, step)[0]) == expected
            value = bytes(0xA0 + i for i in range(size))
            run(scripted, write(0x80 + offset, value, size) if write is pio_out else write(0x80 + offset, value))
            model = bytearray(range(16))
            for i in range(size):
                if offset + i < 16:
                    model[offset + i] = value[i]
            assert memory == model


def test_registers_of_string_instructions_and_masks(scripted):
    memory, fd = bytearray(8), os.eventfd(0, os.EFD_NONBLOCK)
    mask = bytes([0, 1, 0, 0, 0, 0, 0, 0])
    scripted.on_pio(0x80, 8, native.Registers(memory, read_only=mask, eventfd=fd))
    step = pio_in(0x84, 2, 3)
    memory[4:6] = b"zz"
    lefts = run(scripted, pio_out(0x80, b"abcdef", 2), pio_out(0x82, b"uvw", 1), step)
    assert memory == b"e\0w\0zz\0\0"  # the last of the string; byte 1 cannot be written
    assert lefts[2][1] == b"zz" * 3
    assert os.eventfd_read(fd) == 3 + 3
    os.close(fd)
    run(scripted, pio_out(0x80, b"x"))  # its own descriptor is another
    assert memory[:1] == b"x"


def test_registers_answer_msrs_and_pass_the_rest(scripted):
    memory = bytearray(8)
    registers = native.Registers(memory)
    scripted.on(kvmexit.Exit, lambda vcpu, exit: 5 if exit.reason == 3 else None)
    scripted.on_msr(0x10, 1, registers)
    scripted.on_hypercall(12, registers)
    scripted.on_memory_fault(handler=registers)
    rdmsr, wrmsr = (ScriptStep(reason, bytes(8) + bytes(4) + (0x10).to_bytes(4, "little") + value)
                    for reason, value in [(29, bytes(8)), (30, b"12345678")])
    lefts = run(scripted, wrmsr, rdmsr, hypercall(12), memory_fault(0))
    assert memory == b"12345678"
    assert lefts[1][0][16:24] == b"12345678"  # where the union has an MSR's value
    assert answered(hypercall(12), lefts[2]) == (5).to_bytes(8, "little")


def test_registers_of_several_msrs_take_eight_bytes_each(scripted):
    memory = bytearray(24)
    scripted.on_msr(0x10, 4, native.Registers(memory))
    run(scripted, *[ScriptStep(30, bytes(12) + (0x10 + i).to_bytes(4, "little") + bytes([65 + i]) * 8) for i in (0, 2, 3)])
    assert memory == b"A" * 8 + bytes(8) + b"C" * 8


@pytest.mark.parametrize("make", [
    lambda: native.EventFd(), lambda: native.EventFd(1, 2), lambda: native.Registers(bytearray(8), bogus=1),
    lambda: native.Registers(), lambda: native.Registers(b"x"), lambda: native.EventFd(-1), lambda: native.Function(),
    lambda: native.Serial16550(), lambda: native.Serial16550(-1, 2), lambda: native.Serial16550("x"),
    lambda: native.Registers(bytearray(8), read_only=8), lambda: native.Registers(bytearray(8), None, sys.stdout)])
def test_a_handler_that_could_not_be_made_leaves_descriptors_alone(make):
    """Descriptor 0 first of all."""
    before = [os.fstat(fd) for fd in (0, 1, 2)], leaks()
    with pytest.raises((TypeError, ValueError, BufferError, AttributeError)):
        make()
    assert ([os.fstat(fd) for fd in (0, 1, 2)], leaks()) == before


class Device:
    """Whose method is a handler of the VM that it holds."""

    def fault(self, vcpu, fault):
        pass


def test_a_buffer_is_released_when_a_cycle_is_collected():
    """The collector clears a cycle's objects in its own order, the oldest first: here the registers."""
    gc.collect()
    memory = bytearray(8)
    registers = native.Registers(memory)
    vm = ScriptedVM()
    device = Device()
    device.vm = vm
    vm.on_mmio(0, 8, registers)
    vm.on_memory_fault(handler=device.fault)
    del registers, vm, device
    gc.collect()
    memory.extend(b"x")


def test_registers_keep_their_buffer(scripted):
    memory = bytearray(8)
    registers = native.Registers(memory)
    with pytest.raises(BufferError):
        memory.extend(b"x")
    del registers
    gc.collect()
    memory.extend(b"x")
    for bad in (b"bytes", "str", 5):
        with pytest.raises((BufferError, TypeError)):
            native.Registers(bad)
    with pytest.raises(ValueError, match="mask of 3 bytes for 9"):
        native.Registers(memory, read_only=b"abc")


# ---- order ----


def test_the_most_specific_first_then_the_newest_native_or_not(scripted):
    """A native handler that comes after Python's is called too, and the other way round."""
    asked = []
    counters = [native.Counter() for _ in range(4)]

    def python(name, verdict=PASS):
        return lambda vcpu, exit: asked.append((name, [c.writes for c in counters])) or verdict

    scripted.on(kvmexit.Exit, python("any"))
    scripted.on(kvmexit.Io, counters[3])
    scripted.on_pio(0, 100, counters[2])
    scripted.on_pio(0, 100, python("wide"))
    scripted.on_pio(0, 10, python("narrow, old"))
    scripted.on_pio(0, 10, counters[1])
    scripted.on_pio(5, 1, counters[0])
    exit = scripted.create_vcpu(0, [pio_out(5, b"x")]).run()
    assert exit.port == 5
    assert asked == [("narrow, old", [1, 1, 0, 0]), ("wide", [1, 1, 0, 0]), ("any", [1, 1, 1, 1])]


@pytest.mark.parametrize("last", [native.Ignore(0x77), native.Stop()], ids=repr)
def test_a_native_handler_after_pythons_takes_the_exit(scripted, last):
    scripted.on_pio(5, 2, last)
    scripted.on_pio(5, 1, lambda vcpu, io: PASS)
    vcpu = scripted.create_vcpu(0, [pio_in(5), hlt()])
    exit = vcpu.run()
    if isinstance(last, native.Stop):
        assert isinstance(exit, kvmexit.Io)
        exit.data = b"s"
        exit = vcpu.run()
    assert isinstance(exit, kvmexit.Hlt)
    assert scripted.script(vcpu).left(0)[1] == (b"s" if isinstance(last, native.Stop) else b"\x77")


def test_a_native_handler_after_pythons_leaves_its_answer(scripted):
    """Python has set a hypercall's result, and passed."""
    counter = native.Counter()

    @scripted.on_hypercall(12)
    def handler(vcpu, hypercall):
        hypercall.ret = 5
        return PASS

    scripted.on(kvmexit.Exit, counter)
    vcpu = scripted.create_vcpu(0, [hypercall(12), hlt()])
    assert vcpu.run().ret == 5
    vcpu.run()
    assert scripted.script(vcpu).left(0)[0][56:64] == b"\5" + bytes(7)
    assert counter.reads == 1


def test_each_exit_of_a_burst_finds_its_own_handlers(scripted):
    """Ports, addresses and numbers next to each other, in an order that no cache likes."""
    edges = [0, 1, 0xFF, 0x100, 0x101, 0x1FF, 0x200, 0x8000, 0xFFFE, 0xFFFF]
    steps = []
    for i, edge in enumerate(edges):
        scripted.on_pio(edge, 1, native.Ignore(i + 1))
        scripted.on_mmio(edge << 40 | edge, 1, native.Ignore(i + 101))
    scripted.on(kvmexit.Exit, native.Ignore(0xEE))
    for i, edge in enumerate(edges * 3):
        other = edges[(i * 7 + 3) % len(edges)]
        steps += [pio_in(edge), mmio_read(other << 40 | other, 1), pio_in(0x7000 + i), mmio_read(other << 40 | 0x77, 1)]
    expected = []
    for i in range(len(edges) * 3):
        expected += [i % len(edges) + 1, (i * 7 + 3) % len(edges) + 101, 0xEE, 0xEE]
    lefts = run(scripted, *steps)
    assert [answered(step, left)[0] for step, left in zip(steps, lefts, strict=True)] == expected


@pytest.mark.parametrize("seed", range(stress(20)))
def test_tables_against_a_model(seed):
    """Ranges at random, many overlapping: every key finds the handlers that the rule gives, in their order."""
    import random

    chance = random.Random(seed)
    limit = chance.choice([300, 1 << 16])
    with ScriptedVM() as vm:
        asked, live = [], []
        for serial in range(chance.randrange(1, 40)):
            first = chance.randrange(limit)
            count = min(chance.choice([1, 2, 16, 256, 257, limit]), limit - first)
            handler = native.Counter() if chance.random() < 0.5 else None
            name = len(live)
            function = handler or (lambda vcpu, exit, name=name: asked.append(name) or PASS)
            live.append((first, count, serial, handler, vm.on_pio(first, count, function)))
        gone = set()
        for name in range(len(live)):
            if chance.random() < 0.3:
                live[name][4].remove()
                gone.add(name)
        ports = {chance.randrange(limit) for _ in range(20)} | {live[0][0], live[0][0] + live[0][1] - 1}
        for n, port in enumerate(ports):
            del asked[:]
            before = [c and c.writes for *_, c, _ in live]
            vm.create_vcpu(n, [pio_out(port, b"x")]).run()
            hit = [i for i, (first, count, *_) in enumerate(live) if first <= port < first + count and i not in gone]
            order = sorted(hit, key=lambda i: (live[i][1], -live[i][2]))
            assert asked == [i for i in order if live[i][3] is None]
            assert [i for i, (*_, c, _) in enumerate(live) if c and c.writes != before[i]] == [
                i for i in hit if live[i][3] is not None]


# ---- anybody's function ----


@unsanitized("its compiler is not installed there")
@pytest.mark.parametrize("compiler", ["cc -std=c11", "c++ -std=c++11"])
def test_the_header_stands_alone(tmp_path, compiler):
    """C11 and C++11 take it without a warning, and the struct is the one that the tests below read."""
    ziglang = pytest.importorskip("ziglang", reason="the PyPI package ziglang is missing")
    source = tmp_path / f"header.{'cpp' if '++' in compiler else 'c'}"
    offsets = "".join(
        f'_Static_assert(offsetof(struct kvmexit_exit, {name}) == {getattr(Exit, name).offset}, "{name}");\n' for name, _ in Exit._fields_)
    source.write_text(
        "#include <kvmexit/embed.h>\n#include <stddef.h>\n" + offsets.replace("_Static_assert", "static_assert" if "++" in compiler else "_Static_assert")
        + "int f(struct kvmexit_exit *e, void *o) { (void)e; (void)o; return KVMEXIT_DONE; }\nkvmexit_handler h = f;\n"
        + "int g(const struct kvmexit_api *api) { return api->run(api->vcpu(NULL), KVMEXIT_FOREVER, NULL) == KVMEXIT_RUN_EXIT; }\n")
    done = subprocess.run(
        [sys.executable, "-m", ziglang.__name__, *compiler.split(), "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c", str(source),
         "-I", kvmexit.get_include(), "-o", str(tmp_path / "header.o")],
        capture_output=True, text=True, check=False, env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "zig")})
    assert (done.returncode, done.stderr) == (0, "")


PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Handlers in C: tests/native_handlers.c."""
    from processes import compiled

    library = ctypes.CDLL(str(compiled(tmp_path_factory, "native_handlers")))
    for name in ("note", "verdict"):
        getattr(library, name).argtypes = [ctypes.POINTER(Exit), ctypes.c_void_p]
    return library


def test_a_c_function_sees_the_whole_exit(scripted, library):
    narrow, wide = (Exit * 1)(), (Exit * 1)()
    scripted.on(kvmexit.Exit, native.Function(library.note, wide))
    note = native.Function(library.note, narrow)
    scripted.on_pio(0x3F0, 16, note)
    scripted.on_mmio(0x1000, 0x1000, note)
    cases = [
        (pio_out(0x3F8, b"abcd", 2), (2, 0, 0x3F8, 0x3F0, 2, 2, 1, 0)),
        (pio_in(0x3F8), (2, 0, 0x3F8, 0x3F0, 1, 1, 0, 0)),
        (mmio_write(0x1234, b"abc"), (6, 0, 0x1234, 0x1000, 3, 1, 1, 0)),
        (mmio_read(0x9234, 8), (6, 0, 0x9234, 0, 8, 1, 0, 0)),
        (hypercall(12, 1), (3, 0, 12, 0, 8, 1, 0, 0)),
        (memory_fault(0x5000, 0x2000, private=True), (39, errno.EFAULT, 0x5000, 0, 0x2000, 1, 0, 8)),
        (hlt(), (5, 0, 0, 0, 0, 1, 0, 0)),
        (ScriptStep(errno=errno.EFAULT), (0xFFFFFFFF, errno.EFAULT, 0, 0, 0, 1, 0, 0)),
        (ScriptStep(77), (77, 0, 0, 0, 0, 1, 0, 0)),
        (ScriptStep(29, bytes(12) + b"\x10\0\0\0" + bytes(8)), (29, 0, 0x10, 0, 8, 1, 0, 0)),
        (ScriptStep(30, bytes(12) + b"\x10\0\0\0" + bytes(8)), (30, 0, 0x10, 0, 8, 1, 1, 0)),
    ]
    for id, (step, expected) in enumerate(cases):
        vcpu = scripted.create_vcpu(id, [step])
        vcpu.run()  # it passes, and nobody else is there
        seen = (narrow if expected[3] else wide)[0]
        assert wide[0].base == 0  # it comes second
        assert (seen.version, seen.vcpu) == (1, id)
        assert (seen.reason, seen.error, seen.address, seen.base, seen.size, seen.count, seen.is_write, seen.flags) == expected
        assert bool(seen.data) == (step.reason in (2, 3, 6, 29, 30))
        assert seen.owes == (step.reason in (3, 29) or (step.reason in (2, 6) and not seen.is_write))


@pytest.mark.parametrize("after_python", [False, True])
def test_a_verdict_that_is_none_is_an_error(scripted, library, after_python):
    """The exit stays pending, and is offered again."""
    verdict = ctypes.c_int(3)
    scripted.on_pio(1, 2, native.Function(library.verdict, verdict))
    if after_python:
        scripted.on_pio(1, 1, lambda vcpu, io: PASS)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    for verdict.value in (3, -1):
        with pytest.raises(kvmexit.Error, match="verdict.*returned neither KVMEXIT_DONE"):
            vcpu.run()
        assert vcpu.pending.port == 1
    verdict.value = 0
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_function_without_a_wrapper(scripted, library):
    """ctypes functions are taken as they are; their opaque pointer is NULL then."""
    library.verdict.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    route = scripted.on_pio(1, 1, library.verdict)  # of NULL: PASS
    assert isinstance(route, Route)
    assert isinstance(route.handler, native.Function)
    assert scripted.create_vcpu(0, [pio_out(1, b"x")]).run().port == 1


def test_a_capsule_named_by_its_signature(scripted, library):
    """With its context as the opaque pointer; it is kept alive."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    context = ctypes.pythonapi.PyCapsule_SetContext
    context.argtypes = [ctypes.py_object, ctypes.c_void_p]
    address = ctypes.cast(library.verdict, ctypes.c_void_p)
    name, verdict = ctypes.create_string_buffer(b"int (struct kvmexit_exit *, void *)"), ctypes.c_int(0)
    capsule = new(address, name, None)
    context(capsule, ctypes.addressof(verdict))
    scripted.on_pio(1, 1, capsule)
    before = sys.getrefcount(capsule)
    scripted.on_pio(2, 1, native.Function(capsule, ctypes.c_int(2)))
    assert sys.getrefcount(capsule) == before + 1
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), pio_out(2, b"y")])
    assert vcpu.run().port == 2  # the first was DONE, the second STOP
    other = ctypes.create_string_buffer(b"int (void)")
    with pytest.raises(TypeError, match=r"a capsule named 'int \(void\)'.*struct kvmexit_exit"):
        scripted.on_pio(1, 1, new(address, other, None))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: setattr(f, "argtypes", None), "argtypes None"),
        (lambda f: setattr(f, "argtypes", [ctypes.c_void_p]), "argtypes"),
        (lambda f: setattr(f, "argtypes", [ctypes.c_int, ctypes.c_void_p]), "argtypes"),
        (lambda f: setattr(f, "restype", ctypes.c_long), "restype"),
    ],
)
def test_a_wrong_signature_is_refused(scripted, library, change, says):
    function = library["verdict"]  # a new object each time
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    change(function)
    with pytest.raises(TypeError, match=says + r".*PyCapsule named \"int \(struct kvmexit_exit"):
        scripted.on_pio(1, 1, function)


def test_a_callback_around_a_python_function_is_refused(scripted):
    with pytest.raises(TypeError, match="needs the GIL: pass the function itself"):
        scripted.on_pio(1, 1, PROTOTYPE(lambda exit, opaque: 0))
    with pytest.raises(TypeError, match="no function of native code"):
        native.Function(print)


def test_a_broken_handler_whose_exit_was_answered_by_hand_is_let_go(scripted, library):
    """With it its table, whose finalizers may remove routes: nobody waits for this vCPU then."""
    other = scripted.on_pio(9, 1, native.Ignore())

    class Finalized:
        def __call__(self, vcpu, exit):
            return PASS

        def __del__(self):
            other.remove()
            gone.append(True)

    gone, verdict = [], ctypes.c_int(3)
    routes = [scripted.on_pio(1, 1, native.Function(library.verdict, verdict)), scripted.on_pio(2, 1, Finalized())]
    vcpu = scripted.create_vcpu(0, [pio_in(1), hlt()])
    with pytest.raises(kvmexit.Error):
        vcpu.run()
    vcpu.pending.data = b"x"
    for route in routes:
        route.remove()
    del route, routes
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    gc.collect()
    assert gone == [True]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: native.Function(PROTOTYPE()), "is NULL"),
        (lambda f: native.Function(f, ctypes.pointer(ctypes.c_int(5))), "is a pointer, whose buffer is itself"),
        (lambda f: native.Function(ctypes.pythonapi["PyObject_Repr"]), "needs the GIL"),
        (lambda f: type("Made", (kvmexit._routes.Native,), {})(), "has no function"),
    ],
)
def test_what_can_be_no_handler(scripted, library, make, says):
    library.verdict.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    with pytest.raises((TypeError, ValueError), match=says):
        scripted.on_pio(1, 1, make(library.verdict))


def test_a_buffer_as_opaque_is_exported_and_kept(scripted, library):
    memory = bytearray(ctypes.sizeof(Exit))
    route = scripted.on_pio(1, 1, native.Function(library.note, memory))
    with pytest.raises(BufferError):
        memory.clear()
    scripted.create_vcpu(0, [pio_out(1, b"x")]).run()
    assert Exit.from_buffer_copy(memory).address == 1
    route.remove()
    del route
    gc.collect()
    memory.clear()
    with pytest.raises((BufferError, TypeError)):
        native.Function(library.note, b"read-only")


# ---- while vCPUs run ----


@pytest.mark.parametrize("action", ["kick", "timeout", "pause"])
def test_a_native_storm_heeds_kicks_timeouts_and_pauses(scripted, action):
    """It never comes to Python by itself."""
    scripted.on_pio(0x80, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, b"x")], repeat=FOR_EVER, keep=False)
    if action == "timeout":
        assert vcpu.run(timeout=0.05).cause == "timeout"
        return
    results = []
    thread = in_thread(lambda: results.append(vcpu.run()))
    while not vcpu.running:
        time.sleep(0.001)
    if action == "pause":
        scripted.pause()
        position = scripted.script(vcpu).position
        time.sleep(0.02)
        assert scripted.script(vcpu).position == position
        scripted.resume()
    vcpu.kick()
    thread.join(40)
    assert results[0].cause == "kick"


@pytest.mark.kvm
def test_a_guest_is_answered_natively(vm):
    counter, seen = native.Counter(), []
    vm.on_pio(0x80, 1, native.Ignore())
    vm.on_pio(0x80, 1, counter)
    vcpu = load(vm, OUT_FOREVER)
    assert vcpu.run(timeout=0.2).cause == "timeout"
    assert counter.writes > 100
    vm.on_pio(0x80, 1, lambda vcpu, io: seen.append(io) or STOP)
    assert vcpu.run().port == 0x80
    assert len(seen) == 1


def test_a_failed_entry_after_a_native_answer_keeps_it(scripted):
    """The answer is pending: the next run() completes it, and no handler is asked again."""
    counter = native.Counter()
    scripted.on_pio(0x80, 1, native.Ignore(9))
    scripted.on_pio(0x80, 1, counter)
    vcpu = scripted.create_vcpu(0, [pio_in(0x80), ScriptStep(errno=errno.EIO), hlt()])
    with pytest.raises(KvmError) as failed:
        vcpu.run()
    assert failed.value.errno == errno.EIO
    assert vcpu.pending.port == 0x80
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert (counter.reads, scripted.script(vcpu).left(0)[1]) == (1, b"\x09")


def test_python_exits_before_native_ones_are_over(scripted):
    """An Exit object from before a burst cannot answer what came natively after it."""
    kept = []
    scripted.on_pio(1, 1, lambda vcpu, io: kept.append(io) or b"1")
    scripted.on_pio(2, 1, native.Ignore(2))
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_in(2), ScriptStep(errno=errno.EIO), hlt()])
    with pytest.raises(KvmError):
        vcpu.run()
    with pytest.raises(kvmexit.NotPendingError):
        kept[0].data = b"z"
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert scripted.script(vcpu).left(1)[1] == b"\x02"


class Gate:
    """What tests/native_handlers.c's `wait` works on: it says that it is inside, and waits to be let go."""

    def __init__(self, library):
        self.words = (ctypes.c_uint32 * 3)()
        self.handler = native.Function(library.wait, self.words)

    inside = property(lambda self: self.words[0])

    def let_go(self):
        self.words[1] = 1

    def __del__(self):
        self.words[1] = 1


@pytest.fixture
def waiting(scripted, library):
    """-> a vCPU's thread inside a native handler, the handler's route and its Gate."""
    library.wait.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    gate = Gate(library)
    route = scripted.on_pio(1, 1, gate.handler)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), ScriptStep(spin=True)])
    thread = in_thread(vcpu.run)
    while not gate.inside:
        time.sleep(0.001)
    yield vcpu, route, gate
    gate.let_go()
    vcpu.kick()
    thread.join(40)
    assert not thread.is_alive()


def test_remove_waits_for_a_native_handler_under_way(scripted, waiting):
    _, route, gate = waiting
    removed = threading.Event()
    thread = in_thread(lambda: (route.remove(), removed.set()))
    assert not removed.wait(0.05)
    gate.let_go()
    assert removed.wait(40)
    thread.join(40)


def test_a_removed_python_handler_is_let_go_when_the_run_ends(scripted, waiting):
    """Its table was in use by native code when it was removed."""
    vcpu, _, gate = waiting
    other = lambda vcpu, io: None  # noqa: E731
    scripted.on_pio(2, 1, other).remove()
    reference = weakref.ref(other)
    del other
    gate.let_go()
    vcpu.kick()
    deadline = time.monotonic() + 40
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reference() is None


def test_remove_waits_for_nothing_that_was_retired_later(scripted, library, waiting):
    """Others may swap tables for ever."""
    _, _, gate = waiting
    quiet = scripted.on_pio(5, 1, native.Ignore())
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            scripted.on_pio(6, 1, lambda vcpu, io: None).remove()

    threads = [in_thread(swap)]
    removed = threading.Event()
    threads.append(in_thread(lambda: (quiet.remove(), removed.set())))
    assert not removed.wait(0.05)
    gate.let_go()
    try:
        assert removed.wait(40)
    finally:
        stop.set()
        for thread in threads:
            thread.join(40)


def test_a_forked_child_waits_for_no_thread_of_its_parents(scripted, waiting):
    """It may remove routes while the parent's vCPU is in a native handler."""
    route = scripted.on_pio(5, 1, native.Ignore())
    pid = os.fork()
    if pid == 0:
        route.remove()
        os._exit(7)
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_forked_childs_copy_of_a_handler_rings_nobody(scripted):
    """The handler forks and passes: what comes after it is the parent's alone."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    scripted.on_pio(1, 2, native.EventFd(fd))
    pids = []

    @scripted.on_pio(1)
    def handler(vcpu, io):
        pids.append(os.fork())
        return PASS

    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    try:
        exit = vcpu.run()
    except kvmexit.Error as error:
        if pids == [0]:
            os._exit(7 if "belongs to process" in str(error) else 8)
        raise
    if pids == [0]:
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 7
    assert isinstance(exit, kvmexit.Hlt)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_remove_of_another_does_not_wait_and_add_neither(scripted, waiting):
    """What waits is the removal of native handlers alone. The tables between are let go in the end."""
    _, route, gate = waiting
    other = lambda vcpu, io: None  # noqa: E731
    scripted.on_pio(2, 1, other).remove()
    gate.let_go()
    route.remove()
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None


def test_remove_does_not_wait_for_a_guest_that_never_exits(scripted):
    route = scripted.on_pio(1, 1, native.Ignore())
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), ScriptStep(spin=True)])
    thread = in_thread(vcpu.run)
    while len(scripted.script(vcpu).entries) < 2:
        time.sleep(0.001)
    route.remove()
    assert vcpu.running
    vcpu.kick()
    thread.join(40)


def test_remove_in_a_handler_of_the_same_vcpu(scripted):
    """Python's dispatch is no use of native code: nothing to wait for."""
    route = scripted.on_pio(1, 2, native.Ignore())
    scripted.on_pio(1, 1, lambda vcpu, io: route.remove() or PASS)
    assert scripted.create_vcpu(0, [pio_out(1, b"x")]).run().port == 1


def test_a_signal_handlers_exception_ends_the_wait(scripted, waiting):
    import signal

    class Rung(Exception):
        pass

    def ring(number, frame):
        raise Rung

    _, route, gate = waiting
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Rung):
            route.remove()
    finally:
        signal.signal(signal.SIGALRM, previous)
    gate.let_go()
    route.remove()


def test_nobody_uses_a_handler_that_was_removed(scripted, library):
    """Routes to native handlers come and go while vCPUs exit: what a handler works on says whether it may be used, and is
    spoiled as soon as remove() has returned."""
    library.use.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    vcpus = [scripted.create_vcpu(i, [pio_out(1, b"x"), pio_out(2, b"y")], repeat=FOR_EVER, keep=False) for i in range(2)]
    scripted.on(kvmexit.Exit, native.Ignore())
    scripted.on_pio(2, 1, lambda vcpu, io: PASS)  # so what comes on port 2 is called from Python's dispatch
    threads = [in_thread(vcpu.run) for vcpu in vcpus]
    used = 0
    try:
        for i in range(stress(2000)):
            words = (ctypes.c_uint32 * 2)(1, 0)
            with scripted.on_pio(1 + i % 2, 3, native.Function(library.use, words)):
                if i % 3 == 0:
                    time.sleep(0.0002)
            words[0] = 0
            used += words[1] > 0
    finally:
        for vcpu in vcpus:
            vcpu.kick()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert ctypes.c_uint32.in_dll(library, "misuses").value == 0
    assert used > stress(2000) / 20


def test_many_routes_are_added_in_little_time(scripted):
    """A thousand devices: each is found."""
    begun = time.monotonic()
    for i in range(1000):
        scripted.on_mmio(i << 12, 8, native.Ignore(i & 0xFF))
    assert time.monotonic() - begun < 60
    steps = [mmio_read(i << 12, 1) for i in range(0, 1000, 37)]
    assert [answered(step, left)[0] for step, left in zip(steps, run(scripted, *steps), strict=True)] == [
        i & 0xFF for i in range(0, 1000, 37)]


def test_tables_are_not_leaked():
    """What the burst had to itself is let go, in the end by the VM."""
    gc.collect()
    before = len([thing for thing in gc.get_objects() if type(thing) in (RouteTable, Entry)])
    for _ in range(3):
        with ScriptedVM() as vm:
            for i in range(10):
                vm.on_pio(i, 1, native.Ignore())
            vm.create_vcpu(0, [pio_out(1, b"x"), hlt()]).run()
        del vm
    gc.collect()
    assert len([thing for thing in gc.get_objects() if type(thing) in (RouteTable, Entry)]) == before
