"""Kicks, time-outs and Ctrl-C against real guests: none lost, none stale (rules of src/kvmexit/_control.h)."""

import queue
import random
import threading

import pytest
from guests import CODE, OUT_FOREVER, SPIN, load, stress
from processes import compiled, in_thread, preload, python

import kvmexit
from kvmexit import Interrupted

pytestmark = pytest.mark.kvm


# ---- kicks ----


@pytest.mark.parametrize("code", [SPIN, OUT_FOREVER], ids=["spinning", "exiting"])
def test_every_kick_returns_run_exactly_once(vm, code):
    """Each kick, at a random moment, ends one run(); in the end there is none left over."""
    kicks = stress(20_000)
    vcpu = load(vm, code)
    vm.on_pio(0x80, 1, lambda vcpu, io: None)
    returned = queue.SimpleQueue()

    def runner():
        for _ in range(kicks):
            returned.put(vcpu.run())

    chance = random.Random(1)
    thread = in_thread(runner)
    for number in range(kicks):
        for _ in range(chance.randrange(60)):
            pass
        vcpu.kick()
        exit = returned.get(timeout=20)  # queue.Empty: a kick was lost
        assert isinstance(exit, Interrupted), (number, exit)
        assert exit.cause == "kick"
    thread.join(20)
    assert vcpu.run(timeout=0.01).cause == "timeout"  # none is stale


def test_kicks_from_many_threads_coalesce_but_are_never_lost(vm):
    """After the last of a burst of kicks run() comes back at least once, and not for ever."""
    vcpu = load(vm, SPIN)
    for _ in range(stress(50)):
        returned = []
        barrier = threading.Barrier(4)

        def kicker(barrier=barrier):
            barrier.wait()
            for _ in range(20):
                vcpu.kick()

        threads = [in_thread(kicker) for _ in range(3)]
        barrier.wait()
        while any(thread.is_alive() for thread in threads):
            returned.append(vcpu.run(timeout=0.05).cause)  # not for ever: the last kick may be returned before its thread ends
        for thread in threads:
            thread.join(20)
        while vcpu.run(timeout=0.005).cause == "kick":
            returned.append("kick")  # at most what came since
        assert 0 < returned.count("kick") <= 60


def test_a_kick_before_run_is_kept(vm):
    """kick() is sticky: the next run() returns it, once."""
    vcpu = load(vm, SPIN)
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run(timeout=10).cause == "kick"
    assert vcpu.run(timeout=0.01).cause == "timeout"


def test_a_kick_works_where_its_signal_is_blocked(vm):
    """run() unblocks the signal for itself and leaves the thread's mask as it was."""
    import signal

    vcpu = load(vm, SPIN)
    causes, masks = [], []

    def runner():
        signal.pthread_sigmask(signal.SIG_BLOCK, [kvmexit.KICK_SIGNAL])
        causes.append(vcpu.run(timeout=20).cause)
        masks.append(kvmexit.KICK_SIGNAL in signal.pthread_sigmask(signal.SIG_BLOCK, []))

    thread = in_thread(runner)
    while not vcpu.running:
        pass
    vcpu.kick()
    thread.join(20)
    assert (causes, masks) == (["kick"], [True])


def test_an_outer_kick_waits_for_the_inner_run(vm):
    """Kicked while its handler runs another vCPU, the outer one stops after the inner came back."""
    with kvmexit.VM() as inner_vm:
        inner = load(inner_vm, SPIN)
        outer = load(vm, OUT_FOREVER)
        seen = []

        @vm.on_pio(0x80)
        def handler(vcpu, io):
            outer.kick()
            seen.append(inner.run(timeout=0.05).cause)

        assert outer.run(timeout=20).cause == "kick"
        assert seen == ["timeout"]


# ---- time-outs ----


def test_a_timeout_ends_a_spinning_guest_and_does_not_carry_over(vm):
    """A sooner deadline, then a later one, then none at all: each run() ends by its own."""
    vcpu = load(vm, SPIN)
    for timeout in (0.001, 0.05, 0.002, 0.2, 0):
        assert vcpu.run(timeout).cause == "timeout"
    threading.Timer(0.3, vcpu.kick).start()
    assert vcpu.run().cause == "kick"


def test_an_outer_deadline_survives_an_inner_run(vm):
    """The timer is the thread's: an inner run() with a later deadline gives it back."""
    with kvmexit.VM() as inner_vm:
        inner = load(inner_vm, SPIN)
        outer = load(vm, bytes.fromhex("e6 80 eb fe"))  # out 0x80, al; jmp $
        inner_results = []

        @vm.on_pio(0x80)
        def handler(vcpu, io):
            inner_results.append(inner.run(timeout=0.3).cause)

        thread_results = []
        thread = in_thread(lambda: thread_results.append(outer.run(timeout=0.1).cause))
        thread.join(20)
        assert (inner_results, thread_results) == (["timeout"], ["timeout"])


# ---- Ctrl-C ----

CTRL_C = """
import os, queue, random, signal, sys, threading, time
import kvmexit
from guests import load, SPIN, OUT_FOREVER

count, code, handler = int(sys.argv[1]), {"spin": SPIN, "out": OUT_FOREVER}[sys.argv[2]], sys.argv[3]
vm = kvmexit.VM()
vcpu = load(vm, code)
vm.on_pio(0x80, 1, {}.__setitem__ if handler == "c" else lambda vcpu, io: None)
caught, ready = queue.SimpleQueue(), queue.SimpleQueue()

def sender():
    chance = random.Random(2)
    for _ in range(count):
        ready.get()
        for _ in range(chance.randrange(3000)):
            pass
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        try:
            worst.append(caught.get(timeout=20) - sent)
        except queue.Empty:
            print("LOST", flush=True)
            os._exit(3)

worst = []
thread = threading.Thread(target=sender, daemon=True)
thread.start()
for _ in range(count):
    try:
        ready.put(None)
        vcpu.run()
    except KeyboardInterrupt:
        caught.put(time.monotonic())
thread.join()
print(f"{len(worst)} of {count} noticed, worst {max(worst) * 1000:.0f} ms")
"""


@pytest.mark.parametrize(("code", "handler"), [("spin", "none"), ("out", "python"), ("out", "c")])
def test_every_ctrl_c_in_the_main_thread_is_noticed(kvm, code, handler):
    """Each SIGINT raises KeyboardInterrupt from run(): guest spinning, or exiting to Python or C handlers all the time."""
    count = stress(40)
    program = CTRL_C.replace("sys.argv[1]", repr(str(count))).replace("sys.argv[2]", repr(code)).replace("sys.argv[3]", repr(handler))
    done = python(program, timeout=count * 0.5 + 60)
    assert f"{count} of {count} noticed" in done.stdout, done
    print(done.stdout)


# ---- just before the real KVM_RUN ----


@pytest.fixture(scope="module")
def interposer(tmp_path_factory, kvm):
    """The library that gets in front of KVM_RUN."""
    return compiled(tmp_path_factory, "interpose")


INTERPOSED = """
import ctypes, os, sys, threading
import kvmexit
from guests import load, SPIN

NOTHING, ASK, SLEEP, INTERRUPT = range(4)
lib = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
ask, acknowledged = os.eventfd(0), os.eventfd(0)

def asked():
    vcpu.kick()

def answering():
    while True:
        os.eventfd_read(ask)
        asked()
        os.eventfd_write(acknowledged, 1)

threading.Thread(target=answering, daemon=True).start()
"""


def interposed(interposer, code):
    """Run code with the interposer in front; it must print done."""
    done = python(INTERPOSED + code, env=preload(interposer))
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done


def test_a_kick_just_before_kvm_run_is_not_lost(interposer):
    """The whole of kick() happens between the last look at the request and the system call."""
    interposed(interposer, """
for _ in range(200):
    lib.interpose(ASK, ask, acknowledged)
    assert vcpu.run(timeout=20).cause == "kick"
assert lib.interposed() == 200 and vcpu.run(timeout=0.01).cause == "timeout"
print("done")
""")


def test_registers_fetched_while_another_thread_ran_the_vcpu_are_refused(interposer):
    """The vCPU runs between the check and the system call: what the call brings is old, and is not taken for current."""
    interposed(interposer, """
vcpu.sync = 0
def asked():
    vcpu.run(timeout=0.001)
lib.interpose_before(ctypes.c_ulong(0x8090AE81))  # KVM_GET_REGS
lib.interpose(ASK, ask, acknowledged)
vcpu.ioctl(0x8004AE98, bytearray(4))  # any: views fetch anew
try:
    vcpu.regs.rip
except kvmexit.VcpuBusyError:
    assert vcpu.regs.rip == 0x1000
    print("done")
""")


def test_close_waits_for_an_ioctl_under_way(interposer):
    """The descriptor is not taken from under it, for somebody else's file to get its number, just before the system call."""
    interposed(interposer, """
fd, seen = vcpu.fd, []
closer = threading.Thread(target=vm.close)
def asked():
    closer.start()
    closer.join(0.3)  # a close() that does not wait is done by then
    seen.append((closer.is_alive(), os.path.exists(f"/proc/self/fd/{fd}")))
lib.interpose_before(ctypes.c_ulong(0x8090AE81))  # KVM_GET_REGS
lib.interpose(ASK, ask, acknowledged)
assert vcpu.ioctl(0x8090AE81, bytearray(144)) == 0
closer.join()
assert seen == [(True, True)], seen
assert vm.closed and not os.path.exists(f"/proc/self/fd/{fd}")
print("done")
""")


def test_a_kick_that_cannot_be_signalled_says_so_and_stays(kvm):
    """The user's signal queue is full: an error instead of silence, and the next kick delivers it."""
    done = python("""
import resource, threading
import kvmexit
from guests import load, SPIN
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
results = []
thread = threading.Thread(target=lambda: results.append(vcpu.run().cause), daemon=True)
thread.start()
while not vcpu.running:
    pass
soft, hard = resource.getrlimit(resource.RLIMIT_SIGPENDING)
resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, hard))
try:
    vcpu.kick()
except kvmexit.KvmError as error:
    refused = error
resource.setrlimit(resource.RLIMIT_SIGPENDING, (soft, hard))
while not results:
    vcpu.kick()
    thread.join(0.01)
print((refused.call, refused.errno) == ("tgkill", 11), results)
""", timeout=60)
    assert done.stdout == "True ['kick']\n", done


def test_a_timeout_just_before_kvm_run_is_not_lost(interposer):
    """The timer's signal is handled before KVM_RUN is entered: immediate_exit ends it."""
    interposed(interposer, """
def run():
    for _ in range(20):
        lib.interpose(SLEEP, -1, -1)
        assert vcpu.run(timeout=0.01).cause == "timeout"
    assert lib.interposed() == 20
    print("done", flush=True)
thread = threading.Thread(target=run)
thread.start()
thread.join()
""")


def test_a_ctrl_c_just_before_kvm_run_is_not_lost(interposer):
    """SIGINT sets nothing that KVM looks at: the tick finds it."""
    interposed(interposer, """
for _ in range(20):
    lib.interpose(INTERRUPT, -1, -1)
    try:
        vcpu.run()
    except KeyboardInterrupt:
        continue
    raise SystemExit("lost")
assert lib.interposed() == 20
print("done")
""")


# ---- the process belongs to somebody else ----


def test_an_earlier_handler_of_the_signal_is_called_on(kvm):
    """A program that had a handler for KICK_SIGNAL keeps it."""
    done = python("""
import os, signal, kvmexit
from guests import load, SPIN
seen = []
signal.signal(kvmexit.KICK_SIGNAL, lambda number, frame: seen.append(number))
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
vcpu.run(timeout=0.01)
os.kill(os.getpid(), kvmexit.KICK_SIGNAL)
print(seen == [kvmexit.KICK_SIGNAL])
""")
    assert done.stdout == "True\n", done


def test_no_signal_comes_once_run_has_returned(kvm):
    """The timer is left armed, fires once at most with nobody inside run(), and stops itself."""
    done = python("""
import signal, time, kvmexit
from guests import load, SPIN
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
vcpu.run(timeout=0.01)
time.sleep(0.25)  # not synchronisation: the time in which signals would come
signal.pthread_sigmask(signal.SIG_BLOCK, [kvmexit.KICK_SIGNAL])
print(signal.sigtimedwait([kvmexit.KICK_SIGNAL], 0.35))
""")
    assert done.stdout == "None\n", done


def test_threads_that_end_leave_no_timer_behind(kvm):
    """A thread's timer goes with the thread."""
    done = python("""
import threading, time, kvmexit
from guests import load, SPIN
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
def run():
    vcpu.run(timeout=0.001)
for _ in range(20):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
for _ in range(1000):  # join() returns before the thread has quite ended
    if "ID:" not in open("/proc/self/timers").read():
        print("none")
        break
    time.sleep(0.01)
""")
    assert done.stdout == "none\n", done


def test_the_code_address_is_where_the_guests_begin(vm):
    """Registers of a vCPU that never ran are what x86.long_mode() set."""
    assert load(vm, SPIN).regs.rip == CODE
