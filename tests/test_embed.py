"""The C API of kvmexit/embed.h: vCPUs run by threads that have no thread state, beside Python's runs, pauses and close()."""

import ctypes
import errno
import os
import subprocess
import sys
import sysconfig
import threading
import time

import pytest
from guests import OUT_FOREVER, SPIN, load, stress
from processes import compiled, in_thread, python, unsanitized
from test_native import Exit

import kvmexit
from kvmexit import VcpuBusyError, native
from kvmexit.testing import (
    RecordedAttributes,
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

EXIT, PYTHON, KICKED, TIMED_OUT, LOOPING, BROKEN = range(6)
FOREVER = (1 << 64) - 1
FOR_EVER = 1 << 60  # passes of a script
POINTER = ctypes.c_void_p


class Api(ctypes.Structure):
    """struct kvmexit_api. Called like this the GIL is released; the thread has a thread state, which nobody looks at."""

    _fields_ = [
        ("version", ctypes.c_uint32), ("size", ctypes.c_uint32), ("vcpu", ctypes.PYFUNCTYPE(POINTER, ctypes.py_object)),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int, POINTER, ctypes.c_uint64, ctypes.POINTER(ctypes.POINTER(Exit)))),
        ("exit", ctypes.CFUNCTYPE(ctypes.c_int, POINTER, ctypes.POINTER(ctypes.POINTER(Exit)))),
        ("answer", ctypes.CFUNCTYPE(ctypes.c_int, POINTER)), ("kick", ctypes.CFUNCTYPE(ctypes.c_int, POINTER)),
        ("convert", ctypes.CFUNCTYPE(
            ctypes.c_int, POINTER, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64))),
        ("poison", ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER)),
    ]  # fmt: skip


class Job(ctypes.Structure):
    """What a thread of tests/embed.c does, and found."""

    _fields_ = [
        ("api", POINTER), ("vcpu", POINTER), ("timeout_ns", ctypes.c_uint64), ("drives", ctypes.c_uint32), ("stop", ctypes.c_uint32),
        ("what", ctypes.c_int32), ("attached", ctypes.c_uint32), ("exited", ctypes.c_uint32), ("exits", ctypes.c_uint64),
        ("kicks", ctypes.c_uint64), ("busy", ctypes.c_uint64), ("exit", Exit), ("thread", ctypes.c_ulong),
    ]  # fmt: skip


get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
get_pointer.restype, get_pointer.argtypes = POINTER, [ctypes.py_object, ctypes.c_char_p]
ADDRESS = get_pointer(kvmexit._C_API, b"kvmexit._C_API")
api = Api.from_address(ADDRESS)


def run(vcpu, timeout_ns=FOREVER):
    """Run a vCPU by the API, on this thread; -> what it says, and the exit or None."""
    exit = ctypes.POINTER(Exit)()
    what = api.run(api.vcpu(vcpu), timeout_ns, ctypes.byref(exit))
    assert bool(exit) == (what in (EXIT, PYTHON, LOOPING, BROKEN))
    return what, exit.contents if exit else None


def pending(vcpu):
    """-> what exit() says, and the exit or None."""
    exit = ctypes.POINTER(Exit)()
    what = api.exit(api.vcpu(vcpu), ctypes.byref(exit))
    assert bool(exit) == (what >= 0)
    return what, exit.contents if exit else None


def answer(vcpu, data=b""):
    """Write an answer to the exit in hand, and say so."""
    if data:
        ctypes.memmove(pending(vcpu)[1].data, data, len(data))
    return api.answer(api.vcpu(vcpu))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """tests/embed.c; waiting in it keeps the GIL."""
    library = ctypes.PyDLL(str(compiled(tmp_path_factory, "embed")))
    for function in (library.begin, library.end, library.stop):
        function.argtypes = [ctypes.POINTER(Job)]
    return library


@pytest.fixture
def begin(library):
    """begin(vcpu, ...): have a thread without a thread state run a vCPU; -> its Job. job.end() waits with the GIL held."""
    jobs = []

    def begin(vcpu, timeout_ns=FOREVER, drives=False, stop=0):
        job = Job(ADDRESS, api.vcpu(vcpu), timeout_ns, drives, stop)
        job.end = lambda: jobs.remove(job) or library.end(job)
        job.keeps = vcpu
        assert library.begin(job) == 0
        jobs.append(job)
        return job

    yield begin
    for job in jobs:
        library.stop(job)
        library.end(job)


def handler_in(library, name):
    """A native handler in a library; its name is enough, since a PyDLL's functions need the GIL."""
    function = ctypes.CDLL(library._name)[name]
    function.argtypes = [POINTER, POINTER]
    return function


def until(condition):
    """Wait for what another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- exits ----


def test_exits_come_to_a_thread_without_python(scripted, begin):
    """Answered there, or by native handlers, while this thread keeps the GIL from beginning to end."""
    scripted.on_pio(0x80, 1, native.Ignore(0x77))
    steps = [pio_in(0x80), pio_in(0x10, 2, 3), pio_out(0x11, b"x"), mmio_read(0xFED0_0000, 8), mmio_write(0xFED0_0000, b"abcd"),
             hypercall(12), memory_fault(0x5000, private=True), pio_in(0x80), hlt()]
    vcpu = scripted.create_vcpu(0, steps)
    job = begin(vcpu, drives=True)
    assert job.end() == -errno.ENODATA  # the script's end
    assert not job.attached
    assert job.exits == 7
    lefts = [scripted.script(vcpu).left(i) for i in range(len(steps))]
    assert [lefts[i][1] for i in (0, 1, 7)] == [b"\x77", b"\x5a" * 6, b"\x77"]
    assert lefts[3][0][8:16] == lefts[5][0][56:64] == b"\x5a" * 8


def test_an_exit_is_described(scripted):
    vcpu = scripted.create_vcpu(3, [pio_out(0x3F8, b"abcd", 2), memory_fault(0x5000, 0x2000, private=True), ScriptStep(errno=14), hlt()])
    seen = []
    for _ in range(4):
        what, exit = run(vcpu)
        assert (what, exit.version, exit.vcpu, exit.base) == (EXIT, 1, 3, 0)
        seen.append((exit.reason, exit.error, exit.address, exit.size, exit.count, exit.is_write, exit.owes, exit.flags))
    assert seen == [(2, 0, 0x3F8, 2, 2, 1, 0, 0), (39, 14, 0x5000, 0x2000, 1, 0, 0, 8), (0xFFFFFFFF, 14, 0, 0, 1, 0, 0, 0),
                    (5, 0, 0, 0, 1, 0, 0, 0)]


def test_a_read_is_returned_until_it_is_answered(scripted):
    """As by Vcpu.run(); the native handlers are asked again each time."""
    counter = native.Counter()
    scripted.on_pio(1, 1, counter)
    vcpu = scripted.create_vcpu(0, [pio_in(1), hlt()])
    assert pending(vcpu) == (-errno.ENODATA, None)
    assert answer(vcpu) == -errno.ENODATA
    for i in range(3):
        what, exit = run(vcpu)
        assert (what, exit.address, exit.owes, counter.reads) == (EXIT, 1, 1, i + 1)
    assert len(scripted.script(vcpu).entries) == 1
    assert pending(vcpu)[0] == EXIT
    assert answer(vcpu, b"7") == 0
    assert pending(vcpu)[0] == EXIT  # KVM has not completed it
    assert run(vcpu)[1].reason == 5
    assert scripted.script(vcpu).left(0)[1] == b"7"
    assert pending(vcpu) == (-errno.ENODATA, None)


def test_an_answer_half_written_is_kept(scripted):
    """Looking at an exit again does not clear what was written to it: a hypercall's result, which is cleared at first."""
    vcpu = scripted.create_vcpu(0, [hypercall(12), hlt()])
    _, exit = run(vcpu)
    ctypes.memmove(exit.data, b"resulted", 8)
    assert answer(vcpu, b"r") == 0
    run(vcpu)
    assert scripted.script(vcpu).left(0)[0][56:64] == b"resulted"


def test_what_contradicts_itself_cannot_be_answered(scripted):
    vcpu = scripted.create_vcpu(0, [ScriptStep(2, bytes(16)), hlt()])
    for _ in range(2):
        what, exit = run(vcpu)
        assert (what, exit.owes, exit.data) == (EXIT, 1, None)
        assert answer(vcpu) == -errno.EINVAL


@pytest.mark.parametrize("by", ["C", "Python"])
def test_an_exit_whose_handler_is_pythons(scripted, by):
    """It is C's to answer, or goes to its handler when Python runs the vCPU."""
    called = []
    scripted.on_pio(1, 1, lambda vcpu, io: called.append(io.port) or (None if io.is_write else b"P"))
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_out(1, b"x"), hlt()])
    if by == "Python":
        assert run(vcpu)[0] == PYTHON
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert called == [1, 1]
        return
    for data in (b"C", b""):
        assert [run(vcpu)[0] for _ in range(2)] == [PYTHON] * 2  # a write, too: its handler has not seen it
        assert pending(vcpu)[0] == PYTHON
        assert answer(vcpu, data) == 0
    assert run(vcpu)[1].reason == 5
    assert (called, scripted.script(vcpu).left(0)[1]) == ([], b"C")


def test_what_python_left_is_offered_to_c(scripted):
    """A handler's exception leaves the exit; a returned read stays owing; a returned write was accepted."""
    def fail(vcpu, io):
        raise ZeroDivisionError

    with scripted.on_pio(1, 1, fail):
        vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), pio_in(2), pio_out(3, b"y"), hlt()])
        with pytest.raises(ZeroDivisionError):
            vcpu.run()
        assert run(vcpu)[0] == PYTHON
    assert run(vcpu)[1].address == 1  # nobody's now
    assert vcpu.run().port == 2
    assert run(vcpu)[1].address == 2
    assert vcpu.pending.port == 2
    vcpu.pending.data = b"p"
    assert vcpu.run().port == 3
    assert run(vcpu)[1].reason == 5
    assert scripted.script(vcpu).left(1)[1] == b"p"


def test_what_c_left_is_offered_to_python(scripted):
    asked = []
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_out(2, b"x"), hlt()])
    run(vcpu)
    scripted.on_pio(1, 1, lambda vcpu, io: asked.append(io.port) or b"P")
    assert vcpu.run().port == 2
    assert asked == [1]
    kept = vcpu.pending
    assert run(vcpu)[1].reason == 5
    assert scripted.script(vcpu).left(0)[1] == b"P"
    with pytest.raises(AttributeError):
        kept.data = b"z"


def test_an_exit_object_from_before_a_run_answers_nothing(scripted):
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_in(2), hlt()])
    kept = vcpu.run()
    kept.data = b"1"
    run(vcpu)
    with pytest.raises(kvmexit.NotPendingError):
        kept.data = b"2"


@pytest.mark.parametrize("verdict", [native.Stop(), native.Ignore(9)], ids=repr)
def test_a_native_handler_decides_for_an_exit_that_is_offered_again(scripted, verdict):
    vcpu = scripted.create_vcpu(0, [pio_in(1), hlt()])
    run(vcpu)
    with scripted.on_pio(1, 1, verdict):
        what, exit = run(vcpu)
    assert (what, exit.reason) == (EXIT, 2 if isinstance(verdict, native.Stop) else 5)
    if exit.reason == 2:
        answer(vcpu, b"\x09")
        run(vcpu)
    assert scripted.script(vcpu).left(0)[1] == b"\x09"


@pytest.mark.parametrize(("words", "what"), [((3, 0), None), ((2, 1), PYTHON), ((2, 2), EXIT), ((1, 7), BROKEN)])
def test_a_native_handler_that_has_not_finished_is_called_again(scripted, library, words, what):
    """KVMEXIT_LATER; then DONE, PASS, STOP or rubbish."""
    state = (ctypes.c_int32 * 2)(*words)
    scripted.on_pio(1, 2, lambda vcpu, io: None)
    route = scripted.on_pio(1, 1, native.Function(handler_in(library, "later"), state))
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), hlt()])
    said, exit = run(vcpu)
    assert state[0] == -1
    if what is None:
        assert (said, exit.reason) == (EXIT, 5)
        return
    assert (said, exit.reason) == (what, 2)
    route.remove()  # nobody is in it
    assert run(vcpu)[0] == (EXIT if what == EXIT else PYTHON)


def test_failures(scripted):
    """The errno; what was pending still is."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(errno=errno.EINVAL), pio_in(1), ScriptStep(errno=errno.EIO), hlt()])
    assert run(vcpu) == (-errno.EINVAL, None)
    run(vcpu)
    answer(vcpu, b"k")
    assert run(vcpu) == (-errno.EIO, None)
    what, exit = pending(vcpu)
    assert (what, exit.address, exit.error) == (EXIT, 1, 0)
    assert run(vcpu)[1].reason == 5
    assert scripted.script(vcpu).left(0)[1] == b""
    assert scripted.script(vcpu).left(1)[1] == b"k"
    assert run(scripted.create_vcpu(1, [ScriptStep()], repeat=2000)) == (-errno.EPROTO, None)
    assert run(scripted.create_vcpu(2, [ScriptStep(errno=errno.ENOMEM)], repeat=2000)) == (-errno.ENOMEM, None)


def test_the_same_fault_for_ever(scripted):
    scripted.on_memory_fault(handler=native.Ignore())
    vcpu = scripted.create_vcpu(0, [memory_fault(0x1000)], repeat=FOR_EVER, keep=False)
    vcpu.fault_limit = 10
    for _ in range(2):
        what, exit = run(vcpu)
        assert (what, exit.address) == (LOOPING, 0x1000)
        assert scripted.script(vcpu).position == 1
        assert pending(vcpu) == (-errno.ENODATA, None)


# ---- registers ----


@pytest.mark.parametrize("by", ["C", "Python"])
def test_registers_that_python_wrote_reach_the_guest(scripted, by):
    """After the completion of what pends, by an entry of its own; where nothing pends, with the first entry."""
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_out(2, b"x"), hlt()])
    step = (lambda: run(vcpu)) if by == "C" else vcpu.run
    vcpu.regs.rax = 1
    step()
    vcpu.regs.rbx = 2
    answer(vcpu, b"a")
    assert vcpu.regs.rbx == 2
    step()
    vcpu.sregs.cr3 = 0x5000
    step()
    assert (vcpu.regs.rax, vcpu.regs.rbx, vcpu.sregs.cr3) == (1, 2, 0x5000)
    assert scripted.script(vcpu).entries == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 0)]


@pytest.mark.kvm
def test_registers_that_kvm_refuses(vm):
    vcpu = load(vm, SPIN)
    vcpu.sregs.cr4 = 1 << 63
    assert run(vcpu) == (-errno.EINVAL, None)
    assert run(vcpu, 0)[0] == TIMED_OUT


# ---- kicks, time-outs ----


def test_a_kick_is_for_the_next_run(scripted, begin):
    """Once, however many came; from Python or C."""
    vcpu = scripted.create_vcpu(0, [hlt(), hlt()])
    vcpu.kick()
    assert api.kick(api.vcpu(vcpu)) == 0
    assert begin(vcpu).end() == KICKED
    assert begin(vcpu).end() == EXIT
    api.kick(api.vcpu(vcpu))
    assert vcpu.run().cause == "kick"
    assert run(vcpu)[0] == EXIT


def test_a_kick_ends_a_run(scripted, begin):
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True)], repeat=FOR_EVER, keep=False)
    for _ in range(stress(30)):
        job = begin(vcpu)
        until(lambda: vcpu.running)
        api.kick(api.vcpu(vcpu))
        assert job.end() == KICKED


@pytest.mark.parametrize("timeout_ns", [0, 30_000_000])
def test_a_timeout_ends_a_run(scripted, begin, timeout_ns):
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), ScriptStep(spin=True)], repeat=FOR_EVER, keep=False)
    assert begin(vcpu).end() == EXIT
    for _ in range(3):
        assert begin(vcpu, timeout_ns).end() == TIMED_OUT
    assert pending(vcpu) == (-errno.ENODATA, None)
    assert api.kick(api.vcpu(vcpu)) == 0
    assert begin(vcpu).end() == KICKED


@pytest.mark.kvm
def test_a_guest_run_by_c(vm, begin):
    """Native handlers, kick, time-out and exits, on the real KVM."""
    counter = native.Counter()
    vm.on_pio(0x80, 1, native.Ignore())
    vm.on_pio(0x80, 1, counter)
    vcpu = load(vm, OUT_FOREVER)
    assert begin(vcpu, 100_000_000).end() == TIMED_OUT
    assert counter.writes > 10
    job = begin(vcpu)
    until(lambda: vcpu.running)
    vcpu.kick()
    assert job.end() == KICKED
    vm.on_pio(0x80, 1, native.Stop())
    job = begin(vcpu)
    assert job.end() == EXIT
    assert (job.exit.reason, job.exit.address, job.attached) == (2, 0x80, 0)


# ---- whose run it is ----


@pytest.fixture
def spinning(scripted, begin):
    """-> a vCPU that a thread of C's runs: it spins."""
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True), hlt()])
    job = begin(vcpu)
    until(lambda: scripted.script(vcpu).entries)
    return vcpu, job


def test_pythons_run_beside_cs_is_refused(spinning):
    vcpu, job = spinning
    assert vcpu.running
    for use in (vcpu.run, vcpu.complete, lambda: vcpu.regs.rip, lambda: vcpu.pending):
        with pytest.raises(VcpuBusyError):
            use()
    assert run(vcpu) == (-errno.EBUSY, None)
    assert pending(vcpu) == (-errno.EBUSY, None)
    assert answer(vcpu) == -errno.EBUSY
    vcpu.kick()
    assert job.end() == KICKED
    assert not vcpu.running
    assert isinstance(vcpu.run(), kvmexit.Hlt)


def test_cs_run_beside_pythons_is_refused(scripted, begin):
    vcpu = scripted.create_vcpu(0, [ScriptStep(spin=True), hlt()])
    thread = in_thread(vcpu.run)
    until(lambda: scripted.script(vcpu).entries)
    assert begin(vcpu).end() == -errno.EBUSY
    vcpu.kick()
    thread.join(40)
    assert begin(vcpu).end() == EXIT


def test_no_run_inside_a_handler(scripted, library):
    """Neither a Python nor a native one, of this vCPU or another."""
    other = scripted.create_vcpu(1, [hlt()])
    said = []
    scripted.on_pio(1, 1, lambda vcpu, io: said.extend((run(vcpu)[0], run(other)[0])))
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), memory_fault(0x3000, private=True), hlt()])
    scripted.memory.add(0, 1 << 20, guest_memfd=True, discard=False)

    class Device(ctypes.Structure):
        _fields_ = [("api", POINTER), ("vcpu", POINTER), ("other", POINTER), ("converted", ctypes.c_int32), ("ran", ctypes.c_int32),
                    ("done", ctypes.c_uint64)]  # fmt: skip

    device = Device(ADDRESS, api.vcpu(vcpu), api.vcpu(other), 1, 1)
    scripted.on_memory_fault(handler=native.Function(handler_in(library, "device"), device))
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert said == [-errno.EDEADLK] * 2
    assert (device.converted, device.ran, device.done) == (0, -errno.EDEADLK, 4096)
    assert scripted.memory.is_private(0x3000)
    assert run(other)[0] == EXIT


def test_a_forked_child_is_refused(scripted):
    vcpu = scripted.create_vcpu(0, [hlt(), hlt()])
    handle = api.vcpu(vcpu)
    pid = os.fork()
    if pid == 0:
        said = {api.run(handle, 0, None), api.exit(handle, None), api.answer(handle), api.kick(handle), api.convert(handle, 0, 4096, 0, None)}
        os._exit(7 if said == {-errno.ECHILD} else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert run(vcpu)[0] == EXIT


# ---- pause ----


def test_pause_parks_cs_run(scripted, begin):
    """It goes on by itself after resume(), and while it is parked a kick or its deadline ends it."""
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x")], repeat=FOR_EVER, keep=False)
    scripted.on_pio(1, 1, native.Ignore())
    job = begin(vcpu)
    until(lambda: vcpu.running)
    for _ in range(stress(50)):
        scripted.pause()
        position = scripted.script(vcpu).position
        assert vcpu.running
        for _ in range(10):
            assert scripted.script(vcpu).position == position
        scripted.resume()
    scripted.pause()
    vcpu.kick()
    assert job.end() == KICKED
    assert scripted.paused
    assert begin(vcpu, 20_000_000).end() == TIMED_OUT
    scripted.resume()
    assert begin(vcpu, 0).end() == TIMED_OUT


def test_a_run_on_a_paused_vm_enters_nothing(scripted, begin):
    """Nor is an access completed, nor a handler called (P6)."""
    counter = native.Counter()
    scripted.on_pio(2, 1, counter)
    vcpu = scripted.create_vcpu(0, [pio_in(1), pio_out(2, b"x"), hlt()])
    run(vcpu)
    answer(vcpu, b"a")
    scripted.pause()
    job = begin(vcpu)
    until(lambda: vcpu.running)
    scripted.pause()  # returns when it is parked
    assert len(scripted.script(vcpu).entries) == 1
    scripted.resume()
    assert (vcpu.running, counter.writes) == (True, 0)
    scripted.resume()
    assert job.end() == EXIT
    assert (job.exit.address, counter.writes) == (2, 1)


def test_a_native_handler_is_waited_for(scripted, tmp_path_factory, begin):
    """pause() and remove() return when it does."""
    words = (ctypes.c_uint32 * 2)()
    wait = native.Function(handler_in(ctypes.CDLL(str(compiled(tmp_path_factory, "native_handlers"))), "wait"), words)
    route = scripted.on_pio(1, 1, wait)
    vcpu = scripted.create_vcpu(0, [pio_out(1, b"x"), ScriptStep(spin=True)])
    job = begin(vcpu)
    until(lambda: words[0])
    done = []
    threads = [in_thread(lambda: (scripted.pause(), done.append("pause"))), in_thread(lambda: (route.remove(), done.append("remove")))]
    threads[0].join(0.05)
    assert done == []
    words[1] = 1
    for thread in threads:
        thread.join(40)
    assert sorted(done) == ["pause", "remove"]
    scripted.resume()
    vcpu.kick()
    assert job.end() == KICKED


# ---- close ----


def test_close_ends_cs_run_and_refuses_the_next(scripted, spinning):
    vcpu, job = spinning
    scripted.close()
    assert job.end() == KICKED
    handle = api.vcpu(vcpu)
    assert run(vcpu) == (-errno.EBADF, None)
    assert pending(vcpu) == (-errno.EBADF, None)
    assert api.answer(handle) == api.convert(handle, 0, 4096, 1, None) == -errno.EBADF
    assert api.kick(handle) == 0  # its page is there as long as the Vcpu


def test_close_ends_a_parked_run(scripted, begin):
    vcpu = scripted.create_vcpu(0, [hlt()])
    scripted.pause()
    job = begin(vcpu)
    until(lambda: vcpu.running)
    scripted.close()
    assert job.end() == KICKED
    assert not scripted.script(vcpu).entries


@pytest.mark.parametrize("kind", ["scripted", "kvm"])
def test_close_under_runs_that_begin(request, begin, kind):
    """Whoever comes at the same time either runs, and is waited for, or is refused."""
    if kind == "kvm":
        request.getfixturevalue("kvm")
    for _ in range(stress(30)):
        with ScriptedVM() if kind == "scripted" else kvmexit.VM() as vm:
            vcpu = load(vm, SPIN) if kind == "kvm" else vm.create_vcpu(0, [hlt()], repeat=FOR_EVER, keep=False)
            job = begin(vcpu, 100_000, drives=True, stop=1)
            until(lambda vcpu=vcpu: vcpu.running)
        until(lambda job=job: job.what == -errno.EBADF)
        job.stop = 2
        assert job.end() == -errno.EBADF


# ---- conversion ----


def test_a_range_is_converted(scripted):
    vcpu = scripted.create_vcpu(0, [])
    handle = api.vcpu(vcpu)
    scripted.memory.add(0, 1 << 20, guest_memfd=True, discard=False)
    scripted.memory.add(1 << 20, 1 << 20)
    done = ctypes.c_uint64(99)
    assert api.convert(handle, 0x3000, 0x5000, 1, ctypes.byref(done)) == 0
    assert (done.value, scripted.memory.ranges()[1]) == (0x5000, (0x3000, 0x5000, True))
    assert api.convert(handle, 0, 1 << 21, 0, None) == 0
    assert not scripted.memory.is_private(0x3000)
    for gpa, size, private, error in [(1, 4096, 1, errno.EINVAL), (0, 0, 1, errno.EINVAL), (0, 5, 1, errno.EINVAL),
                                      ((1 << 64) - 4096, 8192, 0, errno.EINVAL), (1 << 30, 4096, 1, errno.ENXIO),
                                      (0, 1 << 21, 1, errno.ENXIO)]:
        assert api.convert(handle, gpa, size, private, ctypes.byref(done)) == -error
        assert done.value == 0
    assert api.convert(handle, 1 << 30, 4096, 0, None) == 0  # a hole is shared
    assert not any(found.private for found in scripted.memory.ranges())


def test_a_conversion_that_fails_says_how_far_it_got():
    with ScriptedVM(attributes=RecordedAttributes({3: errno.ENOMEM})) as vm:
        vm.memory.add(0, 0x6000, guest_memfd=True, discard=False)
        vm.memory.convert(0x2000, 0x1000, private=True)
        vcpu, done = vm.create_vcpu(0, []), ctypes.c_uint64()
        assert api.convert(api.vcpu(vcpu), 0, 0x6000, 1, ctypes.byref(done)) == -errno.ENOMEM
        assert (done.value, vm.memory.ranges()) == (0x3000, [(0, 0x3000, True), (0x3000, 0x3000, False)])


@unsanitized("so much does not fit beside TSan's shadow")
def test_huge_ranges_go_by_the_chunk():
    recorded = RecordedAttributes()
    with ScriptedVM(attributes=recorded) as vm:
        vm.memory.add(0, 1 << 30, guest_memfd=True, discard=False)
        vcpu, done = vm.create_vcpu(0, []), ctypes.c_uint64()
        assert api.convert(api.vcpu(vcpu), 0x1000, (1 << 30) - 0x2000, 1, ctypes.byref(done)) == 0
        assert done.value == (1 << 30) - 0x2000
        assert len(recorded.calls) == 16
        assert vm.memory.ranges()[1] == (0x1000, (1 << 30) - 0x2000, True)


def test_a_vm_that_cannot_convert():
    with ScriptedVM(attributes=kvmexit.SlotRebind()) as vm:
        vcpu = vm.create_vcpu(0, [])
        assert api.convert(api.vcpu(vcpu), 0, 4096, 1, None) == -errno.EOPNOTSUPP


@pytest.mark.kvm
def test_private_memory_is_converted(private_vm):
    private_vm.memory.add(0, 1 << 20, guest_memfd=True)
    vcpu = private_vm.create_vcpu(0)
    assert api.convert(api.vcpu(vcpu), 0x3000, 0x5000, 1, None) == 0
    assert private_vm.memory.ranges()[1] == (0x3000, 0x5000, True)


# ---- the table ----


def test_the_capsule_and_whom_it_knows(scripted):
    assert (api.version, api.size) == (1, ctypes.sizeof(Api))
    for thing in (None, scripted, 5):
        with pytest.raises(TypeError, match=r"a kvmexit\.Vcpu has a C side, not"):
            api.vcpu(thing)
    vcpu = scripted.create_vcpu(0, [])
    before = sys.getrefcount(vcpu)
    assert api.vcpu(vcpu) == api.vcpu(vcpu)
    assert sys.getrefcount(vcpu) == before


IMPORTING = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <kvmexit/embed.h>

static PyObject *fetch(PyObject *self, PyObject *object)
{
    const struct kvmexit_api *api = kvmexit_import();
    struct kvmexit_vcpu *vcpu;
    const struct kvmexit_exit *exit;
    int what;
    (void)self;
    if (!api || !(vcpu = api->vcpu(object)))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    what = api->run(vcpu, KVMEXIT_FOREVER, &exit);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("iI", what, exit ? exit->reason : 0);
}

static PyMethodDef methods[] = {{"fetch", fetch, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "importing", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit_importing(void) { return PyModule_Create(&module); }
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "(0, 5)"),
        (("KVMEXIT_EMBED_VERSION 1 ", "KVMEXIT_EMBED_VERSION 2 "), "version 1 and 64 bytes; this was compiled for version 2 and 64 bytes"),
        (("    int (*answer)", "    int (*newer)(void);\n    int (*answer)"), "compiled for version 1 and 72 bytes"),
    ],
)  # fmt: skip
def test_a_program_that_was_compiled_for_another_version_is_told(tmp_path, change, says):
    headers = tmp_path / "include" / "kvmexit"
    headers.mkdir(parents=True)
    for name in ("kvmexit.h", "embed.h"):
        with open(os.path.join(kvmexit.get_include(), "kvmexit", name)) as file:
            text = file.read()
        if change and name == "embed.h":
            assert change[0] in text
            text = text.replace(*change)
        (headers / name).write_text(text)
    (tmp_path / "importing.c").write_text(IMPORTING)
    target = tmp_path / ("importing" + sysconfig.get_config_var("EXT_SUFFIX"))
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", headers.parent, "-I", sysconfig.get_paths()["include"],
                    tmp_path / "importing.c", "-o", target], check=True)
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport importing\nfrom kvmexit.testing import ScriptedVM, hlt\n"
                  "with ScriptedVM() as vm:\n    print(importing.fetch(vm.create_vcpu(0, [hlt()])))")
    assert says in done.stdout + done.stderr, done


# ---- all at once ----


def test_runs_pauses_kicks_and_python_at_once(scripted, begin):
    """Four threads of C's and one of Python's want two vCPUs, while others pause, kick, convert, write registers and look.
    Under a pause nothing moves."""
    scripted.memory.add(0, 1 << 20, guest_memfd=True, discard=False)
    scripted.on_pio(1, 1, native.Ignore())
    steps = [pio_out(1, b"x")] * 20 + [pio_in(2), memory_fault(0x4000, private=True), ScriptStep(spin=True)]
    vcpus = [scripted.create_vcpu(i, steps, repeat=FOR_EVER, keep=False) for i in range(2)]
    jobs = [begin(vcpu, 2_000_000, drives=2, stop=1) for vcpu in vcpus for _ in range(2)]
    often = scripted.create_vcpu(2, [hlt()], repeat=FOR_EVER, keep=False)  # begins and ends all the time
    jobs.append(begin(often, 0, drives=2, stop=1))
    over, mistakes, written = threading.Event(), [], [0]

    def runs():
        while not over.is_set():
            for vcpu in vcpus:
                try:
                    exit = vcpu.run(timeout=0.001)
                    if isinstance(exit, kvmexit.Io):
                        exit.data = b"P"
                except (VcpuBusyError, kvmexit.NotPendingError):
                    pass
                except kvmexit.KvmError as error:
                    mistakes.append(error)

    def converts():
        while not over.is_set():
            for private in (1, 0):
                if api.convert(api.vcpu(vcpus[0]), 0x8000, 0x4000, private, None):
                    mistakes.append("convert")

    def writes():
        while not over.is_set():
            for i in range(256):
                try:
                    often.regs.rax = i * 0x0101_0101_0101_0101
                    if often.regs.rax % 0x0101_0101_0101_0101:
                        mistakes.append("half a register")
                    written[0] += 1
                except VcpuBusyError:
                    pass

    threads = [in_thread(runs), in_thread(converts), in_thread(writes)]
    try:
        for i in range(stress(300)):
            scripted.pause()
            before = [scripted.script(vcpu).position for vcpu in vcpus]
            for _ in range(20):
                api.exit(api.vcpu(vcpus[0]), None)
            if [scripted.script(vcpu).position for vcpu in vcpus] != before:
                mistakes.append(i)
            scripted.resume()
            vcpus[i % 2].kick()
        # All of them got their turn, however short this is: a kick moves the guest on from where it spins.
        until(lambda: [vcpu.kick() for vcpu in vcpus] and written[0] > 10 and sum(job.exits for job in jobs[:4]) > 10)
    finally:
        over.set()
        for thread in threads:
            thread.join(20)
        for job in jobs:
            job.stop = 2
            for vcpu in (*vcpus, often):
                vcpu.kick()
        said = [job.end() for job in jobs]
    assert mistakes == []
    assert all(what in (KICKED, TIMED_OUT, -errno.EBUSY) for what in said)


# ---- with rings and statistics ----


def test_a_run_that_waits_for_room_in_a_ring_heeds_what_is_asked(scripted, begin):
    """As Python's run(): a kick, a time-out and a pause come first, and the exit is offered again."""
    ring = native.Ring(2, full="wait")
    scripted.on_pio(0x80, 1, ring)
    vcpu = scripted.create_vcpu(0, [*(pio_out(0x80, bytes([i])) for i in range(3)), hlt()])
    assert run(vcpu, 30_000_000) == (TIMED_OUT, None)
    assert pending(vcpu)[0] == PYTHON  # unsettled: it goes to the handlers again
    assert ring.pending == 2
    vcpu.kick()
    assert run(vcpu) == (KICKED, None)
    job = begin(vcpu)
    until(lambda: vcpu.running)
    scripted.pause()
    assert [entry.data for entry in ring.drain()] == [0, 1]
    scripted.resume()
    assert job.end() == EXIT
    assert job.exit.reason == 5
    assert [entry.data for entry in ring.drain()] == [2]


def test_a_ring_is_removed_while_a_run_waits_for_room_in_it(scripted, begin):
    """remove() waits for who is inside the handler: the run goes on with the newer routes, and the write is the caller's."""
    route = scripted.on_pio(0x80, 1, native.Ring(2, full="wait"))
    vcpu = scripted.create_vcpu(0, [pio_out(0x80, bytes([i])) for i in range(3)])
    job = begin(vcpu)
    until(lambda: vcpu.stats.exits == 2)
    remover = in_thread(route.remove)
    remover.join(60)
    assert not remover.is_alive()
    assert (job.end(), job.exit.address) == (EXIT, 0x80)


def test_a_kick_before_the_run_lets_kvm_complete_what_is_answered(scripted):
    """As Python's run(): it enters once, and says so then."""
    vcpu = scripted.create_vcpu(0, [pio_in(0x10), hlt()])
    assert run(vcpu)[0] == EXIT
    assert answer(vcpu, b"\x5a") == 0
    vcpu.kick()
    assert run(vcpu) == (KICKED, None)
    assert pending(vcpu) == (-errno.ENODATA, None)
    assert scripted.script(vcpu).left(0)[1] == b"\x5a"
    assert run(vcpu)[0] == EXIT


def test_an_exit_that_is_taken_when_offered_again_is_native(scripted):
    """And one that Python answers by hand is the caller's."""
    ring = native.Ring(2, full="wait")
    scripted.on_pio(0x80, 1, ring)
    scripted.on_pio(0x81, 1, lambda vcpu, io: 1)
    vcpu = scripted.create_vcpu(0, [*[pio_out(0x80, b"x")] * 3, pio_in(0x81), hlt()])
    assert run(vcpu, 30_000_000) == (TIMED_OUT, None)
    ring.drain()
    assert run(vcpu)[0] == PYTHON
    assert [last.outcome for last in vcpu.last_exits] == ["native"] * 3 + ["pending"]
    vcpu.pending.data = 7
    assert run(vcpu)[0] == EXIT
    assert [last.outcome for last in vcpu.last_exits] == ["native"] * 3 + ["caller"] * 2


def test_a_vcpu_that_nobody_made_has_no_c_side():
    with pytest.raises(TypeError, match=r"create_vcpu\(\)"):
        api.vcpu(kvmexit.Vcpu.__new__(kvmexit.Vcpu))


def test_what_it_ran_is_in_the_statistics(scripted):
    """Who took an exit, and where time went, whoever ran the vCPU."""
    scripted.on_pio(0x80, 1, native.Ignore())
    scripted.on_pio(0x81, 1, lambda vcpu, io: None)
    vcpu = scripted.create_vcpu(0, [pio_out(port, b"x") for port in (0x80, 0x81, 0x82)])
    vcpu.timing = True
    assert run(vcpu)[0] == PYTHON
    assert [last.outcome for last in vcpu.last_exits] == ["native", "pending"]
    assert [api.answer(api.vcpu(vcpu)), run(vcpu)[0]] == [0, EXIT]
    assert [last.outcome for last in vcpu.last_exits] == ["native", "caller", "caller"]
    assert (vcpu.stats.kvm.count, vcpu.stats.gil.count, vcpu.stats.python.count) == (3, 0, 0)
