"""The VM: capabilities, vCPUs, modes, registers on real hardware; adoption; refusals; lifetime."""

import contextlib
import gc
import mmap
import os
import struct
import subprocess
import sys
import threading

import pytest
from guests import CODE, OUT_FOREVER, SPIN, load
from processes import in_thread, leaks, python
from test_memory import READ_AND_OUT

import kvmexit
from kvmexit import AdoptedSlot, KvmError, VMType

PAGE = 4096


# ---- modes ----


def test_real_mode_starts_where_it_should(vm):
    """CS has the upper bits, IP the lower 16, of an entry above 64 KiB."""
    ram = vm.memory.add(0, 1 << 20)
    ram[0x23450:0x23453] = b"\xe6\x80\xf4"  # out 0x80, al; hlt
    vcpu = vm.create_vcpu()
    kvmexit.x86.real_mode(vcpu, 0x23450)
    vcpu.regs.rax = 0x41
    assert vcpu.run(timeout=10).data == b"A"
    assert (vcpu.sregs.cs.base, vcpu.sregs.cr0 & 1) == (0x20000, 0)
    assert isinstance(vcpu.run(timeout=10), kvmexit.Hlt)


def test_protected_mode_is_32_bit_and_flat(vm):
    """A 32-bit address above 1 MiB is reached; 64-bit instructions are not there."""
    # mov al, [0x200000]; out 0x80, al; inc eax (0x40: a REX prefix in 64-bit code); out 0x80, al
    vcpu = load(vm, bytes.fromhex("a0 00 00 20 00  e6 80  40  e6 80"), mode=kvmexit.x86.protected_mode, stack=0x8000)
    vm.memory.add(0x200000, PAGE)[0] = 0x42
    assert vcpu.run(timeout=10).data == b"\x42"
    assert vcpu.run(timeout=10).data == b"\x43"
    assert vcpu.regs.rsp == 0x8000


@pytest.mark.parametrize("cpl", [0, 3])
def test_long_mode_at_both_privilege_levels(vm, cpl):
    """64-bit code, ports included, addresses up to 4 GiB, a stack; and SSE, where no emulator stands in for CPL 0."""
    # push rax; mov ebx, 0xfffff000; mov [rbx], rsp; mov dx, 0x3f8; out dx, al
    code = bytes.fromhex("50  bb 00 f0 ff ff  48 89 23  66 ba f8 03  ee")
    sse = bytes.fromhex("66 48 0f 6e c0")  # movq xmm0, rax
    vcpu = load(vm, sse + code if cpl == 3 else code, cpl=cpl, stack=0x9000)
    top = vm.memory.add(0xFFFFF000, PAGE)
    vcpu.regs.rax = 0x1122334455667788
    exit = vcpu.run(timeout=10)
    assert (exit.port, exit.data) == (0x3F8, b"\x88")
    assert struct.unpack("<Q", top[0:8]) == (0x8FF8,)
    assert vm.memory.read(0x8FF8, 8) == struct.pack("<Q", 0x1122334455667788)
    assert vcpu.sregs.cs.dpl == cpl


def test_long_mode_tables_touch_no_other_memory(vm):
    """Six pages at the end of the lowest writable slot, or where told."""
    rom = vm.memory.add(0, 1 << 20, readonly=True)
    ram = vm.memory.add(1 << 20, 1 << 20)
    other = vm.memory.add(2 << 20, 1 << 20)
    vcpu = vm.create_vcpu()
    kvmexit.x86.long_mode(vcpu, CODE)
    assert vcpu.sregs.cr3 == (2 << 20) - kvmexit.x86.PAGE_TABLE_BYTES
    assert not any(rom)
    assert not any(ram[: -kvmexit.x86.PAGE_TABLE_BYTES])
    assert not any(other)
    kvmexit.x86.long_mode(vcpu, CODE, tables=2 << 20)
    assert vcpu.sregs.cr3 == 2 << 20


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: kvmexit.x86.real_mode(v, 1 << 20), "beyond real mode"),
        (lambda v: kvmexit.x86.protected_mode(v, 1 << 32), "not below 0x100000000"),
        (lambda v: kvmexit.x86.long_mode(v, 1 << 32), "not below 0x100000000"),
        (lambda v: kvmexit.x86.long_mode(v, 0, cpl=1), "neither 0 nor 3"),
        (lambda v: kvmexit.x86.long_mode(v, 0, tables=8), "multiple of the page size"),
        (lambda v: kvmexit.x86.long_mode(v, 0), "no writable slot has"),
    ],
)
def test_modes_refuse_what_they_cannot_do(scripted, call, says):
    """With the value in the message."""
    with pytest.raises(ValueError, match=says):
        call(scripted.create_vcpu())


# ---- registers and exits of a real vCPU ----


@pytest.mark.parametrize("sync", [1, 7, 0], ids=["regs", "all", "none"])
def test_registers_are_read_and_written_however_kvm_hands_them_over(vm, sync):
    """Synchronised with every exit, or by ioctl: the guest sees what was written, and the views what it did."""
    # loop: out 0x80, al; inc rcx; jmp loop
    vcpu = load(vm, bytes.fromhex("e6 80  48 ff c1  eb f9"))
    vcpu.sync = sync
    vcpu.regs.rcx = 40
    for n in range(3):
        exit = vcpu.run(timeout=10)
        assert (exit.port, vcpu.regs.rcx) == (0x80, 40 + n)
    vcpu.regs.rcx = 100
    vcpu.regs.rax = 0x5A
    exit = vcpu.run(timeout=10)
    assert (exit.data, vcpu.regs.rcx, vcpu.sregs.cs.l) == (b"\x5a", 101, 1)


def test_a_register_written_while_a_read_is_pending_keeps_both(vm):
    """The read's answer lands in AL, the written RCX stays, RIP goes on behind the instruction."""
    # in al, 0x80; mov [0x3000], al; mov [0x3008], rcx; out 0x80, al
    vcpu = load(vm, bytes.fromhex("e4 80  88 04 25 00 30 00 00  48 89 0c 25 08 30 00 00  e6 80"))
    exit = vcpu.run(timeout=10)
    vcpu.regs.rcx = 0x77
    assert vcpu.regs.rcx == 0x77
    exit.data = 0x42
    assert vcpu.run(timeout=10).is_write
    assert vm.memory.read(0x3000, 1) == b"\x42"
    assert vm.memory.read(0x3008, 8) == struct.pack("<Q", 0x77)


def test_a_jump_ordered_while_a_write_is_pending_is_made(vm):
    """RIP written at an OUT exit takes effect after the OUT has been completed."""
    vcpu = load(vm, bytes.fromhex("b0 01 e6 80  b0 02 e6 80"))  # mov al, 1; out 0x80, al; mov al, 2; out 0x80, al
    assert vcpu.run(timeout=10).data == b"\x01"
    vcpu.regs.rip = CODE
    assert vcpu.run(timeout=10).data == b"\x01"
    assert vcpu.run(timeout=10).data == b"\x02"


def test_a_state_setting_ioctl_is_seen_by_the_views(vm):
    """vcpu.ioctl() goes straight to KVM; what a view shows next is fetched anew."""
    vcpu = load(vm, SPIN)
    vcpu.run(timeout=0.001)
    registers = bytearray(144)
    vcpu.ioctl(0x8090AE81, registers)  # KVM_GET_REGS
    struct.pack_into("<Q", registers, 3 * 8, 0x1234)  # rdx
    vcpu.ioctl(0x4090AE82, registers)  # KVM_SET_REGS
    assert vcpu.regs.rdx == 0x1234


def test_a_written_register_survives_complete_and_an_ioctl(vm):
    """It is KVM's only from the next entry on; until then nothing fetches over it."""
    vcpu = load(vm, bytes.fromhex("e6 80"))  # out 0x80, al
    vcpu.regs.rax = 0x35
    assert vcpu.complete() is None
    vcpu.ioctl(0x8004AE98, bytearray(4))  # KVM_GET_MP_STATE
    assert vcpu.regs.rax == 0x35
    assert vcpu.run(timeout=10).data == b"\x35"


def test_registers_of_a_processor_not_started_yet_are_kept(kvm):
    """With an in-kernel interrupt controller vCPU 1 waits for its start-up, and KVM takes no registers meanwhile."""
    with kvmexit.VM() as vm:
        vm.create_irqchip()
        vm.create_vcpu(0)
        waiting = vm.create_vcpu(1)
        waiting.regs.rbx = 0x55
        assert waiting.run(timeout=0.01).cause == "timeout"
        assert waiting.regs.rbx == 0x55


def test_cr8_can_be_written_through_sregs(vm):
    """KVM takes kvm_run.cr8 after all other registers."""
    vcpu = load(vm, bytes.fromhex("44 0f 20 c0  e6 80"), cpl=0)  # mov rax, cr8; out 0x80, al
    vcpu.sregs.cr8 = 5
    assert vcpu.run(timeout=10).data == b"\x05"


def test_descriptors_serve_their_own_class_only(scripted):
    """A field of one exit is not written into another's payload, a register not into another's view."""
    vcpu = scripted.create_vcpu(0, [kvmexit.testing.pio_in(0x80)])
    io = vcpu.run()
    for use in (lambda: vars(kvmexit.Dcr)["data"].__set__(io, 1), lambda: vars(kvmexit.Dcr)["data"].__get__(io, None),
                lambda: vars(kvmexit.Sregs)["interrupt_bitmap"].__set__(vcpu.events, 1),
                lambda: vars(kvmexit.Sregs)["cs"].__get__(vcpu.events, None)):
        with pytest.raises(TypeError, match="not of"):
            use()


def test_registers_of_a_running_vcpu_are_refused(vm):
    """From another thread, while it runs; the guest is none the worse."""
    vcpu = load(vm, SPIN)
    thread = in_thread(vcpu.run)
    while not vcpu.running:
        pass
    for touch in (lambda: vcpu.regs.rax, lambda: setattr(vcpu.regs, "rax", 1), lambda: vcpu.sregs.cr0, vcpu.run, vcpu.complete):
        with pytest.raises(kvmexit.VcpuBusyError):
            touch()
    vcpu.kick()
    thread.join(10)
    assert vcpu.regs.rip == CODE


def test_string_io_is_one_exit_with_the_whole_buffer(vm):
    """rep outsb and rep insb of eight bytes, both ways."""
    # mov esi, 0x3000; mov ecx, 8; mov dx, 0x80; rep outsb; mov edi, 0x4000; mov ecx, 8; rep insb; out 0x81, al
    code = bytes.fromhex("be 00 30 00 00  b9 08 00 00 00  66 ba 80 00  f3 6e  bf 00 40 00 00  b9 08 00 00 00  f3 6c  e6 81")
    vcpu = load(vm, code)
    vm.memory.write(0x3000, b"outgoing")
    sent, asked = [], []

    @vm.on_pio(0x80)
    def port(vcpu, io):
        if io.is_write:
            sent.append(io.data)
            return None
        asked.append(io.count)
        return b"incoming"[: io.count * io.size] if io.count > 1 else b"incoming"[len(asked) - 1 : len(asked)]

    assert vcpu.run(timeout=10).port == 0x81
    assert b"".join(sent) == b"outgoing"
    assert sum(asked) == 8
    assert vm.memory.read(0x4000, 8) == b"incoming"


def test_an_access_across_pages_comes_in_fragments(vm):
    """An eight-byte MMIO read over a page boundary: two exits, one value."""
    # mov rax, [0x200ffc]; mov [0x3000], rax; out 0x80, al
    vcpu = load(vm, bytes.fromhex("48 8b 04 25 fc 0f 20 00  48 89 04 25 00 30 00 00  e6 80"))
    seen = []

    @vm.on_mmio(0x200000, 2 * PAGE)
    def device(vcpu, mmio):
        seen.append((mmio.gpa, mmio.size))
        return bytes(range(mmio.size)) if mmio.gpa < 0x201000 else bytes(range(0x80, 0x80 + mmio.size))

    assert vcpu.run(timeout=10).port == 0x80
    assert seen == [(0x200FFC, 4), (0x201000, 4)]
    assert vm.memory.read(0x3000, 8) == bytes([0, 1, 2, 3, 0x80, 0x81, 0x82, 0x83])


def test_complete_returns_the_second_fragment(vm):
    """Draining the first half of a page-crossing read brings the second, which still has to be answered."""
    vcpu = load(vm, bytes.fromhex("48 8b 04 25 fc 0f 20 00  48 89 04 25 00 30 00 00  e6 80"))
    first = vcpu.run(timeout=10)
    assert vcpu.complete() is first
    first.data = b"\x11" * 4
    second = vcpu.complete()
    assert (second.gpa, vcpu.pending) == (0x201000, second)
    second.data = b"\x22" * 4
    assert vcpu.complete() is None
    assert (vcpu.pending, vcpu.regs.rax) == (None, 0x2222222211111111)
    assert vcpu.run(timeout=10).port == 0x80


def test_msr_exits_reach_the_handler(vm):
    """An MSR that KVM does not know: read and written by the handler; error=1 is #GP."""
    # mov ecx, 0xdead; rdmsr; add eax, 1; wrmsr; out 0x80, al
    vcpu = load(vm, bytes.fromhex("b9 ad de 00 00  0f 32  83 c0 01  0f 30  e6 80"), cpl=0)
    written = []

    @vm.on_msr(0xDEAD)
    def msr(vcpu, access):
        if isinstance(access, kvmexit.Wrmsr):
            written.append((access.index, access.data))
            return None
        return 0x1_0000_0041

    assert vcpu.run(timeout=10).data == b"\x42"
    assert written == [(0xDEAD, 0x1_0000_0042)]


def test_a_bare_fault_has_no_address_and_goes_on_once_repaired(vm):
    """A truncated file behind an ordinary slot."""
    vcpu = load(vm, READ_AND_OUT)
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGE)
    vm.memory.add(0x200000, PAGE, fd=fd)
    os.ftruncate(fd, 0)
    fault = vcpu.run(timeout=10)
    assert (type(fault).__name__, fault.reason, fault.errno, fault.rip) == ("UnexplainedFault", None, 14, CODE)
    assert isinstance(vcpu.run(timeout=10), kvmexit.UnexplainedFault)
    os.pwrite(fd, b"\x21", 0)
    os.ftruncate(fd, PAGE)
    assert vcpu.run(timeout=10).data == b"\x21"
    os.close(fd)


def test_a_fault_that_is_never_repaired_ends_in_an_error(vm):
    """Not in a spin; and with less patience where fault_limit says so."""
    vcpu = load(vm, READ_AND_OUT)
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGE)
    vm.memory.add(0x200000, PAGE, fd=fd)
    os.ftruncate(fd, 0)
    seen = []
    vm.on(kvmexit.UnexplainedFault, lambda vcpu, fault: seen.append(fault.rip))
    vcpu.fault_limit = 10
    with pytest.raises(kvmexit.FaultLoopError) as caught:
        vcpu.run(timeout=10)
    assert (seen, caught.value.fault.rip) == ([CODE] * 10, CODE)
    os.close(fd)


def test_an_interrupt_window_opens_and_takes_an_interrupt(vm):
    """request_irq_window() brings one exit; sti makes the window."""
    vcpu = load(vm, bytes.fromhex("fb 90 eb fe"), mode=kvmexit.x86.real_mode)  # sti; nop; jmp $
    # vector 0x20: out 0x80, al; iret
    vm.memory.write(0x80, struct.pack("<HH", 0x3000, 0))
    vm.memory.write(0x3000, bytes.fromhex("e6 80 cf"))
    vcpu.regs.rsp = 0x8000
    vcpu.request_irq_window()
    assert isinstance(vcpu.run(timeout=10), kvmexit.IrqWindowOpen)
    vcpu.interrupt(0x20)
    assert vcpu.run(timeout=10).port == 0x80
    assert vcpu.run(timeout=0.01).cause == "timeout"  # asked for once


def test_cr8_is_the_vcpus(vm):
    """Written before the entry, read after it."""
    vcpu = load(vm, bytes.fromhex("44 0f 20 c0  e6 80"), cpl=0)  # mov rax, cr8; out 0x80, al
    vcpu.cr8 = 5
    assert vcpu.run(timeout=10).data == b"\x05"
    assert vcpu.cr8 == 5


# ---- capabilities ----


def test_capabilities_are_kvms_numbers(vm):
    """check() is KVM_CHECK_EXTENSION, enable() KVM_ENABLE_CAP, errors name the call."""
    assert vm.check(136) > 0  # IMMEDIATE_EXIT
    assert vm.check(99999) == 0
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP: Invalid argument"):
        vm.enable(99999)
    with pytest.raises(ValueError, match="four arguments"):
        vm.enable(1, 1, 2, 3, 4, 5)


def test_a_hypercall_that_kvm_keeps_to_itself_is_refused(vm):
    """KVM forwards MAP_GPA_RANGE (12) at most."""
    with pytest.raises(ValueError, match="KVM does not forward hypercall 5"):
        vm.on_hypercall(5, lambda vcpu, call: 0)


def test_a_hypercall_is_answered_in_rax(vm):
    """MAP_GPA_RANGE (12) with its arguments; what the handler returns is the guest's RAX."""
    with open("/proc/cpuinfo") as cpuinfo:
        vmcall = "0f 01 d9" if "AuthenticAMD" in cpuinfo.read() else "0f 01 c1"
    # mov eax, 12; mov ebx, 0x3000; mov ecx, 2; mov edx, 0x10; vm(m)call; out 0x80, eax
    code = f"b8 0c 00 00 00  bb 00 30 00 00  b9 02 00 00 00  ba 10 00 00 00  {vmcall}  e7 80"
    vcpu = load(vm, bytes.fromhex(code), cpl=0)
    seen = []

    @vm.on_hypercall(12)
    def map_gpa_range(vcpu, call):
        seen.append((call.nr, call.args[:3], call.flags & 1))
        return 2**64 - 22

    exit = vcpu.run(timeout=0.5)
    if isinstance(exit, kvmexit.Interrupted):
        pytest.skip("a guest's hypercall does not exit on this machine")
    assert exit.data == struct.pack("<i", -22)
    assert seen == [(12, (0x3000, 2, 0x10), 1)]


def test_a_raw_ioctl_checks_its_buffer(vm):
    """Too short, or read-only where KVM writes."""
    with pytest.raises(ValueError, match="takes 24 bytes, the buffer has 4"):
        vm.ioctl(0x8018AE01, bytearray(4))
    with pytest.raises(ValueError, match="read-only"):
        vm.ioctl(0x8018AE01, bytes(24))
    with pytest.raises(KvmError):
        vm.ioctl(0xAEFF)
    with pytest.raises(ValueError, match="KVM_RUN is run"):
        load(vm, SPIN).ioctl(0xAE80)


# ---- refusals ----


def test_a_device_that_is_none_is_refused(tmp_path):
    """Missing, not KVM, no permission: each with the way out."""
    before = leaks()
    with pytest.raises(KvmError, match="load the kvm_intel or kvm_amd module"):
        kvmexit.VM(device=tmp_path / "kvm")
    with pytest.raises(KvmError, match="is no KVM device"):
        kvmexit.VM(device="/dev/null")
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm to be refused")
    assert leaks() == before


def test_no_permission_says_what_to_do(tmp_path):
    """EACCES: the group that owns the device."""
    device = tmp_path / "kvm"
    device.touch(mode=0)
    code = "import os, sys, kvmexit\nos.setuid(65534)\ntry: kvmexit.VM(device=sys.argv[1])\nexcept kvmexit.KvmError as e: print(e)"
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    os.chmod(tmp_path, 0o755)
    for parent in list(tmp_path.parents)[:-2]:
        os.chmod(parent, 0o755)
    done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert "Permission denied" in done.stdout, done
    assert "add the user to the group that owns the device" in done.stdout


def test_a_kernel_without_immediate_exit_is_refused(kvm):
    """By the version that brought it, and its descriptor is closed again."""

    class Old(kvmexit.VM):
        def check(self, cap):
            return 0 if cap == 136 else super().check(cap)

    before = os.listdir("/proc/self/fd")
    with pytest.raises(kvmexit.Error, match=r"KVM_CAP_IMMEDIATE_EXIT \(Linux 4\.11\)"):
        Old()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("platform", "machine"), [("darwin", "x86_64"), ("linux", "aarch64")],
)
def test_other_machines_are_told_apart(monkeypatch, platform, machine):
    """And pointed to what works there."""
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(kvmexit.Error, match=f"on x86-64 Linux, this is {machine} {platform}: .*ScriptedVM"):
        kvmexit.VM()


def test_signals_do_not_keep_a_vm_from_being_created(kvm):
    """KVM_CREATE_VM is EINTR then; what a handler raises comes out, and nothing is left."""
    done = python("""
import os, signal, time, kvmexit
from guests import stress
def handle(number, frame):
    if raising:
        raise InterruptedError("by the handler")
raising = False
signal.signal(signal.SIGALRM, handle)
signal.siginterrupt(signal.SIGALRM, False)
began = time.monotonic()
kvmexit.VM().close()
often = max(0.001, 5 * (time.monotonic() - began))  # where a VM takes longer than this, no attempt would ever succeed
signal.setitimer(signal.ITIMER_REAL, often, often)
for _ in range(stress(500)):
    kvmexit.VM().close()
signal.setitimer(signal.ITIMER_REAL, 0)
before = len(os.listdir("/proc/self/fd"))
raising = True
signal.setitimer(signal.ITIMER_REAL, often, often)
try:
    while True:
        kvmexit.VM().close()
except InterruptedError as error:
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert str(error) == "by the handler", error
print("done", len(os.listdir("/proc/self/fd")) - before)
""")
    assert (done.stdout, done.stderr) == ("done 0\n", "")


def test_a_vm_type_the_kernel_lacks_is_an_error_that_leaves_nothing(kvm):
    """Whichever this kernel lacks."""
    with kvmexit.VM() as vm:
        types = vm.check(235)
    missing = [t for t in VMType if not types >> t & 1]
    if not missing:
        pytest.skip("this kernel has every VM type")
    before = leaks()
    with pytest.raises(KvmError, match="KVM_CREATE_VM.*no such VM type"):
        kvmexit.VM(missing[0])
    assert leaks() == before


def test_vcpu_ids_are_checked(vm):
    """Twice the same, negative, beyond the limit; and nothing is left."""
    vcpu = vm.create_vcpu(3)
    before = leaks()
    with pytest.raises(KvmError, match="another"):
        vm.create_vcpu(3)
    with pytest.raises(ValueError, match="negative"):
        vm.create_vcpu(-1)
    with pytest.raises(KvmError, match="beyond"):
        vm.create_vcpu(1 << 30)
    assert leaks() == before
    assert vcpu.id == 3


def test_internal_classes_do_not_crash_when_made_by_hand():
    """Objects without a VM behind them raise; none of them takes the process down."""
    for cls in (kvmexit.Vcpu, kvmexit.Slot, kvmexit.Regs, kvmexit.Memory, kvmexit.Route, kvmexit.VM):
        with contextlib.suppress(TypeError):
            bare = cls.__new__(cls)
            for name in dir(bare):
                if not name.startswith("__"):
                    with contextlib.suppress(Exception):
                        member = getattr(bare, name)
                        member()
            with contextlib.suppress(Exception):
                repr(bare)


# ---- lifetime ----


def test_a_closed_vm_refuses_everything(vm):
    """With an Error, again and again; close() itself may be repeated."""
    vcpu = load(vm, SPIN)
    vm.close()
    vm.close()
    assert vm.closed
    for use in (vcpu.run, vcpu.complete, lambda: vcpu.regs.rip, lambda: setattr(vcpu.regs, "rax", 1), vm.create_vcpu, lambda: vm.memory.add(0, PAGE), lambda: vm.check(1), lambda: vm.fd,
                lambda: vcpu.fd, lambda: vm.on_pio(1, 1, print), lambda: vm.memory.read(0, 1), vcpu.nmi):
        with pytest.raises(kvmexit.Error, match="closed"):
            use()
    vcpu.kick()


def test_closing_a_running_vm_waits_for_its_vcpus(vm):
    """run() comes back with a kick, and a next one is refused."""
    vcpu = load(vm, SPIN)
    results = []

    def runner():
        with contextlib.suppress(kvmexit.Error):
            while True:
                results.append(vcpu.run().cause)

    thread = in_thread(runner)
    while not vcpu.running:
        pass
    vm.close()
    assert not vcpu.running
    thread.join(10)
    assert results == ["kick"]


def test_vcpus_may_be_created_while_the_vm_is_closed(kvm):
    """One or the other comes first; neither stumbles."""
    for _ in range(100):
        vm = kvmexit.VM()
        begun = threading.Event()
        errors = []

        def creator(vm=vm, begun=begun, errors=errors):
            begun.set()
            try:
                for id in range(20):
                    vm.create_vcpu(id)
            except kvmexit.Error:
                pass
            except BaseException as error:
                errors.append(error)

        thread = in_thread(creator)
        begun.wait(10)
        vm.close()
        thread.join(10)
        assert errors == []


def test_a_child_forked_in_a_handler_leaves_the_parents_page_alone(vm):
    """It returns from the handler into run(), which raises there before it stores anything; the parent goes on."""
    vcpu = load(vm, OUT_FOREVER)
    page = mmap.mmap(vcpu.fd, PAGE)
    children = []

    @vm.on_pio(0x80)
    def forks(vcpu, io):
        if children:
            return kvmexit.STOP
        children.append(os.fork())
        if children != [0]:
            children.append(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
            children.append(struct.unpack("<I", page[8:12])[0])  # exit_reason, which an entry overwrites
        return None

    try:
        exit = vcpu.run(timeout=10)
    except kvmexit.Error:
        os._exit(7 if children == [0] else 8)
    except BaseException:
        os._exit(9)
    if children == [0]:
        os._exit(10)
    assert children[1:] == [7, kvmexit.ExitReason.IO]
    assert exit.port == 0x80


def test_internal_handles_close_nothing_they_do_not_own():
    """Made wrongly, one must not take descriptor 0 with it."""
    before = os.fstat(0)
    with pytest.raises(TypeError):
        kvmexit._ioctl.Handle()
    gc.collect()
    assert os.fstat(0) == before


def test_what_a_handler_returns_is_not_closed(scripted):
    """Only a coroutine is, which would be reported as never awaited otherwise."""
    import socket

    one, other = socket.socketpair()
    with one, other:
        scripted.on_pio(0x80, 1, lambda vcpu, io: one)
        vcpu = scripted.create_vcpu(0, [kvmexit.testing.pio_in(0x80)])
        with pytest.raises(TypeError):
            vcpu.run()
        assert one.fileno() >= 0


def test_close_from_a_handler_is_refused(vm):
    """The vCPU under it is still running."""
    vcpu = load(vm, OUT_FOREVER)
    vm.on_pio(0x80, 1, lambda vcpu, io: vm.close())
    with pytest.raises(kvmexit.Error, match=r"close\(\) from a handler"):
        vcpu.run(timeout=10)
    assert not vm.closed


def test_everything_is_released_with_the_last_reference(kvm):
    """Without close(): descriptors and mappings go when the objects do."""
    before = leaks()
    for _ in range(3):
        vm = kvmexit.VM()
        vcpu = load(vm, OUT_FOREVER)
        vm.on_pio(0x80, 1, lambda vcpu, io: kvmexit.STOP)
        vcpu.run(timeout=10)
        del vm, vcpu
    assert leaks() == before


def test_a_vcpu_and_its_exits_keep_what_they_need(kvm):
    """An exit outlives its vCPU, a vCPU its VM's last other reference."""
    vm = kvmexit.VM()
    vcpu = load(vm, OUT_FOREVER)
    del vm
    gc.collect()
    exit = vcpu.run(timeout=10)
    del vcpu
    gc.collect()
    assert (exit.port, exit.data) == (0x80, b"\0")


def test_objects_raise_in_a_forked_child(vm):
    """And the parent's vCPU is not touched by what the child tries."""
    vcpu = load(vm, SPIN)
    exit = vcpu.run(timeout=0.001)
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (vcpu.kick, vcpu.run, vcpu.complete, lambda: vcpu.regs.rax, vm.create_vcpu, lambda: vm.memory.add(0, PAGE),
                    lambda: vcpu.pending, lambda: vm.check(1)):
            try:
                use()
            except kvmexit.Error:
                refused += 1
        repr(exit), repr(vcpu), vm.close()
        with kvmexit.VM() as own:
            refused += load(own, SPIN).run(timeout=0.01).cause == "timeout"
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert vcpu.run(timeout=0.01).cause == "timeout"
    assert vm.check(136) > 0


@pytest.mark.parametrize("daemon", [True, False])
def test_interpreter_shutdown_with_a_vcpu_running(kvm, daemon):
    """A daemon thread's guest is dropped with the process; for any other the interpreter waits, and a kick ends it."""
    done = python(f"""
import threading, time
import kvmexit
from guests import load, SPIN
vm = kvmexit.VM()
vcpu = load(vm, SPIN)
thread = threading.Thread(target=vcpu.run, daemon={daemon})
thread.start()
while not vcpu.running:
    pass
if not {daemon}:
    threading.Timer(0.2, vcpu.kick).start()
print("end of main")
""", timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end of main\n", "")


def test_shutdown_with_a_daemon_thread_in_handlers(kvm):
    """The interpreter goes down while a daemon thread comes back for the GIL all the time."""
    done = python("""
import threading, kvmexit
from guests import load, OUT_FOREVER
vm = kvmexit.VM()
vcpu = load(vm, OUT_FOREVER)
vm.on_pio(0x80, 1, lambda vcpu, io: None)
threading.Thread(target=vcpu.run, daemon=True).start()
while not vcpu.running:
    pass
""", timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="own-GIL sub-interpreters came with Python 3.12")
def test_own_gil_subinterpreters_are_refused():
    """Until tested: an ImportError, not a crash."""
    module = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    done = python(f"""
import {module} as interpreters
i = interpreters.create()
result = None
try:
    result = interpreters.run_string(i, "import kvmexit")
except Exception as error:
    result = error
print("does not support loading in subinterpreters" in str(result) or "ImportError" in str(result))
""")
    assert done.stdout == "True\n", done


# ---- adoption ----


@contextlib.contextmanager
def somebody_elses_vm():
    """A VM, one slot and a vCPU made with raw ioctls, as a VMM would; -> fd, vcpu fd, memory, its address."""
    import ctypes
    import fcntl

    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, 0xAE01, 0)
    ram = mmap.mmap(-1, 1 << 20)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    fcntl.ioctl(vm, 0x4020AE46, struct.pack("<IIQQQ", 0, 0, 0, 1 << 20, hva))
    vcpu = fcntl.ioctl(vm, 0xAE41, 0)
    cpuid = bytearray(8 + 40 * 256)
    struct.pack_into("<I", cpuid, 0, 256)
    fcntl.ioctl(kvm, 0xC008AE05, cpuid)
    fcntl.ioctl(vcpu, 0x4008AE90, cpuid)
    try:
        yield vm, vcpu, ram, hva
    finally:
        for fd in (vcpu, vm, kvm):
            os.close(fd)


def test_an_adopted_vm_runs_and_is_left_as_it_was(kvm):
    """Its slots are known, ours come and go, its descriptors stay open, its page's valid_regs come back."""
    with somebody_elses_vm() as (vm_fd, vcpu_fd, ram, hva):
        ram[CODE : CODE + len(READ_AND_OUT)] = READ_AND_OUT
        page = mmap.mmap(vcpu_fd, 3 * PAGE)
        page[288:296] = struct.pack("<Q", 4)  # kvm_valid_regs
        with kvmexit.VM.adopt(vm_fd, slots=[AdoptedSlot(0, 0, 1 << 20, hva)], free_slots=[7, 5]) as vm:
            vcpu = vm.adopt_vcpu(vcpu_fd)
            assert vm.memory.read(CODE, 2) == READ_AND_OUT[:2]
            with pytest.raises(ValueError, match="overlaps Slot"):
                vm.memory.add(0, PAGE)
            added = vm.memory.add(0x200000, PAGE)
            assert added.number == 5
            added[0] = 0x44
            kvmexit.x86.long_mode(vcpu, CODE, cpl=3)
            assert vcpu.run(timeout=10).data == b"\x44"
            assert vm.create_vcpu(9).id == 9
            vcpu.complete()
            vcpu.regs.rbx = 0x66
            vcpu.kick()
        assert page[1] == 0  # immediate_exit
        assert page[296] & 1  # rbx is the owner's to run with
        assert struct.unpack("<Q", page[288:296]) == (4,)
        os.fstat(vm_fd), os.fstat(vcpu_fd)
        with kvmexit.VM.adopt(vm_fd, slots=[(0, 0, 1 << 20, hva)], free_slots=[5]) as again:
            again.memory.add(0x200000, PAGE)  # our slot had gone


def test_what_is_no_vm_cannot_be_adopted(kvm):
    """A descriptor of something else."""
    before = leaks()
    with open("/dev/null") as null, pytest.raises(KvmError, match="KVM_CHECK_EXTENSION"):
        kvmexit.VM.adopt(null.fileno())
    with open("/dev/kvm") as kvm, pytest.raises(ValueError, match="the KVM device itself"):
        kvmexit.VM.adopt(kvm.fileno())
    assert leaks() == before


def test_two_vms_and_several_vcpus_run_at_once(kvm):
    """Each thread its own vCPU; a kick reaches the one it is for."""
    with kvmexit.VM() as one, kvmexit.VM() as two:
        vcpus = [load(one, SPIN), load(two, SPIN)]
        results = [None, None]

        def runner(n):
            results[n] = vcpus[n].run(timeout=20).cause

        threads = [threading.Thread(target=runner, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        vcpus[1].kick()
        threads[1].join(20)
        assert results == [None, "kick"]
        vcpus[0].kick()
        threads[0].join(20)
        assert results == ["kick", "kick"]
