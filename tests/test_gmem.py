"""Faults of guest_memfd in ordinary VMs, and faults without flags: real ones, in lab/newer and on kernels from 6.18 on.

An ordinary VM's guest_memfd (MMAP, INIT_SHARED) is the slot's whole memory, to the guest and to the host. What it cannot
give is a MEMORY_FAULT with flags 0: EFAULT once it is closed, EHWPOISON where a page is poisoned.
"""

import errno
import mmap
import os
import resource
import signal
import struct
import threading

import pytest
from guests import CODE, load, stress
from processes import in_thread

import kvmexit
from kvmexit import GuestMemfdFlags, Io, MemoryFault, Mmio, handlers
from kvmexit.faults import Cause

PAGE, DATA, HOLE = 4096, 0x1000_0000, 0x2000_0000
EHWPOISON, MADV_HWPOISON, KVM_SET_MEMORY_ATTRIBUTES, PRIVATE = 133, 100, 0x4020AED2, 8
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED

PEEK = bytes.fromhex("48 8b 03  e6 80")  # mov rax, [rbx]; out 0x80, al
POKE = bytes.fromhex("48 89 0b  e6 80")  # mov [rbx], rcx; out 0x80, al
COUNT = bytes.fromhex("48 ff 03  eb fb")  # again: inc qword [rbx]; jmp again
PEEKS, POKES, COUNTS = CODE, CODE + 0x10, CODE + 0x20
GUEST = PEEK.ljust(0x10, b"\xcc") + POKE.ljust(0x10, b"\xcc") + COUNT


@pytest.fixture
def vcpu(vm):
    """In an ordinary VM where a guest_memfd can be a slot's memory."""
    if vm.check(244) & MMAP_SHARED != MMAP_SHARED:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    return load(vm, GUEST)


def add(vm, pages=4):
    """-> a slot of guest_memfd alone, whose page n begins with n + 1."""
    slot = vm.memory.add(DATA, pages * PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED)
    for page in range(pages):
        slot[page * PAGE] = page + 1
    return slot


def do(vcpu, program, gpa, value=0):
    """Have the guest run one of PEEKS and POKES; -> what it read, or the exit that it was instead."""
    vcpu.regs.rip, vcpu.regs.rbx, vcpu.regs.rcx = program, gpa, value
    exit = vcpu.run(timeout=60)
    return vcpu.regs.rax if isinstance(exit, Io) else exit


def counting(vcpu):
    """Have the guest count at DATA, in a thread; -> that, and the list that its exit will be in."""
    vcpu.regs.rip, vcpu.regs.rbx = COUNTS, DATA
    exits = []
    return in_thread(lambda: exits.append(vcpu.run(timeout=60))), exits


def facts(fault):
    return type(fault), fault.errno, fault.flags, fault.gpa, fault.size


def explained(fault, vcpu):
    said = fault.explain(vcpu)
    return said.cause, said.certain, said.gpa


# ---- guest_memfd in an ordinary VM ----


def test_guest_and_host_see_the_same_bytes(vm, vcpu):
    """What one writes the other reads, while the guest runs."""
    slot = add(vm)
    assert do(vcpu, PEEKS, DATA + PAGE) == 2
    slot[0:8] = struct.pack("<Q", 1 << 32)
    run, _ = counting(vcpu)
    while struct.unpack("<Q", slot[0:8])[0] < (1 << 32) + 1000:
        assert run.is_alive()
    vcpu.kick()
    run.join(60)
    assert vm.memory.read(DATA, 8) == bytes(slot[0:8])
    assert [(s.gmem_flags, s.gmem_offset) for s in vm.memory.slots] == [(GuestMemfdFlags.NONE, 0), (MMAP_SHARED, 0)]


def test_closed_under_a_running_guest(vm, vcpu):
    """Its very next access is the fault; rebind() gives it other memory of the same kind, and it goes on with zeros."""
    for _ in range(stress(20)):
        slot = add(vm)
        run, exits = counting(vcpu)
        while slot[1] == 0:  # it has counted to 256
            assert run.is_alive()
        slot.close_guest_memfd()
        run.join(60)
        assert facts(exits[0]) == (MemoryFault, errno.EFAULT, 0, DATA, PAGE)
        assert explained(exits[0], vcpu) == (Cause.GUEST_MEMFD_CLOSED, True, DATA)
        with vm.on_fault(DATA, PAGE, lambda vcpu, fault: fault.repair()):
            assert do(vcpu, PEEKS, DATA) == 0
        new = vm.memory.slots[1]
        assert new is not slot
        assert new.gmem_flags == MMAP_SHARED
        assert do(vcpu, POKES, DATA + PAGE, 77) == 0  # rax is still what was read
        assert new[PAGE] == 77
        vm.memory.remove(new)


def test_converting_repairs_no_closed_one(vm, vcpu):
    """The ready-made handler finds nothing to convert, and the same fault for ever is a FaultLoopError."""
    add(vm).close_guest_memfd()
    with vm.on_memory_fault(handler=handlers.convert), pytest.raises(kvmexit.FaultLoopError):
        do(vcpu, PEEKS, DATA)
    assert facts(vcpu.run(timeout=60)) == (MemoryFault, errno.EFAULT, 0, DATA, PAGE)


def test_an_emulated_access_to_a_closed_one(vm, vcpu):
    """Where KVM emulates it is an Mmio in the slot; the cause is the same, so the advice is."""
    add(vm).close_guest_memfd()
    kvmexit.x86.long_mode(vcpu, PEEKS, cpl=0)
    exit = do(vcpu, PEEKS, DATA)
    assert isinstance(exit, (Mmio, MemoryFault))
    assert explained(exit, vcpu) == (Cause.GUEST_MEMFD_CLOSED, True, DATA)


# ---- poison ----


def poison(slot, page):
    """As if the memory had failed: asked for by a child, whom the kernel tells by SIGBUS, with a mapping of its own.

    EBUSY: it is poisoned, and still in the file (mm/memory-failure.c, has_extra_refcount).
    """
    file, size = slot.guest_memfd, slot.size
    child = os.fork()
    if not child:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            mmap.mmap(file, size).madvise(MADV_HWPOISON, page * PAGE, PAGE)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(255)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status in (errno.EINVAL, errno.EPERM):
        pytest.skip("this kernel does not poison memory on request (MADV_HWPOISON)")
    assert status in (0, -signal.SIGBUS, errno.EBUSY), os.strerror(status)


@pytest.mark.parametrize("program", [PEEKS, POKES])
def test_poison(vm, vcpu, program):
    """EHWPOISON, with its page and no other; renew() makes it zeros to the guest and to the host, and its neighbours stay."""
    slot = add(vm)
    assert [do(vcpu, PEEKS, DATA + page * PAGE) for page in range(4)] == [1, 2, 3, 4]  # KVM maps them
    poison(slot, 2)
    fault = do(vcpu, program, DATA + 2 * PAGE + 8, 55)
    assert facts(fault) == (MemoryFault, EHWPOISON, 0, DATA + 2 * PAGE, PAGE)
    assert explained(fault, vcpu) == (Cause.POISONED, True, DATA + 2 * PAGE)
    assert facts(vcpu.run(timeout=60)) == facts(fault)  # until it is repaired
    assert [do(vcpu, PEEKS, DATA + page * PAGE) for page in (0, 1, 3)] == [1, 2, 4]
    with vm.on_fault(DATA, 4 * PAGE, lambda vcpu, fault: fault.repair()):
        do(vcpu, program, DATA + 2 * PAGE + 8, 55)
    assert vm.memory.slots[1] is slot
    assert bytes(slot[2 * PAGE : 3 * PAGE]) == bytes(8) + bytes([55 if program == POKES else 0]) + bytes(PAGE - 9)
    slot[2 * PAGE] = 9
    assert [do(vcpu, PEEKS, DATA + page * PAGE) for page in range(4)] == [1, 2, 9, 4]


def test_poison_is_no_loss_to_convert_for(vm, vcpu):
    """handlers.convert and native.Convert leave it to others."""
    slot = add(vm)
    poison(slot, 0)
    for handler in (kvmexit.native.Convert(vm), handlers.convert):
        with vm.on_memory_fault(handler=handler):
            assert facts(do(vcpu, PEEKS, DATA)) == (MemoryFault, EHWPOISON, 0, DATA, PAGE)


def test_only_a_guest_memfd_has_holes(scripted):
    """renew() of a private page says so where there is none any more."""
    scripted.memory.add(DATA, PAGE, guest_memfd=True).close_guest_memfd()
    vcpu = scripted.create_vcpu(0, [kvmexit.testing.memory_fault(DATA, private=True, errno=EHWPOISON)])

    @scripted.on_fault()
    def handler(vcpu, fault):
        with pytest.raises(kvmexit.Error, match="has no guest_memfd"):
            fault.renew()
        return kvmexit.STOP

    assert isinstance(vcpu.run(), MemoryFault)


def test_a_private_page_is_renewed(scripted):
    """The private side is the guest_memfd's, at the slot's place in it; the shared one is left alone."""
    slot = scripted.memory.add(DATA, 4 * PAGE, guest_memfd=True)
    slot[PAGE] = 5
    os.pwrite(slot.guest_memfd, b"\7" * 4 * PAGE, 0)
    scripted.on_fault(handler=lambda vcpu, fault: fault.repair())
    steps = [kvmexit.testing.memory_fault(DATA + PAGE, private=True, errno=EHWPOISON), kvmexit.testing.hlt()]
    assert isinstance(scripted.create_vcpu(0, steps).run(), kvmexit.Hlt)
    assert os.pread(slot.guest_memfd, 4 * PAGE, 0) == b"\7" * PAGE + bytes(PAGE) + b"\7" * 2 * PAGE
    assert slot[PAGE] == 5


def test_a_slot_that_goes_takes_no_other_file_with_it(scripted):
    """Its descriptor's number is another file's as soon as it is closed: that one gets no holes."""
    for round_ in range(stress(200)):
        slot = scripted.memory.add(DATA, 4 * PAGE, guest_memfd=True)
        number, begun, ends = slot.guest_memfd, threading.Event(), []

        def renew(slot=slot, begun=begun, ends=ends):
            try:
                while True:
                    slot._renew_private(DATA, 4 * PAGE)
                    begun.set()
            except Exception as error:
                ends.append(str(error))

        thread = in_thread(renew)
        assert begun.wait(60)
        slot.close_guest_memfd() if round_ % 2 else scripted.memory.remove(slot)
        other = os.memfd_create("other")
        assert other == number
        os.write(other, b"\7" * 4 * PAGE)
        thread.join(60)
        assert os.pread(other, 4 * PAGE, 0) == b"\7" * 4 * PAGE
        os.close(other)
        assert ends == [f"{slot!r} has no guest_memfd"]
        if round_ % 2:
            scripted.memory.remove(slot)


# ---- no flags, in a VM that has private memory ----


def test_an_attribute_that_changed_under_a_hole(private_vm):
    """Read a hole, make it private, change any slot, read again: flags 0, for KVM still takes the access for shared.

    Source: arch/x86/kvm/mmu/mmu.c (handle_mmio_page_fault, kvm_faultin_pfn).
    """
    vm, vcpu = private_vm, load(private_vm, GUEST)

    def attribute(value):
        vm.ioctl(KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", HOLE, PAGE, value, 0))

    exit = do(vcpu, PEEKS, HOLE)
    assert (type(exit), exit.gpa, exit.slot) == (Mmio, HOLE, None)
    assert explained(exit, vcpu) == (Cause.NO_SLOT, True, HOLE)
    exit.data = b"\1" * 8
    assert isinstance(vcpu.run(timeout=60), Io)
    attribute(PRIVATE)
    vm.memory.add(DATA, PAGE)
    fault = do(vcpu, PEEKS, HOLE)
    assert facts(fault) == (MemoryFault, errno.EFAULT, 0, HOLE, PAGE)
    assert explained(fault, vcpu) == (Cause.PRIVATE_HOLE, True, HOLE)
    attribute(0)
    exit = vcpu.run(timeout=60)
    assert (type(exit), exit.gpa) == (Mmio, HOLE)
    exit.data = b"\2" + bytes(7)
    assert isinstance(vcpu.run(timeout=60), Io)
    assert vcpu.regs.rax == 2
