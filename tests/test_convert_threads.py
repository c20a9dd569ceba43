"""Conversions and other threads: races that are lost, close(), signals, the GIL."""

import pytest
from processes import python

HUGE = 1 << 42  # bytes; takes some tenths of a second to convert, and as long to look at


# ---- close() ----


@pytest.mark.parametrize("what", ["ranges()", "is_private(0)"])
def test_close_waits_for_who_looks(what):
    """The table is looked through without the GIL. In a process of its own: it crashed."""
    done = python(f"""
import kvmexit
from processes import in_thread
from kvmexit.testing import ScriptedVM
for _ in range(10):
    vm = ScriptedVM()
    vm.memory.add(0, {HUGE}, guest_memfd=True, discard=False)
    looked, errors = [], []
    def look():
        try:
            while True:
                vm.memory.{what}
                looked.append(1)
        except kvmexit.Error as error:
            errors.append(str(error))
    thread = in_thread(look)
    while not looked:
        pass
    vm.close()
    thread.join(30)
    assert errors == ["this VM is closed"], errors
print("done")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


# ---- signals ----

INTERRUPTED = """
import os, random, signal, time, kvmexit
from guests import stress
from kvmexit.testing import RecordedAttributes, ScriptedVM

armed = False

def handle(number, frame):
    if armed:
        raise InterruptedError

def interrupted(work, most):
    # Call work() with a signal handler that raises within `most` seconds.
    global armed
    armed = True
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, most))
            work()
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except InterruptedError:
        return True
    return False

signal.signal(signal.SIGALRM, handle)
"""


def test_an_interrupted_add_or_remove_leaves_one_table():
    """The slots, what the converter knows of them, the memslot numbers and the descriptors: as many at any moment."""
    done = python(INTERRUPTED + """
vm = ScriptedVM()
before, count = len(os.listdir("/proc/self/fd")), 0
ends = time.monotonic() + stress(2)
while time.monotonic() < ends:
    count += interrupted(lambda: vm.memory.remove(vm.memory.add(0, 1 << 18, guest_memfd=True)), 150e-6)
    there = [(slot.gpa, slot.size) for slot in vm.memory.slots]
    assert there == [(r.gpa, r.size) for r in vm.memory.ranges()], (there, vm.memory.ranges())
    assert len(os.listdir("/proc/self/fd")) == before + len(there)
    if there:
        vm.memory.remove(0)
assert count
print("done", vm.memory.add(0, 4096).number)
""")
    assert (done.stdout, done.stderr) == ("done 0\n", "")


def test_an_interrupted_close_of_a_guest_memfd_closes_it_or_not():
    """It was taken from the slot, and then kept by nobody."""
    done = python(INTERRUPTED + """
vm = ScriptedVM()
before, count = len(os.listdir("/proc/self/fd")), 0
ends = time.monotonic() + stress(1)
while time.monotonic() < ends:
    slot = vm.memory.add(0, 4096, guest_memfd=True)
    count += interrupted(slot.close_guest_memfd, 8e-6)
    assert len(os.listdir("/proc/self/fd")) == before + (slot.guest_memfd is not None)
    vm.memory.remove(slot)
print("done" if count else "no interruption")
""")
    assert (done.stdout, done.stderr) == ("done\n", "")
