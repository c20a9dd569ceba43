"""run(): who is offered an exit, what an exit owes, what ends a run, and what happens to registers meanwhile."""

import contextlib
import enum
import functools
import gc
import inspect
import itertools
import os
import struct
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import needs_gil, off_main, python

import kvmexit
from kvmexit import PASS, STOP
from kvmexit.testing import ScriptedVM, ScriptStep, hlt, hypercall, memory_fault, mmio_read, mmio_write, pio_in, pio_out

PORT, OTHER_PORT, GPA = 0x10, 0x20, 0x1000
EFAULT, EINTR, EINVAL = 14, 4, 22
IMMEDIATELY = 1      # kvm_run.immediate_exit
REGS, SREGS = 1, 2   # bits of kvm_run.kvm_dirty_regs
REASONS = {"rdmsr": 29, "wrmsr": 30, "xen": 34, "hyperv": 27, "tdx": 40, "snp": 43}
DEFAULT_FAULT_LIMIT = 1000
SPIN = ScriptStep(spin=True)


class Running:
    """A function running in a thread of its own: `with Running(vcpu.run) as running: ...; running.result()`."""

    def __init__(self, function, *args, **kwargs):
        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(function, *args, **kwargs)

    def result(self):
        return self.future.result()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.pool.shutdown()


def wait_for(condition):
    """Yield the processor until a condition holds (pytest's time-out ends a wait in vain)."""
    while not condition():
        os.sched_yield()


def entries(vcpu):
    """-> (immediate_exit, dirty_regs) at each KVM_RUN of a scripted vCPU."""
    return vcpu.vm.script(vcpu).entries


def entered(vcpu):
    """-> how often KVM_RUN was called."""
    return len(entries(vcpu))


def union(vcpu, step=0):
    """-> kvm_run's union as userspace left it when a step was completed."""
    return vcpu.vm.script(vcpu).left(step)[0]


def pio_data(vcpu, step=0):
    """-> the PIO data as userspace left it when a step was completed."""
    return vcpu.vm.script(vcpu).left(step)[1]


class Recorder:
    """A handler that notes its name in a list, and returns a verdict or raises it."""

    def __init__(self, names, name, verdict=None):
        self.names, self.name, self.verdict = names, name, verdict

    def __call__(self, vcpu, exit):
        self.names.append(self.name)
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict


@pytest.fixture
def asked():
    """Names of handlers, in the order they were asked."""
    return []


def msr_exit(kind, index, data=0):
    """An access to an MSR that KVM does not know."""
    return ScriptStep(REASONS[kind], struct.pack("<B7xIIQ", 0, 2, index, data))


# An exit of each kind that asks for an answer: how it is scripted, where in kvm_run's union the answer goes, its size.
# Offsets are those of kvm-abi.md, section 3, less the union's own 32.
READS = {
    "mmio": (mmio_read(GPA, 8), 8, 8),
    "hypercall": (hypercall(12, 1, 2, 3), 56, 8),
    "rdmsr": (msr_exit("rdmsr", 0x1234), 16, 8),
    "xen": (ScriptStep(REASONS["xen"], struct.pack("<I4xII4Q", 1, 1, 0, 17, 0xdead, 0, 0)), 24, 8),
    "hyperv hypercall": (ScriptStep(REASONS["hyperv"], struct.pack("<I4x4Q", 2, 0x5c, 0xdead, 0, 0)), 16, 8),
    "hyperv debugger": (ScriptStep(REASONS["hyperv"], struct.pack("<I4xI4x5Q", 3, 0x4000, 0, 0xdead, 0, 0, 0)), 24, 8),
    "tdx": (ScriptStep(REASONS["tdx"], struct.pack("<8Q", 0, 0x10002, 0xdead, 0, 0, 0, 0, 0)), 16, 8),
}
reads = pytest.mark.parametrize("step", [pio_in(PORT), *(read for read, _, _ in READS.values())], ids=["pio", *READS])

# Exits that ask for nothing.
DONE = {
    "pio": pio_out(PORT, b"x"),
    "mmio": mmio_write(GPA, b"x"),
    "wrmsr": msr_exit("wrmsr", 0x1234, 5),
    "hlt": hlt(),
    "fault": memory_fault(GPA),
    "bare fault": ScriptStep(errno=EFAULT),
    "shutdown": ScriptStep(8),
    "unknown": ScriptStep(1000),
}
done = pytest.mark.parametrize("step", DONE.values(), ids=DONE)


# ---- what a handler returns ----


@done
def test_none_takes_an_exit_that_asks_for_nothing(scripted, step):
    """A handler that returns None has done all there is to do: the vCPU goes on."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: STOP if isinstance(exit, kvmexit.Debug) else None)
    assert isinstance(scripted.create_vcpu(0, [step, ScriptStep(4)]).run(), kvmexit.Debug)


@pytest.mark.parametrize(("size", "value", "data"), [
    (1, 0xab, b"\xab"), (2, 0xabcd, b"\xcd\xab"), (4, 0xabcdef01, b"\x01\xef\xcd\xab"), (4, 1, b"\x01\0\0\0"),
    (1, 0, b"\0"),
])
def test_an_int_answers_port_input(scripted, size, value, data):
    """An int fills the unit, least byte first."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: value)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT, size), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == data


@pytest.mark.parametrize("size", range(1, 9))
def test_an_int_answers_an_mmio_read(scripted, size):
    """An int fills as many bytes as the guest reads, least byte first."""
    scripted.on_mmio(GPA, 8, lambda vcpu, mmio: 0x8877665544332211 & (1 << 8 * size) - 1)
    vcpu = scripted.create_vcpu(0, [mmio_read(GPA, size), hlt()])
    vcpu.run()
    assert union(vcpu)[8:16] == bytes.fromhex("1122334455667788")[:size].ljust(8, b"\0")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_answer_a_read(scripted, kind):
    """bytes, and what is like them, are taken as they are."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: kind(b"\x01\x02"))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT, 2), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == b"\x01\x02"


@pytest.mark.parametrize(("size", "count"), [(1, 2), (4, 4), (1, 17), (2, 2048), (4, 1024)])
def test_bytes_answer_a_string_instruction(scripted, size, count):
    """rep insb and kin take all units at once."""
    data = bytes(i % 251 for i in range(size * count))
    scripted.on_pio(PORT, 1, lambda vcpu, io: data)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT, size, count), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == data


def test_what_is_an_index_answers_as_an_int(scripted):
    """An IntEnum member, or anything with __index__."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: enum.IntEnum("Status", {"READY": 7}).READY)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == b"\x07"


@pytest.mark.parametrize(("step", "at", "size"), READS.values(), ids=READS)
def test_the_return_value_is_the_answer(scripted, step, at, size):
    """MMIO data, ret, result, status: one int, at the place where KVM looks for it, over what was there before."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: None if isinstance(exit, kvmexit.Hlt) else 0x1122334455667788)
    vcpu = scripted.create_vcpu(0, [step, ScriptStep(errno=EINVAL)])
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert int.from_bytes(union(vcpu)[at:at + size], "little") == 0x1122334455667788


def test_the_return_value_answers_a_certificate_request(scripted):
    """SNP_REQ_CERTS: the return value is `ret`."""
    scripted.on(kvmexit.SnpReqCerts, lambda vcpu, certs: 28)
    vcpu = scripted.create_vcpu(0, [ScriptStep(REASONS["snp"], struct.pack("<3Q", 0x5000, 1, 0xdead)), hlt()])
    vcpu.run()
    assert struct.unpack_from("<Q", union(vcpu), 16) == (28,)


@pytest.mark.parametrize("step", [pio_in(PORT), mmio_read(GPA, 1)], ids=["pio", "mmio"])
def test_data_set_on_the_exit_is_an_answer(scripted, step):
    """A handler may set exit.data and return None."""
    @scripted.on(kvmexit.Exit)
    def handler(vcpu, exit):
        if isinstance(exit, kvmexit.Hlt):
            return STOP
        exit.data = 7

    assert isinstance(scripted.create_vcpu(0, [step, hlt()]).run(), kvmexit.Hlt)


def test_ret_set_on_the_exit_is_an_answer(scripted):
    """A handler may set hypercall.ret and return None."""
    scripted.on_hypercall(12, lambda vcpu, call: setattr(call, "ret", 7))
    vcpu = scripted.create_vcpu(0, [hypercall(12), hlt()])
    vcpu.run()
    assert struct.unpack_from("<Q", union(vcpu), 56) == (7,)


def test_an_error_set_on_an_msr_read_is_an_answer(scripted):
    """error = 1 answers with #GP, and no data is asked for."""
    scripted.on_msr(0x1234, 1, lambda vcpu, msr: setattr(msr, "error", 1))
    vcpu = scripted.create_vcpu(0, [READS["rdmsr"][0], hlt()])
    vcpu.run()
    assert union(vcpu)[0] == 1


def test_the_return_value_wins_over_data_set_before(scripted):
    """The last answer counts."""
    @scripted.on_pio(PORT)
    def handler(vcpu, io):
        io.data = 1
        return 2

    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == b"\x02"


def test_data_set_before_pass_stays_the_answer(scripted):
    """A handler that answers and passes leaves an answered exit to the caller: the next run() goes on."""
    @scripted.on_pio(PORT)
    def handler(vcpu, io):
        io.data = 1
        return PASS

    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    assert [type(vcpu.run()), type(vcpu.run())] == [kvmexit.Io, kvmexit.Hlt]


@pytest.mark.parametrize("step", [pio_in(PORT), *DONE.values()], ids=["read", *DONE])
def test_stop_ends_run_with_this_exit(scripted, step, asked):
    """STOP: no other handler is asked, and run() returns the exit."""
    scripted.on(kvmexit.Exit, Recorder(asked, "last"))
    kept = []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: kept.append(exit) or STOP)
    assert [scripted.create_vcpu(0, [step]).run(), *asked] == kept


def test_a_write_returned_with_stop_counts_as_accepted(scripted, asked):
    """The next run() completes it and does not offer it again."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler", STOP))
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    assert (type(vcpu.run()), asked) == (kvmexit.Hlt, ["handler"])


def test_a_read_returned_with_stop_is_offered_again(scripted, asked):
    """STOP is no answer."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler", STOP))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    assert (vcpu.run(), asked) == (vcpu.run(), ["handler", "handler"])


async def coroutine():
    """Something a handler should not return."""


def generator():
    """Something a handler should not return."""
    yield


NO_ANSWER = {
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "str": lambda: "x", "float": lambda: 1.0,
    "list": lambda: [1], "coroutine": coroutine, "generator": generator,
}


@reads
@pytest.mark.parametrize("made", NO_ANSWER.values(), ids=NO_ANSWER)
def test_what_is_no_data_is_no_answer(scripted, step, made):
    """None, a bool, a coroutine and other objects for an unanswered read: TypeError."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: made())
    with pytest.raises(TypeError):
        scripted.create_vcpu(0, [step]).run()


@done
@pytest.mark.parametrize("made", [lambda: 0, lambda: b"", lambda: b"x", *list(NO_ANSWER.values())[1:]],
                         ids=["0", "nothing", "bytes", *list(NO_ANSWER)[1:]])
def test_data_for_what_asks_for_none_is_an_error(scripted, step, made):
    """Anything but None, PASS and STOP for a write or an event: TypeError."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: made())
    with pytest.raises(TypeError):
        scripted.create_vcpu(0, [step]).run()


def test_a_coroutine_is_closed(scripted):
    """Nobody will await it, and the interpreter need not say so."""
    made = coroutine()
    scripted.on_pio(PORT, 1, lambda vcpu, io: made)
    with pytest.raises(TypeError):
        scripted.create_vcpu(0, [pio_in(PORT)]).run()
    assert inspect.getcoroutinestate(made) == inspect.CORO_CLOSED


@pytest.mark.parametrize(("step", "value"), [
    (pio_in(PORT), b""), (pio_in(PORT), b"12"), (pio_in(PORT, 2), b"1"), (pio_in(PORT, 2, 3), b"12345"),
    (mmio_read(GPA, 4), b"123"), (mmio_read(GPA, 8), b"123456789"),
])
def test_data_of_another_length_is_an_error(scripted, step, value):
    """A read takes exactly size * count bytes: ValueError."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: value)
    with pytest.raises(ValueError, match="takes"):
        scripted.create_vcpu(0, [step]).run()


@pytest.mark.parametrize(("step", "value"), [
    (pio_in(PORT), 256), (pio_in(PORT), -1), (pio_in(PORT, 2), 1 << 16), (pio_in(PORT, 4), 1 << 32),
    (mmio_read(GPA, 3), 1 << 24), (mmio_read(GPA, 8), 1 << 64), (hypercall(12), 1 << 64), (hypercall(12), -1),
    (READS["rdmsr"][0], 1 << 64),
])
def test_a_number_that_does_not_fit_is_an_error(scripted, step, value):
    """Nothing is cut off, and nothing wraps: ValueError."""
    scripted.on(kvmexit.Exit, lambda vcpu, exit: value)
    with pytest.raises(ValueError, match="does not fit"):
        scripted.create_vcpu(0, [step]).run()


def test_an_int_does_not_answer_a_string_instruction(scripted):
    """Of several units an int could mean any: TypeError."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: 7)
    with pytest.raises(TypeError):
        scripted.create_vcpu(0, [pio_in(PORT, 1, 2)]).run()


def test_bytes_do_not_answer_a_hypercall(scripted):
    """ret is a number: TypeError."""
    scripted.on_hypercall(12, lambda vcpu, call: b"12345678")
    with pytest.raises(TypeError):
        scripted.create_vcpu(0, [hypercall(12)]).run()


def test_a_certificate_request_takes_only_what_kvm_takes(scripted):
    """SNP_REQ_CERTS: another errno fails KVM_RUN, so it is a ValueError before."""
    scripted.on(kvmexit.SnpReqCerts, lambda vcpu, certs: 22)
    with pytest.raises(ValueError, match="22"):
        scripted.create_vcpu(0, [ScriptStep(REASONS["snp"], bytes(24))]).run()


@pytest.mark.parametrize("wrong", [None, True, b"12", 256])
def test_a_wrong_answer_leaves_the_exit_to_be_offered_again(scripted, wrong):
    """TypeError and ValueError are a handler's failure like any other."""
    answers = iter([wrong, 7])
    scripted.on_pio(PORT, 1, lambda vcpu, io: next(answers))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    with pytest.raises((TypeError, ValueError)):
        vcpu.run()
    vcpu.run()
    assert pio_data(vcpu) == b"\x07"


@pytest.mark.parametrize("step", [pio_out(PORT, b"x"), mmio_write(GPA, b"x")], ids=["pio", "mmio"])
def test_a_write_takes_no_data(scripted, step):
    """Setting data on what the guest wrote: AttributeError."""
    exit = scripted.create_vcpu(0, [step]).run()
    with pytest.raises(AttributeError):
        exit.data = b"y"


def test_a_hypercall_has_no_answer_at_first(scripted):
    """ret is 0 until answered, whatever KVM left in its place."""
    step = ScriptStep(3, struct.pack("<9Q", 12, 0, 0, 0, 0, 0, 0, 0xdead, 1))
    assert scripted.create_vcpu(0, [step]).run().ret == 0


# ---- the order of routes ----


SPECIFIC = {  # from the most specific on
    "port": lambda vm, handler: vm.on_pio(PORT, 1, handler),
    "ports": lambda vm, handler: vm.on_pio(PORT - 1, 3, handler),
    "all ports": lambda vm, handler: vm.on_pio(0, 0x10000, handler),
    "class": lambda vm, handler: vm.on(kvmexit.Io, handler),
    "Exit": lambda vm, handler: vm.on(kvmexit.Exit, handler),
}


@pytest.mark.parametrize("order", [
    list(SPECIFIC), list(SPECIFIC)[::-1], ["class", "port", "Exit", "all ports", "ports"],
    ["all ports", "Exit", "ports", "class", "port"],
], ids=["as asked", "reversed", "mixed", "mixed again"])
def test_the_most_specific_route_comes_first(scripted, asked, order):
    """Small ranges before large ones, ranges before the class, the class before Exit; however they were registered."""
    for name in order:
        SPECIFIC[name](scripted, Recorder(asked, name, PASS))
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["port", "ports", "all ports", "class", "Exit"]


@pytest.mark.parametrize("register", SPECIFIC.values(), ids=SPECIFIC)
def test_of_equal_routes_the_newest_comes_first(scripted, asked, register):
    """So a later handler can stand before an earlier one."""
    for name in ["first", "second", "third"]:
        register(scripted, Recorder(asked, name, PASS))
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["third", "second", "first"]


def test_ranges_of_one_size_are_equals(scripted, asked):
    """Where two ranges of the same size overlap, the newer one comes first."""
    scripted.on_pio(PORT, 2, Recorder(asked, "older", PASS))
    scripted.on_pio(PORT - 1, 2, Recorder(asked, "newer", PASS))
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["newer", "older"]


def test_a_handler_that_takes_the_exit_is_the_last_asked(scripted, asked):
    """None ends the chain."""
    scripted.on(kvmexit.Exit, Recorder(asked, "Exit", STOP))
    scripted.on(kvmexit.Io, Recorder(asked, "class"))
    scripted.on_pio(PORT, 1, Recorder(asked, "port", PASS))
    scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()]).run()
    assert asked == ["port", "class", "Exit"]  # the last is for hlt


@reads
def test_an_exit_that_all_pass_is_the_callers(scripted, asked, step):
    """PASS, PASS: run() returns it."""
    kept = []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: kept.append(exit) or PASS)
    scripted.on(kvmexit.Exit, Recorder(asked, "newer", PASS))
    assert [scripted.create_vcpu(0, [step]).run(), *asked] == [*kept, "newer"]


RANGES = {  # a registration for 2 numbers from 0x100 on, or one number, and an exit at a number
    "pio": (lambda vm, handler: vm.on_pio(0x100, 2, handler), lambda at: pio_out(at, b"x")),
    "mmio": (lambda vm, handler: vm.on_mmio(0x100, 2, handler), lambda at: mmio_write(at, b"x")),
    "memory fault": (lambda vm, handler: vm.on_memory_fault(0x100, 2, handler), memory_fault),
    "rdmsr": (lambda vm, handler: vm.on_msr(0x100, 2, handler), lambda at: msr_exit("rdmsr", at)),
    "wrmsr": (lambda vm, handler: vm.on_msr(0x100, 2, handler), lambda at: msr_exit("wrmsr", at)),
}


@pytest.mark.parametrize(("register", "exit_at"), RANGES.values(), ids=RANGES)
def test_a_range_covers_its_numbers_and_no_other(scripted, asked, register, exit_at):
    """first and first + count - 1 are in it, their neighbours are not."""
    register(scripted, lambda vcpu, exit: asked.append(vcpu.id) or STOP)
    for at in [0xff, 0x100, 0x101, 0x102]:
        scripted.create_vcpu(at, [exit_at(at)]).run()
    assert asked == [0x100, 0x101]


def test_a_hypercall_route_is_for_one_number(scripted, asked):
    """Others are the caller's."""
    scripted.on_hypercall(12, lambda vcpu, call: asked.append(call.nr) or 0)
    assert (scripted.create_vcpu(0, [hypercall(12), hypercall(11)]).run().nr, asked) == (11, [12])


def test_a_range_may_reach_to_the_end_of_the_address_space(scripted, asked):
    """The last byte is one that can be asked for."""
    scripted.on_mmio(2**64 - 1, 1, Recorder(asked, "last byte", STOP))
    scripted.create_vcpu(0, [mmio_write(2**64 - 1, b"x")]).run()
    assert asked == ["last byte"]


def test_memory_faults_without_a_range_are_all(scripted, asked):
    """on_memory_fault() alone sees every one."""
    scripted.on_memory_fault(handler=lambda vcpu, fault: asked.append(fault.gpa))
    scripted.create_vcpu(0, [memory_fault(0), memory_fault(2**64 - 4096), hlt()]).run()
    assert asked == [0, 2**64 - 4096]


def test_a_route_sees_only_its_kind(scripted, asked):
    """A port number is no address."""
    scripted.on_mmio(PORT, 1, Recorder(asked, "mmio"))
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == []


def test_what_contradicts_itself_goes_to_no_range(scripted, asked):
    """A port exit of 3-byte units is an UnknownExit."""
    scripted.on_pio(PORT, 1, Recorder(asked, "port"))
    scripted.on(kvmexit.UnknownExit, Recorder(asked, "UnknownExit", STOP))
    scripted.create_vcpu(0, [ScriptStep(2, struct.pack("<BBHIQ", 1, 3, PORT, 1, 4096))]).run()
    assert asked == ["UnknownExit"]


def test_handlers_are_called_with_the_vcpu_and_the_exit(scripted):
    """handler(vcpu, exit), by position."""
    calls = []
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")])
    scripted.on_pio(PORT, 1, lambda *arguments, **names: calls.append((arguments, names)) or STOP)
    exit = vcpu.run()
    assert calls == [((vcpu, exit), {})]


class Callables:
    """What else than a function can be called."""

    def __call__(self, vcpu, io):
        return 7

    def method(self, vcpu, io):
        return 7

    @staticmethod
    def static(vcpu, io):
        return 7


@pytest.mark.parametrize("handler", [
    Callables(), Callables().method, Callables.static, functools.partial(lambda value, vcpu, io: value, 7),
], ids=["object", "method", "staticmethod", "partial"])
def test_any_callable_is_a_handler(scripted, handler):
    """Not only functions."""
    scripted.on_pio(PORT, 1, handler)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == b"\x07"


# ---- registering ----


REGISTER = {
    "on": lambda vm, *handler: vm.on(kvmexit.Hlt, *handler),
    "on_pio": lambda vm, *handler: vm.on_pio(PORT, 1, *handler),
    "on_mmio": lambda vm, *handler: vm.on_mmio(GPA, 1, *handler),
    "on_memory_fault": lambda vm, *handler: vm.on_memory_fault(0, 4096, *handler),
    "on_hypercall": lambda vm, *handler: vm.on_hypercall(12, *handler),
    "on_msr": lambda vm, *handler: vm.on_msr(1, 1, *handler),
}
register = pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)


async def async_function(vcpu, exit):
    """No handler."""


def generator_function(vcpu, exit):
    """No handler."""
    yield


async def async_generator_function(vcpu, exit):
    """No handler."""
    yield


@register
@pytest.mark.parametrize("handler", [
    async_function, generator_function, async_generator_function, functools.partial(async_function),
])
def test_functions_that_do_not_answer_at_once_are_refused(scripted, register, handler):
    """async def and generator functions: TypeError when registered, not when called."""
    with pytest.raises(TypeError, match="plain function"):
        register(scripted, handler)


@register
@pytest.mark.parametrize("handler", [1, "handler", b"", [], PASS])
def test_what_cannot_be_called_is_refused(scripted, register, handler):
    """TypeError says what a handler is."""
    with pytest.raises(TypeError, match=r"\(vcpu, exit\)"):
        register(scripted, handler)


@register
def test_decorators_refuse_as_well(scripted, register):
    """The same check, at the same moment."""
    with pytest.raises(TypeError):
        register(scripted)(async_function)


@register
def test_a_decorator_leaves_the_function_as_it_is(scripted, register):
    """So it can be called and registered again."""
    def handler(vcpu, exit):
        """Never called."""

    assert register(scripted)(handler) is handler


@register
def test_registering_gives_a_route(scripted, register):
    """Which knows its handler."""
    def handler(vcpu, exit):
        """Never called."""

    route = register(scripted, handler)
    assert (type(route), route.handler) == (kvmexit.Route, handler)


@pytest.mark.parametrize("what", [kvmexit.Interrupted, int, object, None, 5, "Hlt", Exception])
def test_what_no_handler_sees_cannot_be_registered_for(scripted, what):
    """Interrupted is run()'s own, and the rest are no exits: ValueError."""
    with pytest.raises(ValueError, match="no class of exits"):
        scripted.on(what, lambda vcpu, exit: None)


@pytest.mark.parametrize("attempt", [
    lambda vm: vm.on_pio(-1, 1), lambda vm: vm.on_pio(0x10000, 1), lambda vm: vm.on_pio(0xffff, 2),
    lambda vm: vm.on_pio(0, 0), lambda vm: vm.on_pio(0, -1), lambda vm: vm.on_mmio(2**64, 1),
    lambda vm: vm.on_mmio(2**64 - 1, 2), lambda vm: vm.on_mmio(-1, 1), lambda vm: vm.on_mmio(0, 0),
    lambda vm: vm.on_msr(2**32, 1), lambda vm: vm.on_msr(-1), lambda vm: vm.on_memory_fault(0),
    lambda vm: vm.on_memory_fault(size=4096), lambda vm: vm.on_memory_fault(2**64, 4096),
    lambda vm: vm.on_hypercall(-1, lambda vcpu, call: 0), lambda vm: vm.on_hypercall(2**64, lambda vcpu, call: 0),
])
def test_ranges_outside_their_space_are_refused(scripted, attempt):
    """Empty, negative, beyond the end, or half given: ValueError."""
    with pytest.raises(ValueError):  # noqa: PT011 - each names its own numbers
        attempt(scripted)


def test_a_removed_route_is_not_asked(scripted, asked):
    """remove() takes the handler out."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler")).remove()
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == []


def test_removing_a_route_leaves_the_others(scripted, asked):
    """Also one of the same handler for the same range."""
    handler = Recorder(asked, "handler", PASS)
    scripted.on_pio(PORT, 1, handler)
    scripted.on_pio(PORT, 1, handler).remove()
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["handler"]


def test_a_route_may_be_removed_twice(scripted, asked):
    """The second time nothing happens, to other routes either."""
    scripted.on_pio(PORT, 1, Recorder(asked, "other", PASS))
    route = scripted.on_pio(PORT, 1, Recorder(asked, "handler", PASS))
    route.remove()
    route.remove()
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["other"]


def test_a_route_is_taken_back_at_the_end_of_its_block(scripted, asked):
    """with vm.on_pio(...): inside the handler is asked, outside it is not."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(PORT, b"y")])
    with scripted.on_pio(PORT, 1, Recorder(asked, "handler", PASS)):
        vcpu.run()
    vcpu.run()
    assert asked == ["handler"]


def test_a_route_is_taken_back_when_its_block_fails(scripted, asked):
    """The exception goes on."""
    with pytest.raises(KeyError), scripted.on_pio(PORT, 1, Recorder(asked, "handler", KeyError())):
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    scripted.create_vcpu(1, [pio_out(PORT, b"x")]).run()
    assert asked == ["handler"]


def test_removing_an_msr_route_takes_reads_and_writes_back(scripted, asked):
    """It is one route over two kinds of exit."""
    scripted.on_msr(0x1234, 1, Recorder(asked, "handler", STOP)).remove()
    scripted.create_vcpu(0, [READS["rdmsr"][0]]).run()
    scripted.create_vcpu(1, [DONE["wrmsr"]]).run()
    assert asked == []


def test_routes_are_the_vms(scripted, asked):
    """Another VM's vCPU does not see them."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler"))
    with ScriptedVM() as other:
        other.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == []


class Device:
    """Something with a route, that takes it back when it goes; only the collector of cycles finds it."""

    def __init__(self, vm, asked):
        self.cycle = self
        self.route = vm.on_pio(PORT, 1, Recorder(asked, "device"))

    def __del__(self):
        self.route.remove()


@pytest.mark.parametrize("allocations", range(12))
def test_a_route_removed_by_a_finalizer_stays_removed(scripted, asked, allocations):
    """Whenever the collector runs: on 3.11 also at an allocation in the midst of another registration."""
    before = gc.get_threshold()
    gc.disable()
    try:
        Device(scripted, asked)
        gc.set_threshold(gc.get_count()[0] + allocations)
        gc.enable()
        scripted.on_pio(OTHER_PORT, 1, Recorder(asked, "other"))
    finally:
        gc.set_threshold(*before)
        gc.enable()
    gc.collect()
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == []


# ---- routes that change while a vCPU runs ----


def test_a_handler_added_by_a_handler_takes_the_next_exit(scripted, asked):
    """Not the one in hand: that is offered to the routes there were."""
    @scripted.on_pio(PORT)
    def adds(vcpu, io):
        asked.append("adds")
        scripted.on_pio(PORT, 1, Recorder(asked, "added", STOP))
        return PASS

    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(PORT, b"y")])
    vcpu.run()
    vcpu.run()
    assert asked == ["adds", "added"]


def test_a_handler_may_remove_itself(scripted, asked):
    """It has taken this exit, and gets no other."""
    def once(vcpu, io):
        asked.append("once")
        route.remove()

    route = scripted.on_pio(PORT, 1, once)
    scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(PORT, b"y")]).run()
    assert asked == ["once"]


def test_a_handler_that_removed_itself_can_still_pass(scripted, asked):
    """The next in the chain is asked as if nothing had happened."""
    scripted.on_pio(PORT, 1, Recorder(asked, "older", STOP))
    route = scripted.on_pio(PORT, 1, lambda vcpu, io: route.remove() or PASS)
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["older"]


def test_a_handler_removed_by_another_is_not_freed_under_the_call(scripted, asked):
    """The chain in hand keeps its handlers alive, also when nobody else refers to them."""
    route = scripted.on_pio(PORT, 1, Recorder(asked, "older", STOP))

    def removes(vcpu, io):
        nonlocal route
        route.remove()
        route = None
        gc.collect()
        return PASS

    scripted.on_pio(PORT, 1, removes)
    scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert asked == ["older"]


def test_a_handler_added_by_another_thread_takes_the_next_exit(scripted, asked):
    """While the vCPU is in a handler."""
    def adds(vcpu, io):
        off_main(scripted.on_pio, OTHER_PORT, 1, Recorder(asked, "added", STOP))

    scripted.on_pio(PORT, 1, adds)
    scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(OTHER_PORT, b"y")]).run()
    assert asked == ["added"]


def test_a_handler_added_while_the_guest_runs_takes_the_next_exit(scripted, asked):
    """While the vCPU is inside KVM_RUN."""
    vcpu = scripted.create_vcpu(0, [SPIN, pio_out(PORT, b"x")])
    with Running(vcpu.run):
        wait_for(lambda: entered(vcpu) == 1)
        scripted.on_pio(PORT, 1, Recorder(asked, "added", STOP))
        vcpu.kick()
    vcpu.run()
    assert asked == ["added"]


def test_a_handler_removed_while_the_guest_runs_is_not_asked(scripted, asked):
    """While the vCPU is inside KVM_RUN."""
    route = scripted.on_pio(PORT, 1, Recorder(asked, "removed"))
    vcpu = scripted.create_vcpu(0, [SPIN, pio_out(PORT, b"x")])
    with Running(vcpu.run):
        wait_for(lambda: entered(vcpu) == 1)
        route.remove()
        vcpu.kick()
    vcpu.run()
    assert asked == []


def test_a_handler_removed_by_another_thread_ends_its_call(scripted, asked):
    """remove() does not wait for a call that is under way, nor cut it short."""
    def handler(vcpu, io):
        off_main(route.remove)
        asked.append("went on")

    route = scripted.on_pio(PORT, 1, handler)
    scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(PORT, b"y")]).run()
    assert asked == ["went on"]


# ---- exceptions ----

EXITS = {"read": pio_in(PORT), **DONE}
exits = pytest.mark.parametrize("step", EXITS.values(), ids=EXITS)


@pytest.mark.parametrize("error", [
    KeyError("x"), KeyboardInterrupt(), SystemExit(3), StopIteration(), GeneratorExit(), kvmexit.Error("x"),
], ids=lambda error: type(error).__name__)
def test_an_exception_leaves_run_unchanged(scripted, asked, error):
    """The very object, not one that wraps it."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler", error))
    with pytest.raises(type(error)) as caught:
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert (caught.value, caught.value.__cause__, caught.value.__context__) == (error, None, None)


def test_an_exception_keeps_its_traceback(scripted):
    """From the caller of run() down to the line that raised."""
    def raises_here(vcpu, io):
        raise KeyError("x")

    scripted.on_pio(PORT, 1, raises_here)
    with pytest.raises(KeyError) as caught:
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()
    assert traceback.extract_tb(caught.tb)[-1].name == "raises_here"


@exits
def test_an_exit_whose_handler_raised_is_offered_again(scripted, asked, step):
    """By the next run(), from the first route on; also a write or a fault, which asks for nothing."""
    scripted.on(kvmexit.Exit, Recorder(asked, "raises", KeyError()))
    scripted.on(kvmexit.Exit, Recorder(asked, "passes", PASS))
    vcpu = scripted.create_vcpu(0, [step, ScriptStep(4)])
    for _ in range(2):
        with pytest.raises(KeyError):
            vcpu.run()
    assert asked == ["passes", "raises", "passes", "raises"]


@exits
def test_kvm_is_not_entered_while_a_handler_has_failed(scripted, step):
    """One entry for the exit, none for the offers after it."""
    scripted.on(kvmexit.Exit, Recorder([], "raises", KeyError()))
    vcpu = scripted.create_vcpu(0, [step, ScriptStep(4)])
    for _ in range(3):
        with pytest.raises(KeyError):
            vcpu.run()
    assert entered(vcpu) == 1


@exits
def test_an_exit_whose_handler_raised_is_the_same_when_offered_again(scripted, step):
    """The same object: nothing about it has changed."""
    seen = []

    @scripted.on(kvmexit.Exit)
    def handler(vcpu, exit):
        seen.append(exit)
        if len(seen) == 1:
            raise KeyError
        return STOP

    vcpu = scripted.create_vcpu(0, [step])
    with pytest.raises(KeyError):
        vcpu.run()
    assert vcpu.run() is seen[0]


@exits
def test_an_exit_whose_handler_raised_is_pending(scripted, step):
    """vcpu.pending shows it."""
    kept = []
    vcpu = scripted.create_vcpu(0, [step])
    scripted.on(kvmexit.Exit, lambda vcpu, exit: kept.append(exit) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vcpu.run()
    assert vcpu.pending is kept[0]


@exits
def test_an_exit_whose_handler_raised_is_the_callers_once_the_handler_is_gone(scripted, step):
    """Offered again, and nobody takes it."""
    kept = []
    route = scripted.on(kvmexit.Exit, lambda vcpu, exit: kept.append(exit) or 1 / 0)
    vcpu = scripted.create_vcpu(0, [step])
    with pytest.raises(ZeroDivisionError):
        vcpu.run()
    route.remove()
    assert vcpu.run() is kept[0]


def test_a_handler_that_answered_and_then_raised_is_asked_again(scripted):
    """Its failure counts for more than the answer it had set."""
    calls = []

    @scripted.on_pio(PORT)
    def handler(vcpu, io):
        calls.append(io)
        io.data = 1
        if len(calls) == 1:
            raise KeyError
        return 2

    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    with pytest.raises(KeyError):
        vcpu.run()
    vcpu.run()
    assert len(calls) == 2


def test_a_handler_that_answered_and_then_returned_rubbish_is_asked_again(scripted):
    """ValueError is a failure like any other."""
    answers = iter([256, 2])

    @scripted.on_pio(PORT)
    def handler(vcpu, io):
        io.data = 1
        return next(answers)

    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    with pytest.raises(ValueError, match="does not fit"):
        vcpu.run()
    vcpu.run()
    assert pio_data(vcpu) == b"\x02"


def test_the_caller_may_answer_for_a_handler_that_raised(scripted, asked):
    """vcpu.pending.data = ...; the handler is not asked again."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler", KeyError()))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    with pytest.raises(KeyError):
        vcpu.run()
    vcpu.pending.data = 7
    assert (type(vcpu.run()), asked) == (kvmexit.Hlt, ["handler"])


def test_after_an_exception_the_vcpu_does_not_run(scripted):
    """It has left run(), as after any other end."""
    scripted.on_pio(PORT, 1, Recorder([], "handler", KeyError()))
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")])
    with pytest.raises(KeyError):
        vcpu.run()
    assert not vcpu.running


# ---- what an exit owes ----


@reads
def test_an_unanswered_read_is_offered_again(scripted, asked, step):
    """run() returns it, and the next run() begins with it."""
    vcpu = scripted.create_vcpu(0, [step])
    first = vcpu.run()
    scripted.on(kvmexit.Exit, Recorder(asked, "handler", PASS))
    assert (vcpu.run() is first, asked) == (True, ["handler"])


@reads
def test_kvm_is_not_entered_with_an_unanswered_read(scripted, step):
    """The guest would read rubbish."""
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    for _ in range(3):
        vcpu.run()
    assert entered(vcpu) == 1


@pytest.mark.parametrize("payload", [
    struct.pack("<BBHIQ", 2, 1, PORT, 1, 4096), struct.pack("<BBHIQ", 0, 0, PORT, 1, 4096),
    struct.pack("<BBHIQ", 0, 1, PORT, 0, 4096), struct.pack("<BBHIQ", 0, 4, PORT, 2**32 - 1, 4096),
    struct.pack("<BBHIQ", 0, 1, PORT, 1, 2**64 - 1),
    struct.pack("<BBHIQ", 0, 1, PORT, 8193, 4096), struct.pack("<BBHIQ", 0, 1, PORT, 1, 0),
], ids=["direction", "no size", "no units", "too long", "far outside", "one byte too long", "inside kvm_run"])
def test_kvm_is_not_entered_after_port_input_that_contradicts_itself(scripted, payload):
    """Nobody can answer it, so it stays with the caller."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(2, payload), hlt()])
    vcpu.run()
    assert (type(vcpu.run()), entered(vcpu)) == (kvmexit.UnknownExit, 1)


def test_an_unanswered_read_is_answered_by_a_handler_added_later(scripted):
    """The second offer goes to the routes of that moment."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    scripted.on_pio(PORT, 1, lambda vcpu, io: 7)
    vcpu.run()
    assert pio_data(vcpu) == b"\x07"


@pytest.mark.parametrize("verdict", [None, PASS])
def test_the_answer_to_one_read_does_not_answer_the_next(scripted, verdict):
    """Each is asked for anew."""
    verdicts = iter([7, verdict, 8])
    scripted.on_pio(PORT, 1, lambda vcpu, io: next(verdicts))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), pio_in(PORT), hlt()])
    with contextlib.suppress(TypeError):
        vcpu.run()
    vcpu.run()
    assert pio_data(vcpu, 1) == b"\x08"


def test_an_answered_read_is_not_offered_again(scripted, asked):
    """exit.data = ... by the caller; the next run() goes on."""
    scripted.on_pio(PORT, 1, Recorder(asked, "handler", PASS))
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run().data = 7
    assert (type(vcpu.run()), asked) == (kvmexit.Hlt, ["handler"])


def test_an_answer_by_the_caller_reaches_kvm(scripted):
    """exit.data is where the guest reads."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT, 4), hlt()])
    vcpu.run().data = 0x12345678
    vcpu.run()
    assert pio_data(vcpu) == bytes.fromhex("78563412")


def test_an_answer_can_be_changed_before_the_next_run(scripted):
    """The last one counts."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    io = vcpu.run()
    io.data = 1
    io.data = 2
    vcpu.run()
    assert pio_data(vcpu) == b"\x02"


def test_an_answer_may_come_from_another_thread(scripted):
    """A vCPU that does not run belongs to no thread."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    off_main(setattr, vcpu.run(), "data", 7)
    vcpu.run()
    assert pio_data(vcpu) == b"\x07"


def test_a_refused_answer_changes_nothing(scripted):
    """The exit is as unanswered as before."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    io = vcpu.run()
    with pytest.raises(ValueError, match="does not fit"):
        io.data = 256
    assert (io.data, vcpu.run()) == (None, io)


def test_a_late_answer_is_an_error(scripted):
    """NotPendingError: KVM has been re-entered, and the answer would go to another exit."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), pio_in(PORT)])
    io = vcpu.run()
    io.data = 1
    vcpu.run()
    with pytest.raises(kvmexit.NotPendingError):
        io.data = 2


def test_an_answer_while_the_guest_runs_is_an_error(scripted):
    """NotPendingError from another thread, too: KVM has been re-entered."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), SPIN])
    io = vcpu.run()
    io.data = 1
    with Running(vcpu.run):
        wait_for(lambda: entered(vcpu) == 2)
        try:
            with pytest.raises(kvmexit.NotPendingError):
                io.data = 2
        finally:
            vcpu.kick()


def test_an_answer_during_the_handler_is_the_handlers_business(scripted):
    """VcpuBusyError for another thread while the vCPU runs."""
    def handler(vcpu, io):
        with pytest.raises(kvmexit.VcpuBusyError):
            off_main(setattr, io, "data", 1)
        return 2

    scripted.on_pio(PORT, 1, handler)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    assert pio_data(vcpu) == b"\x02"


@pytest.mark.parametrize("step", [DONE["pio"], DONE["mmio"], DONE["wrmsr"]], ids=["pio", "mmio", "wrmsr"])
def test_a_returned_write_counts_as_accepted(scripted, asked, step):
    """It is offered once; the next run() completes it."""
    scripted.on(kvmexit.Exit, Recorder(asked, "handler", PASS))
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    vcpu.run()
    assert (type(vcpu.run()), asked) == (kvmexit.Hlt, ["handler", "handler"])


def test_exits_are_matched_in_pull_style(scripted):
    """A VMM without handlers: one match statement round run()."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"a"), pio_in(PORT), mmio_write(GPA, b"b"), memory_fault(GPA), hlt()])
    log = []
    while not log or log[-1] != "hlt":
        match vcpu.run():
            case kvmexit.Io(port, size=1, is_write=True, data=data):
                log.append(("out", port, data))
            case kvmexit.Io(port, size) as io:
                log.append(("in", port, size))
                io.data = 7
            case kvmexit.Mmio(gpa, is_write=True, data=data):
                log.append(("mmio", gpa, data))
            case kvmexit.MemoryFault(gpa, size, private):
                log.append(("fault", gpa, size, private))
            case kvmexit.Hlt():
                log.append("hlt")
    assert log == [("out", PORT, b"a"), ("in", PORT, 1), ("mmio", GPA, b"b"), ("fault", GPA, 4096, False), "hlt"]


# ---- pending ----


def test_nothing_is_pending_at_first(scripted):
    """No exit, nothing to complete."""
    assert scripted.create_vcpu(0, [hlt()]).pending is None


@pytest.mark.parametrize("step", [
    pio_in(PORT), pio_out(PORT, b"x"), mmio_read(GPA, 1), mmio_write(GPA, b"x"), hypercall(12), READS["rdmsr"][0],
    DONE["wrmsr"], ScriptStep(33),
], ids=["in", "out", "mmio read", "mmio write", "hypercall", "rdmsr", "wrmsr", "bus lock"])
def test_what_kvm_completes_on_the_next_entry_is_pending(scripted, step):
    """It is the exit that run() returned."""
    vcpu = scripted.create_vcpu(0, [step])
    exit = vcpu.run()
    assert vcpu.pending is exit


@pytest.mark.parametrize("step", [hlt(), memory_fault(GPA), ScriptStep(errno=EFAULT), ScriptStep(8)],
                         ids=["hlt", "fault", "bare fault", "shutdown"])
def test_what_kvm_has_done_with_is_not_pending(scripted, step):
    """The caller has it, and KVM waits for nothing."""
    vcpu = scripted.create_vcpu(0, [step])
    vcpu.run()
    assert vcpu.pending is None


def test_an_answered_read_is_pending_until_kvm_took_it(scripted):
    """The answer is in kvm_run; the guest has not got it."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT)])
    io = vcpu.run()
    io.data = 1
    assert vcpu.pending is io


@exits
def test_in_a_handler_its_exit_is_pending(scripted, step):
    """The very object."""
    same = []
    scripted.on(kvmexit.Exit, lambda vcpu, exit: same.append(vcpu.pending is exit) or STOP)
    scripted.create_vcpu(0, [step]).run()
    assert same == [True]


def test_after_a_kick_nothing_is_pending(scripted):
    """What was has been completed on the way."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")])
    vcpu.run()
    vcpu.kick()
    vcpu.run()
    assert vcpu.pending is None


def test_pending_of_a_running_vcpu_is_busy(scripted):
    """Another thread must not look into kvm_run while KVM writes it: VcpuBusyError, as for registers."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN])
    vcpu.run()
    with Running(vcpu.run):
        wait_for(lambda: entered(vcpu) == 2)
        try:
            with pytest.raises(kvmexit.VcpuBusyError):
                vcpu.pending  # noqa: B018
        finally:
            vcpu.kick()


# ---- exits are values ----


@pytest.mark.parametrize(("step", "other"), [
    (pio_out(PORT, b"x"), pio_out(OTHER_PORT, b"yz")), (pio_out(PORT, b"x" * 99), pio_out(OTHER_PORT, b"y" * 99)),
    (mmio_write(GPA, b"x"), mmio_write(0, b"yz")), (memory_fault(GPA), memory_fault(0, private=True)),
    (hypercall(12, 1), hypercall(11, 2)), (ScriptStep(1000, b"x"), ScriptStep(1001, b"y")),
    (ScriptStep(errno=EFAULT, rip=1), ScriptStep(errno=EFAULT, rip=2)),
], ids=["pio", "string", "mmio", "fault", "hypercall", "unknown", "bare fault"])
def test_an_exit_that_a_handler_keeps_never_changes(scripted, step, other):
    """Whatever comes after it."""
    kept = []

    @scripted.on(kvmexit.Exit)
    def handler(vcpu, exit):
        kept.append((exit, repr(exit)))
        return 0 if isinstance(exit, kvmexit.Hypercall) else None

    vcpu = scripted.create_vcpu(0, [step, other])
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    exit, then = kept[0]
    assert repr(exit) == then


def test_a_returned_exit_never_changes(scripted):
    """Also while the vCPU goes on to another of its class."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(OTHER_PORT, b"y")])
    exit = vcpu.run()
    vcpu.run()
    assert (exit.port, exit.data) == (PORT, b"x")


@needs_gil("that nobody else refers to it cannot be seen there")
@pytest.mark.parametrize("step", [
    pio_out(PORT, b"x"), pio_in(PORT), mmio_write(GPA, b"x"), memory_fault(GPA), hypercall(12),
], ids=["out", "in", "mmio", "fault", "hypercall"])
def test_an_exit_that_nobody_keeps_is_reused(scripted, step):
    """One object serves a run of exits."""
    seen = set()

    @scripted.on(kvmexit.Exit)
    def handler(vcpu, exit):
        seen.add(id(exit))
        return 0 if isinstance(exit, kvmexit.Hypercall) or getattr(exit, "is_write", True) is False else None

    with pytest.raises(kvmexit.KvmError):
        scripted.create_vcpu(0, [step], repeat=100).run()
    assert len(seen) == 1


# ---- MMIO and memslots ----


@pytest.mark.parametrize(("gpa", "inside"), [
    (0, False), (0xfff, False), (0x1000, True), (0x2fff, True), (0x3000, False), (2**64 - 1, False),
])
def test_mmio_says_which_slot_covers_it(scripted, gpa, inside):
    """A write to a read-only slot is MMIO as well; only an address outside every slot has None."""
    slot = scripted.memory.add(0x1000, 0x2000, readonly=True)
    assert scripted.create_vcpu(0, [mmio_write(gpa, b"x")]).run().slot is (slot if inside else None)


def test_mmio_finds_its_slot_among_many(scripted):
    """Each of its own."""
    slots = [scripted.memory.add(0x2000 * i, 0x1000) for i in range(7)]
    vcpu = scripted.create_vcpu(0, [mmio_write(0x2000 * i + 0x800, b"x") for i in range(7)])
    assert [vcpu.run().slot for _ in slots] == slots


def test_mmio_has_the_slot_of_its_moment(scripted):
    """An exit is a value: a slot added afterwards does not change it, also when it is offered again."""
    vcpu = scripted.create_vcpu(0, [mmio_read(GPA, 1)])
    exit = vcpu.run()
    scripted.memory.add(GPA, 0x1000)
    vcpu.run()
    assert exit.slot is None


# ---- complete() ----


@pytest.mark.parametrize("before", [[], [hlt()], [memory_fault(GPA)], [ScriptStep(errno=EFAULT)]],
                         ids=["new", "hlt", "fault", "bare fault"])
def test_complete_enters_nothing_where_nothing_is_pending(scripted, before):
    """There is nothing to let KVM finish."""
    vcpu = scripted.create_vcpu(0, [*before, hlt()])
    for _ in before:
        vcpu.run()
    assert (vcpu.complete(), entered(vcpu)) == (None, len(before))


def test_complete_lets_kvm_finish_a_write(scripted):
    """One entry, with immediate_exit; the guest does not run on."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    assert (off_main(vcpu.complete), entries(vcpu)) == (None, [(0, 0), (IMMEDIATELY, 0)])


def test_complete_lets_kvm_finish_an_answered_read(scripted):
    """The answer is taken."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run().data = 7
    vcpu.complete()
    assert pio_data(vcpu) == b"\x07"


def test_after_complete_nothing_is_pending(scripted):
    """An answer would come too late."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.complete()
    assert vcpu.pending is None


def test_after_complete_the_guest_runs_on(scripted):
    """With the exit after, and without a left-over immediate_exit."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    off_main(vcpu.complete)
    assert (type(off_main(vcpu.run)), entries(vcpu)) == (kvmexit.Hlt, [(0, 0), (IMMEDIATELY, 0), (0, 0)])


def test_complete_twice_is_once(scripted):
    """The second time there is nothing to do."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    off_main(vcpu.complete)
    assert (off_main(vcpu.complete), entered(vcpu)) == (None, 2)


@reads
def test_complete_returns_a_read_that_is_still_owing(scripted, step):
    """And enters nothing."""
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    exit = vcpu.run()
    assert (vcpu.complete() is exit, entered(vcpu)) == (True, 1)


def test_complete_offers_what_is_owing_to_the_handlers(scripted):
    """Which can answer it by now; then it is completed."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run()
    scripted.on_pio(PORT, 1, lambda vcpu, io: 7)
    assert (vcpu.complete(), pio_data(vcpu)) == (None, b"\x07")


@exits
def test_complete_offers_an_exit_whose_handler_raised(scripted, asked, step):
    """From the first route on, and raises what it raises."""
    scripted.on(kvmexit.Exit, Recorder(asked, "handler", KeyError()))
    vcpu = scripted.create_vcpu(0, [step])
    for call in [vcpu.run, vcpu.complete]:
        with pytest.raises(KeyError):
            call()
    assert asked == ["handler", "handler"]


def test_complete_raises_where_kvm_refuses(scripted):
    """KvmError as from run(); the exit stays pending."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")])
    vcpu.run()
    scripted.close()
    with pytest.raises(kvmexit.Error):
        vcpu.complete()


def test_complete_keeps_a_kick_for_the_next_run(scripted):
    """It is run() that says so."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.kick()
    vcpu.complete()
    assert vcpu.run().cause == "kick"


def test_complete_with_nothing_pending_keeps_a_kick_too(scripted):
    """No entry, no kick spent."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.kick()
    vcpu.complete()
    assert vcpu.run().cause == "kick"


halves = pytest.mark.skipif(
    "second_half" not in ScriptStep._fields, reason="scripts cannot yet give out the second half of an access")


def half(step):
    """A step that KVM gives out while it completes the one before, immediate_exit or not."""
    return step._replace(second_half=True)


@halves
def test_complete_returns_a_second_half_nobody_took(scripted):
    """rc 0 with immediate_exit is a new exit of the same instruction."""
    vcpu = scripted.create_vcpu(0, [mmio_write(0xffc, b"abcd"), half(mmio_write(0x1000, b"efgh")), hlt()])
    vcpu.run()
    assert vcpu.complete().data == b"efgh"


@halves
def test_complete_routes_a_second_half(scripted):
    """Handlers see it as always; completing goes on behind it, until EINTR."""
    data = []
    scripted.on_mmio(0x1000, 4, lambda vcpu, mmio: data.append(mmio.data))
    vcpu = scripted.create_vcpu(0, [mmio_write(0xffc, b"abcd"), half(mmio_write(0x1000, b"efgh")), hlt()])
    vcpu.run()
    assert (off_main(vcpu.complete), data, entered(vcpu)) == (None, [b"efgh"], 3)


@halves
def test_complete_returns_a_second_half_that_is_still_owing(scripted):
    """And once it is answered completes it."""
    vcpu = scripted.create_vcpu(0, [mmio_read(0xffc, 4), half(mmio_read(0x1000, 4)), hlt()])
    vcpu.run().data = b"abcd"
    vcpu.complete().data = b"efgh"
    vcpu.complete()
    assert union(vcpu, 1)[8:12] == b"efgh"


@halves
def test_a_kicked_run_routes_a_second_half_first(scripted, asked):
    """The kick is answered when nothing is pending any more."""
    scripted.on_mmio(0, 0x2000, Recorder(asked, "handler"))
    vcpu = scripted.create_vcpu(0, [mmio_write(0xffc, b"abcd"), half(mmio_write(0x1000, b"efgh")), hlt()])
    vcpu.kick()
    vcpu.run()
    scripted.on_mmio(0xffc, 1, lambda vcpu, mmio: vcpu.kick())
    assert (vcpu.run().cause, asked) == ("kick", ["handler"])


@halves
def test_register_writes_wait_for_the_second_half(scripted):
    """They are applied behind the last completion, and never in an entry that completes something."""
    scripted.on_mmio(0, 0x2000, lambda vcpu, mmio: setattr(vcpu.regs, "rax", 5))
    vcpu = scripted.create_vcpu(0, [mmio_write(0xffc, b"abcd"), half(mmio_write(0x1000, b"efgh")), hlt()])
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (IMMEDIATELY, 0), (IMMEDIATELY, 0), (0, REGS)]


# ---- registers ----


def test_a_register_reads_back_what_was_written(scripted):
    """Before any run."""
    vcpu = scripted.create_vcpu(0)
    vcpu.regs.rax = 0x1122334455667788
    assert vcpu.regs.rax == 0x1122334455667788


def test_a_register_keeps_what_was_written(scripted):
    """KVM has it now, and gives it back."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.regs.rax = 5
    vcpu.run()
    assert vcpu.regs.rax == 5


def test_rip_is_where_the_guest_left(scripted):
    """Of the latest exit."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(5, rip=0x10), ScriptStep(5, rip=0x20)])
    vcpu.run()
    vcpu.run()
    assert vcpu.regs.rip == 0x20


def test_a_register_written_while_an_exit_is_pending_reads_back(scripted):
    """Though KVM gets it only later."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(*pio_out(PORT, b"x")[:5], rip=0x10), hlt()])
    vcpu.run()
    vcpu.regs.rip = 0x20
    assert vcpu.regs.rip == 0x20


def test_registers_written_while_an_exit_is_pending_wait_for_its_completion(scripted):
    """One extra entry with immediate_exit completes the exit; the next has the registers."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: setattr(vcpu.regs, "rax", 5))
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (IMMEDIATELY, 0), (0, REGS)]


def test_registers_written_by_the_caller_while_an_exit_is_pending_wait_too(scripted):
    """As those written by a handler."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run().data = 1
    vcpu.regs.rax = 5
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (IMMEDIATELY, 0), (0, REGS)]


@pytest.mark.parametrize("step", [hlt(), memory_fault(GPA), ScriptStep(errno=EFAULT)],
                         ids=["hlt", "fault", "bare fault"])
def test_registers_written_while_nothing_is_pending_cost_no_entry(scripted, step):
    """They go along with the next one."""
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    off_main(vcpu.run)
    vcpu.regs.rax = 5
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (0, REGS)]


def test_registers_written_before_the_first_run_cost_no_entry(scripted):
    """They go along with it."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.regs.rax = 5
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, REGS)]


def test_registers_are_written_once(scripted):
    """Entries after that have none."""
    vcpu = scripted.create_vcpu(0, [hlt(), hlt()])
    vcpu.regs.rax = 5
    off_main(vcpu.run)
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, REGS), (0, 0)]


def test_reading_registers_costs_no_entry(scripted):
    """Nor does it write any."""
    @scripted.on_pio(PORT)
    def reads_rax(vcpu, io):
        assert vcpu.regs.rax == 0

    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (0, 0)]


def test_each_pending_exit_with_register_writes_costs_one_entry(scripted):
    """Exits without cost none."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: setattr(vcpu.regs, "rax", 5))
    scripted.on_pio(OTHER_PORT, 1, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), pio_out(OTHER_PORT, b"x"), pio_out(PORT, b"x"), hlt()])
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (IMMEDIATELY, 0), (0, REGS), (0, 0), (IMMEDIATELY, 0), (0, REGS)]


def test_complete_finishes_an_exit_without_the_registers(scripted):
    """They go along with the next run()."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.regs.rax = 5
    off_main(vcpu.complete)
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, 0), (IMMEDIATELY, 0), (0, REGS)]


def test_complete_keeps_registers_that_wait(scripted):
    """They still read back."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.regs.rax = 5
    vcpu.complete()
    assert vcpu.regs.rax == 5


def test_a_kick_does_not_lose_register_writes(scripted):
    """Nor do they keep the kick back."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.regs.rax = 5
    vcpu.kick()
    assert (vcpu.run().cause, vcpu.regs.rax) == ("kick", 5)


def test_registers_kept_aside_leave_the_others_alone(scripted):
    """Register by register: rip is KVM's, rax is ours."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(*pio_out(PORT, b"x")[:5], rip=0x10), hlt()])
    vcpu.run()
    vcpu.regs.rax = 5
    vcpu.run(timeout=0)  # an entry with the registers, and without an exit that would bring new ones
    assert (vcpu.regs.rip, vcpu.regs.rax) == (0x10, 5)


def test_register_classes_are_written_apart(scripted):
    """With sync = 3 both reach KVM in the page: kvm_dirty_regs says which."""
    vcpu = scripted.create_vcpu(0, [hlt(), hlt()])
    vcpu.sync = REGS | SREGS
    vcpu.sregs.cr3 = 0x1000
    off_main(vcpu.run)
    vcpu.regs.rax = 5
    vcpu.sregs.cr3 = 0x2000
    off_main(vcpu.run)
    assert entries(vcpu) == [(0, SREGS), (0, REGS | SREGS)]


@pytest.mark.parametrize("name", [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{i}" for i in range(8, 16)), "rip", "rflags",
])
def test_each_general_register_is_its_own(scripted, name):
    """Writing one changes no other."""
    vcpu = scripted.create_vcpu(0)
    before = repr(vcpu.regs)
    setattr(vcpu.regs, name, 0xabcdef)
    assert repr(vcpu.regs) == before.replace(f"{name}=0x0", f"{name}=0xabcdef")


def test_a_segment_is_copied_from_another(scripted):
    """sregs.ds = sregs.es, hidden part and all."""
    vcpu = scripted.create_vcpu(0)
    vcpu.sregs.es.base, vcpu.sregs.es.limit, vcpu.sregs.es.selector = 0x1000, 0xffff, 8
    vcpu.sregs.ds = vcpu.sregs.es
    assert (vcpu.sregs.ds.base, vcpu.sregs.ds.limit, vcpu.sregs.ds.selector) == (0x1000, 0xffff, 8)


@pytest.mark.parametrize(("register", "value"), [
    (lambda vcpu: (vcpu.regs, "rax"), -1), (lambda vcpu: (vcpu.regs, "rax"), 1 << 64),
    (lambda vcpu: (vcpu.sregs.cs, "selector"), 1 << 16), (lambda vcpu: (vcpu.sregs.cs, "dpl"), 256),
    (lambda vcpu: (vcpu.sregs.gdt, "limit"), -1), (lambda vcpu: (vcpu.events, "sipi_vector"), 1 << 32),
    (lambda vcpu: (vcpu.events.exception, "nr"), 256),
])
def test_a_value_that_does_not_fit_a_register_is_refused(scripted, register, value):
    """ValueError: nothing is cut off."""
    view, name = register(scripted.create_vcpu(0))
    with pytest.raises(ValueError, match="does not fit"):
        setattr(view, name, value)


@pytest.mark.parametrize("value", [1.0, "1", None, b"1", []])
def test_a_register_takes_only_integers(scripted, value):
    """TypeError."""
    vcpu = scripted.create_vcpu(0)
    with pytest.raises(TypeError):
        vcpu.regs.rax = value


def test_a_refused_value_changes_nothing(scripted):
    """The register reads as before."""
    vcpu = scripted.create_vcpu(0)
    vcpu.regs.rax = 5
    with pytest.raises(ValueError, match="does not fit"):
        vcpu.regs.rax = 1 << 64
    assert vcpu.regs.rax == 5


@pytest.mark.parametrize("name", ["eax", "cr3", "zmm0"])
def test_a_register_that_is_not_there_cannot_be_written(scripted, name):
    """A misspelt name is an AttributeError."""
    with pytest.raises(AttributeError):
        setattr(scripted.create_vcpu(0).regs, name, 0)


def test_general_registers_are_synced_always(scripted):
    """The fault guard and the flight recorder need rip."""
    assert scripted.create_vcpu(0).sync == REGS


@pytest.mark.parametrize("classes", [0, 1, 2, 3, 4, 5, 6, 7])
def test_more_register_classes_can_be_synced(scripted, classes):
    """sync reads back what was asked for."""
    vcpu = scripted.create_vcpu(0)
    vcpu.sync = classes
    assert vcpu.sync == classes


@pytest.mark.parametrize("classes", [8, 15, 1 << 40, -1])
def test_register_classes_kvm_does_not_copy_are_refused(scripted, classes):
    """ValueError; sync stays as it was."""
    vcpu = scripted.create_vcpu(0)
    with pytest.raises(ValueError, match="KVM_CAP_SYNC_REGS"):
        vcpu.sync = classes


@pytest.mark.parametrize("value", [0, 1, 15])
def test_cr8_reads_back(scripted, value):
    """The task priority, 0 to 15."""
    vcpu = scripted.create_vcpu(0)
    vcpu.cr8 = value
    assert vcpu.cr8 == value


@pytest.mark.parametrize("value", [-1, 16, 1 << 64])
def test_cr8_is_four_bits(scripted, value):
    """KVM_RUN would be EINVAL: ValueError before."""
    with pytest.raises(ValueError, match="cr8"):
        scripted.create_vcpu(0).cr8 = value


BUSY = {
    "regs": lambda vcpu: vcpu.regs.rax,
    "regs written": lambda vcpu: setattr(vcpu.regs, "rax", 1),
    "sregs": lambda vcpu: vcpu.sregs.cs.base,
    "events": lambda vcpu: vcpu.events.flags,
    "cr8": lambda vcpu: vcpu.cr8,
    "cr8 written": lambda vcpu: setattr(vcpu, "cr8", 1),
    "sync": lambda vcpu: setattr(vcpu, "sync", 1),
    "request_irq_window": lambda vcpu: vcpu.request_irq_window(),
    "run": lambda vcpu: vcpu.run(),
    "complete": lambda vcpu: vcpu.complete(),
}


@pytest.mark.parametrize("use", BUSY.values(), ids=BUSY)
def test_a_running_vcpu_is_busy_for_other_threads(scripted, use):
    """VcpuBusyError while it is inside KVM_RUN."""
    vcpu = scripted.create_vcpu(0, [SPIN])
    with Running(vcpu.run):
        wait_for(lambda: entered(vcpu) == 1)
        try:
            with pytest.raises(kvmexit.VcpuBusyError):
                use(vcpu)
        finally:
            vcpu.kick()


@pytest.mark.parametrize("use", BUSY.values(), ids=BUSY)
def test_a_vcpu_in_a_handler_is_busy_for_other_threads(scripted, use):
    """VcpuBusyError: handlers are part of run()."""
    def handler(vcpu, io):
        with pytest.raises(kvmexit.VcpuBusyError):
            off_main(use, vcpu)

    scripted.on_pio(PORT, 1, handler)
    assert isinstance(scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()]).run(), kvmexit.Hlt)


# ---- one run() at a time ----


@pytest.mark.parametrize("call", [
    lambda vcpu: vcpu.run(), lambda vcpu: vcpu.run(timeout=0), lambda vcpu: vcpu.complete(),
], ids=["run", "run(timeout=0)", "complete"])
def test_a_handler_cannot_run_its_own_vcpu(scripted, call):
    """VcpuBusyError says that this is its own handler."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: call(vcpu))
    with pytest.raises(kvmexit.VcpuBusyError, match="own handler"):
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()


def test_a_refused_run_does_not_disturb_the_one_in_progress(scripted):
    """It goes on, and is still what a kick reaches."""
    def handler(vcpu, io):
        with pytest.raises(kvmexit.VcpuBusyError):
            vcpu.run()
        vcpu.kick()

    scripted.on_pio(PORT, 1, handler)
    assert scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN]).run().cause == "kick"


def test_a_handler_may_run_another_vcpu(scripted):
    """And gets its exit."""
    inner = scripted.create_vcpu(1, [ScriptStep(8)])
    seen = []
    scripted.on_pio(PORT, 1, lambda vcpu, io: seen.append(inner.run()))
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    assert (type(outer.run()), type(seen[0])) == (kvmexit.Hlt, kvmexit.Shutdown)


def test_a_handler_of_an_inner_vcpu_cannot_run_the_outer(scripted):
    """It is running, two calls up."""
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    inner = scripted.create_vcpu(1, [pio_out(OTHER_PORT, b"x")])
    scripted.on_pio(PORT, 1, lambda vcpu, io: inner.run() and None)
    scripted.on_pio(OTHER_PORT, 1, lambda vcpu, io: outer.run() and None)
    with pytest.raises(kvmexit.VcpuBusyError):
        outer.run()


def test_a_vcpu_runs_on_any_thread_in_turn(scripted):
    """One after the other."""
    vcpu = scripted.create_vcpu(0, [hlt()], repeat=3)
    assert [type(off_main(vcpu.run)), type(vcpu.run()), type(off_main(vcpu.run))] == [kvmexit.Hlt] * 3


def test_a_vcpu_runs_from_run_to_its_return(scripted):
    """running: in a handler yes, before and after no."""
    states = []
    scripted.on_pio(PORT, 1, lambda vcpu, io: states.append(vcpu.running))
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    states.append(vcpu.running)
    vcpu.run()
    assert [*states, vcpu.running] == [False, True, False]


def test_a_vm_is_not_closed_by_its_own_handler(scripted):
    """Error: run() has still to come back to it."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: scripted.close())
    with pytest.raises(kvmexit.Error, match="handler"):
        scripted.create_vcpu(0, [pio_out(PORT, b"x")]).run()


def test_closing_a_vm_ends_its_run(scripted):
    """close() kicks, and waits."""
    vcpu = scripted.create_vcpu(0, [SPIN])
    with Running(vcpu.run) as running:
        wait_for(lambda: entered(vcpu) == 1)
        scripted.close()
        assert running.result().cause == "kick"


def test_a_vm_that_is_being_closed_is_not_closed_by_a_handler(scripted):
    """Error, as before: another thread's close() is waiting for this very run()."""
    started = threading.Event()

    def handler(vcpu, io):
        started.set()
        wait_for(lambda: scripted.closed)
        with pytest.raises(kvmexit.Error, match="handler"):
            scripted.close()

    scripted.on_pio(PORT, 1, handler)
    with Running(scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN]).run) as running:
        started.wait()
        scripted.close()
        assert running.result().cause == "kick"


def test_each_close_waits_for_the_run_in_progress(scripted):
    """Also one that finds the VM closing: after it the vCPU does not run, and nobody uses what was released."""
    started, returned = threading.Event(), []

    def close():
        scripted.close()
        returned.append(vcpu.running)

    def handler(vcpu, io):
        started.set()
        wait_for(lambda: scripted.closed)
        second.start()
        second.join(0.05)  # long enough for a close() that does not wait

    scripted.on_pio(PORT, 1, handler)
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN])
    second = threading.Thread(target=close)
    with Running(vcpu.run):
        started.wait()
        scripted.close()
    second.join()
    assert returned == [False]


def test_a_vcpu_of_a_closed_vm_does_not_run(scripted):
    """Error, and no entry."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.close()
    with pytest.raises(kvmexit.Error, match="closed"):
        vcpu.run()


# ---- the same fault again and again ----

FAULTS = {"explained": memory_fault(GPA, rip=0x10), "bare": ScriptStep(errno=EFAULT, rip=0x10)}
faults = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def answer_faults(vm):
    """Say of each fault that it is repaired; -> the list of them."""
    seen = []
    vm.on(kvmexit.MemoryFault, lambda vcpu, fault: seen.append(fault.gpa))
    vm.on(kvmexit.UnexplainedFault, lambda vcpu, fault: seen.append(fault.rip))
    return seen


@faults
def test_one_fault_too_often_is_a_loop(scripted, fault):
    """fault_limit identical faults in a row are offered; with one more there is no point in going on."""
    seen = answer_faults(scripted)
    vcpu = scripted.create_vcpu(0, [fault], repeat=100)
    vcpu.fault_limit = 3
    with pytest.raises(kvmexit.FaultLoopError):
        vcpu.run()
    assert len(seen) == 3


@faults
def test_the_limit_is_1000_at_first(scripted, fault):
    """Enough for any race between vCPUs over one page."""
    seen = answer_faults(scripted)
    vcpu = scripted.create_vcpu(0, [fault], repeat=10 * DEFAULT_FAULT_LIMIT)
    with pytest.raises(kvmexit.FaultLoopError):
        vcpu.run()
    assert (vcpu.fault_limit, len(seen)) == (DEFAULT_FAULT_LIMIT, DEFAULT_FAULT_LIMIT)


def test_a_loop_names_the_fault(scripted):
    """FaultLoopError.fault is the last of them."""
    answer_faults(scripted)
    vcpu = scripted.create_vcpu(0, [memory_fault(GPA)], repeat=100)
    vcpu.fault_limit = 3
    with pytest.raises(kvmexit.FaultLoopError, match="MemoryFault") as caught:
        vcpu.run()
    assert caught.value.fault.gpa == GPA


@faults
def test_faults_given_to_the_caller_count_as_well(scripted, fault):
    """A caller who just calls run() again loops no less."""
    vcpu = scripted.create_vcpu(0, [fault], repeat=100)
    vcpu.fault_limit = 3
    for _ in range(3):
        vcpu.run()
    with pytest.raises(kvmexit.FaultLoopError):
        vcpu.run()


@faults
def test_after_a_loop_the_vcpu_can_run_again(scripted, fault):
    """And the count starts anew."""
    seen = answer_faults(scripted)
    vcpu = scripted.create_vcpu(0, [fault], repeat=100)
    vcpu.fault_limit = 3
    for _ in range(2):
        with pytest.raises(kvmexit.FaultLoopError):
            vcpu.run()
    assert len(seen) == 6


VARIED = {
    "gpa": [memory_fault(GPA), memory_fault(GPA + 4096)],
    "size": [memory_fault(GPA), memory_fault(GPA, 8192)],
    "flags": [memory_fault(GPA), memory_fault(GPA, private=True)],
    "rip": [memory_fault(GPA, rip=1), memory_fault(GPA, rip=2)],
    "rip of a bare one": [ScriptStep(errno=EFAULT, rip=1), ScriptStep(errno=EFAULT, rip=2)],
    "bare and not": [memory_fault(GPA), ScriptStep(errno=EFAULT)],
    "another exit between": [memory_fault(GPA), pio_out(PORT, b"x")],
}


@pytest.mark.parametrize("steps", VARIED.values(), ids=VARIED)
def test_faults_that_differ_are_no_loop(scripted, steps):
    """Another address, other registers, or another exit between: the guest gets somewhere."""
    answer_faults(scripted)
    scripted.on_pio(PORT, 1, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, steps * 100 + [hlt()])
    vcpu.fault_limit = 3
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_register_that_changes_is_no_loop(scripted):
    """rip alone does not say that the guest stands still: rep movsb."""
    def handler(vcpu, fault):
        vcpu.regs.rcx += 1

    scripted.on_memory_fault(handler=handler)
    vcpu = scripted.create_vcpu(0, [memory_fault(GPA)] * 100 + [hlt()])
    vcpu.fault_limit = 3
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@pytest.mark.parametrize("change", [
    lambda memory: memory.add(0x10000 * (1 + len(memory.slots)), 4096), lambda memory: memory.remove(memory.slots[0]),
], ids=["add", "remove"])
@faults
def test_faults_with_a_change_of_memory_between_are_no_loop(scripted, fault, change):
    """Something was done about it."""
    for i in range(30):
        scripted.memory.add(0x100000 + 0x2000 * i, 4096)
    scripted.on(kvmexit.Hlt, lambda vcpu, hlt: STOP)
    scripted.on(kvmexit.Exit, lambda vcpu, fault: change(scripted.memory) and None)
    vcpu = scripted.create_vcpu(0, [fault] * 20 + [hlt()])
    vcpu.fault_limit = 1
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@faults
def test_the_guard_can_be_switched_off(scripted, fault):
    """fault_limit 0: for ever."""
    seen = answer_faults(scripted)
    vcpu = scripted.create_vcpu(0, [fault], repeat=5 * DEFAULT_FAULT_LIMIT)
    vcpu.fault_limit = 0
    with pytest.raises(kvmexit.KvmError):  # ENODATA: the end of the script
        vcpu.run()
    assert len(seen) == 5 * DEFAULT_FAULT_LIMIT


@pytest.mark.parametrize(("value", "error"), [
    (-1, ValueError), (1 << 64, ValueError), ("x", TypeError), (None, TypeError),
])
def test_a_limit_that_is_none_is_refused(scripted, value, error):
    """ValueError, TypeError; the limit stays as it was."""
    vcpu = scripted.create_vcpu(0)
    with pytest.raises(error):
        vcpu.fault_limit = value


# ---- time-outs ----


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
def test_a_time_out_that_is_no_duration_is_refused(scripted, timeout):
    """ValueError, and nothing was run."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    with pytest.raises(ValueError, match="timeout"):
        vcpu.run(timeout=timeout)


@pytest.mark.parametrize("timeout", ["1", "x", b"1", [], object()])
def test_a_time_out_is_a_number(scripted, timeout):
    """TypeError."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    with pytest.raises(TypeError):
        vcpu.run(timeout=timeout)


def test_a_refused_time_out_leaves_the_vcpu_free(scripted):
    """The next run() is an ordinary one."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    with pytest.raises(ValueError, match="timeout"):
        vcpu.run(timeout=-1)
    assert isinstance(vcpu.run(), kvmexit.Hlt)


@pytest.mark.parametrize("timeout", [None, 3600, 0.5e9, 1e300, float("inf"), True])
def test_a_time_out_in_the_future_changes_nothing(scripted, timeout):
    """Seconds, of any size."""
    assert isinstance(scripted.create_vcpu(0, [hlt()]).run(timeout=timeout), kvmexit.Hlt)


def test_a_time_out_of_zero_does_not_run_the_guest(scripted):
    """One entry, with immediate_exit."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    assert (off_main(vcpu.run, timeout=0).cause, entries(vcpu)) == ("timeout", [(IMMEDIATELY, 0)])


def test_a_time_out_of_zero_completes_what_is_pending(scripted):
    """The guest's own next step comes with the run() after."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    cause = vcpu.run(timeout=0).cause
    assert (cause, vcpu.pending, type(vcpu.run())) == ("timeout", None, kvmexit.Hlt)


def test_a_time_out_of_zero_first_offers_what_is_owing(scripted):
    """An unanswered read cannot be completed."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT)])
    io = vcpu.run()
    assert vcpu.run(timeout=0) is io


def test_a_time_out_of_zero_applies_registers(scripted):
    """After what was pending is complete."""
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    vcpu.run()
    vcpu.regs.rax = 5
    off_main(vcpu.run, timeout=0)
    assert entries(vcpu)[1:] == [(IMMEDIATELY, 0), (IMMEDIATELY, REGS)]


@pytest.mark.parametrize("call", [off_main, lambda function, **kw: function(**kw)],
                         ids=["on another thread", "on the main thread"])
def test_a_guest_that_spins_is_timed_out(scripted, call):
    """Interrupted("timeout")."""
    assert call(scripted.create_vcpu(0, [SPIN]).run, timeout=0.01).cause == "timeout"


def test_a_guest_that_exits_all_the_time_is_timed_out(scripted):
    """Handlers in between do not keep it."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")], repeat=1 << 60, keep=False)
    assert vcpu.run(timeout=0.01).cause == "timeout"


def test_a_handler_that_takes_longer_than_the_time_out_is_let_finish(scripted, asked):
    """Then what it answered is completed, and run() returns."""
    def slow(vcpu, io):
        end = time.monotonic() + 0.02
        while time.monotonic() < end:
            os.sched_yield()
        asked.append("slow")
        return 7

    scripted.on_pio(PORT, 1, slow)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    cause = vcpu.run(timeout=0.01).cause
    assert (cause, asked, pio_data(vcpu)) == ("timeout", ["slow"], b"\x07")


def test_a_time_out_does_not_carry_over(scripted):
    """The next run() without one is not cut short by it: a kick ends it."""
    vcpu = scripted.create_vcpu(0, [SPIN] * 1000)

    def both():
        first = vcpu.run(timeout=0.005)
        threading.Timer(0.02, vcpu.kick).start()  # long after the first one's end
        return first.cause, vcpu.run().cause

    assert off_main(both) == ("timeout", "kick")


def test_a_time_out_of_an_inner_run_is_not_the_outers(scripted):
    """Each has its own."""
    inner = scripted.create_vcpu(1, [SPIN])
    causes = []
    scripted.on_pio(PORT, 1, lambda vcpu, io: causes.append(inner.run(timeout=0.005).cause))
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    assert (type(outer.run()), causes) == (kvmexit.Hlt, ["timeout"])


def test_a_time_out_of_the_outer_run_waits_for_the_inner(scripted):
    """And is not lost meanwhile."""
    inner = scripted.create_vcpu(1, [SPIN] * 100)
    causes = []
    scripted.on_pio(PORT, 1, lambda vcpu, io: causes.append(inner.run(timeout=0.02).cause))
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN])
    assert (outer.run(timeout=0.005).cause, causes) == ("timeout", ["timeout"])


def test_a_time_out_of_the_outer_run_outlives_the_inner(scripted):
    """The inner run() has none, and leaves the outer's in force."""
    inner = scripted.create_vcpu(1, [hlt()])
    scripted.on_pio(PORT, 1, lambda vcpu, io: inner.run() and None)
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), SPIN])
    assert off_main(outer.run, timeout=0.01).cause == "timeout"


AFTER_FORK = """
import os, signal
from kvmexit.testing import ScriptedVM, ScriptStep, hlt

ScriptedVM().create_vcpu(0, [hlt()]).run(timeout=3600)  # leaves this thread's timer armed
child = os.fork()
if not child:
    signal.alarm(10)  # the end of a child that nothing else ends
    os._exit(ScriptedVM().create_vcpu(0, [ScriptStep(spin=True)] * 1000).run(timeout=0.2).cause != "timeout")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_time_outs_of_its_own():
    """The parent's timer is not inherited (timer_create(2)), so one that it left armed is nothing to rely on."""
    assert python(AFTER_FORK).stdout == "0\n"


# ---- kicks ----


def test_a_kick_before_run_makes_it_return_once(scripted):
    """The next run() says kick, the one after runs the guest."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.kick()
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_a_kicked_run_does_not_run_the_guest(scripted):
    """One entry, with immediate_exit, and none that is left over."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.kick()
    off_main(vcpu.run)
    off_main(vcpu.run)
    assert entries(vcpu) == [(IMMEDIATELY, 0), (0, 0)]


def test_a_kicked_run_completes_what_is_pending(scripted):
    """As with a time-out of zero."""
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    vcpu.run().data = 7
    vcpu.kick()
    vcpu.run()
    assert (vcpu.pending, pio_data(vcpu)) == (None, b"\x07")


def test_two_kicks_are_one(scripted):
    """Earlier kicks coalesce."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.kick()
    vcpu.kick()
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_a_kick_ends_a_guest_that_spins(scripted):
    """From another thread."""
    vcpu = scripted.create_vcpu(0, [SPIN])
    with Running(vcpu.run) as running:
        wait_for(lambda: entered(vcpu) == 1)
        vcpu.kick()
        assert running.result().cause == "kick"


def test_two_kicks_of_a_guest_that_spins_are_told_apart_by_its_return(scripted):
    """A kick after the return is one for the next run()."""
    vcpu = scripted.create_vcpu(0, [SPIN, hlt()])
    with Running(vcpu.run) as running:
        wait_for(lambda: entered(vcpu) == 1)
        vcpu.kick()
        running.result()
    vcpu.kick()
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_a_kick_ends_a_guest_that_exits_all_the_time(scripted):
    """From another thread, while handlers take every exit."""
    first = threading.Event()
    scripted.on_pio(PORT, 1, lambda vcpu, io: first.set())
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x")], repeat=1 << 60, keep=False)
    with Running(vcpu.run) as running:
        first.wait()
        vcpu.kick()
        assert running.result().cause == "kick"


def test_a_handler_may_kick_its_own_vcpu(scripted):
    """Its exit is completed, then run() returns, then the guest goes on."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: vcpu.kick() or 7)
    vcpu = scripted.create_vcpu(0, [pio_in(PORT), hlt()])
    assert (vcpu.run().cause, pio_data(vcpu), type(vcpu.run())) == ("kick", b"\x07", kvmexit.Hlt)


def test_a_kick_by_a_thread_during_a_handler_counts_for_this_run(scripted):
    """run() has not returned yet."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: off_main(vcpu.kick))
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


KEEPS_KICK = {
    "STOP": (pio_out(PORT, b"x"), STOP),
    "an unanswered read": (pio_in(PORT), PASS),
    "an exit for the caller": (hlt(), PASS),
    "a fault": (memory_fault(GPA), PASS),
}


@pytest.mark.parametrize(("step", "verdict"), KEEPS_KICK.values(), ids=KEEPS_KICK)
def test_no_other_return_consumes_a_kick(scripted, step, verdict):
    """The kick came during the handler; the exit is returned, and the kick by the next run() that enters."""
    route = scripted.on(kvmexit.Exit, lambda vcpu, exit: vcpu.kick() or verdict)
    vcpu = scripted.create_vcpu(0, [step, hlt()])
    exit = vcpu.run()
    route.remove()
    if isinstance(exit, kvmexit.Io) and not exit.is_write:
        exit.data = 0
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_an_exception_does_not_consume_a_kick(scripted):
    """It is there once the exit has been settled."""
    route = scripted.on_pio(PORT, 1, lambda vcpu, io: vcpu.kick() or 1 / 0)
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    with pytest.raises(ZeroDivisionError):
        vcpu.run()
    route.remove()
    scripted.on_pio(PORT, 1, lambda vcpu, io: None)
    assert (vcpu.run().cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_an_error_of_kvm_does_not_consume_a_kick(scripted):
    """A kick during an entry that fails is there for the next."""
    scripted.on_pio(PORT, 1, lambda vcpu, io: vcpu.kick())
    vcpu = scripted.create_vcpu(0, [pio_out(PORT, b"x"), ScriptStep(errno=EINVAL), hlt()])
    vcpu.run()
    with pytest.raises(kvmexit.KvmError):
        vcpu.run()
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_a_kick_wins_over_a_time_out(scripted):
    """Both are due: run() says kick, and the time-out was this run()'s own."""
    vcpu = scripted.create_vcpu(0, [hlt()])
    vcpu.kick()
    assert (vcpu.run(timeout=0).cause, type(vcpu.run())) == ("kick", kvmexit.Hlt)


def test_a_kick_of_the_outer_vcpu_waits_for_the_inner(scripted):
    """The inner run() is not ended by it, nor does it swallow it."""
    inner = scripted.create_vcpu(1, [ScriptStep(8)])
    seen = []

    def handler(vcpu, io):
        vcpu.kick()
        seen.append(type(inner.run()))

    scripted.on_pio(PORT, 1, handler)
    outer = scripted.create_vcpu(0, [pio_out(PORT, b"x"), hlt()])
    assert (outer.run().cause, seen) == ("kick", [kvmexit.Shutdown])


def test_a_kick_reaches_its_own_vcpu_only(scripted):
    """Others run on."""
    kicked, other = scripted.create_vcpu(0, [hlt()]), scripted.create_vcpu(1, [hlt()])
    kicked.kick()
    assert isinstance(other.run(), kvmexit.Hlt)


# ---- nothing is allocated for an exit ----

PATHS = {
    "pio": [pio_out(PORT, b"x")],
    "pio string of 16 bytes": [pio_out(PORT, b"0123456789abcdef")],
    "mmio": [mmio_write(GPA, b"x")],
    "memory fault": [memory_fault(GPA, rip=1), memory_fault(GPA + 4096, rip=2)],  # two: the fault guard stays quiet
    "bare fault": [ScriptStep(errno=EFAULT, rip=1), ScriptStep(errno=EFAULT, rip=2)],
    "hlt": [hlt()],
}
WARM_UP, EXITS_MEASURED = 1_000, 10_000


@pytest.mark.parametrize("steps", PATHS.values(), ids=PATHS)
def test_exits_to_a_python_handler_leave_no_memory_behind(scripted, steps):
    """10,000 exits within one run(): as many blocks are allocated at the last as at the first."""
    blocks = [None, None]
    samples = iter(itertools.chain(
        itertools.repeat(None, WARM_UP), [0], itertools.repeat(None, EXITS_MEASURED), [1], itertools.repeat(STOP)))

    def handler(vcpu, exit):
        sample = next(samples)
        if sample is None or sample is STOP:
            return sample
        blocks[sample] = sys.getallocatedblocks()

    scripted.on(kvmexit.Exit, handler)
    vcpu = scripted.create_vcpu(0, steps, repeat=2 * (WARM_UP + EXITS_MEASURED), keep=False)
    gc.collect()
    vcpu.run()
    assert blocks[1] - blocks[0] <= 1  # the first sample itself


@pytest.mark.parametrize("step", [pio_in(PORT, 4), mmio_read(GPA, 8), hypercall(12)], ids=["pio", "mmio", "hypercall"])
def test_answers_leave_no_memory_behind(scripted, step):
    """The same for what a handler answers by its return value."""
    blocks = [None, None]
    samples = iter(itertools.chain(
        itertools.repeat(None, WARM_UP), [0], itertools.repeat(None, EXITS_MEASURED), [1], itertools.repeat(STOP)))

    def handler(vcpu, exit):
        sample = next(samples)
        if sample is STOP:
            return STOP
        if sample is not None:
            blocks[sample] = sys.getallocatedblocks()
        return 0x12345678

    scripted.on(kvmexit.Exit, handler)
    vcpu = scripted.create_vcpu(0, [step], repeat=2 * (WARM_UP + EXITS_MEASURED), keep=False)
    gc.collect()
    vcpu.run()
    assert blocks[1] - blocks[0] <= 1  # the first sample itself
