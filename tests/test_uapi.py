"""include/kvmexit/uapi.h against the kernel's own headers: every macro and every member that both define.

Each side is compiled to an object with debug information; layouts are then read from DWARF, values from the symbol
table, so nothing has to run and aarch64 is checked on any machine. "theirs" is the system's <linux/kvm.h>, however old,
and the recent one that the PyPI package ziglang carries for every architecture.
"""

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import kvmexit

elffile = pytest.importorskip("elftools.elf.elffile", reason="pyelftools is missing")

HEADER = Path(kvmexit.__file__).parent / "include" / "kvmexit" / "uapi.h"
SYSTEM_HEADER = Path("/usr/include/linux/kvm.h")
THEIR_INCLUDES = "#include <linux/kvm.h>\n#include <linux/kvm_para.h>\n#include <asm/kvm.h>\n"
OUR_INCLUDES = '#include "uapi.h"\n'

EXIT_REASONS = {
    "KVM_EXIT_UNKNOWN": 0,
    "KVM_EXIT_EXCEPTION": 1,
    "KVM_EXIT_IO": 2,
    "KVM_EXIT_HYPERCALL": 3,
    "KVM_EXIT_DEBUG": 4,
    "KVM_EXIT_HLT": 5,
    "KVM_EXIT_MMIO": 6,
    "KVM_EXIT_IRQ_WINDOW_OPEN": 7,
    "KVM_EXIT_SHUTDOWN": 8,
    "KVM_EXIT_FAIL_ENTRY": 9,
    "KVM_EXIT_INTR": 10,
    "KVM_EXIT_SET_TPR": 11,
    "KVM_EXIT_TPR_ACCESS": 12,
    "KVM_EXIT_S390_SIEIC": 13,
    "KVM_EXIT_S390_RESET": 14,
    "KVM_EXIT_DCR": 15,
    "KVM_EXIT_NMI": 16,
    "KVM_EXIT_INTERNAL_ERROR": 17,
    "KVM_EXIT_OSI": 18,
    "KVM_EXIT_PAPR_HCALL": 19,
    "KVM_EXIT_S390_UCONTROL": 20,
    "KVM_EXIT_WATCHDOG": 21,
    "KVM_EXIT_S390_TSCH": 22,
    "KVM_EXIT_EPR": 23,
    "KVM_EXIT_SYSTEM_EVENT": 24,
    "KVM_EXIT_S390_STSI": 25,
    "KVM_EXIT_IOAPIC_EOI": 26,
    "KVM_EXIT_HYPERV": 27,
    "KVM_EXIT_ARM_NISV": 28,
    "KVM_EXIT_X86_RDMSR": 29,
    "KVM_EXIT_X86_WRMSR": 30,
    "KVM_EXIT_DIRTY_RING_FULL": 31,
    "KVM_EXIT_AP_RESET_HOLD": 32,
    "KVM_EXIT_X86_BUS_LOCK": 33,
    "KVM_EXIT_XEN": 34,
    "KVM_EXIT_RISCV_SBI": 35,
    "KVM_EXIT_RISCV_CSR": 36,
    "KVM_EXIT_NOTIFY": 37,
    "KVM_EXIT_LOONGARCH_IOCSR": 38,
    "KVM_EXIT_MEMORY_FAULT": 39,
    "KVM_EXIT_TDX": 40,
    "KVM_EXIT_ARM_SEA": 41,
    "KVM_EXIT_ARM_LDST64B": 42,
    "KVM_EXIT_SNP_REQ_CERTS": 43,
}


# ---- compilers ----


class Compiler(NamedTuple):
    """A C compiler for one target, with a recent or the system's <linux/kvm.h>."""

    name: str
    command: tuple[str, ...]

    def run(self, *arguments, cwd, check=True):
        """-> the finished process; where `check`, one that failed fails the test with what the compiler said."""
        done = subprocess.run([*self.command, *arguments], cwd=cwd, check=False, capture_output=True, text=True)
        if check and done.returncode != 0:
            pytest.fail(f"{self.name}: {done.stderr}")
        return done


def zig(target):
    return Compiler(f"zig {target}", (sys.executable, "-m", "ziglang", "cc", "-target", target))


GCC = Compiler("gcc", ("gcc",))
ZIG_X86_64 = zig("x86_64-linux-gnu")
ZIG_AARCH64 = zig("aarch64-linux-gnu")
COMPILERS = [GCC, ZIG_X86_64, ZIG_AARCH64]


def need(compiler):
    """Skip where the compiler, or what it is compared with, is missing."""
    if compiler is GCC:
        if shutil.which("gcc") is None:
            pytest.skip("gcc is missing")
        if not SYSTEM_HEADER.exists():
            pytest.skip(f"{SYSTEM_HEADER} is missing")
    elif importlib.util.find_spec("ziglang") is None:
        pytest.skip("the PyPI package ziglang is missing")


# ---- an object file, read back ----


class Place(NamedTuple):
    """Where a member lies in its struct, in bytes; a struct itself is at 0."""

    offset: int
    size: int


class Abi(NamedTuple):
    """What a header says: value by macro, Place by "struct.member" (and "struct.member[0]" for an array's elements)."""

    macros: dict[str, int]
    members: dict[str, Place]


def macro_names(compiler, includes, directory):
    """-> the KVM macros that have a value: without function-like ones, and without ioctls whose argument this target
    lacks (struct kvm_cpuid2 is x86's, KVM_GET_SUPPORTED_CPUID everybody's)."""
    source = directory / "names.c"
    source.write_text(includes)
    text = compiler.run("-E", "-dD", source.name, cwd=directory).stdout
    structs = set(re.findall(r"\bstruct (\w+) \{", text))
    macros = re.findall(r"^#define ((?:KVM|GUEST_MEMFD)_\w+) +(\S.*)", text, re.MULTILINE)
    return {name for name, value in macros if structs.issuperset(re.findall(r"\bstruct (\w+)", value))}


def compile_abi(compiler, includes, names, directory):
    """-> the Abi of what `includes` defines, with the values of these macros."""
    source = directory / "abi.c"
    values = [f"const unsigned long long value_{name} = (unsigned long long)({name});\n" for name in sorted(names)]
    source.write_text(includes + "".join(values))
    compiler.run("-g", "-fno-eliminate-unused-debug-types", "-c", source.name, "-o", "abi.o", cwd=directory)
    with (directory / "abi.o").open("rb") as stream:
        elf = elffile.ELFFile(stream)
        return Abi(values_in(elf), members_in(elf))


def values_in(elf):
    """-> {NAME: value} of the constants value_NAME."""
    found = {}
    for symbol in elf.get_section_by_name(".symtab").iter_symbols():
        if symbol.name.startswith("value_"):
            start = symbol["st_value"]
            data = elf.get_section(symbol["st_shndx"]).data()[start : start + 8]
            found[symbol.name.removeprefix("value_")] = int.from_bytes(data, "little")
    return found


def members_in(elf):
    """-> {"struct.member.member": Place} of every struct kvm_*. Members of unnamed structs and unions count as their
    parent's."""
    found = {}
    for unit in elf.get_dwarf_info().iter_CUs():
        for die in unit.get_top_DIE().iter_children():
            name = name_of(die)
            if name and name.startswith("kvm_") and is_record(die) and "DW_AT_declaration" not in die.attributes:
                found[name] = Place(0, size_of(die))
                found.update(walk(die, 0, name))
    return found


def walk(record, base, prefix):
    for die in record.iter_children():
        if die.tag != "DW_TAG_member":
            continue
        location = die.attributes.get("DW_AT_data_member_location")  # a union's members have none
        offset = base + (location.value if location else 0)
        kind = type_of(die)
        name = name_of(die)
        if name is None:
            yield from walk(kind, offset, prefix)
            continue
        path = f"{prefix}.{name}"
        yield path, Place(offset, size_of(kind))
        if kind.tag == "DW_TAG_array_type":
            kind = type_of(kind)
            path += "[0]"
            yield path, Place(offset, size_of(kind))
        if is_record(kind):
            yield from walk(kind, offset, path)


def is_record(die):
    return die.tag in ("DW_TAG_structure_type", "DW_TAG_union_type")


def name_of(die):
    attribute = die.attributes.get("DW_AT_name")
    return attribute.value.decode() if attribute else None


def type_of(die):
    """The type of a member, an array or a typedef, without typedefs and qualifiers."""
    die = die.get_DIE_from_attribute("DW_AT_type")
    while die.tag in ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type"):
        die = die.get_DIE_from_attribute("DW_AT_type")
    return die


def size_of(die):
    if die.tag == "DW_TAG_array_type":
        bounds = [child for child in die.iter_children() if child.tag == "DW_TAG_subrange_type"]
        return size_of(type_of(die)) * math.prod(length_of(bound) for bound in bounds)
    if die.tag == "DW_TAG_pointer_type":
        return die.cu["address_size"]
    return die.attributes["DW_AT_byte_size"].value


def length_of(bound):
    """Elements of an array; 0 for a flexible one."""
    if "DW_AT_count" in bound.attributes:
        return bound.attributes["DW_AT_count"].value
    if "DW_AT_upper_bound" in bound.attributes:
        return bound.attributes["DW_AT_upper_bound"].value + 1
    return 0


# ---- the comparison ----


class Pair(NamedTuple):
    """Both sides under one compiler."""

    compiler: Compiler
    our_names: set[str]
    their_names: set[str]
    ours: Abi
    theirs: Abi

    @property
    def common_macros(self):
        return self.ours.macros.keys() & self.theirs.macros.keys()

    @property
    def common_members(self):
        return self.ours.members.keys() & self.theirs.members.keys()


def differences(pair):
    """-> a line for each macro and each member that both define, and define differently."""
    where = f"uapi.h against <linux/kvm.h> of {pair.compiler.name}"
    lines = [
        f"{where}: {name} is {pair.ours.macros[name]:#x}, the kernel's is {pair.theirs.macros[name]:#x}"
        for name in sorted(pair.common_macros)
        if pair.ours.macros[name] != pair.theirs.macros[name]
    ]
    lines += [
        f"{where}: {name} is at offset {ours.offset} with {ours.size} bytes, "
        f"the kernel's at offset {theirs.offset} with {theirs.size} bytes"
        for name in sorted(pair.common_members)
        if (ours := pair.ours.members[name]) != (theirs := pair.theirs.members[name])
    ]
    return lines


def make_pair(compiler, directory, header=HEADER, theirs=None):
    """Compile one header against the kernel's. theirs: a Pair of this compiler, whose kernel side is reused."""
    shutil.copy(header, directory / "uapi.h")
    our_names = macro_names(compiler, OUR_INCLUDES, directory)
    their_names = theirs.their_names if theirs else macro_names(compiler, THEIR_INCLUDES, directory)
    common = our_names & their_names
    ours = compile_abi(compiler, OUR_INCLUDES, common, directory)
    kernel = theirs.theirs if theirs else compile_abi(compiler, THEIR_INCLUDES, common, directory)
    return Pair(compiler, our_names, their_names, ours, kernel)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """-> a function: the Pair of a compiler, compiled once."""
    made = {}

    def get(compiler):
        need(compiler)
        if compiler not in made:
            made[compiler] = make_pair(compiler, tmp_path_factory.mktemp("uapi"))
        return made[compiler]

    return get


every_compiler = pytest.mark.parametrize("compiler", COMPILERS, ids=lambda compiler: compiler.name)
recent_headers = pytest.mark.parametrize("compiler", [ZIG_X86_64, ZIG_AARCH64], ids=lambda compiler: compiler.name)


@every_compiler
def test_values_and_layouts_are_the_kernels(pair_of, compiler):
    """No macro and no member differs; ioctl numbers are among the macros, so our encoder agrees with _IOC too."""
    assert differences(pair_of(compiler)) == []


# What the comparison must have covered with recent headers: a little below what it covers now.
LEAST = {ZIG_X86_64: (150, 940), ZIG_AARCH64: (120, 345)}


@recent_headers
def test_the_comparison_covers_enough(pair_of, compiler):
    """A comparison of nothing would pass as well."""
    pair = pair_of(compiler)
    macros, members = LEAST[compiler]
    assert len(pair.common_macros) >= macros
    assert len(pair.common_members) >= members


@recent_headers
def test_every_exit_reason_is_compared(pair_of, compiler):
    """All 44, with the numbers of the table above."""
    pair = pair_of(compiler)
    compared = {name: pair.theirs.macros[name] for name in pair.common_macros if name in EXIT_REASONS}
    assert compared == EXIT_REASONS


# Offsets and sizes out of the ABI document, for members deep in unnamed unions too. None: it depends on the target.
PLACES = {
    "kvm_run": Place(0, 2352),
    "kvm_run.immediate_exit": Place(1, 1),
    "kvm_run.exit_reason": Place(8, 4),
    "kvm_run.io": Place(32, 16),
    "kvm_run.io.data_offset": Place(40, 8),
    "kvm_run.mmio": Place(32, 24),
    "kvm_run.mmio.data": Place(40, 8),
    "kvm_run.mmio.len": Place(48, 4),
    "kvm_run.hypercall": Place(32, 72),
    "kvm_run.hypercall.args[0]": Place(40, 8),
    "kvm_run.hypercall.ret": Place(88, 8),
    "kvm_run.hypercall.flags": Place(96, 8),
    "kvm_run.emulation_failure.insn_bytes": Place(49, 15),
    "kvm_run.hyperv.u.syndbg.pending_page": Place(80, 8),
    "kvm_run.xen.u.hcall.result": Place(56, 8),
    "kvm_run.msr": Place(32, 24),
    "kvm_run.msr.data": Place(48, 8),
    "kvm_run.memory_fault": Place(32, 24),
    "kvm_run.memory_fault.gpa": Place(40, 8),
    "kvm_run.tdx": Place(32, 64),
    "kvm_run.tdx.get_tdvmcall_info.r14": Place(88, 8),
    "kvm_run.snp_req_certs": Place(32, 24),
    "kvm_run.snp_req_certs.ret": Place(48, 8),
    "kvm_run.kvm_valid_regs": Place(288, 8),
    "kvm_run.kvm_dirty_regs": Place(296, 8),
    "kvm_run.s": Place(304, 2048),
    "kvm_run.s.regs": None,
    "kvm_userspace_memory_region2.guest_memfd": Place(40, 4),
    "kvm_ioeventfd.flags": Place(24, 4),
    "kvm_irqfd.resamplefd": Place(12, 4),
    "kvm_coalesced_mmio.data": Place(16, 8),
    "kvm_coalesced_mmio_ring.coalesced_mmio": Place(8, 0),
    "kvm_clear_dirty_log.dirty_bitmap": Place(16, 8),
    "kvm_dirty_gfn.offset": Place(8, 8),
}


@recent_headers
@pytest.mark.parametrize("member", PLACES)
def test_member_is_compared(pair_of, compiler, member):
    """Both sides have it, where the ABI document says."""
    pair = pair_of(compiler)
    assert member in pair.common_members
    assert PLACES[member] in (None, pair.ours.members[member])


def test_every_name_of_ours_is_the_kernels(pair_of):
    """A macro or struct under a kernel's name that the kernel does not have would never be compared: a misspelling."""
    pair = pair_of(ZIG_X86_64)
    assert pair.our_names - pair.their_names == set()
    assert pair.ours.members.keys() - pair.theirs.members.keys() == set()


# ---- does the comparison see what it should? ----


@every_compiler
@pytest.mark.parametrize(
    ("text", "broken", "reported"),
    [
        pytest.param(
            "uint32_t dcrn, data;",
            "uint32_t data, dcrn;",
            {"kvm_run.dcr.dcrn", "kvm_run.dcr.data"},
            id="swapped members",
        ),
        pytest.param(
            "uint64_t trans_exc_code;",
            "uint32_t trans_exc_code, unused;",
            {"kvm_run.s390_ucontrol", "kvm_run.s390_ucontrol.trans_exc_code"},
            id="member too small",
        ),
        pytest.param(
            "uint64_t rip;\n            uint32_t is_write, pad;",
            "uint32_t is_write, pad; uint64_t rip;",
            {"kvm_run.tpr_access.rip", "kvm_run.tpr_access.is_write", "kvm_run.tpr_access.pad"},
            id="moved to the front",
        ),
        pytest.param(
            "uint64_t input, result, params[2];",
            "uint64_t result, input, params[2];",
            # The struct is compared by itself, and again as a member of kvm_run.
            {
                f"{owner}.u.hcall.{name}"
                for owner in ("kvm_hyperv_exit", "kvm_run.hyperv")
                for name in ("input", "result")
            },
            id="in a named struct",
        ),
        pytest.param(
            "uint64_t gprs[32];",
            "uint32_t gprs[64];",
            {"kvm_run.osi.gprs[0]"},
            id="array of smaller elements",
        ),
        pytest.param("#define KVM_EXIT_IO_OUT 1\n", "#define KVM_EXIT_IO_OUT 2\n", {"KVM_EXIT_IO_OUT"}, id="macro"),
        pytest.param("KVMEXIT_IO(0x80)", "KVMEXIT_IO(0x81)", {"KVM_RUN"}, id="ioctl number"),
        pytest.param(
            "KVMEXIT_IOW(0x86, struct kvm_interrupt)",
            "KVMEXIT_IOR(0x86, struct kvm_interrupt)",
            {"KVM_INTERRUPT"},
            id="ioctl direction",
        ),
    ],
)
def test_what_differs_is_reported(pair_of, tmp_path, compiler, text, broken, reported):
    """One mistake in a copy of our header is named, and nothing else is."""
    pair = pair_of(compiler)
    header = tmp_path / "broken.h"
    right = HEADER.read_text()
    assert right.count(text) == 1
    header.write_text(right.replace(text, broken))
    lines = differences(make_pair(compiler, tmp_path, header, theirs=pair))
    assert {re.search(rf"of {re.escape(compiler.name)}: (\S+) is", line)[1] for line in lines} == reported


def test_a_difference_is_described_in_full(pair_of):
    """Header, target, name and both values are in the line."""
    theirs = pair_of(ZIG_X86_64)._replace(
        ours=Abi({"KVM_RUN": 0xAE81}, {"kvm_run.io.port": Place(32, 2)}),
        theirs=Abi({"KVM_RUN": 0xAE80}, {"kvm_run.io.port": Place(34, 2)}),
    )
    assert differences(theirs) == [
        "uapi.h against <linux/kvm.h> of zig x86_64-linux-gnu: KVM_RUN is 0xae81, the kernel's is 0xae80",
        "uapi.h against <linux/kvm.h> of zig x86_64-linux-gnu: kvm_run.io.port is at offset 32 with 2 bytes, "
        "the kernel's at offset 34 with 2 bytes",
    ]


# ---- the header as a header ----

# To an object and no further: zig hands linker options to a bare -fsyntax-only, which -Werror takes for a mistake.
STRICTLY = ("-Wall", "-Wextra", "-Werror", "-c", "-o", "user.o")


@every_compiler
def test_is_strict_c11(tmp_path, compiler):
    """The public header draws no warning in anybody's C."""
    need(compiler)
    source = tmp_path / "user.c"
    source.write_text(f'#include "{HEADER}"\nint main(void) {{ return (int)sizeof(struct kvm_run) - 2352; }}\n')
    done = compiler.run("-std=c11", "-Wpedantic", *STRICTLY, source.name, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@every_compiler
def test_is_cplusplus_17(tmp_path, compiler):
    """As C++ too; not pedantic, which forbids unnamed structs and flexible arrays there."""
    need(compiler)
    source = tmp_path / "user.cpp"
    source.write_text(f'#include "{HEADER}"\nint main() {{ return int(sizeof(kvm_run)) - 2352; }}\n')
    done = compiler.run("-x", "c++", "-std=c++17", *STRICTLY, source.name, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@every_compiler
def test_refuses_to_follow_the_kernels_header(tmp_path, compiler):
    """Both define the same names: the message says which to drop, instead of a screen of redefinitions."""
    need(compiler)
    source = tmp_path / "both.c"
    source.write_text(f'#include <linux/kvm.h>\n#include "{HEADER}"\n')
    done = compiler.run("-c", source.name, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "kvmexit/uapi.h uses the names of <linux/kvm.h>: include one of the two" in done.stderr
