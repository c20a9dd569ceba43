"""Poisoned memory: a SIGBUS of KVM's is an exit (src/kvmexit/_poison.h, faults.catch_poison()), every other one is whose it was.

Here the signals are sent to a thread that is in KVM_RUN, and get the kernel's siginfo by a handler above ours (tests/poison.c); where the
kernel poisons memory on request (the lab), the same with real poison.
"""

import ctypes
import errno
import mmap
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from guests import CODE, SPIN, load, stress
from processes import compiled, in_thread, python, unsanitized
from test_embed import ADDRESS, FOREVER, POINTER, Api
from test_faults import example  # noqa: F401

import kvmexit
from kvmexit import STOP, faults, handlers, native
from kvmexit.errors import FaultLoopError, KvmError
from kvmexit.faults import Cause
from kvmexit.testing import ScriptedVM, hlt, memory_fault

PAGE, DATA, FLAG = 4096, 0x1000_0000, 0x8000
AR, AO, ADRERR = 4, 5, 2  # si_code: BUS_MCEERR_AR, BUS_MCEERR_AO, BUS_ADRERR
EHWPOISON = 133
COUNTS, PASSES, ASKS = range(3)
MARKED = bytes.fromhex("c6 03 01 eb fb")  # again: mov byte [rbx], 1; jmp again
OUT_SPIN = bytes.fromhex("e6 80 eb fe")  # out 0x80, al; jmp $
READ = bytes.fromhex("8a 03 e6 f4")  # mov al, [rbx]; out 0xf4, al
WRITE = bytes.fromhex("88 03 8a 03 e6 f4")  # mov [rbx], al; mov al, [rbx]; out 0xf4, al
JUMP = bytes.fromhex("ff e3")  # jmp rbx
OUT = bytes.fromhex("e6 f4")  # out 0xf4, al

CHILD = """
import ctypes, mmap, os, resource, signal, sys
import kvmexit
from kvmexit import faults
from guests import CODE, load
from test_poison import *
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
lib = loaded(os.environ["POISON"])
"""


def loaded(path):
    """tests/poison.c."""
    library = ctypes.CDLL(str(path), use_errno=True)
    library.send_bus.argtypes, library.send_bus.restype = [ctypes.c_int, ctypes.c_int, POINTER, ctypes.c_int], ctypes.c_long
    library.poison.argtypes, library.address_seen.restype = [POINTER], POINTER
    library.prepare.argtypes = [POINTER, POINTER, ctypes.c_long]
    library.read_memory.argtypes = [POINTER, POINTER]
    return library


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory, "poison")


@pytest.fixture(scope="module")
def poisons(path):
    """Whether this kernel poisons memory on request. It tells the thread that asked by a SIGBUS, which is the program's own."""
    library, scratch = loaded(path), mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    scratch[0] = 1
    library.install(COUNTS)
    try:
        return library.poison(ctypes.addressof(ctypes.c_char.from_buffer(scratch))) == 0
    finally:
        library.uninstall()


@pytest.fixture
def forging(kvm, poisons):
    """Skips where poison can be real: in the lab, which is slow."""
    if poisons:
        pytest.skip("poison can be real here")


@pytest.fixture
def bus(path):
    """tests/poison.c, counting what comes to the process's own handler: installed before kvmexit's."""
    library = loaded(path)
    assert library.install(COUNTS) == 0
    library.start = library.seen()
    library.lost = lambda: library.seen() - library.start
    yield library
    library.down()
    assert library.is_first(COUNTS), "a test left a handler behind"
    library.uninstall()


@pytest.fixture
def over(path, tmp_path):
    """The library once more, for handlers that come after kvmexit's."""
    return loaded(shutil.copy(path, tmp_path / "over.so"))


@pytest.fixture
def caught(bus):
    """With faults.catch_poison()."""
    with faults.catch_poison():
        yield bus
        bus.down()


class Guest:
    """A vCPU that spins, marking that it does, and a thread of its own to run it; four pages of 7s at DATA."""

    def __init__(self, vm, library, code=MARKED):
        self.library, self.vm = library, vm
        self.vcpu = load(vm, code)
        memory = mmap.mmap(-1, 6 * PAGE)  # before and behind it is no guest memory
        self.ram, self.slot = vm.memory.slots[0], vm.memory.add(DATA, 4 * PAGE, buffer=memory, offset=PAGE)
        self.slot[:] = b"\7" * 4 * PAGE
        self.vcpu.regs.rbx = FLAG
        self.pool = ThreadPoolExecutor(1)
        self.tid = self.on_thread(library.gettid_here).result()

    def on_thread(self, function, *args):
        return self.pool.submit(function, *args)

    def run(self, timeout=30):
        """-> a future of the exit, once the guest runs."""
        self.ram[FLAG] = 0
        future = self.on_thread(self.vcpu.run, timeout)
        self.runs()
        return future

    def runs(self):
        """Wait until the guest runs: then the thread is in KVM_RUN, and stays there until somebody wants it."""
        self.ram[FLAG] = 0
        until(lambda: self.ram[FLAG])

    def send(self, at=None, code=AR, shift=12):
        """What KVM sends. at: the host address."""
        assert self.library.send_bus(self.tid, code, self.slot.hva if at is None else at, shift) == 0

    def stop(self, future):
        self.vcpu.kick()
        assert future.result().cause == "kick"


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.0005)


@pytest.fixture
def guest(forging, vm, bus):
    guest = Guest(vm, bus)
    yield guest
    guest.vcpu.kick()
    guest.pool.shutdown()


# ---- what KVM sends becomes an exit ----


@pytest.mark.parametrize(("offset", "shift", "first", "size"), [
    (0, 12, 0, PAGE), (3 * PAGE + 5, 12, 3 * PAGE, PAGE), (PAGE, 0, PAGE, PAGE), (PAGE, 13, 0, 2 * PAGE),
    (2 * PAGE, 30, 0, 4 * PAGE), (2 * PAGE, 99, 0, 4 * PAGE)])
def test_the_exit_says_the_page(caught, guest, offset, shift, first, size):
    """As much as is lost, as far as it is the slot's."""
    base = guest.slot.hva
    if shift == 13 and base % (2 * PAGE):
        first, size = PAGE, 2 * PAGE
    future = guest.run()
    guest.send(base + offset, shift=shift)
    exit = future.result()
    assert (type(exit), exit.gpa, exit.size, exit.flags, exit.errno) == (kvmexit.MemoryFault, DATA + first, size, 0, EHWPOISON)
    assert exit.reason == kvmexit.ExitReason.MEMORY_FAULT
    said = exit.explain(guest.vcpu)
    assert (said.cause, said.certain, said.gpa, said.slot, said.hva) == (
        Cause.POISONED, True, DATA + first, guest.slot, base + first)
    assert caught.lost() == 0
    guest.stop(guest.run())  # and the guest is as it was


def test_its_handlers_are_those_of_memory_faults(caught, guest):
    """Routes with a range, on_fault(), and the order of them; the guest goes on."""
    seen = []
    guest.vm.on_memory_fault(DATA, PAGE, lambda vcpu, fault: seen.append("first page"))
    guest.vm.on_fault(DATA + PAGE, PAGE, lambda vcpu, fault: seen.append((fault.cause, fault.gpa, fault.hva, fault.certain)))
    future = guest.run()
    for page, of_it in (0, "first page"), (1, (Cause.POISONED, DATA + PAGE, guest.slot.hva + PAGE, True)):
        guest.send(guest.slot.hva + page * PAGE)
        until(lambda page=page: len(seen) == page + 1)
        assert seen[page] == of_it
        guest.runs()
    guest.send(guest.slot.hva + 2 * PAGE)
    assert future.result().gpa == DATA + 2 * PAGE


def test_a_page_that_is_not_lost_is_not_renewed(caught, guest):
    """Another vCPU's handler may have been first, and the guest have written to the new page since."""
    guest.vm.on_fault(handler=lambda vcpu, fault: fault.repair() or STOP)
    future = guest.run()
    guest.send()
    assert future.result().errno == EHWPOISON
    assert guest.slot[:] == b"\7" * 4 * PAGE


def test_native_handlers_see_it(caught, guest):
    """As of a guest_memfd: native.Convert passes it on, and so does handlers.convert."""
    convert = native.Convert(guest.vm)
    guest.vm.on_memory_fault(handler=convert)
    guest.vm.on_memory_fault(handler=handlers.convert)
    future = guest.run()
    guest.send()
    assert future.result().errno == EHWPOISON
    assert (convert.faults, convert.failed) == (0, 0)


def test_it_is_recorded(forging, path, tmp_path):
    """And read back. A process of its own: a recording has a SIGBUS handler, too, which stays; ours is below it."""
    done = python(CHILD + f"""
with kvmexit.VM() as vm, faults.catch_poison():
    guest = Guest(vm, lib)
    with guest.vcpu.record({str(tmp_path / "trace")!r}):
        future = guest.run()
        guest.send(guest.slot.hva + PAGE)
        print(future.result().errno)
exits = [record.exit for record in kvmexit.load({str(tmp_path / "trace")!r}) if record.errno == EHWPOISON]
print([(type(exit).__name__, exit.gpa == DATA + PAGE, exit.size) for exit in exits])
""", env={"POISON": str(path)})
    assert done.stdout.splitlines() == ["133", "[('MemoryFault', True, 4096)]"], done.stderr


def test_a_fault_that_nobody_repairs_is_a_loop(forging, caught, vm):
    """The same one, at the same registers, thrice: the guard counts it. The first ones' flags may be others."""
    guest = Guest(vm, caught, SPIN)
    came, sent = [], None
    vm.on_memory_fault(handler=lambda vcpu, fault: came.append((fault.gpa, vcpu.regs.rip, vcpu.regs.rflags)))
    guest.vcpu.fault_limit = 3
    future = guest.on_thread(guest.vcpu.run, 30)
    while not future.done():
        now = (len(came), caught.lost())
        if now != sent:  # a signal that comes when the thread is not in KVM_RUN is not the guest's: it is lost, and sent again
            sent = now
            guest.send()
    with pytest.raises(FaultLoopError, match="errno=133") as raised:
        future.result()
    assert raised.value.fault.gpa == DATA
    assert came[-3:] == [(DATA, CODE, came[-1][2])] * 3
    assert came[-4:-3] != came[-1:]
    guest.pool.shutdown()


def test_two_machines(caught, guest, path):
    """A thread's own vCPU counts: another VM's address is not its guest's."""
    with kvmexit.VM() as other:
        theirs = Guest(other, caught)
        futures = [guest.run(), theirs.run()]
        guest.send(theirs.slot.hva)
        until(lambda: caught.lost() == 1)
        guest.runs()
        theirs.send()
        assert (futures[1].result().gpa, futures[0].done()) == (DATA, False)
        guest.stop(futures[0])
        theirs.pool.shutdown()


def test_the_inner_of_two_runs(caught, guest):
    """A run() in a handler: the signal is of the vCPU that the thread is in KVM_RUN with."""
    with kvmexit.VM() as vm:
        inner = Guest(vm, caught)
        guest.vm.on_memory_fault(handler=lambda vcpu, fault: exits.append(inner.vcpu.run(30)) or STOP)
        exits = []
        future = guest.run()
        guest.send()
        inner.runs()
        guest.send()  # the outer's memory: the inner guest has none of it
        until(lambda: caught.lost() == 1)
        inner.runs()
        guest.send(inner.slot.hva + PAGE)
        assert (future.result().gpa, [exit.gpa for exit in exits]) == (DATA, [DATA + PAGE])
        inner.pool.shutdown()


# ---- what comes with it is not lost ----


@pytest.fixture
def asking(guest, bus, over):
    """asking(kick, nap_ns): the program has a handler of its own that asks the C API, and before that kicks, or sleeps."""
    over.prepare(ADDRESS, None, 0)
    assert over.install(ASKS) == 0

    def asking(kick=False, nap_ns=0):
        over.prepare(ADDRESS, Api.from_address(ADDRESS).vcpu(guest.vcpu) if kick else None, nap_ns)
        return over

    yield asking
    bus.down()
    over.uninstall()


def test_a_programs_own_handler_asks(guest, bus, asking):
    """Without catch_poison(): the C API's poison() takes what is the guest's, and no more."""
    library = asking()
    future = guest.run()
    guest.send(guest.slot.hva - PAGE)
    until(lambda: library.seen() == 1)
    guest.runs()
    guest.send()
    assert (future.result().errno, library.poisons_seen(), library.seen()) == (EHWPOISON, 1, 1)


@pytest.mark.parametrize("kick", [True, False])
def test_a_kick_or_time_out_in_the_same_eintr(guest, asking, kick):
    """The fault comes first; the run goes on, and says what else there was."""
    faults = []
    asking(kick=kick, nap_ns=0 if kick else 500_000_000)
    guest.vm.on_memory_fault(handler=lambda vcpu, fault: faults.append(fault.gpa))
    future = guest.run(30 if kick else 0.4)
    guest.send()
    assert (future.result().cause, faults) == ("kick" if kick else "timeout", [DATA])


def test_a_kick_with_a_fault_that_is_returned(guest, asking):
    """It is for the run() after."""
    asking(kick=True)
    future = guest.run()
    guest.send()
    assert future.result().errno == EHWPOISON
    assert guest.on_thread(guest.vcpu.run, 30).result().cause == "kick"


def test_a_run_of_the_c_api(guest, asking):
    """The exit, with its error."""
    from test_embed import EXIT, api, run

    asking()
    guest.ram[FLAG] = 0
    future = guest.on_thread(run, guest.vcpu, FOREVER)
    guest.runs()
    guest.send(guest.slot.hva + PAGE)
    what, exit = future.result()
    assert (what, exit.reason, exit.error, exit.address, exit.size) == (EXIT, 39, EHWPOISON, DATA + PAGE, PAGE)
    assert api.kick(api.vcpu(guest.vcpu)) == 0


def test_stress_signals_and_kicks(forging, caught, vm):
    """Two vCPUs. Each signal is a fault, or was its owner's since the thread was not in KVM_RUN; each kick is said once."""
    guests = [Guest(vm, caught)]
    guests.append(Guest.__new__(Guest))
    second = guests[1]
    second.library, second.vm, second.ram, second.slot = caught, vm, guests[0].ram, guests[0].slot
    second.vcpu = vm.create_vcpu(9)
    kvmexit.x86.long_mode(second.vcpu, CODE, cpl=3)
    second.vcpu.regs.rbx = FLAG + 8
    second.pool = ThreadPoolExecutor(1)
    second.tid = second.on_thread(caught.gettid_here).result()
    counts = {guest.vcpu.id: [0, 0] for guest in guests}  # faults, kicks
    sent = [0, 0]
    done = threading.Event()
    vm.on_memory_fault(handler=lambda vcpu, fault: counts[vcpu.id].__setitem__(0, counts[vcpu.id][0] + 1))

    def run(vcpu):
        while not done.is_set():
            if vcpu.run(30).cause == "kick":
                counts[vcpu.id][1] += 1

    running = [guest.on_thread(run, guest.vcpu) for guest in guests]
    for i in range(stress(300)):
        guest = guests[i % 2]
        guest.send()
        sent[0] += 1
        kicks = counts[guest.vcpu.id][1]
        guest.vcpu.kick()
        sent[1] += 1
        until(lambda: sum(faults for faults, _ in counts.values()) + caught.lost() == sent[0])
        until(lambda guest=guest, kicks=kicks: counts[guest.vcpu.id][1] == kicks + 1)
    done.set()
    for guest, future in zip(guests, running, strict=True):
        guest.vcpu.kick()
        future.result()
        guest.pool.shutdown()
    assert sum(kicks for _, kicks in counts.values()) - sent[1] in (0, 1, 2)  # those that ended it


# ---- what is not the guest's ----


@pytest.mark.parametrize(("code", "where"), [
    (AO, 0), (ADRERR, 0), (-1, 0), (AR, -PAGE), (AR, 4 * PAGE), (AR, None)],
    ids=["optional", "address error", "queued", "before", "behind", "nowhere"])
def test_another_sigbus_is_its_owners(caught, guest, code, where):
    """Another code, or an address that is not guest memory: with its siginfo, and the guest goes on."""
    at = 0 if where is None else guest.slot.hva + where
    future = guest.run()
    guest.send(at, code)
    until(lambda: caught.lost() == 1)
    assert (caught.address_seen() or 0) == (at if code != -1 else caught.address_seen() or 0)
    guest.runs()
    guest.stop(future)


def test_not_in_kvm_run(forging, caught, vm):
    """The thread runs the vCPU, and is in its handler; another thread; and none that runs one."""
    guest = Guest(vm, caught, OUT_SPIN)
    vm.on_pio(0x80, 1, lambda vcpu, io: guest.send() or STOP)
    assert isinstance(guest.on_thread(guest.vcpu.run, 30).result(), kvmexit.Io)
    assert caught.lost() == 1
    assert caught.send_bus(caught.gettid_here(), AR, guest.slot.hva, 12) == 0
    assert caught.lost() == 2
    future = guest.on_thread(guest.vcpu.run, 0.3)
    assert caught.send_bus(caught.gettid_here(), AR, guest.slot.hva, 12) == 0
    assert caught.lost() == 3
    assert future.result().cause == "timeout"
    guest.pool.shutdown()


def test_a_slot_that_was_removed(caught, guest):
    """Its memory is nobody's."""
    at, view = guest.slot.hva, guest.slot.view
    guest.vm.memory.remove(guest.slot)
    future = guest.run()
    guest.send(at)
    until(lambda: caught.lost() == 1)
    guest.stop(future)
    view.release()


# ---- handlers before and after ours ----


def test_it_is_undone_when_the_last_lets_go(guest, bus):
    """Each call counts, closing twice does not; afterwards the process is as it was."""
    first, second = faults.catch_poison(), faults.catch_poison()
    assert (first.first, bus.is_first(COUNTS), repr(first)) == (True, 0, "<PoisonCatch, open>")
    first.close()
    first.close()
    assert second.first
    future = guest.run()
    guest.send()
    assert (future.result().errno, second.first) == (EHWPOISON, False)
    bus.down()
    with second as same:
        assert same is second
    assert (second.first, bus.is_first(COUNTS), repr(second)) == (False, 1, "<PoisonCatch, closed>")
    future = guest.run()
    guest.send()
    until(lambda: bus.lost() == 1)
    guest.stop(future)


def test_a_later_handler_that_calls_on(guest, bus, over):
    """It sees all, and we what it passes on: poison taken, and its own predecessor's otherwise."""
    def own_access():
        assert bus.send_bus(bus.gettid_here(), AR, guest.slot.hva, 12) == 0
        bus.down()
        return over.seen(), bus.lost()

    with faults.catch_poison() as catch:
        over.install(PASSES)
        assert not catch.first
        future = guest.run()
        guest.send()
        assert (future.result().errno, over.seen(), bus.lost()) == (EHWPOISON, 1, 0)
        assert own_access() == (2, 1)
    assert over.is_first(PASSES)  # it is not ours to take out
    assert own_access() == (3, 2)
    with faults.catch_poison() as catch:  # once more, below it: two that called each other on would not end
        assert (own_access(), catch.first) == ((4, 3), False)
        future = guest.run()
        guest.send()
        assert future.result().errno == EHWPOISON
        bus.down()
        over.uninstall()
        assert catch.first
    assert bus.is_first(COUNTS)


def test_a_later_handler_that_does_not(guest, bus, over):
    """Its word is the last: the guest goes on, and the wish that ends below it leaves it alone."""
    catch = faults.catch_poison()
    over.install(COUNTS)
    future = guest.run()
    guest.send()
    until(lambda: over.seen() == 1)
    bus.down()
    catch.close()
    assert over.is_first(COUNTS)
    guest.stop(future)
    over.uninstall()  # which puts ours back; nobody wants it, and it passes on
    future = guest.run()
    guest.send()
    until(lambda: bus.lost() == 1)
    guest.stop(future)
    bus.down()
    faults.catch_poison().close()
    assert bus.is_first(COUNTS)


def test_a_blocked_signal_is_unblocked_for_the_run(caught, guest):
    """Blocked, it would not end KVM_RUN. Afterwards the thread has it blocked again, and its kick is not."""
    guest.on_thread(caught.block, 1).result()
    future = guest.run()
    guest.send()
    assert future.result().errno == EHWPOISON
    assert guest.on_thread(caught.block, -1).result() == 1
    guest.stop(guest.run())
    assert guest.on_thread(caught.block, -1).result() == 1


def test_it_stays_blocked_where_nobody_asked(guest, bus):
    """A program's signals are its own."""
    guest.on_thread(bus.block, 1).result()
    future = guest.run()
    guest.send()
    guest.stop(future)
    assert bus.lost() == 0
    guest.on_thread(bus.block, 0).result()
    assert bus.lost() == 1


# ---- what was fatal stays so: processes of their own ----

TRUNCATED = """
file = os.memfd_create("x")
os.ftruncate(file, PAGE)
memory = mmap.mmap(file, PAGE)
os.ftruncate(file, 0)
"""
DEATHS = {
    "one's own access": TRUNCATED + "memory[0]",
    "sent": "os.kill(os.getpid(), signal.SIGBUS)",
    "ignored, and one's own access": "signal.signal(signal.SIGBUS, signal.SIG_IGN)\ncatch = faults.catch_poison()\n" + TRUNCATED + "memory[0]",
    "poison that is nobody's": """
with kvmexit.VM() as vm:
    guest = Guest(vm, lib)
    future = guest.run()
    guest.send(guest.slot.hva - PAGE)
    future.result()
""",
    "a native handler's access": TRUNCATED + """
with kvmexit.VM() as vm:
    slot = vm.memory.add(DATA, PAGE, buffer=memory)
    vcpu = load(vm, bytes.fromhex("e4 80 eb fe"))
    vm.on_pio(0x80, 1, native.Function(lib.read_memory, slot.hva))
    vcpu.run(30)
""",
}


@unsanitized("it has a SIGBUS handler of its own")
@pytest.mark.parametrize("death", DEATHS)
def test_what_was_fatal_stays_so(forging, path, death):
    """The default is restored, and the process dies of that signal."""
    catch = "" if death.startswith("ignored") else "catch = faults.catch_poison()\n"
    done = python(CHILD + catch + "print('alive', flush=True)\n" + DEATHS[death] + "\nprint('survived')",
                  env={"POISON": str(path)}, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "alive\n"), done.stderr


@unsanitized("it has a SIGBUS handler of its own")
def test_what_was_not_fatal_is_not(forging, path):
    """SIG_IGN, as far as it goes; and a handler of Python's."""
    done = python(CHILD + """
signal.signal(signal.SIGBUS, signal.SIG_IGN)
with faults.catch_poison():
    os.kill(os.getpid(), signal.SIGBUS)
    lib.send_bus(lib.gettid_here(), AO, 4096, 12)
    with kvmexit.VM() as vm:
        guest = Guest(vm, lib)
        future = guest.run()
        guest.send(guest.slot.hva - PAGE)
        guest.stop(future)
        future = guest.run()
        guest.send()
        print(future.result().errno)
    lib.down()
assert signal.getsignal(signal.SIGBUS) == signal.SIG_IGN
os.kill(os.getpid(), signal.SIGBUS)
signal.signal(signal.SIGBUS, lambda *_: print("python"))
with faults.catch_poison() as catch:
    os.kill(os.getpid(), signal.SIGBUS)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    print(catch.first, faults.catch_poison().first)  # what took ours away is not above it: it is put anew
print("done")
""", env={"POISON": str(path)}, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["133", "python", "False", "True", "done"]), done.stderr


def test_a_child_of_fork_is_not_in_kvm_run(caught, guest):
    """It has the handler, and no guest."""
    seen = []

    def handler(vcpu, fault):
        child = os.fork()
        if child == 0:
            before = caught.lost()
            caught.send_bus(caught.gettid_here(), AR, guest.slot.hva, 12)
            os._exit(caught.lost() - before)
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return STOP

    guest.vm.on_memory_fault(handler=handler)
    future = guest.run()
    guest.send()
    assert (future.result().errno, seen) == (EHWPOISON, [1])


# ---- EHWPOISON of a guest_memfd, scripted ----


def private_machine(pages):
    vm = ScriptedVM()
    slot = vm.memory.add(DATA, pages * PAGE, guest_memfd=True)
    os.pwrite(slot.guest_memfd, b"\7" * pages * PAGE, 0)
    return vm, slot


def poisoned(page=0, private=True):
    return memory_fault(DATA + page * PAGE, private=private, errno=EHWPOISON)


def test_a_private_page_gets_a_hole():
    """Of the guest_memfd, and of that page only; the guest goes on."""
    vm, slot = private_machine(3)
    causes = []
    with vm:
        vm.memory.convert(DATA, 3 * PAGE, private=True)
        os.pwrite(slot.guest_memfd, b"\7" * 3 * PAGE, 0)
        vm.on_fault(handler=lambda vcpu, fault: causes.append((fault.cause, fault.certain)) or fault.repair())
        assert isinstance(vm.create_vcpu(0, [poisoned(1), hlt()]).run(), kvmexit.Hlt)
        assert os.pread(slot.guest_memfd, 3 * PAGE, 0) == b"\7" * PAGE + bytes(PAGE) + b"\7" * PAGE
        assert causes == [(Cause.POISONED, True)]


def test_the_second_to_repair_a_private_page_leaves_it():
    """Two vCPUs fault on one page. What a guest wrote to the new one stays; a fault that comes after that is another."""
    vm, slot = private_machine(1)
    with vm:
        vcpus = [vm.create_vcpu(i, [poisoned(), poisoned()]) for i in range(2)]
        pending = [(vcpu, faults.Fault(vcpu, vcpu.run())) for vcpu in vcpus]
        pending[0][1].repair()
        os.pwrite(slot.guest_memfd, b"\1", 0)
        pending[1][1].repair()
        assert os.pread(slot.guest_memfd, 2, 0) == b"\1\0"
        again = faults.Fault(vcpus[1], vcpus[1].run())
        again.repair()
        assert os.pread(slot.guest_memfd, 2, 0) == b"\0\0"


def test_no_guest_memfd_to_repair():
    """It was closed meanwhile: said so."""
    vm, slot = private_machine(1)
    with vm:
        vcpu = vm.create_vcpu(0, [poisoned()])
        fault = faults.Fault(vcpu, vcpu.run())
        slot.close_guest_memfd()
        with pytest.raises(kvmexit.Error, match="has no guest_memfd"):
            fault.repair()


@pytest.mark.parametrize("handler", [handlers.convert, native.Convert], ids=["handlers.convert", "native.Convert"])
def test_converting_is_no_answer_to_poison(handler):
    """Passed on, to who can repair it or to the caller of run()."""
    vm, _ = private_machine(1)
    with vm:
        vm.on_memory_fault(handler=handler(vm) if handler is native.Convert else handler)
        exit = vm.create_vcpu(0, [poisoned(private=False)]).run()
        assert (exit.errno, exit.gpa, vm.memory.is_private(DATA)) == (EHWPOISON, DATA, False)


def test_unrepaired_it_is_a_loop(scripted):
    vcpu = scripted.create_vcpu(0, [poisoned()], repeat=2000)
    scripted.on_memory_fault(handler=lambda vcpu, fault: None)
    with pytest.raises(FaultLoopError, match="errno=133"):
        vcpu.run()


# ---- real poison ----


@pytest.fixture
def hwpoison(vm, caught, poisons):
    if not poisons:
        pytest.skip("this kernel does not poison memory on request (MADV_HWPOISON)")
    return caught


def spoil(library, at):
    assert library.poison(at) == 0, os.strerror(ctypes.get_errno())


def backed(vm, backing, size=2 * PAGE):
    """A slot of 7s at DATA. -> it, its file or None, and what reads there when the page is a new one."""
    if backing == "anonymous":
        slot, file, after = vm.memory.add(DATA, size), None, 0
    else:
        file, after = os.memfd_create("data"), {"private mapping": 0, "private mapping, written to": 9, "file": 0}[backing]
        os.ftruncate(file, size)
        os.pwrite(file, b"\x09" * size, 0)
        options = {"fd": file} if backing == "file" else {"buffer": mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)}
        slot = vm.memory.add(DATA, size, **options)
    if backing == "private mapping":
        assert slot[0] == 9
    else:
        slot[:] = b"\7" * size
    return slot, file, after


BACKINGS = ["anonymous", "file", "private mapping", "private mapping, written to"]


@pytest.mark.parametrize("code", [READ, WRITE, JUMP], ids=["read", "write", "fetch"])
@pytest.mark.parametrize("backing", BACKINGS)
def test_real_poison_is_repaired(vm, hwpoison, backing, code):
    """The guest goes on with a new page; its neighbour is as it was, and nobody else was told."""
    vcpu = load(vm, code)
    slot, file, after = backed(vm, backing)
    neighbour = slot[PAGE:2 * PAGE].tobytes()
    vcpu.regs.rbx, vcpu.regs.rax = DATA, 0x55
    spoil(hwpoison, slot.hva)
    lost, seen = hwpoison.lost(), []

    @vm.on_fault()
    def handler(vcpu, fault):
        seen.append((fault.gpa, fault.cause, fault.certain, fault.slot is slot, fault.exit.errno))
        fault.repair()
        if code is JUMP:
            vm.memory.write(DATA, OUT)

    exit = vcpu.run(60)
    assert isinstance(exit, kvmexit.Io), exit
    assert exit.data[0] == (after if code is READ else 0x55)
    assert (seen, hwpoison.lost()) == ([(DATA, Cause.POISONED, True, True, EHWPOISON)], lost)
    assert slot[PAGE:2 * PAGE] == neighbour
    if file is not None:
        os.close(file)


@pytest.mark.parametrize("locked", [False, True])
def test_real_poison_that_nobody_answers(vm, hwpoison, locked):
    """run() says the address, again and again, until it is repaired; the checked way to guest memory says EFAULT."""
    vcpu = load(vm, READ)
    slot, _, _ = backed(vm, "anonymous")
    if locked:
        assert ctypes.CDLL(None).mlock(POINTER(slot.hva), ctypes.c_size_t(2 * PAGE)) == 0
    vcpu.regs.rbx = DATA
    spoil(hwpoison, slot.hva)
    for _ in range(3):
        exit = vcpu.run(60)
        assert (type(exit), exit.gpa, exit.size, exit.errno) == (kvmexit.MemoryFault, DATA, PAGE, EHWPOISON)
    with pytest.raises(KvmError) as raised:
        vm.memory.read(DATA, 1)
    assert raised.value.errno == errno.EFAULT
    assert "poisoned" in str(exit.explain(vcpu))
    faults.Fault(vcpu, exit).repair()
    assert vcpu.run(60).data == b"\0"


def test_real_poison_unrepaired_is_a_loop(vm, hwpoison):
    vcpu = load(vm, READ)
    slot, _, _ = backed(vm, "anonymous")
    vcpu.regs.rbx, vcpu.fault_limit = DATA, 5
    spoil(hwpoison, slot.hva)
    vm.on_fault(handler=lambda vcpu, fault: None)
    with pytest.raises(FaultLoopError, match="errno=133"):
        vcpu.run(60)


def test_real_poison_in_a_page_table(vm, hwpoison):
    """The guest's own tables: the exit names the table's page."""
    vcpu = load(vm, READ)
    vcpu.regs.rbx = 0x2000
    table = vcpu.sregs.cr3
    slot = vm.memory.slots[0]
    entries = vm.memory.read(table, PAGE)
    spoil(hwpoison, slot.hva + table)

    @vm.on_fault()
    def handler(vcpu, fault):
        assert fault.gpa // PAGE * PAGE == table
        fault.repair()
        vm.memory.write(table, entries)

    assert isinstance(vcpu.run(60), kvmexit.Io)


def test_real_poison_under_several_vcpus(vm, hwpoison):
    """They meet at one page; each repairs it, and what one has written to the new page stays."""
    first = load(vm, WRITE)
    slot, _, _ = backed(vm, "anonymous")
    vcpus = [first, *[vm.create_vcpu(i) for i in (5, 6, 7)]]
    for i, vcpu in enumerate(vcpus):
        kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
        vcpu.regs.rbx, vcpu.regs.rax = DATA + i, 0x50 + i
    vm.on_fault(handler=lambda vcpu, fault: fault.repair())
    for _ in range(stress(20)):
        for vcpu in vcpus:
            vcpu.regs.rip = CODE
        spoil(hwpoison, slot.hva)
        exits = []
        threads = [in_thread(lambda vcpu=vcpu, exits=exits: exits.append(vcpu.run(60))) for vcpu in vcpus]
        for thread in threads:
            thread.join()
        assert sorted(exit.data[0] for exit in exits) == [0x50, 0x51, 0x52, 0x53]
        assert slot[:4] == bytes([0x50, 0x51, 0x52, 0x53])


@pytest.mark.parametrize("repaired", [False, True])
def test_real_poison_told_to_the_guest(vm, hwpoison, example, repaired):  # noqa: F811
    """The address goes to the guest in its machine check bank, whether the page is a new one by then or not."""
    vm.memory.add(0, 1 << 20)
    vcpu = example.kernel_and_user(vm)
    slot = vm.memory.add(example.FILE, example.PAGES * PAGE)
    for page in range(example.PAGES):
        slot[page * PAGE] = page + 1
    spoil(hwpoison, slot.hva + 3 * PAGE)

    @vm.on_fault()
    def handler(vcpu, fault):
        if repaired:
            fault.repair()
        fault.inject("#MC")

    told, finished = vcpu.run(60), vcpu.run(60)
    assert (told.port, int.from_bytes(told.data, "little")) == (0x82, example.FILE + 3 * PAGE)
    assert (finished.port, finished.data[0]) == (0x81, sum(range(1, 17)) - 4)


def test_real_poison_in_huge_pages(vm, hwpoison):
    """A huge page is lost as a whole."""
    size = 2 << 20
    try:
        with open("/proc/sys/vm/nr_hugepages", "w") as pages:
            pages.write("2")
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    except OSError:
        pytest.skip("no huge pages here")
    slot = vm.memory.add(DATA, size, buffer=memory)
    slot[:] = b"\7" * size
    vcpu = load(vm, READ, tables=0x90000)
    vcpu.regs.rbx = DATA + 5 * PAGE
    spoil(hwpoison, slot.hva + 4 * PAGE)
    vm.on_fault(handler=lambda vcpu, fault: fault.repair())
    assert vcpu.run(60).data == b"\0"
    assert slot[:] == bytes(size)


@unsanitized("it has a SIGBUS handler of its own")
@pytest.mark.parametrize("how", ["uncaught", "a native handler"])
def test_real_poison_is_fatal_without(vm, hwpoison, path, how):
    """Uncaught; and where a native handler touches it, not the guest."""
    done = python(CHILD + f"""
lib.install(COUNTS)
how = {how!r}
with kvmexit.VM() as vm:
    vcpu = load(vm, READ if how == "uncaught" else bytes.fromhex("e4 80 eb fe"))
    slot, _, _ = backed(vm, "anonymous")
    vcpu.regs.rbx = DATA
    spoil(lib, slot.hva)
    lib.uninstall()
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    if how != "uncaught":
        catch = faults.catch_poison()
        vm.on_pio(0x80, 1, native.Function(lib.read_memory, slot.hva))
    print("alive", flush=True)
    vcpu.run(30)
    print("survived")
""", env={"POISON": str(path)}, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "alive\n"), done.stderr
