"""ioeventfd and irqfd: what KVM itself tells an eventfd, and what an eventfd tells the guest."""

import errno
import gc
import os
import select
import struct

import pytest
from guests import CODE, load
from processes import leaks

import kvmexit
from kvmexit import KvmError
from kvmexit.testing import hlt, pio_out

GPA = 0x20_0000


@pytest.fixture
def bell():
    """An eventfd that does not block."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def rung(fd):
    """-> what was added to an eventfd since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# mov al, 7; out 0x80, al; out 0x80, al; out 0x81, al; out 0x80, ax; mov al, 8; out 0x80, al; in al, 0x80; out 0xf4, al
PORTS = bytes.fromhex("b0 07 e6 80 e6 80 e6 81 66 e7 80 b0 08 e6 80 e4 80 e6 f4")

# mov eax, 7; mov [0x200000], eax; mov [0x200000], rax; mov [0x200000], al; mov [0x200004], eax;
# mov eax, 8; mov [0x200000], eax; mov eax, [0x200000]; out 0xf4, al
STORES = bytes.fromhex(
    "b8 07 00 00 00  89 04 25 00 00 20 00  48 89 04 25 00 00 20 00  88 04 25 00 00 20 00  89 04 25 04 00 20 00"
    "b8 08 00 00 00  89 04 25 00 00 20 00  8b 04 25 00 00 20 00  e6 f4"
)


def exits(vcpu):
    """Run a guest to its OUT 0xf4; -> its exits before that: (address, size, bytes written or None)."""
    seen = []
    while True:
        exit = vcpu.run(timeout=10)
        where = exit.port if isinstance(exit, kvmexit.Io) else exit.gpa
        if where == 0xF4:
            return seen
        seen.append((where, exit.size, bytes(exit.data) if exit.is_write else None))
        if not exit.is_write:
            exit.data = bytes(exit.size)


PORT_EXITS = [(0x80, 1, b"\7"), (0x80, 1, b"\7"), (0x81, 1, b"\7"), (0x80, 2, b"\7\0"), (0x80, 1, b"\x08"), (0x80, 1, None)]
STORE_EXITS = [
    (GPA, 4, b"\7\0\0\0"), (GPA, 8, b"\7" + bytes(7)), (GPA, 1, b"\7"), (GPA + 4, 4, b"\7\0\0\0"),
    (GPA, 4, b"\x08\0\0\0"), (GPA, 4, None)]  # fmt: skip


@pytest.mark.parametrize(
    ("where", "gone"), [
        ({"address": 0x80, "size": 1, "pio": True}, [0, 1, 4]),
        ({"address": 0x80, "size": 2, "pio": True}, [3]),
        ({"address": 0x80, "size": 0, "pio": True}, [0, 1, 3, 4]),
        ({"address": 0x80, "size": 1, "pio": True, "match": 8}, [4]),
        ({"address": 0x81, "size": 1, "pio": True, "match": 7}, [2]),
        ({"address": 0x81, "size": 1, "pio": True, "match": 6}, []),
        ({"address": GPA, "size": 4}, [0, 4]),
        ({"address": GPA, "size": 8}, [1]),
        ({"address": GPA, "size": 0}, [0, 1, 2, 4]),
        ({"address": GPA, "size": 4, "match": 8}, [4]),
        ({"address": GPA + 4, "size": 4}, [3]),
        ({"address": GPA, "size": 2}, []),
    ])  # fmt: skip
def test_the_writes_ring_and_do_not_exit(vm, bell, where, gone):
    """These and no others, also not reads; the others exit in their order. Once removed all exit again."""
    code, all_exits = (PORTS, PORT_EXITS) if where.get("pio") else (STORES, STORE_EXITS)
    vcpu = load(vm, code)
    assigned = vm.ioeventfd(eventfd=bell, **where)
    assert exits(vcpu) == [exit for i, exit in enumerate(all_exits) if i not in gone]
    assert rung(bell) == len(gone)
    assigned.remove()
    assigned.remove()
    vcpu.regs.rip = CODE
    assert exits(vcpu) == all_exits
    assert rung(bell) == 0


def test_values_share_an_address(vm, bell):
    """An eventfd for each value, as virtio's queues want; what none matches exits."""
    vcpu = load(vm, PORTS)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    with vm.ioeventfd(0x80, 1, bell, pio=True, match=7), vm.ioeventfd(0x80, 1, other, pio=True, match=8):
        assert exits(vcpu) == [PORT_EXITS[2], PORT_EXITS[3], PORT_EXITS[5]]
        assert (rung(bell), rung(other)) == (2, 1)
    vcpu.regs.rip = CODE
    assert exits(vcpu) == PORT_EXITS
    os.close(other)


def test_routes_do_not_see_what_rings(vm, bell):
    """KVM comes first, whatever is registered here."""
    vcpu = load(vm, PORTS)
    counter = kvmexit.native.Counter()
    vm.on_pio(0x80, 1, counter)
    vm.ioeventfd(0x80, 1, bell, pio=True)
    exits(vcpu)
    assert (counter.reads, counter.writes, rung(bell)) == (1, 1, 3)


def test_it_outlives_what_the_caller_has(vm):
    """Neither the object nor the caller's descriptor has to be kept."""
    vcpu = load(vm, PORTS)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    mine = os.dup(fd)
    vm.ioeventfd(0x80, 1, fd, pio=True)
    os.close(fd)
    gc.collect()
    exits(vcpu)
    assert rung(mine) == 3
    os.close(mine)


@pytest.mark.parametrize(
    ("arguments", "error"), [
        ({"size": 3}, ValueError), ({"size": 16}, ValueError), ({"size": -1}, ValueError), ({"size": 8, "pio": True}, ValueError),
        ({"address": 0x1_0000, "pio": True}, ValueError), ({"address": -1}, ValueError), ({"address": 2**64}, ValueError),
        ({"address": 2**64 - 2, "size": 4}, ValueError), ({"match": 256}, ValueError), ({"match": -1}, ValueError),
        ({"size": 0, "match": 0}, ValueError), ({"match": 1.5}, TypeError), ({"eventfd": 0}, ValueError),
        ({"eventfd": 99_999}, ValueError), ({"eventfd": "x"}, AttributeError), ({"size": None}, TypeError),
    ])  # fmt: skip
def test_wrong_doorbells_are_refused(scripted, bell, arguments, error):
    """Before KVM is asked, and nothing stays behind."""
    before = leaks()
    with pytest.raises(error):
        scripted.ioeventfd(**{"address": 0x80, "size": 1, "eventfd": bell, **arguments})
    assert leaks() == before


def test_kvm_says_who_has_the_writes_already(vm, bell):
    """The error says what to do; and what it is about stays in force."""
    vm.ioeventfd(0x80, 1, bell, pio=True)
    before = leaks()
    with pytest.raises(KvmError, match="another ioeventfd has these writes") as caught:
        vm.ioeventfd(0x80, 1, bell, pio=True, match=7)
    assert (caught.value.call, caught.value.errno) == ("KVM_IOEVENTFD", errno.EEXIST)
    del caught
    assert leaks() == before
    exits(load(vm, PORTS))
    assert rung(bell) == 3


def test_a_scripted_vm_takes_them(scripted, bell):
    """And nothing comes of them: a program under test need not know."""
    with scripted.ioeventfd(0x80, 1, bell, pio=True), scripted.irqfd(5, bell):
        assert isinstance(scripted.create_vcpu(0, [pio_out(0x80, b"x"), hlt()]).run(), kvmexit.Io)
    assert rung(bell) == 0


def test_nothing_is_left_of_a_closed_vm(kvm, bell):
    """No descriptor; and removing what is gone is no error."""
    kvmexit.VM().close()
    before = leaks()
    vm = kvmexit.VM()
    assigned = vm.ioeventfd(0x80, 1, bell, pio=True)
    vm.close()
    assigned.remove()
    with pytest.raises(kvmexit.Error, match="closed"):
        vm.ioeventfd(0x80, 1, bell, pio=True)
    del assigned
    assert leaks() == before
    kept = kvmexit.VM()
    kept.ioeventfd(0x80, 1, bell, pio=True)
    del kept
    assert leaks() == before


@pytest.mark.parametrize("closed", [True, False])
def test_an_adopted_vm_gets_them_back(vm, bell, closed):
    """It lives on without us: what we assigned in it is taken back, with close() and without."""
    vcpu = load(vm, PORTS)
    ours = kvmexit.VM.adopt(vm.fd)
    ours.ioeventfd(0x80, 1, bell, pio=True)
    if closed:
        ours.close()
    del ours
    gc.collect()
    assert exits(vcpu) == PORT_EXITS
    assert rung(bell) == 0


# ---- interrupts ----

LINE, READY, GOT = 5, 0x80, 0x81

# Vectors 0x20 and up for the PIC, line 5 unmasked, interrupts on:
#   mov al, 0x11; out 0x20, al; mov al, 0x20; out 0x21, al; mov al, 4; out 0x21, al; mov al, 1; out 0x21, al;
#   mov al, 0xdf; out 0x21, al; sti; out 0x80, al; wait: hlt; jmp wait
# on line 5: out 0x81, al; mov al, 0x20; out 0x20, al; out 0x82, al; iret
WAIT = bytes.fromhex("b0 11 e6 20 b0 20 e6 21 b0 04 e6 21 b0 01 e6 21 b0 df e6 21 fb e6 80 f4 eb fd")
HANDLER = bytes.fromhex("e6 81 b0 20 e6 20 e6 82 cf")
AT = 0x2000


@pytest.fixture
def waiting(vm):
    """A vCPU that waits for interrupts in real mode."""
    vm.create_irqchip()
    vcpu = load(vm, WAIT, mode=kvmexit.x86.real_mode)
    vm.memory.write(AT, HANDLER)
    vm.memory.write((0x20 + LINE) * 4, struct.pack("<HH", AT, 0))
    assert vcpu.run(timeout=10).port == READY
    return vcpu


def test_a_write_interrupts_the_guest(vm, waiting, bell):
    """Each once; after remove() no longer, and the eventfd keeps its count."""
    with vm.irqfd(LINE, bell) as line:
        assert repr(line) == "IrqFd(gsi=5)"
        for _ in range(2):
            os.eventfd_write(bell, 1)
            assert [waiting.run(timeout=10).port for _ in range(2)] == [GOT, 0x82]
        assert rung(bell) == 0  # KVM has read it
    os.eventfd_write(bell, 1)
    assert waiting.run(timeout=0.2).cause == "timeout"
    assert rung(bell) == 1


def test_a_level_is_told_when_it_was_acknowledged(vm, waiting, bell):
    """Not before the guest's EOI; then the eventfd can raise it again."""
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    with vm.irqfd(LINE, bell, resample=resample) as line:
        assert repr(line) == "IrqFd(gsi=5, resample)"
        for _ in range(2):
            os.eventfd_write(bell, 1)
            assert waiting.run(timeout=10).port == GOT
            assert rung(resample) == 0
            assert waiting.run(timeout=10).port == 0x82
            assert select.select([resample], [], [], 10)[0]
            assert rung(resample) == 1
    os.close(resample)


def test_an_interrupt_needs_a_controller(vm, bell):
    """The error says which call is missing."""
    before = leaks()
    with pytest.raises(KvmError, match=r"vm.create_irqchip\(\) first"):
        vm.irqfd(LINE, bell)
    assert leaks() == before


def test_an_eventfd_raises_one_line(vm, bell):
    """Two irqfds of one eventfd are KVM's EBUSY."""
    vm.create_irqchip()
    vm.irqfd(LINE, bell)
    with pytest.raises(KvmError, match="use one for each line") as caught:
        vm.irqfd(LINE + 1, bell)
    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize(
    ("arguments", "error"), [
        ({"gsi": -1}, ValueError), ({"gsi": 1 << 32}, ValueError), ({"gsi": "5"}, TypeError), ({"eventfd": 0}, ValueError),
        ({"resample": 0}, ValueError)])  # fmt: skip
def test_wrong_interrupts_are_refused(scripted, bell, arguments, error):
    """Before KVM is asked, and nothing stays behind."""
    before = leaks()
    with pytest.raises(error):
        scripted.irqfd(**{"gsi": LINE, "eventfd": bell, **arguments})
    assert leaks() == before


def test_a_line_that_kvm_cannot_route_is_refused(vm, bell):
    """It would never interrupt anybody."""
    vm.create_irqchip()
    with pytest.raises(ValueError, match=r"gsi 4096 is not in 0\.\.4095"):
        vm.irqfd(4096, bell)
