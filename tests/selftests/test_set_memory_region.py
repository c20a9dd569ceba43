"""After tools/testing/selftests/kvm/set_memory_region_test.c.

It requires of userspace: a vCPU without any memory ends with an internal error; flags that a memslot cannot have, alone or together
(GUEST_MEMFD with the older call, with LOG_DIRTY or READONLY) are EINVAL; as many slots as KVM_CAP_NR_MEMSLOTS says can be added and
no more; a guest_memfd is bound only where it is one, of this VM, at an offset of whole pages, and to no memory that another slot has.
A slot that is moved under a running vCPU: the guest sees the old memory, MMIO, or the new, and never a mixture; one that is
deleted: MMIO, until it is there again. With all memory gone the vCPU shuts down, or ends with an internal error where it was.
All that with and without KVM's quirk of zapping everything for one slot.

kvmexit moves no slots, and chooses their numbers and flags itself: what it would not ask for is asked by vm.ioctl().
"""

import ctypes
import errno
import mmap
import os
import threading

import pytest
from guests import stress
from memory_guest import (
    ENTRY,
    FLAG,
    GUEST_MEMFD,
    LOG_DIRTY,
    MIB,
    PAGE,
    READONLY,
    Guest,
    create_guest_memfd,
    set_region,
    set_region_1,
)
from processes import in_thread

import kvmexit
from kvmexit import GuestMemfdFlags, InternalError, KvmError, Shutdown

GPA, SIZE = 0xC000_0000, 2 * MIB
MMIO = 0xBEEF
NR_MEMSLOTS, MEMORY_ATTRIBUTES, GUEST_MEMFD_FLAGS, DISABLE_QUIRKS2, SLOT_ZAP_ALL = 10, 233, 244, 213, 1 << 7


def errno_of(call, *args):
    """-> the errno it fails with, or 0."""
    try:
        call(*args)
    except KvmError as error:
        return error.errno
    return 0


def test_zero_memory_regions(vm):
    """Nothing to fetch an instruction from."""
    vm.ioctl(0xAE44, 64)  # KVM_SET_NR_MMU_PAGES
    assert isinstance(vm.create_vcpu(0).run(timeout=60), InternalError)


@pytest.fixture(params=["ordinary", "private"])
def any_vm(request, vm):
    """A VM of either type."""
    return vm if request.param == "ordinary" else request.getfixturevalue("private_vm")


def gmem_flags(vm):
    """-> flags of guest_memfds that this VM can bind; skips where there are none."""
    if vm.check(MEMORY_ATTRIBUTES) & 8:
        return 0
    flags = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED
    if vm.check(GUEST_MEMFD_FLAGS) & flags != flags:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    return flags


def test_invalid_memory_region_flags(any_vm):
    """One by one: those that neither call knows, and that only the newer does."""
    both = LOG_DIRTY | READONLY
    for flag in (1 << bit for bit in range(32)):
        if flag & both:
            continue
        assert errno_of(set_region_1, any_vm, 0, flag, 0, SIZE) == errno.EINVAL, hex(flag)
        if flag != GUEST_MEMFD:
            assert errno_of(set_region, any_vm, 0, flag, 0, SIZE) == errno.EINVAL, hex(flag)


def test_guest_memfd_goes_with_no_other_flag(any_vm):
    """Nobody logs what is written to it, and it cannot be read-only. memory.add() says so before KVM is asked."""
    fd = create_guest_memfd(any_vm, SIZE, gmem_flags(any_vm))
    for flag, option in ((LOG_DIRTY, "log_dirty"), (READONLY, "readonly")):
        assert errno_of(set_region, any_vm, 0, flag | GUEST_MEMFD, 0, SIZE, 0, fd) == errno.EINVAL
        with pytest.raises(ValueError, match="neither readonly nor log_dirty"):
            any_vm.memory.add(0, SIZE, guest_memfd=True, **{option: True})
    set_region(any_vm, 0, GUEST_MEMFD, 0, SIZE, 0, fd)
    os.close(fd)


def test_add_max_memory_regions(vm):
    """Numbers end where KVM_CAP_NR_MEMSLOTS says. All of them at KVMEXIT_STRESS=1, else the last few: numbers are the limit."""
    most = vm.check(NR_MEMSLOTS)
    assert most > 0
    backing = mmap.mmap(-1, SIZE)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(backing))
    first = 0 if stress(most) >= most else most - 100
    for number in range(first, most):
        set_region_1(vm, number, 0, number * SIZE, SIZE, hva)
    assert errno_of(set_region_1, vm, most, 0, most * SIZE, SIZE, hva) == errno.EINVAL


def test_memory_add_takes_what_numbers_there_are(kvm):
    """The next is refused, and says why; a number given back is used again."""
    class Few(kvmexit.VM):
        def check(self, cap):
            return 20 if cap == NR_MEMSLOTS else super().check(cap)

    with Few() as few:
        for number in range(20):
            few.memory.add(number * SIZE, PAGE)
        with pytest.raises(kvmexit.Error):
            few.memory.add(20 * SIZE, PAGE)
        few.memory.remove(7 * SIZE)
        assert few.memory.add(20 * SIZE, PAGE).number == 7


def test_add_private_memory_region(any_vm):
    """What is no guest_memfd, or another VM's, or not at a page."""
    flags = gmem_flags(any_vm)

    def bind(vm, fd, offset=0):
        return errno_of(set_region, vm, 10, GUEST_MEMFD, GPA, SIZE, 0, fd, offset)

    with kvmexit.VM(any_vm.type) as other, open("/dev/kvm", "rb") as kvm:
        memfd, theirs = os.memfd_create("ordinary"), create_guest_memfd(other, SIZE, flags)
        os.ftruncate(memfd, SIZE)
        for fd in (kvm.fileno(), any_vm.fd, memfd, theirs):
            assert bind(any_vm, fd) == errno.EINVAL
        assert bind(other, theirs) == 0
        os.close(memfd)
        os.close(theirs)
    ours = create_guest_memfd(any_vm, SIZE, flags)
    for offset in range(1, PAGE, 1 if stress(PAGE) == PAGE else 97):
        assert bind(any_vm, ours, offset) == errno.EINVAL, offset
    assert bind(any_vm, ours, PAGE) == errno.EINVAL  # and ends behind the file
    assert bind(any_vm, ours) == 0
    os.close(ours)


def test_add_overlapping_private_memory_regions(any_vm):
    """Two slots have no page of a guest_memfd in common."""
    fd = create_guest_memfd(any_vm, 4 * SIZE, gmem_flags(any_vm))
    set_region(any_vm, 10, GUEST_MEMFD, GPA, 2 * SIZE, 0, fd, 0)
    set_region(any_vm, 11, GUEST_MEMFD, GPA // 2, 2 * SIZE, 0, fd, 2 * SIZE)
    set_region(any_vm, 10, GUEST_MEMFD, GPA, 0)
    for gpa in (GPA // 2 - SIZE, GPA // 2 + SIZE):
        assert errno_of(set_region, any_vm, 10, GUEST_MEMFD, gpa, 2 * SIZE, 0, fd, 0) == errno.EEXIST
    assert errno_of(set_region, any_vm, 10, GUEST_MEMFD, GPA, 2 * SIZE, 0, fd, SIZE) in (errno.EEXIST, errno.EINVAL)
    set_region(any_vm, 10, GUEST_MEMFD, GPA, 2 * SIZE, 0, fd, 0)
    os.close(fd)


# ---- a slot that is in use ----


class Spinner:
    """A guest that reads [GPA] until it is no longer what it was told, in a thread; MMIO reads there are MMIO."""

    def __init__(self, vm, stages):
        """stages: what it spins on, one after the other; `seen` gets what it found instead, `stage` is released each time."""
        self.vm, self.stages = vm, stages
        self.guest = Guest(vm)
        self.guest.vcpu.sregs.idt.limit = 0  # where memory goes, #PF is to become a triple fault, not a fault for ever
        self.seen, self.mmio, self.stage, self.end = [], [], threading.Semaphore(0), None
        vm.on_mmio(GPA, 8, self.answer)

    def answer(self, vcpu, exit):
        self.mmio.append((exit.gpa, exit.size, exit.is_write))
        return MMIO

    def start(self):
        self.thread = in_thread(self.run)
        self.has_looked()

    def run(self):
        for value in self.stages:
            self.guest.begin("spin", rdi=GPA, rbx=FLAG, rax=value)
            exit = self.guest.vcpu.run(timeout=60)
            if not isinstance(exit, kvmexit.Io):
                self.end = exit
                return
            self.seen.append(self.guest.vcpu.regs.rcx)
            self.stage.release()

    def has_looked(self):
        """Wait until it has read [GPA] once more, from beginning to end."""
        def looks():
            return int.from_bytes(self.vm.memory.read(FLAG, 8), "little")

        before = looks()
        while looks() < before + 2:
            assert self.thread.is_alive(), (self.seen, self.end)

    def finish(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert {*self.mmio} <= {(GPA, 8, False)}


@pytest.fixture(params=["zap-all", "zap-slot"])
def each_quirk(request, vm):
    """A VM with the quirk, and one without."""
    if request.param == "zap-slot":
        if not vm.check(DISABLE_QUIRKS2) & SLOT_ZAP_ALL:
            pytest.skip("this kernel has no KVM_X86_QUIRK_SLOT_ZAP_ALL to disable")
        vm.enable(DISABLE_QUIRKS2, SLOT_ZAP_ALL)
    return vm


@pytest.mark.parametrize("turn", range(stress(5)))
def test_move_memory_region(each_quirk, turn):
    """By a page, so that the guest looks at another one, and back: it never sees what is written while it is away."""
    vm = each_quirk
    slot = vm.memory.add(GPA, SIZE)
    spinner = Spinner(vm, [0, MMIO, 0, MMIO])
    spinner.start()
    set_region(vm, slot.number, 0, GPA - PAGE, SIZE, slot.hva)
    slot[0] = 2
    spinner.has_looked()
    slot[0] = 1
    set_region(vm, slot.number, 0, GPA, SIZE, slot.hva)
    spinner.finish()
    first, second, third, last = spinner.seen
    assert first in (1, MMIO)
    assert second in (0, 1)
    assert third in (1, MMIO)
    assert last == 1


@pytest.mark.parametrize("turn", range(stress(5)))
def test_delete_memory_region(each_quirk, turn):
    """And add it again, and delete all memory there is."""
    vm = each_quirk
    vm.memory.add(GPA, SIZE)
    spinner = Spinner(vm, [0, MMIO, 0, MMIO])
    spinner.start()
    vm.memory.remove(GPA)
    assert spinner.stage.acquire(timeout=60)
    vm.memory.add(GPA, SIZE)
    assert spinner.stage.acquire(timeout=60)
    vm.memory.remove(GPA)
    assert spinner.stage.acquire(timeout=60)
    assert spinner.seen == [MMIO, 0, MMIO]
    vm.memory.remove(0)
    spinner.finish()
    assert isinstance(spinner.end, (Shutdown, InternalError)), spinner.end
    if isinstance(spinner.end, InternalError):
        assert ENTRY["spin"] <= spinner.guest.vcpu.regs.rip < ENTRY["spin"] + 11
