"""After tools/testing/selftests/kvm/coalesced_io_test.c: writes that KVM posts in a ring.

Required of userspace: from each place where the ring may begin, to find all that fits (a ring of 170 has room for 169),
ports and memory in the order in which the guest wrote them, when the write that does not fit exits; to be given an access
outside the zones at once, with nothing in the ring; and to be given each write as an exit once a zone is gone.
"""

import pytest
from guests import load, stress

import kvmexit
from kvmexit import native

GPA, PORT, SYNC, ROOM = 0x1000_0000, 0x80, 0xF4, 169
FIRST = 0x1234_5600  # the value of the first write

# round: mov eax, esi; mov ecx, edi
# again: test al, 1; jnz port
# mov [rbx], rax; jmp next
# port: out 0x80, eax
# next: inc eax; dec ecx; jnz again
# out 0xf4, al; jmp round
GUEST = bytes.fromhex("89 f0  89 f9  a8 01  75 05  48 89 03  eb 02  e7 80  ff c0  ff c9  75 ef  e6 f4  eb e7")


def written(first, count):
    """-> what the ring has of `count` writes: (address, size, value). Memory and port in turn."""
    return [(PORT, 4, value) if value & 1 else (GPA, 8, value) for value in range(first, first + count)]


class Coalesced:
    """The guest, two zones with one ring of ours behind them, and the exits of what is not posted."""

    def __init__(self, vm):
        self.vm = vm
        self.vcpu = load(vm, GUEST)
        self.vcpu.regs.rbx = GPA
        self.ring = native.Ring(256)
        self.zones = [vm.coalesce_mmio(GPA, 8, self.ring), vm.coalesce_pio(PORT, 8, self.ring)]
        # Newer than the zones' own routes: the write that did not fit is given to the caller of run().
        vm.on_mmio(GPA, 8, lambda vcpu, exit: kvmexit.STOP)
        vm.on_pio(PORT, 8, lambda vcpu, exit: kvmexit.STOP)

    def write(self, first, count):
        """The guest's next round; -> the exit."""
        self.vcpu.regs.rsi, self.vcpu.regs.rdi = first, count
        return self.vcpu.run(timeout=60)

    def posted(self):
        return [(entry.address, entry.size, entry.data) for entry in self.ring.drain()]

    def at_sync(self):
        """Whether the guest's next exit is the end of its round, with nothing posted."""
        return self.vcpu.run(timeout=60).port == SYNC and not self.posted()


@pytest.mark.off_main
def test_coalesced_io(vm):
    """From each of the 170 places (with KVMEXIT_STRESS below 1, so many fewer), the ring is filled by writes to both, and
    both are the write that exits then."""
    guest = Coalesced(vm)
    for _ in range(stress(ROOM + 1)):
        exit = guest.write(FIRST + 1, ROOM + 1)  # the last one goes to memory
        assert (exit.gpa, exit.is_write, exit.size) == (GPA, True, 8)
        assert int.from_bytes(exit.data, "little") == FIRST + 1 + ROOM
        assert guest.posted() == written(FIRST + 1, ROOM)
        assert guest.at_sync()
        exit = guest.write(FIRST, ROOM + 1)  # to the port
        assert (exit.port, exit.is_write, exit.size, exit.count) == (PORT, True, 4, 1)
        assert int.from_bytes(exit.data, "little") == FIRST + ROOM
        assert guest.posted() == written(FIRST, ROOM)
        assert guest.at_sync()
        assert guest.write(FIRST, 1).port == SYNC  # one place on: 2 * 169 + 1 is -1 modulo 170
        assert guest.posted() == written(FIRST, 1)


def test_unregistered_io_exits(vm):
    """Each bus by itself, from the moment its zone is gone."""
    guest = Coalesced(vm)
    mmio, pio = guest.zones
    assert guest.write(FIRST, 2).port == SYNC
    assert guest.posted() == written(FIRST, 2)
    mmio.remove()
    exit = guest.write(FIRST, 2)
    assert (exit.gpa, exit.size, int.from_bytes(exit.data, "little")) == (GPA, 8, FIRST)
    assert guest.vcpu.run(timeout=60).port == SYNC
    assert guest.posted() == written(FIRST + 1, 1)
    pio.remove()
    assert guest.write(FIRST, 2).gpa == GPA
    exit = guest.vcpu.run(timeout=60)
    assert (exit.port, exit.size, int.from_bytes(exit.data, "little")) == (PORT, 4, FIRST + 1)
    assert guest.at_sync()
