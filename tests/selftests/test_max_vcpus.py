"""After tools/testing/selftests/kvm/kvm_create_max_vcpus.c and x86_64/max_vcpuid_cap_test.c: how many vCPUs a VM has.

Required of userspace: to create as many as KVM says (KVM_CAP_MAX_VCPUS), with the first ids as with the last ones that it
says there are (KVM_CAP_MAX_VCPU_ID), having raised its limit of descriptors; and to be refused ids beyond a limit that it
set itself, once, before the first vCPU.
"""

import errno
import gc
import resource
import time

import pytest
from guests import CODE

import kvmexit
from kvmexit import KvmError

SET_BOOT_CPU_ID_CAP, MAX_VCPUS, MAX_VCPU_ID = 34, 66, 128
SET_BOOT_CPU_ID = 0xAE78
BOUND = 3  # seconds: a slow machine, such as the lab, creates as many as it can in this time


@pytest.fixture
def descriptors():
    """-> a function that sees to a number of descriptors; skips where that many are not permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def see_to(wanted):
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"RLIMIT_NOFILE is {hard} here, {wanted} are wanted")
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    yield see_to
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("ids", ["first", "last"])
def test_create_max_vcpus(vm, descriptors, ids):
    """All of them, and none more; the one with the last id runs."""
    count, end = vm.check(MAX_VCPUS), vm.check(MAX_VCPU_ID)
    assert end >= count
    descriptors(count + 100)
    first = 0 if ids == "first" else end - count
    until = time.monotonic() + BOUND
    vcpus = []
    for id in reversed(range(first, first + count)):
        vcpus.append(vm.create_vcpu(id))
        if time.monotonic() > until:
            break
    else:
        with pytest.raises(KvmError) as caught:
            vm.create_vcpu(first - 1 if first else count)
        assert (caught.value.call, caught.value.errno) == ("KVM_CREATE_VCPU", errno.EINVAL)
    assert [vcpu.id for vcpu in vcpus] == [first + count - 1 - i for i in range(len(vcpus))]
    vm.memory.add(0, 1 << 20)[CODE : CODE + 2] = bytes.fromhex("e6 80")  # out 0x80, al
    kvmexit.x86.long_mode(vcpus[0], CODE, cpl=3)
    assert vcpus[0].run(timeout=20).port == 0x80


@pytest.mark.parametrize("id", ["end", 1 << 31, 1 << 32, 1 << 63])
def test_ids_there_are_none_of(vm, id):
    """The first beyond the end, and those whose low half would be an id."""
    with pytest.raises(KvmError, match="KVM_CAP_MAX_VCPU_ID") as caught:
        vm.create_vcpu(vm.check(MAX_VCPU_ID) if id == "end" else id)
    assert (caught.value.call, caught.value.errno) == ("KVM_CREATE_VCPU", errno.EINVAL)
    assert vm.create_vcpu(0).id == 0


def test_max_vcpuid_cap(vm):
    """A limit of the VM's own: not beyond KVM's, not below the boot processor's id, and set once; then ids end there."""

    def refused(call, *arguments):
        with pytest.raises(KvmError) as caught:
            call(*arguments)
        assert caught.value.errno == errno.EINVAL

    limit = 2
    refused(vm.enable, MAX_VCPU_ID, vm.check(MAX_VCPU_ID) + 1)
    if vm.check(SET_BOOT_CPU_ID_CAP):
        vm.ioctl(SET_BOOT_CPU_ID, limit)
        refused(vm.enable, MAX_VCPU_ID, limit - 1)
    vm.enable(MAX_VCPU_ID, limit)
    refused(vm.enable, MAX_VCPU_ID, limit + 1)
    refused(vm.create_vcpu, limit)
    refused(vm.create_vcpu, 1 << 32)
    for id in range(limit):
        assert vm.create_vcpu(id).id == id
