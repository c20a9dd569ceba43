"""After tools/testing/selftests/kvm/x86_64/userspace_io_test.c: what userspace does to the count of a string input.

Required: nothing breaks when userspace changes RCX at the exit of `rep insb`, down or far up, whatever becomes of that
input; and an input that nobody disturbs fills its 8192 bytes.
"""

import struct

import pytest
from exit_guest import DONE, FREE, Guest

INS = 0x90
SIZE = 8192
GET_REGS, SET_REGS = 0x8090AE81, 0x4090AE82
RCX = 2  # its place in struct kvm_regs


def set_rcx_now(vcpu, value):
    """In KVM's own order: before the input is completed."""
    regs = bytearray(18 * 8)
    vcpu.ioctl(GET_REGS, regs)
    struct.pack_into("<Q", regs, 8 * RCX, value)
    vcpu.ioctl(SET_REGS, regs)


def set_rcx_after(vcpu, value):
    """By the view, which waits for KVM to have completed the input."""
    vcpu.regs.rcx = value


def ins(guest, count, change=None):
    """`rep insb` of `count` bytes 0xaa to FREE; -> how many bytes the exits asked for. change: (RCX at an exit, RCX in its
    place, how)."""
    asked = 0
    exit = guest.step("fc f3 6c", rcx=count, rdx=INS, rdi=FREE)  # cld; rep insb
    while exit.port != DONE:
        assert (exit.port, exit.size, exit.is_write) == (INS, 1, False)
        assert 0 < exit.count <= 4096
        asked += exit.count
        exit.data = b"\xaa" * exit.count
        if change and guest.vcpu.regs.rcx == change[0]:
            _, rcx, how = change
            how(guest.vcpu, rcx)
            change = None
        exit = guest.go_on()
    return asked


@pytest.mark.parametrize(("how", "more"), [(set_rcx_now, 0), (set_rcx_after, 1)])
def test_the_count_is_changed_at_the_exit(vm, how, more):
    """2 to 1, and 3 to 8192: the guest comes to the end of its instruction with what was said last, and no byte lies
    behind it. Before completion the new count counts from the beginning, after it for what is to come: then every byte is
    in its place, too."""
    guest = Guest(vm)
    for count, changed in ((2, 1), (3, SIZE)):
        vm.memory.write(FREE, bytes(2 * SIZE))
        ins(guest, count, (count, changed, how))
        filled = changed + more * count
        assert (guest.vcpu.regs.rcx, guest.vcpu.regs.rdi) == (0, FREE + filled)
        assert vm.memory.read(FREE + filled, SIZE // 2) == bytes(SIZE // 2)
        assert not more or vm.memory.read(FREE, filled) == b"\xaa" * filled


def test_an_undisturbed_input_fills_its_buffer(vm):
    """All 8192 bytes, and no more."""
    guest = Guest(vm)
    assert ins(guest, SIZE) == SIZE
    assert (guest.vcpu.regs.rcx, guest.vcpu.regs.rdi) == (0, FREE + SIZE)
    assert vm.memory.read(FREE, SIZE + 1) == b"\xaa" * SIZE + b"\0"
