"""After tools/testing/selftests/kvm/dirty_log_test.c.

It requires of userspace, of each way to know which pages a guest writes to (the log, the log that is cleared by hand, the ring):
while the guest writes the number of the round to pages at random, a page that is said to be dirty has this round's number or the one
before; one that is not has no later one, and if it has this round's, the next round has to say it. A full ring ends KVM_RUN until it is
emptied; what is given back to KVM is as much as was taken. So while the vCPU runs, and it is stopped only to look at the values.
The slot's pages are not a multiple of 64.
"""

import struct
import threading

import pytest
from guests import load, stress
from memory_guest import PAGE
from processes import in_thread

import kvmexit
from kvmexit import handlers

GPA, ROUND, PER_LOOP, RING = 0x1000_0000, 0x7000, 1024, 1024
# loop: mov ecx, 1024
# again: imul r8, r8, 0x5851f42d; add r8, 0x3577; mov rax, r8; shr rax, 33; xor edx, edx; div r9; shl rdx, 12
#     mov rax, [rbx]; mov [rdi + rdx], rax; dec ecx; jnz again
# out 0xf4, al; jmp loop
WRITER = bytes.fromhex(
    "b9 00 04 00 00"
    "4d 69 c0 2d f4 51 58  49 81 c0 77 35 00 00  4c 89 c0  48 c1 e8 21  31 d2  49 f7 f1  48 c1 e2 0c"
    "48 8b 03  48 89 04 17  ff c9  75 d7"
    "e6 f4  eb ce"
)


class Writer:
    """The guest, in a thread; stopped only between two loops of writes."""

    def __init__(self, vm, pages):
        self.vm = vm
        self.vcpu = load(vm, WRITER)
        self.slot = vm.memory.add(GPA, pages * PAGE, log_dirty=True)
        regs = self.vcpu.regs
        regs.r8, regs.r9, regs.rdi, regs.rbx = 1, pages, GPA, ROUND
        self.stop, self.stopped, self.go = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
        vm.on_pio(0xF4, 1, self.between)
        self.result = []

    def between(self, vcpu, exit):
        if self.stop.is_set():
            self.stop.clear()
            self.stopped.release()
            self.go.acquire()

    def begin(self, number):
        self.vm.memory.write(ROUND, number.to_bytes(8, "little"))

    def __enter__(self):
        self.thread = in_thread(lambda: self.result.append(self.vcpu.run()))
        return self

    def __exit__(self, *exc_info):
        self.stop.clear()
        self.go.release()
        self.vcpu.kick()
        self.thread.join(60)

    def hold(self):
        """Stop it; all that it wrote is done."""
        self.stop.set()
        assert self.stopped.acquire(timeout=60), self.result

    def values(self):
        """-> the first number of each page."""
        return [struct.unpack_from("<Q", self.slot.view, at)[0] for at in range(0, self.slot.size, PAGE)]


def by_log(writer):
    return pages_of(writer.slot.dirty())


def by_cleared_log(writer):
    """What was said is cleared, and nothing else: what the guest wrote to meanwhile is unsaid."""
    runs = writer.slot.dirty()
    writer.hold()
    writer.go.release()
    for gpa, size in runs:
        writer.slot.clear_dirty(gpa, size)
    return pages_of(runs)


def pages_of(runs):
    return {page for gpa, size in runs for page in range((gpa - GPA) // PAGE, (gpa - GPA + size) // PAGE)}


@pytest.mark.parametrize("mode", ["dirty-log", "clear-log", "clear-log-initially-set", "dirty-ring"])
def test_dirty_log(vm, mode):
    """Round by round."""
    pages = (4096 if stress(4096) >= 4096 else 2048) + 3
    if mode.startswith("clear-log"):
        vm.manual_dirty_protect(initially_set=mode != "clear-log")
    elif mode == "dirty-ring":
        vm.enable_dirty_ring(RING)
        full = []
        vm.on(kvmexit.DirtyRingFull, lambda vcpu, exit: full.append(vm.memory.collect_dirty()))
    writer = Writer(vm, pages)
    collect = by_cleared_log if mode.startswith("clear-log") else by_log
    if mode == "clear-log-initially-set":
        assert writer.slot.dirty() == [(GPA, pages * PAGE)]
        writer.slot.clear_dirty()
    to_come, said = set(), 0
    writer.begin(1)
    with writer:
        for number in range(1, stress(32) + 3):
            writer.hold()  # so that there is something to say
            writer.go.release()
            dirty = collect(writer)
            writer.hold()
            values = writer.values()
            assert to_come <= dirty
            assert {values[page] for page in dirty} <= {number, number - 1}
            clean = {page: value for page, value in enumerate(values) if page not in dirty}
            assert max(clean.values(), default=0) <= number
            to_come = {page for page, value in clean.items() if value == number}
            said += len(dirty)
            writer.begin(number + 1)
            writer.go.release()
    assert writer.result[0].cause == "kick"
    assert said > pages // 2
    if mode == "dirty-ring":
        assert sum(full) > 0
        assert max(full) <= RING  # and 0 where the other thread was faster


def test_what_is_given_back_is_what_was_taken(vm):
    """collect_dirty() counts the ring's entries, which KVM_RESET_DIRTY_RINGS gives back: the guest can write them anew."""
    vm.enable_dirty_ring(RING)
    writer = Writer(vm, 64)
    vm.on(kvmexit.DirtyRingFull, handlers.collect_dirty)
    writer.begin(1)
    for _ in range(stress(20) + 2):
        with vm.on_pio(0xF4, 1, lambda vcpu, exit: kvmexit.STOP):
            assert writer.vcpu.run(timeout=60).port == 0xF4
        assert vm.memory.collect_dirty() == 64  # 1024 writes to 64 pages at random
        assert vm.memory.collect_dirty() == 0
        assert pages_of(writer.slot.dirty()) == {*range(64)}
