"""After tools/testing/selftests/kvm/pre_fault_memory_test.c.

It requires of userspace: KVM_PRE_FAULT_MEMORY (of a vCPU) maps a range before the guest touches it. A call does a part, and says in its
argument what is left, or fails and changes nothing; called again it comes to the range's end, or to ENOENT where no memslot is. So for
2 MiB, for a range half of which is behind the slot, and for one that is wholly. The guest then reads all of it without an exit.
In ordinary and in software-protected VMs, there shared and private.

kvmexit has no name for the call: it is made by vcpu.ioctl().
"""

import errno
import struct

import pytest
from memory_guest import MIB, PAGE, Guest

import kvmexit

CAP, PRE_FAULT_MEMORY = 236, 0xC040AED5
GPA, SIZE = 0xC000_0000, 2 * MIB + PAGE


def pre_fault(vcpu, gpa, size):
    """-> (bytes left, errno): as much as can be done."""
    while True:
        argument = bytearray(struct.pack("<QQ", gpa, size).ljust(64, b"\0"))
        failed = 0
        try:
            vcpu.ioctl(PRE_FAULT_MEMORY, argument)
        except kvmexit.KvmError as error:
            failed = error.errno
        at, left = struct.unpack_from("<QQ", argument)
        assert at + left == gpa + size
        assert (left < size) != bool(failed)  # something was done, or it failed
        gpa, size = at, left
        if not left or failed not in (0, errno.EINTR):
            return left, failed


@pytest.mark.parametrize("kind", ["ordinary", "protected-shared", "protected-private"])
def test_pre_fault_memory(request, vm, kind):
    if not vm.check(CAP):
        pytest.skip("this kernel has no KVM_PRE_FAULT_MEMORY")
    if kind != "ordinary":
        vm = request.getfixturevalue("private_vm")
    vm.memory.add(GPA, SIZE, guest_memfd=kind == "protected-private")
    if kind == "protected-private":
        vm.memory.convert(GPA, SIZE, private=True)
    guest = Guest(vm)
    assert pre_fault(guest.vcpu, GPA, 2 * MIB) == (0, 0)
    assert pre_fault(guest.vcpu, GPA + 2 * MIB, 2 * PAGE) == (PAGE, errno.ENOENT)
    assert pre_fault(guest.vcpu, GPA + SIZE, PAGE) == (PAGE, errno.ENOENT)
    assert guest.add_up(GPA, SIZE) == 0
