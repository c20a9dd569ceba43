"""`kvmexit doctor`: what this machine's KVM can do, found out by doing it, and what to do about the rest.

Marks: "ok"; "missing" is not there; "fails" is there, or said to be, and does not work. Exit status: 0 where a guest
ran, 1 where none did.

--json prints one object: "kvmexit" (its version), "device" (path), "ran" (whether a guest ran), and "findings", a list
of objects with "group" and "name" (together unique), "ok" (true; null: missing; false: fails), "value" (its type goes
by the name; an exit floor has "p50_us", "p99_us", "max_us", "exits"), and "advice" (a string, empty where all is well).
What could not be tried has no finding: without a VM there are no capabilities, VM types and guests.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import grp
import gzip
import json
import os
import platform
import pwd
import re
import resource
import stat
import struct
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvmexit import x86
from kvmexit._exits import Exit, Hypercall, Interrupted, Io, MemoryFault
from kvmexit._loop import Vcpu, time_entries
from kvmexit._memory import GuestMemfdFlags
from kvmexit._version import __version__
from kvmexit._vm import VM, VMType
from kvmexit.errors import KvmError
from kvmexit.faults import catch_poison
from kvmexit.testing import ScriptedVM

__all__ = ["add_to"]

CODE, REGION, RAM, PAGE, DONE_PORT = 0x1000, 0x1000_0000, 1 << 20, 4096, 0xF4
MARKS = {True: "ok", None: "missing", False: "fails"}
OUT = bytes.fromhex("e6 f4 eb fc")  # again: out DONE_PORT, al; jmp again
READ = bytes.fromhex("48 8b 03") + OUT  # mov rax, [rbx]
HYPERCALL = {"vmcall": bytes.fromhex("0f 01 c1") + OUT, "vmmcall": bytes.fromhex("0f 01 d9") + OUT}
TIMEOUT = 0.5  # seconds, of each guest
TIMED = 5000  # exits

KVM_GET_API_VERSION, KVM_CHECK_EXTENSION, KVM_SET_MEMORY_ATTRIBUTES = 0xAE00, 0xAE03, 0x4020AED2
MEMORY_ATTRIBUTE_PRIVATE, HC_MAP_GPA_RANGE = 1 << 3, 12
SYS_USERFAULTFD, SYS_MEMBARRIER, PRIVATE_EXPEDITED = 323, 324, 1 << 3
MMAP_SHARED = GuestMemfdFlags.MMAP | GuestMemfdFlags.INIT_SHARED


class Capability(NamedTuple):
    """A KVM_CAP_ or VM type: its number, the first Linux that has it on x86, the kernel option, what else it needs."""

    number: int
    since: str = ""
    option: str = ""
    also: str = ""


CAPABILITIES = {
    "NR_VCPUS": Capability(9),
    "NR_MEMSLOTS": Capability(10),
    "COALESCED_MMIO": Capability(15),
    "MCE": Capability(31),
    "IRQFD": Capability(32),
    "IOEVENTFD": Capability(36),
    "MAX_VCPUS": Capability(66),
    "SYNC_REGS": Capability(74, "4.17"),
    "READONLY_MEM": Capability(81, "3.7"),
    "SPLIT_IRQCHIP": Capability(121, "4.4"),
    "MAX_VCPU_ID": Capability(128, "4.8"),
    "IMMEDIATE_EXIT": Capability(136, "4.11"),
    "COALESCED_PIO": Capability(162, "4.20"),
    "X86_USER_SPACE_MSR": Capability(188, "5.10"),
    "X86_MSR_FILTER": Capability(189, "5.10"),
    "DIRTY_LOG_RING": Capability(192, "5.11"),
    "X86_BUS_LOCK_EXIT": Capability(193, "5.12", "", "a processor with bus-lock detection"),
    "EXIT_HYPERCALL": Capability(201, "5.14"),
    "EXIT_ON_EMULATION_FAILURE": Capability(204, "5.14"),
    "X86_NOTIFY_VMEXIT": Capability(219, "6.0", "", "an Intel processor with notify VM exits, passed on in a VM"),
    "DIRTY_LOG_RING_ACQ_REL": Capability(223, "6.1"),
    "USER_MEMORY2": Capability(231, "6.8"),
    "MEMORY_FAULT_INFO": Capability(232, "6.8"),
    "VM_TYPES": Capability(235, "6.8"),
    "PRE_FAULT_MEMORY": Capability(236, "6.11", "", "two-dimensional paging (EPT or NPT)"),
}
_SW_PROTECTED = "CONFIG_KVM_SW_PROTECTED_VM"
MEMORY_CAPABILITIES = {  # which differ by VM type
    "MEMORY_ATTRIBUTES": Capability(233, "6.8", _SW_PROTECTED, "a VM type with private memory, as SW_PROTECTED"),
    "GUEST_MEMFD": Capability(234, "6.8", "", "a VM type with private memory, or Linux 6.18"),
    "GUEST_MEMFD_FLAGS": Capability(244, "6.18"),
}
VM_TYPES = {
    VMType.DEFAULT: Capability(0),
    VMType.SW_PROTECTED: Capability(1, "6.8", _SW_PROTECTED, "two-dimensional paging (EPT or NPT)"),
    VMType.SEV: Capability(2, "6.10", "CONFIG_KVM_AMD_SEV", "an AMD processor with SEV, and kvm_amd.sev=1"),
    VMType.SEV_ES: Capability(3, "6.10", "CONFIG_KVM_AMD_SEV", "an AMD processor with SEV-ES, and kvm_amd.sev_es=1"),
    VMType.SNP: Capability(4, "6.11", "CONFIG_KVM_AMD_SEV", "an AMD processor with SEV-SNP, and kvm_amd.sev_snp=1"),
    VMType.TDX: Capability(5, "6.16", "CONFIG_KVM_INTEL_TDX", "an Intel processor with TDX, and kvm_intel.tdx=1"),
}
VIRTUALISATION = (
    "switch VT-x or AMD-V on in the firmware; in a VM, enable nested virtualisation on its host (kvm_intel.nested=1 or "
    "kvm_amd.nested=1, and a CPU model that passes vmx or svm on)"
)


class Finding(NamedTuple):
    """One line of the report. ok: True; None: missing; False: there, or said to be, and does not work."""

    group: str
    name: str
    ok: bool | None
    value: Any
    advice: str = ""


# ---- the machine ----


def kernel_config() -> tuple[str, dict[str, str]]:
    """Where the running kernel's configuration can be read, and the options that are on; "" where it cannot."""
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")):
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
        except OSError:
            continue
        return str(path), dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))
    return "", {}


def cpuinfo(key: str) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where there is none."""
    found = re.search(rf"^{key}\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else ""


def modules() -> list[str]:
    """KVM's modules, loaded or built in with parameters."""
    return sorted(path.name for path in Path("/sys/module").glob("kvm*"))


def version(text: str) -> tuple[int, ...]:
    """The numbers in front of a kernel's version."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def how_to_have(wanted: Capability) -> str:
    """What to do about a capability or VM type that KVM does not offer: every reason that can be told."""
    release, (path, options) = platform.release(), kernel_config()
    needs = []
    if version(release) < version(wanted.since):
        needs.append(f"Linux {wanted.since} or later (this is {release})")
    if wanted.option and options.get(wanted.option) not in ("y", "m"):
        known = f"off in {path}" if path else "whether this one has it is not known"
        needs.append(f"a kernel with {wanted.option}=y ({known})")
    needs += [wanted.also] if wanted.also else []
    if needs:
        return f"needs {'; '.join(needs)}"
    return f"Linux {release} is new enough, its KVM ({', '.join(modules())}) lacks it: use kvm_intel or kvm_amd"


def host() -> Iterator[Finding]:
    """The machine below KVM."""
    flags = cpuinfo("flags").split()
    hardware = [flag for flag in ("vmx", "svm") if flag in flags]
    yield Finding("host", "kernel", True, f"{platform.system()} {platform.release()} {platform.machine()}")
    path, _ = kernel_config()
    yield Finding("host", "kernel configuration", True if path else None, path or "not readable",
                  "" if path else "needs /proc/config.gz (CONFIG_IKCONFIG_PROC) or /boot/config-*, to say what is off")
    yield Finding("host", "CPU", True, f"{cpuinfo('model name')}, {cpuinfo('vendor_id')}")
    yield Finding("host", "vmx or svm", bool(hardware) or None, hardware, "" if hardware else VIRTUALISATION)
    yield Finding("host", "nested (CPU flag hypervisor)", True, "hypervisor" in flags)
    yield Finding("host", "modules", bool(modules()) or None, modules(),
                  "" if modules() else f"modprobe kvm_intel or kvm_amd; {VIRTUALISATION}")
    yield Finding("host", "Python", True, platform.python_version())
    yield Finding("host", "kvmexit", True, __version__)


def device_node(device: str) -> Iterator[Finding]:
    """The device file: there, a device, permitted, KVM."""
    try:
        status = os.stat(device)
    except OSError as error:
        yield Finding("device", device, None, error.strerror, f"modprobe kvm_intel or kvm_amd; {VIRTUALISATION}; "
                      "in a container, pass the device in (--device /dev/kvm)")
        return
    mode = f"{stat.filemode(status.st_mode)} {name_of_user(status.st_uid)}:{name_of_group(status.st_gid)}"
    if not stat.S_ISCHR(status.st_mode):
        yield Finding("device", device, False, f"{mode}, no character device", "--device takes KVM's device: c 10 232")
        return
    yield Finding("device", device, True, mode)
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        yield Finding("device", "permission", False, error.strerror, how_to_open(status))
        return
    try:
        yield Finding("device", "permission", True, "read and write")
        api = fcntl.ioctl(fd, KVM_GET_API_VERSION, 0)
        yield Finding("device", "KVM_GET_API_VERSION", api == 12, api, "" if api == 12 else "kvmexit needs version 12")
        types = fcntl.ioctl(fd, KVM_CHECK_EXTENSION, CAPABILITIES["VM_TYPES"].number)
        yield Finding("device", "KVM_CAP_VM_TYPES", True if types else None, [t.name for t in VMType if types >> t & 1],
                      "" if types else how_to_have(CAPABILITIES["VM_TYPES"]))
    except OSError as error:
        yield Finding("device", "KVM_GET_API_VERSION", False, error.strerror, f"{device} is no KVM device")
    finally:
        os.close(fd)


def how_to_open(status: os.stat_result) -> str:
    """What to do about a device that may not be opened."""
    group = name_of_group(status.st_gid)
    if status.st_mode & 0o060 == 0o060 and status.st_gid not in (os.getgid(), *os.getgroups()):
        return f"usermod -aG {group} {name_of_user(os.getuid())}, and log in again; or run as root"
    return ('give the device to group kvm (udev: KERNEL=="kvm", GROUP="kvm", MODE="0660") and join it; or run as root; '
            "in a container, pass the device in (--device /dev/kvm)")


def name_of_user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def name_of_group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# ---- VMs and guests ----


def guarded(group: str, probe: Callable[..., Iterable[Finding]], *arguments: Any) -> Iterator[Finding]:
    """What a probe finds; whatever it raises is a finding, too."""
    try:
        yield from probe(*arguments)
    except Exception as error:  # a doctor that dies of the disease tells nothing
        name = " ".join(["probe", probe.__name__, *map(str, arguments[1:])])
        hint = error.hint if isinstance(error, KvmError) else ""
        said = f"{error.call}: {error.strerror}" if isinstance(error, KvmError) else f"{type(error).__name__}: {error}"
        yield Finding(group, name, False, said, hint or "not expected: please report it with this output")


def start(vm: VM, code: bytes, cpl: int) -> Vcpu:
    """A vCPU about to run `code` in long mode, rbx at REGION."""
    ram = vm.memory.add(0, RAM)
    ram[CODE : CODE + len(code)] = code
    vcpu = vm.create_vcpu()
    x86.long_mode(vcpu, CODE, cpl=cpl)
    vcpu.regs.rbx = REGION
    return vcpu


def reached_out(exit: Exit) -> bool:
    return isinstance(exit, Io) and exit.port == DONE_PORT


def capabilities(device: str) -> Iterator[Finding]:
    """What KVM_CHECK_EXTENSION says on a VM."""
    with VM(device=device) as vm:
        yield from check(vm, "capabilities", CAPABILITIES)


def check(vm: VM, group: str, wanted: dict[str, Capability]) -> Iterator[Finding]:
    """KVM_CHECK_EXTENSION of each."""
    for name, capability in wanted.items():
        value = vm.check(capability.number)
        advice = "" if value else how_to_have(capability)
        yield Finding(group, f"KVM_CAP_{name}", True if value else None, value, advice)


def vm_type(device: str, kind: VMType) -> Iterator[Finding]:
    """Whether VMs of a type can be created, and what their memory can do."""
    group = f"VM type {kind.name}"
    try:
        vm = VM(kind, device=device)
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
        yield Finding(group, "KVM_CREATE_VM", None, error.strerror, how_to_have(VM_TYPES[kind]))
        return
    with vm:
        yield Finding(group, "KVM_CREATE_VM", True, "created")
        yield from check(vm, group, MEMORY_CAPABILITIES)
        attributes, gmem = MEMORY_CAPABILITIES["MEMORY_ATTRIBUTES"], MEMORY_CAPABILITIES["GUEST_MEMFD"]
        bound, refusal = bindable(vm)
        yield Finding(
            group, "guest_memfd bound with", bool(bound) or (False if vm.check(gmem.number) else None),
            [flags.name for flags in bound], "" if bound else refusal if vm.check(gmem.number) else how_to_have(gmem))
        can_be_private = vm.check(attributes.number) & MEMORY_ATTRIBUTE_PRIVATE != 0
        private = can_be_private and any(not flags & GuestMemfdFlags.INIT_SHARED for flags in bound)
        yield Finding(group, "private memory", private or None, private, "" if private else how_to_have(attributes))
        if kind <= VMType.SW_PROTECTED:  # guests of the others have to be encrypted first
            yield memory_fault(vm, group, can_be_private, MMAP_SHARED in bound)


def bindable(vm: VM) -> tuple[list[GuestMemfdFlags], str]:
    """The flags with which a guest_memfd could be made and bound to a memslot, and why the last other could not."""
    bound, refusal = [], ""
    for flags in (GuestMemfdFlags.NONE, GuestMemfdFlags.MMAP, GuestMemfdFlags.INIT_SHARED, MMAP_SHARED):
        try:
            vm.memory.remove(vm.memory.add(REGION, PAGE, guest_memfd=True, gmem_flags=flags))
            bound.append(flags)
        except KvmError as error:
            refusal = str(error)
    return bound, refusal


def memory_fault(vm: VM, group: str, can_be_private: bool, gmem_only: bool) -> Finding:
    """Provoke KVM_EXIT_MEMORY_FAULT."""
    name = "KVM_EXIT_MEMORY_FAULT"
    if can_be_private:
        way = "private page without guest_memfd"
        vm.memory.add(REGION, PAGE)
        vm.ioctl(KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", REGION, PAGE, MEMORY_ATTRIBUTE_PRIVATE, 0))
    elif gmem_only:
        way = "guest_memfd closed"
        vm.memory.add(REGION, PAGE, guest_memfd=True, gmem_flags=MMAP_SHARED).close_guest_memfd()
    else:
        return Finding(group, name, None, "nothing to provoke it with", "needs private memory, or Linux 6.18 or later "
                       "(KVM_CAP_GUEST_MEMFD_FLAGS with MMAP and INIT_SHARED); faults come as a bare EFAULT")
    exit = start(vm, READ, 3).run(timeout=TIMEOUT)
    if isinstance(exit, MemoryFault) and exit.gpa == REGION:
        return Finding(group, name, True, f"{way}: flags {exit.flags:#x}")
    advice = "this KVM does not report the fault: use kvm_intel or kvm_amd"
    return Finding(group, name, False, f"{way}: {exit!r}", advice)


def guest(device: str, cpl: int) -> Iterator[Finding]:
    """A guest that does one OUT."""
    with VM(device=device) as vm:
        exit = start(vm, OUT, cpl).run(timeout=TIMEOUT)
        good = reached_out(exit)
        yield Finding(
            "guest", f"OUT at CPL {cpl}", good, "exit reached" if good else repr(exit),
            "" if good else f"the vCPU was created and its guest does not get there; {VIRTUALISATION}")


def hypercall(device: str) -> Iterator[Finding]:
    """Whether KVM_HC_MAP_GPA_RANGE leaves KVM: some say so, and execute the instruction again and again."""
    name = "KVM_EXIT_HYPERCALL"
    instruction = "vmmcall" if cpuinfo("vendor_id") in ("AuthenticAMD", "HygonGenuine") else "vmcall"
    wanted = CAPABILITIES["EXIT_HYPERCALL"]
    with VM(device=device) as vm:
        if not vm.check(wanted.number) >> HC_MAP_GPA_RANGE & 1:
            yield Finding("guest", name, None, "not offered", how_to_have(wanted))
            return
        vm.enable(wanted.number, 1 << HC_MAP_GPA_RANGE)
        vcpu = start(vm, HYPERCALL[instruction], 0)
        vcpu.regs.rax, vcpu.regs.rbx, vcpu.regs.rcx, vcpu.regs.rdx = HC_MAP_GPA_RANGE, REGION, 1, 0
        exit = vcpu.run(timeout=TIMEOUT)
        if isinstance(exit, Hypercall):
            yield Finding("guest", name, True, f"{instruction} exits, nr {exit.nr}")
            return
        if isinstance(exit, Interrupted):
            said = f"{instruction} did not come out of KVM_RUN in {TIMEOUT} s"
        else:
            said = f"{instruction} led to {exit!r}, rax {vcpu.regs.rax:#x}"
        yield Finding("guest", name, False, said, "KVM_CAP_EXIT_HYPERCALL promises what this KVM does not do "
                      f"({', '.join(modules())}): run hypercalls with a time-out, or on kvm_intel or kvm_amd")


def exit_floor(device: str, cpl: int) -> Iterator[Finding]:
    """What an exit costs whatever userspace does: a guest of nothing but OUT, re-entered natively."""
    with VM(device=device) as vm:
        times = sorted(time_entries(start(vm, OUT, cpl), TIMED))
    if not times:
        yield Finding("guest", f"exit floor at CPL {cpl}", False, None, "no guest to time: see OUT above")
        return
    p50, p99 = (times[min(len(times) * p // 100, len(times) - 1)] for p in (50, 99))
    microseconds = {"p50_us": p50 / 1000, "p99_us": p99 / 1000, "max_us": times[-1] / 1000, "exits": len(times)}
    yield Finding("guest", f"exit floor at CPL {cpl}", True, microseconds)


# ---- the process ----


def signals() -> Iterator[Finding]:
    """Kicks and time-outs are queued signals."""
    limit = resource.getrlimit(resource.RLIMIT_SIGPENDING)[0]
    yield Finding("process", "RLIMIT_SIGPENDING", limit != 0, limit,
                  "" if limit else "ulimit -i 1024: kicks and time-outs are queued signals")


def reads_itself() -> Iterator[Finding]:
    """memory.read() and write() go through the kernel."""
    with ScriptedVM() as vm:
        vm.memory.add(0, PAGE)
        try:
            vm.memory.read(0, 1)
            yield Finding("process", "process_vm_readv", True, "of itself")
        except KvmError as error:
            yield Finding("process", "process_vm_readv", False, error.strerror,
                          "needs CONFIG_CROSS_MEMORY_ATTACH, and a seccomp profile that lets it through")


def poisoned_memory() -> Iterator[Finding]:
    """Whether memory that the hardware loses can be a guest's fault, and not the end of the process."""
    path, options = kernel_config()
    if path and "CONFIG_MEMORY_FAILURE" not in options:
        yield Finding("process", "poisoned memory", None, "not survived by this kernel",
                      f"a kernel with CONFIG_MEMORY_FAILURE=y (off in {path})")
        return
    catch_poison().close()  # raises where it cannot be
    yield Finding("process", "poisoned memory", True, "can be caught (faults.catch_poison)")


def system_calls() -> Iterator[Finding]:
    """Calls that Python has no function for."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    said = "also for KVM's accesses" if fd >= 0 else os.strerror(ctypes.get_errno())
    yield Finding("process", "userfaultfd", fd >= 0 or None, said, "" if fd >= 0 else
                  "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE; needs CONFIG_USERFAULTFD, and a seccomp "
                  "profile that lets it through")
    if fd >= 0:
        os.close(fd)
    commands = libc.syscall(SYS_MEMBARRIER, 0, 0)
    has = commands >= 0 and commands & PRIVATE_EXPEDITED != 0
    yield Finding("process", "membarrier", has or None, "PRIVATE_EXPEDITED" if has else commands,
                  "" if has else "needs Linux 4.14 or later with CONFIG_MEMBARRIER")


# ---- the command ----


def gather(device: str) -> list[Finding]:
    """Everything there is to say; 3 seconds at most, where every guest times out."""
    findings = [*guarded("host", host), *guarded("device", device_node, device)]
    if any(f.name == "KVM_GET_API_VERSION" and f.ok for f in findings):
        findings += guarded("capabilities", capabilities, device)
        for kind in VMType:
            findings += guarded(f"VM type {kind.name}", vm_type, device, kind)
        for probe in (guest, exit_floor):
            for cpl in (3, 0):
                findings += guarded("guest", probe, device, cpl)
        findings += guarded("guest", hypercall, device)
    for process in (signals, reads_itself, poisoned_memory, system_calls):
        findings += guarded("process", process)
    return findings


def guest_ran(findings: list[Finding]) -> bool:
    """Whether any guest did its OUT."""
    return any(f.ok is True and f.name.startswith("OUT at CPL") for f in findings)


def shown(value: Any) -> str:
    """A value as the table has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.removesuffix('_us')} {v:.1f} us" if key.endswith("_us") else f"{v} {key}"
                         for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)


def table(findings: list[Finding]) -> str:
    """A line a finding, by group, advice below it."""
    lines: list[str] = []
    width = max(len(f.name) for f in findings)
    for i, finding in enumerate(findings):
        if i == 0 or finding.group != findings[i - 1].group:
            lines += ["", finding.group] if i else [finding.group]
        lines.append(f"  {MARKS[finding.ok]:<8}{finding.name:<{width}}  {shown(finding.value)}")
        if finding.advice:
            lines += textwrap.wrap(finding.advice, 110, initial_indent=" " * 10 + "-> ", subsequent_indent=" " * 13)
    return "\n".join(lines)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor", help="what this machine's KVM can do, and what to do about the rest", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--device", default="/dev/kvm", help="the KVM device (/dev/kvm)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine and report; 0 if a guest ran."""
    findings = gather(options.device)
    ran = guest_ran(findings)
    if options.json:
        said = [finding._asdict() for finding in findings]
        print(json.dumps({"kvmexit": __version__, "device": options.device, "ran": ran, "findings": said}, indent=1))
    else:
        print(f"{table(findings)}\n\n{'a guest ran' if ran else 'no guest ran'} on {options.device}")
    return 0 if ran else 1
