"""After tools/testing/selftests/kvm/guest_memfd_test.c, of 6.12, and of 6.18 for what can be mapped.

It requires of userspace: sizes that are not whole pages, and flags that the kernel does not announce, are EINVAL; two guest_memfds are
two files of their own sizes; a guest_memfd is neither read nor written as a file; its size and block size are as made; fallocate(2)
allocates and punches whole pages within it, and beyond its end punches nothing; it cannot be mapped, but with MMAP, and then shared
only; what is mapped is the guest's memory, with INIT_SHARED, and SIGBUS (here EFAULT from memory.read()) without.
"""

import contextlib
import ctypes
import errno
import mmap
import os

import pytest
from memory_guest import KEEP_SIZE, PAGE, Guest, create_guest_memfd, fallocate, punch_hole

import kvmexit
from kvmexit import GuestMemfdFlags, KvmError

FLAGS_CAP = 244  # KVM_CAP_GUEST_MEMFD_FLAGS
MMAP, MMAP_SHARED = GuestMemfdFlags.MMAP, GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED
SIZE = 4 * PAGE
GPA = 0x1000_0000


@pytest.fixture(params=["ordinary", "private"])
def any_vm(request, vm):
    """A VM of either type, where there is one. (An ordinary one may have guest_memfds that it cannot bind, and says it has none.)"""
    if errno_of(lambda: os.close(create_guest_memfd(vm, PAGE))):
        pytest.skip("this kernel has no guest_memfd")
    return vm if request.param == "ordinary" else request.getfixturevalue("private_vm")


@pytest.fixture(params=[0, MMAP, MMAP_SHARED], ids=["0", "mmap", "mmap-shared"])
def flags(request, any_vm):
    """Flags to make it with."""
    if any_vm.check(FLAGS_CAP) & request.param != request.param:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    return request.param


@pytest.fixture
def fd(any_vm, flags):
    """A guest_memfd of four pages."""
    made = create_guest_memfd(any_vm, SIZE, flags)
    yield made
    os.close(made)


def errno_of(call, *args):
    """-> the errno it fails with, or 0."""
    try:
        call(*args)
    except OSError as error:
        return error.errno
    return 0


def test_create_guest_memfd_invalid_sizes(any_vm, flags):
    """EINVAL from the kernel; ValueError, before it is asked, from memory.add()."""
    for size in (0, 1, 512, PAGE - 1, PAGE + 1):
        assert errno_of(create_guest_memfd, any_vm, size, flags) == errno.EINVAL
        with pytest.raises(ValueError, match="positive multiple"):
            any_vm.memory.add(GPA, size, guest_memfd=True, gmem_flags=flags)


def test_guest_memfd_flags(any_vm):
    """Each by itself: those that KVM_CAP_GUEST_MEMFD_FLAGS has, and no others."""
    valid = any_vm.check(FLAGS_CAP)
    for flag in (1 << bit for bit in range(64)):
        if flag & valid:
            os.close(create_guest_memfd(any_vm, PAGE, flag))
        else:
            assert errno_of(create_guest_memfd, any_vm, PAGE, flag) == errno.EINVAL, hex(flag)
            with pytest.raises(KvmError) as caught:
                any_vm.memory.add(GPA, PAGE, guest_memfd=True, gmem_flags=flag)
            assert (caught.value.call, caught.value.errno) == ("KVM_CREATE_GUEST_MEMFD", errno.EINVAL)
    assert any_vm.memory.slots == ()


def test_create_guest_memfd_multiple(any_vm):
    """Two are two."""
    first = create_guest_memfd(any_vm, PAGE)
    second = create_guest_memfd(any_vm, 2 * PAGE)
    one, two = os.fstat(first), os.fstat(second)
    assert (one.st_size, two.st_size) == (PAGE, 2 * PAGE)
    assert one.st_ino != two.st_ino
    os.close(second)
    assert os.fstat(first).st_size == PAGE
    os.close(first)


def test_file_read_write(fd):
    """It is no file for that."""
    assert errno_of(os.read, fd, 64)
    assert errno_of(os.write, fd, b"x" * 64)
    assert errno_of(os.pread, fd, 64, 0)
    assert errno_of(os.pwrite, fd, b"x" * 64, 0)


def test_mmap(fd, flags):
    """With the flag, and shared."""
    assert errno_of(mmap.mmap, fd, PAGE, mmap.MAP_PRIVATE)
    for size in (PAGE, SIZE):
        if flags & MMAP:
            mmap.mmap(fd, size, mmap.MAP_SHARED).close()
        else:
            assert errno_of(mmap.mmap, fd, size, mmap.MAP_SHARED)


def test_file_size(fd):
    """As made; blocks are pages."""
    stat = os.fstat(fd)
    assert (stat.st_size, stat.st_blksize) == (SIZE, PAGE)


def test_fallocate(fd):
    """Whole pages within the file; a hole behind its end is none."""
    fallocate(fd, KEEP_SIZE, 0, SIZE)
    assert errno_of(punch_hole, fd, PAGE - 1, PAGE)
    assert errno_of(fallocate, fd, KEEP_SIZE, SIZE, PAGE)
    assert errno_of(fallocate, fd, KEEP_SIZE, SIZE + PAGE, PAGE)
    punch_hole(fd, SIZE, PAGE)
    punch_hole(fd, SIZE + PAGE, PAGE)
    assert errno_of(punch_hole, fd, PAGE, PAGE - 1)
    punch_hole(fd, PAGE, PAGE)
    fallocate(fd, KEEP_SIZE, PAGE, PAGE)
    assert os.fstat(fd).st_size == SIZE


@pytest.mark.parametrize("offset", [0, 1, PAGE])
def test_invalid_punch_hole(fd, offset):
    """EINVAL where it is not of whole pages."""
    for size in (1, PAGE - 1, PAGE, PAGE + 1):
        expected = 0 if offset % PAGE == size % PAGE == 0 else errno.EINVAL
        assert errno_of(punch_hole, fd, offset, size) == expected, size


# ---- what is mapped ----


@contextlib.contextmanager
def mapped(vm, flags, pages=4):
    """A slot whose memory is a guest_memfd's own mapping."""
    if vm.check(FLAGS_CAP) & flags != flags:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    slot = vm.memory.add(GPA, pages * PAGE, guest_memfd=True, gmem_flags=flags)
    yield slot
    vm.memory.remove(slot)


def test_mmap_supported(vm):
    """Zeros, what was written, zeros again where a hole was punched."""
    with mapped(vm, MMAP_SHARED) as slot:
        assert bytes(slot.view) == bytes(SIZE)
        slot[:] = b"\xaa" * SIZE
        punch_hole(slot.guest_memfd, 0, PAGE)
        assert bytes(slot.view) == bytes(PAGE) + b"\xaa" * (SIZE - PAGE)
        slot[:PAGE] = b"\xaa" * PAGE
        assert vm.memory.read(GPA, SIZE) == b"\xaa" * SIZE


def test_guest_memfd_guest(vm):
    """The host writes and the guest finds it; the guest writes and the host finds it: by the slot, and by a mapping of its own."""
    with mapped(vm, MMAP_SHARED) as slot:
        guest = Guest(vm)
        with mmap.mmap(slot.guest_memfd, SIZE) as own:
            own[:] = b"\xaa" * SIZE
        assert guest.holds(GPA, SIZE, 0xAA)
        guest.fill(GPA, SIZE, 0xFF)
        assert bytes(slot.view) == b"\xff" * SIZE
        with mmap.mmap(slot.guest_memfd, SIZE) as own:
            assert own[:] == b"\xff" * SIZE


def test_fault_overflow(vm):
    """A mapping may be longer than the file, though not one of kvmexit's own. What is behind the file is EFAULT, for the host that
    reads guest memory and for the guest."""
    if vm.check(FLAGS_CAP) & MMAP_SHARED != MMAP_SHARED:
        pytest.skip("this kernel's guest_memfd has no MMAP and INIT_SHARED (KVM_CAP_GUEST_MEMFD_FLAGS)")
    fd = create_guest_memfd(vm, SIZE, MMAP_SHARED)
    with pytest.raises(ValueError, match="too short"):
        vm.memory.add(GPA, 4 * SIZE, fd=fd)
    with map_file(fd, 4 * SIZE) as buffer:
        vm.memory.add(GPA, 4 * SIZE, buffer=buffer)
        vm.memory.write(GPA, b"\xaa" * SIZE)
        for access in (lambda: vm.memory.read(GPA + SIZE, 1), lambda: vm.memory.write(GPA + 4 * SIZE - 1, b"x")):
            with pytest.raises(KvmError) as caught:
                access()
            assert caught.value.errno == errno.EFAULT
        assert vm.memory.read(GPA, SIZE) == b"\xaa" * SIZE
        guest = Guest(vm)
        assert guest.holds(GPA, SIZE, 0xAA)
        guest.begin("add up", rdi=GPA + SIZE, rsi=GPA + 2 * SIZE, rdx=PAGE, rax=0)
        assert isinstance(guest.vcpu.run(timeout=60), kvmexit.UnexplainedFault)
        vm.memory.remove(GPA)
    os.close(fd)


@contextlib.contextmanager
def map_file(fd, size):
    """mmap(2), which Python has not for more than there is in a file; -> the memory."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, ctypes.c_int64(0))
    yield (ctypes.c_char * size).from_address(address)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


def test_fault_private(vm):
    """Without INIT_SHARED the host may not touch it, mapped or not: an error, and not SIGBUS."""
    with mapped(vm, MMAP):
        for access in (lambda: vm.memory.read(GPA, 8), lambda: vm.memory.write(GPA, b"x")):
            with pytest.raises(KvmError) as caught:
                access()
            assert caught.value.errno == errno.EFAULT
