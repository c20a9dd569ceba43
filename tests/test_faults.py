"""Faults repaired, and told to the guest: vm.on_fault(), inject(), skip() (src/kvmexit/faults/)."""

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from guests import CODE, load

import kvmexit
from kvmexit import STOP, faults
from kvmexit.faults import Cause
from kvmexit.testing import RecordedAttributes, ScriptedVM, failure, hlt, memory_fault, mmio_read, mmio_write

PAGE, DATA = 4096, 0x1000_0000
READ = bytes.fromhex("8a 03 e6 f4")  # mov al, [rbx]; out 0xf4, al
WRITE = bytes.fromhex("88 03 8a 03 e6 f4")  # mov [rbx], al; mov al, [rbx]; out 0xf4, al
EXAMPLE = Path(__file__).parent.parent / "examples" / "truncated_file.py"


@pytest.fixture
def guest(vm, iced):
    """guest(code): -> a vCPU about to run it, rbx at DATA, where there are two pages of 7s; and their file."""
    file = os.memfd_create("data")

    def guest(code, **options):
        os.pwrite(file, b"\7" * 2 * PAGE, 0)
        vcpu = load(vm, code, stack=0x9000, **options)
        vm.memory.add(DATA, 2 * PAGE, fd=file)
        vcpu.regs.rbx = DATA
        return vcpu, file

    yield guest
    os.close(file)


def spoil(slot, how, file):
    """Make the slot's first page inaccessible."""
    libc = ctypes.CDLL(None)
    at = ctypes.c_void_p(slot.hva)
    if how == "truncated":
        os.ftruncate(file, 0)
    elif how == "unmapped":
        assert libc["munmap"](at, ctypes.c_size_t(PAGE)) == 0
    else:
        assert libc["mprotect"](at, ctypes.c_size_t(PAGE), {"none": 0, "read": mmap.PROT_READ}[how]) == 0


# ---- repair ----


@pytest.mark.parametrize(("how", "code", "cause", "reads"), [
    ("none", READ, Cause.PROT_NONE, 7), ("none", WRITE, Cause.PROT_NONE, 0x55), ("read", WRITE, Cause.PROT_READ, 0x55),
    ("unmapped", READ, Cause.UNMAPPED, 0), ("unmapped", WRITE, Cause.UNMAPPED, 0x55)])
def test_repair_does_what_the_cause_asks_for(vm, guest, how, code, cause, reads):
    """And the guest goes on with what is there then."""
    vcpu, file = guest(code)
    vcpu.regs.rax = 0x55
    spoil(vm.memory.slots[1], how, file)
    seen = []

    @vm.on_fault()
    def handler(vcpu, fault):
        seen.append((fault.gpa, fault.gva, fault.cause, fault.certain, fault.slot is vm.memory.slots[1]))
        fault.repair()

    assert vcpu.run(timeout=10).data == bytes([reads])
    assert seen == [(DATA, DATA, cause, True, True)]


def test_a_truncated_file_needs_its_descriptor(vm, guest):
    """repair() says so; extend() takes the file's own only, and makes it no longer than needed."""
    vcpu, file = guest(READ)
    spoil(vm.memory.slots[1], "truncated", file)
    other = os.memfd_create("other")

    @vm.on_fault(DATA, PAGE)
    def handler(vcpu, fault):
        with pytest.raises(kvmexit.Error, match="extend the file"):
            fault.repair()
        with pytest.raises(ValueError, match="not of the file"):
            fault.extend(other)
        fault.extend(file)

    assert vcpu.run(timeout=10).data == b"\0"
    assert (os.fstat(file).st_size, os.fstat(other).st_size) == (PAGE, 0)
    os.close(other)


def test_mmio_in_a_slot_is_completed_as_memory(vm, guest):
    """At CPL 0 this machine emulates: what cannot be reached comes as MMIO, where it is not a bare fault."""
    vcpu, file = guest(WRITE, cpl=0)
    vcpu.regs.rax = 0x55
    spoil(vm.memory.slots[1], "none", file)
    kinds = []

    @vm.on_fault()
    def handler(vcpu, fault):
        kinds.append(type(fault.exit))
        fault.repair()

    assert vcpu.run(timeout=10).data == b"\x55"
    assert kinds
    assert set(kinds) <= {kvmexit.Mmio, kvmexit.UnexplainedFault}
    assert vm.memory.slots[1][0] == 0x55


def test_only_faults_of_its_range(vm, guest):
    """Others are for the next handler, and for the caller; so are all once the route is removed."""
    vcpu, file = guest(READ)
    spoil(vm.memory.slots[1], "none", file)
    with vm.on_fault(DATA + PAGE, PAGE, lambda vcpu, fault: fault.repair()):
        assert isinstance(vcpu.run(timeout=10), kvmexit.UnexplainedFault)
    with vm.on_fault(DATA, PAGE, lambda vcpu, fault: STOP):
        assert isinstance(vcpu.run(timeout=10), kvmexit.UnexplainedFault)
    route = vm.on_fault(DATA, PAGE, lambda vcpu, fault: fault.repair())
    route.remove()
    assert isinstance(vcpu.run(timeout=10), kvmexit.UnexplainedFault)
    with vm.on_fault(DATA, PAGE, lambda vcpu, fault: fault.repair()):
        assert vcpu.run(timeout=10).data == b"\7"


def test_a_repair_that_does_not_repair(vm, guest):
    """Comes again, and ends in a FaultLoopError; the vCPU is none the worse."""
    vcpu, file = guest(READ)
    vcpu.fault_limit = 20
    spoil(vm.memory.slots[1], "none", file)
    with vm.on_fault(handler=lambda vcpu, fault: fault.protect(0)), pytest.raises(kvmexit.FaultLoopError):
        vcpu.run(timeout=10)
    with vm.on_fault(handler=lambda vcpu, fault: fault.repair()):
        assert vcpu.run(timeout=10).data == b"\7"


def test_a_page_on_the_wrong_side_is_converted():
    """By the exit's own word, or the caller's; a bare fault says none."""
    with ScriptedVM(attributes=RecordedAttributes()) as vm:
        vm.memory.add(DATA, 4 * PAGE, guest_memfd=True, discard=False)
        causes = []

        @vm.on_fault(DATA, 4 * PAGE)
        def handler(vcpu, fault):
            causes.append((fault.cause, fault.gva))
            fault.repair()

        vcpu = vm.create_vcpu(0, [memory_fault(DATA + PAGE, PAGE, private=True), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert (causes, vm.memory.ranges()[1]) == ([(Cause.WRONG_SIDE, None)], (DATA + PAGE, PAGE, True))


def test_a_closed_guest_memfd_is_replaced():
    """The slot is a new one, with a guest_memfd of its own."""
    with ScriptedVM(attributes=RecordedAttributes()) as vm:
        slot = vm.memory.add(DATA, 4 * PAGE, guest_memfd=True)
        vm.memory.convert(DATA, PAGE, private=True)
        slot.close_guest_memfd()
        vm.on_fault(handler=lambda vcpu, fault: fault.repair())
        vcpu = vm.create_vcpu(0, [memory_fault(DATA, PAGE, private=True), hlt()])
        assert isinstance(vcpu.run(), kvmexit.Hlt)
        assert [new.guest_memfd is not None for new in vm.memory.slots] == [True]
        assert vm.memory.slots[0] is not slot


def test_what_is_no_fault_of_a_slot_is_left_alone():
    """MMIO where no slot is, and writes to a read-only one."""
    with ScriptedVM() as vm:
        vm.memory.add(DATA, PAGE, readonly=True)
        vm.on_fault(handler=lambda vcpu, fault: 1 / 0)
        vcpu = vm.create_vcpu(0, [mmio_read(DATA - PAGE, 4), mmio_write(DATA, b"x")])
        exit = vcpu.run()
        assert (exit.gpa, exit.is_write) == (DATA - PAGE, False)
        exit.data = b"1234"
        assert vcpu.run().is_write


def test_bad_handlers_and_ranges(scripted):
    with pytest.raises(ValueError, match="give gpa and size, or neither"):
        scripted.on_fault(1)
    with pytest.raises(ValueError, match="empty"):
        scripted.on_fault(0, 0, print)
    with pytest.raises(TypeError, match="taking \\(vcpu, fault\\)"):
        scripted.on_fault(handler=5)


def test_a_fault_that_stays_unexplained_can_be_handled_only_without_a_range(scripted, iced):
    """Nothing is there to repair, and each helper says so; nothing found is nothing to repair."""
    scripted.memory.add(0, 1 << 20)
    scripted.memory.write(CODE, b"\xf4")
    seen = []

    @scripted.on_fault()
    def handler(vcpu, fault):
        seen.append((fault.gpa, fault.cause))
        for helper in (fault.map, fault.protect, lambda: fault.extend(0), fault.rebind):
            with pytest.raises(kvmexit.Error, match="there is no"):
                helper()
        with pytest.raises(kvmexit.Error, match="needs an address"):
            fault.inject("#MC")
        with pytest.raises(ValueError, match="give private="):
            fault.convert()
        fault.repair()

    scripted.on_fault(0, 1 << 20, lambda vcpu, fault: 1 / 0)
    vcpu = scripted.create_vcpu(0, [failure(14), hlt()])
    kvmexit.x86.long_mode(vcpu, CODE)
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert seen == [(None, Cause.NOTHING_FOUND)]


# ---- telling the guest ----

# pop rax; out 0x83, eax; mov rax, cr2; out 0x84, eax; mov [rsp], r15; iretq: with an error code, and without
TELL = {True: bytes.fromhex("58 e7 83 0f 20 d0 e7 84 4c 89 3c 24 48 cf"),
        False: bytes.fromhex("31 c0 e7 83 e7 84 4c 89 3c 24 48 cf")}  # fmt: skip


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("truncated_file", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernel(vm, example):
    """kernel(vector, coded): -> a vCPU that faults on a file that has no page, and whose kernel tells of the vector."""
    files = []

    def kernel(vector, coded):
        vm.memory.add(0, 1 << 20)
        vcpu = example.kernel_and_user(vm)
        vm.memory.write(0x1900, TELL[coded])
        gate = (0x1900).to_bytes(2, "little") + bytes.fromhex("28 00 00 8e") + bytes(10)
        vm.memory.write(example.IDT + 16 * vector, gate)
        files.append(os.memfd_create("empty"))
        os.ftruncate(files[0], 16 * PAGE)
        vm.memory.add(example.FILE, 16 * PAGE, fd=files[0])
        os.ftruncate(files[0], 0)
        vcpu.regs.rcx = 1
        return vcpu

    yield kernel
    for file in files:
        os.close(file)


@pytest.mark.parametrize(("what", "vector", "given", "code"), [
    ("#GP", 13, {"error_code": 0x18}, 0x18), (13, 13, {}, 0), ("#AC", 17, {}, 0), ("#PF", 14, {}, 5), ("#UD", 6, {}, None)])
def test_the_guests_handler_gets_the_exception(vm, kernel, example, iced, what, vector, given, code):
    """With its error code, and a page fault with its address; then the guest goes on."""
    vcpu = kernel(vector, code is not None)
    vm.on_fault(handler=lambda vcpu, fault: fault.inject(what, **given))
    told = vcpu.run(timeout=20)
    assert (told.port, told.data) == (0x83, (code or 0).to_bytes(4, "little"))
    address = vcpu.run(timeout=20)
    assert address.port == 0x84
    if vector == 14:
        assert int.from_bytes(address.data, "little") == example.FILE
    assert vcpu.run(timeout=20).port == 0x81


@pytest.mark.parametrize(("code", "level", "says"), [(READ, 3, 5), (WRITE, 3, 7), (READ, 0, 1), (WRITE, 0, 3)])
def test_a_page_fault_says_what_was_wanted_and_by_whom(scripted, iced, code, level, says):
    scripted.memory.add(0, 1 << 16)[CODE : CODE + len(code)] = code
    spoil(scripted.memory.add(DATA, PAGE), "none", None)
    vcpu = scripted.create_vcpu(0, [failure(14, rip=CODE)])
    vcpu.sregs.cr0, vcpu.sregs.cs.db, vcpu.sregs.ss.db = 1, 1, 1  # protected mode, no paging
    vcpu.regs.rbx, vcpu.sregs.ss.dpl = DATA, level
    told = []

    @scripted.on_fault()
    def handler(vcpu, fault):
        fault.inject("#PF")
        told.append((vcpu.sregs.cr2, vcpu.events.exception.nr, vcpu.events.exception.error_code))
        return STOP

    vcpu.run()
    assert told == [(DATA, 14, says)]


@pytest.mark.parametrize("way", ["repair", "inject"])
def test_a_guest_survives_that_its_file_is_truncated(kvm, iced, way):
    """The example: by a longer file, and by its own handler of machine checks."""
    done = subprocess.run([sys.executable, EXAMPLE, way], capture_output=True, text=True, timeout=100, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["the guest finished: 45, of 45 that were left"], done.stderr
    lost = [f"the guest's handler: lost {0x10_0000 + page * PAGE:#x}" for page in range(9, 16)]
    assert lines[:-1] == (lost if way == "inject" else [])


def test_machine_checks_that_would_be_triple_faults_are_refused(vm, kernel, example):
    """So is one that KVM would drop. Nothing has changed, and what can be injected still is."""
    vcpu = kernel(13, True)
    assert isinstance(vcpu.run(timeout=20), kvmexit.UnexplainedFault)
    vcpu.sregs.cr4 &= ~example.CR4_MCE
    with pytest.raises(kvmexit.Error, match=r"CR4\.MCE is clear"):
        faults.inject(vcpu, "#MC", address=example.FILE)
    vcpu.sregs.cr4 |= example.CR4_MCE
    with pytest.raises(ValueError, match="there is no bank 10: .* has 10"):
        faults.inject(vcpu, "#MC", address=example.FILE, bank=10)
    set_msr(vcpu, 0x400 + 4 * 2, 0)  # MC2_CTL
    with pytest.raises(kvmexit.Error, match="switched machine checks off in bank 2"):
        faults.inject(vcpu, "#MC", address=example.FILE, bank=2)
    set_msr(vcpu, 0x17A, 4)  # MCG_STATUS.MCIP
    with pytest.raises(kvmexit.Error, match="MCIP"):
        faults.inject(vcpu, "#MC", address=example.FILE)
    faults.inject(vcpu, "#GP")
    with pytest.raises(kvmexit.Error, match="exception 13 is on its way"):
        faults.inject(vcpu, "#PF", address=0)
    with pytest.raises(kvmexit.Error, match="was delivering"):
        faults.skip(vcpu, 2)
    assert vcpu.run(timeout=20).port == 0x83


def set_msr(vcpu, index, value):
    entry = bytearray((1).to_bytes(8, "little") + index.to_bytes(8, "little") + value.to_bytes(8, "little"))
    assert vcpu.ioctl(0x4008AE89, entry) == 1  # KVM_SET_MSRS


@pytest.mark.parametrize(("what", "given", "why"), [
    ("#XX", {}, "no exception"), (2, {}, "vcpu.nmi"), (32, {}, "no exception"), (-1, {}, "no exception"), (None, {}, "no exception"),
    ("#PF", {}, "needs address"), ("#MC", {}, "needs address"), ("#GP", {"address": 5}, "has no address"),
    ("#UD", {"error_code": 0}, "no error code"), ("#GP", {"error_code": 1 << 32}, "no error code"),
    ("#PF", {"address": 1 << 64}, "64 bits")])
def test_what_is_no_exception(scripted, what, given, why):
    vcpu = scripted.create_vcpu(0, [hlt()])
    with pytest.raises(ValueError, match=why):
        faults.inject(vcpu, what, **given)
    assert isinstance(vcpu.run(), kvmexit.Hlt)


# ---- skipping ----


@pytest.mark.parametrize("size", [2, None])
def test_an_instruction_is_passed_over(vm, guest, size):
    """Its size given, or found; it may lie across two pages."""
    vcpu, file = guest(b"")
    vm.memory.write(2 * PAGE - 1, READ)
    vcpu.regs.rip, vcpu.regs.rax = 2 * PAGE - 1, 0x33
    spoil(vm.memory.slots[1], "none", file)
    vm.on(kvmexit.UnexplainedFault, lambda vcpu, exit: faults.skip(vcpu, size))
    assert vcpu.run(timeout=10).data == b"\x33"


def test_what_cannot_be_skipped(scripted, iced):
    """Sizes that no instruction has; bytes that are none, or cannot be read."""
    scripted.memory.add(0, 1 << 20)
    vcpu = scripted.create_vcpu(0, [hlt()])
    kvmexit.x86.long_mode(vcpu, CODE)
    for size in (0, 16, -1):
        with pytest.raises(ValueError, match="no instruction has"):
            faults.skip(vcpu, size)
    scripted.memory.write(CODE, b"\x06" * 15)  # push es: not in 64-bit mode
    with pytest.raises(kvmexit.Error, match="is no instruction that could be skipped"):
        faults.skip(vcpu)
    vcpu.regs.rip = 1 << 30
    with pytest.raises(kvmexit.Error, match="cannot be read"):
        faults.skip(vcpu)
    vcpu.regs.rip = CODE
    scripted.memory.write(CODE, b"\x90")
    faults.skip(vcpu)
    assert vcpu.regs.rip == CODE + 1
    assert isinstance(vcpu.run(), kvmexit.Hlt)
