"""Private and shared memory on a kernel that has it: real faults, real hypercalls, and what the guest then reads.

A software-protected VM derives from the attribute whether an access is private, so the two cannot disagree there: its
PRIVATE faults come from private pages whose guest_memfd is gone. The guest's code lies in shared memory.
"""

import ctypes
import mmap
import os
import random
import struct
import threading
import time

import pytest
from guests import CODE, stress
from processes import in_thread

import kvmexit
from kvmexit import ConversionError, Hypercall, Io, MemoryFault, Mmio, handlers, native

PAGE = 4096
REGION = 0x1000_0000
MIB = 1 << 20
ENCRYPTED, SIZE_2M = 1 << 4, 1
KVM_SET_MEMORY_ATTRIBUTES, PRIVATE = 0x4020AED2, 8

# ask: vmmcall; out 0x80, al; jmp ask
ASK = bytes.fromhex("0f 01 d9  e6 80  eb f9")
# peek: mov rax, [rdi]; out 0x81, al; jmp peek
PEEK = bytes.fromhex("48 8b 07  e6 81  eb f9")
# poke: mov [rdi], rsi; out 0x82, al; jmp poke
POKE = bytes.fromhex("48 89 37  e6 82  eb f9")
# walk: add [rdi], rdi; add rdi, 0x1000; cmp rdi, rsi; jb walk; out 0x83, al
WALK = bytes.fromhex("48 01 3f  48 81 c7 00 10 00 00  48 39 f7  72 f1  e6 83")
PROGRAMS = {}
at = CODE
for name, code in (("ask", ASK), ("peek", PEEK), ("poke", POKE), ("walk", WALK)):
    PROGRAMS[name] = (at, code)
    at += 0x100


class Guest:
    """A vCPU that does what it is told: ask for a conversion, read a word, write one, walk over pages."""

    def __init__(self, vm, id=0):
        self.vcpu = vm.create_vcpu(id)
        kvmexit.x86.long_mode(self.vcpu, CODE, cpl=0, tables=0x80000 + id * 0x10000)

    def do(self, program, **registers):
        """Run one of PROGRAMS up to its OUT; -> RAX."""
        self.vcpu.regs.rip = PROGRAMS[program][0]
        for name, value in registers.items():
            setattr(self.vcpu.regs, name, value)
        exit = self.vcpu.run(timeout=60)
        assert isinstance(exit, Io), exit
        return self.vcpu.regs.rax

    def ask(self, gpa, pages, attributes):
        """KVM_HC_MAP_GPA_RANGE; -> what it returned, signed."""
        value = self.do("ask", rax=12, rbx=gpa, rcx=pages, rdx=attributes)
        return struct.unpack("<q", struct.pack("<Q", value))[0]

    def peek(self, gpa):
        return self.do("peek", rdi=gpa)

    def poke(self, gpa, value):
        self.do("poke", rdi=gpa, rsi=value)


@pytest.fixture
def vm(private_vm):
    """With the guests' code in shared memory, and the ready-made handlers."""
    ram = private_vm.memory.add(0, MIB)
    for address, code in PROGRAMS.values():
        ram[address : address + len(code)] = code
    private_vm.on_hypercall(12, handlers.map_gpa_range)
    return private_vm


def host_word(vm, gpa):
    return struct.unpack("<Q", vm.memory.read(gpa, 8))[0]


def put_word(vm, gpa, value):
    vm.memory.write(gpa, struct.pack("<Q", value))


# ---- what happens to data ----


def test_private_data_is_gone_after_a_round_trip(vm):
    """private -> shared -> private: zeros on both sides; the neighbours keep theirs."""
    vm.memory.add(REGION, 3 * PAGE, guest_memfd=True)
    guest = Guest(vm)
    vm.memory.convert(REGION, 3 * PAGE, private=True)
    for page in range(3):
        guest.poke(REGION + page * PAGE, 0x1111 * (page + 1))
    assert host_word(vm, REGION + PAGE) == 0  # the shared side
    vm.memory.convert(REGION + PAGE, PAGE, private=False)
    assert guest.peek(REGION + PAGE) == 0
    vm.memory.convert(REGION + PAGE, PAGE, private=True)
    assert [guest.peek(REGION + page * PAGE) for page in range(3)] == [0x1111, 0, 0x3333]


def test_shared_data_is_gone_after_a_round_trip(vm):
    """shared -> private -> shared: the same the other way."""
    slot = vm.memory.add(REGION, 3 * PAGE, guest_memfd=True)
    guest = Guest(vm)
    for page in range(3):
        put_word(vm, REGION + page * PAGE, 0x1111 * (page + 1))
    assert guest.peek(REGION + PAGE) == 0x2222
    vm.memory.convert(REGION + PAGE, PAGE, private=True)
    assert guest.peek(REGION + PAGE) == 0
    vm.memory.convert(REGION + PAGE, PAGE, private=False)
    assert [guest.peek(REGION + page * PAGE) for page in range(3)] == [0x1111, 0, 0x3333]
    assert slot[PAGE : PAGE + 8] == bytes(8)


def test_without_discard_both_sides_keep_their_data(vm):
    """discard=False: KVM's attributes say which side the guest sees, and nothing else changes."""
    vm.memory.add(REGION, PAGE, guest_memfd=True, discard=False)
    guest = Guest(vm)
    put_word(vm, REGION, 0x5AED)
    vm.memory.convert(REGION, PAGE, private=True)
    guest.poke(REGION, 0x9417)
    vm.memory.convert(REGION, PAGE, private=False)
    assert guest.peek(REGION) == 0x5AED
    vm.memory.convert(REGION, PAGE, private=True)
    assert guest.peek(REGION) == 0x9417


@pytest.mark.parametrize("discard", [False, True])
def test_an_adopted_vm_converts_what_its_owner_made(vm, discard):
    """What is private there is not known, then converted through us; data of both sides goes only where the owner said so. The
    owner's descriptor stays open."""
    slot = vm.memory.add(REGION, 4 * PAGE, guest_memfd=True)
    vm.memory.convert(REGION, PAGE, private=True)
    guest = Guest(vm)
    guest.poke(REGION, 0x9417)
    put_word(vm, REGION + PAGE, 0x5AED)
    theirs = kvmexit.AdoptedSlot(slot.number, slot.gpa, slot.size, slot.hva, slot.guest_memfd, 0, discard)
    with kvmexit.VM.adopt(vm.fd, type=kvmexit.VMType.SW_PROTECTED, slots=[theirs]) as ours:
        pages = range(REGION, REGION + 4 * PAGE, PAGE)
        assert ([ours.memory.is_private(gpa) for gpa in pages], ours.memory.ranges()) == ([None] * 4, [])
        ours.memory.convert(REGION, 2 * PAGE, private=True)
        assert [ours.memory.is_private(gpa) for gpa in pages] == [True, True, None, None]
        assert ours.memory.ranges() == [(REGION, 2 * PAGE, True)]
        assert (guest.peek(REGION), guest.peek(REGION + PAGE)) == (0x9417, 0)
        ours.memory.convert(REGION, 4 * PAGE, private=False)
        assert ours.memory.ranges() == [(REGION, 4 * PAGE, False)]
        assert (guest.peek(REGION), guest.peek(REGION + PAGE)) == (0, 0 if discard else 0x5AED)
        ours.memory.convert(REGION, PAGE, private=True)
        assert guest.peek(REGION) == (0 if discard else 0x9417)
    assert slot.guest_memfd is not None
    os.fstat(slot.guest_memfd)
    assert guest.peek(REGION) == (0 if discard else 0x9417)


# ---- faults ----


def test_8192_pages_are_converted_by_a_callback(vm):
    """One real PRIVATE fault a page; the guest goes on where it was, and its memory is right."""
    pages = stress(8192 * 4) if stress(100) < 25 else 8192
    slot = vm.memory.add(REGION, pages * PAGE, guest_memfd=True)
    vm.memory.convert(REGION, pages * PAGE, private=True)
    slot.close_guest_memfd()
    seen = []

    @vm.on_memory_fault(REGION, pages * PAGE)
    def to_shared(vcpu, fault):
        assert (fault.private, fault.size, fault.flags, fault.errno) == (True, PAGE, 8, 14)
        seen.append(fault.gpa)
        vm.memory.convert(fault.gpa, fault.size, private=False)

    guest = Guest(vm)
    guest.do("walk", rdi=REGION, rsi=REGION + pages * PAGE)
    assert seen == list(range(REGION, REGION + pages * PAGE, PAGE))
    assert [host_word(vm, gpa) for gpa in seen] == seen
    assert vm.memory.ranges()[1:] == [(REGION, pages * PAGE, False)]
    assert guest.vcpu.retries["race"] == 0


def flipped():
    """-> a native handler that makes of a PRIVATE fault one that wants shared memory, for the handlers behind it: an access
    that is not what its page is cannot be had in this type of VM."""
    code = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("48 83 77 40 08  b8 01 00 00 00  c3"))  # xor qword [rdi + 64], 8 (exit->flags); mov eax, PASS; ret
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    function.code = code  # is kept as long
    return function


def test_8192_pages_are_converted_natively(vm):
    """Page by page as the callback does, then in windows: the guest's memory is right each time, and takes as many faults as
    the windows say. Prints what a page costs, beside the callback in the same run, and a walk that faults nowhere."""
    pages = stress(8192 * 4) if stress(100) < 25 else 8192
    size, guest = pages * PAGE, Guest(vm)
    as_if_shared = flipped()
    seen = []

    def to_shared(vcpu, fault):
        seen.append(fault.gpa)
        vm.memory.convert(fault.gpa, fault.size, private=False)

    print(f"\n{pages} pages    faults  ioctls  us/page")
    for kind, options, faults in [
        ("no fault", {}, 0), ("callback", None, pages), ("4 KiB", {}, pages), ("64 KiB", {"window": 1 << 16}, -(-pages // 16)),
        ("2 MiB", {"window": 1 << 21}, -(-pages // 512)), ("adaptive", {"adaptive": True}, 9 + -(-pages // 512)),
    ]:  # fmt: skip
        slot = vm.memory.add(REGION, size, guest_memfd=True)
        if faults:
            vm.memory.convert(REGION, size, private=True)
        slot.close_guest_memfd()
        convert = native.Convert(vm, REGION, size, **(options or {}))
        chain = (to_shared,) if options is None else (convert, as_if_shared)
        routes = [vm.on_memory_fault(handler=handler) for handler in chain]
        changes, began = vm.memory.changes, time.perf_counter()
        guest.do("walk", rdi=REGION, rsi=REGION + size)
        us = (time.perf_counter() - began) / pages * 1e6
        ioctls, had = vm.memory.changes - changes, len(seen) if options is None else convert.faults
        print(f"{kind:10} {had:10} {ioctls:7} {us:8.0f}")
        assert had == ioctls == faults
        assert vm.memory.ranges()[1:] == [(REGION, size, False)]
        assert [host_word(vm, gpa) for gpa in range(REGION, REGION + size, PAGE)] == list(range(REGION, REGION + size, PAGE))
        if options is not None:
            assert (convert.conversions, convert.pages, convert.failed) == (faults, pages if faults else 0, 0)
        assert guest.vcpu.retries["race"] == 0
        for route in routes:
            route.remove()
        vm.memory.remove(slot)


def test_private_memory_that_nobody_repairs_is_returned_and_then_a_loop(vm):
    """A closed guest_memfd under private pages: the exit; and converting to what is so already does not help."""
    slot = vm.memory.add(REGION, PAGE, guest_memfd=True)
    vm.memory.convert(REGION, PAGE, private=True)
    slot.close_guest_memfd()
    guest = Guest(vm)
    guest.vcpu.regs.rip, guest.vcpu.regs.rdi = PROGRAMS["peek"][0], REGION
    fault = guest.vcpu.run(timeout=10)
    assert (type(fault), fault.gpa, fault.private) == (MemoryFault, REGION, True)
    guest.vcpu.fault_limit = 50
    with vm.on_memory_fault(handler=handlers.convert), pytest.raises(kvmexit.FaultLoopError):
        guest.vcpu.run(timeout=10)
    vm.memory.convert(REGION, PAGE, private=False)
    with pytest.raises(ConversionError, match="has no guest_memfd"):
        vm.memory.convert(REGION, PAGE, private=True)
    assert guest.peek(REGION) == 0


def test_a_private_access_to_a_slot_without_guest_memfd(vm):
    """The ready-made handler says what is missing; the exit stays pending, and the guest can be saved."""
    vm.memory.add(REGION, PAGE)
    put_word(vm, REGION, 0x77)
    set_attributes(vm, REGION, PAGE, PRIVATE)  # behind the converter's back: it would refuse
    guest = Guest(vm)
    with (
        vm.on_memory_fault(handler=handlers.convert),
        pytest.raises(ConversionError, match=r"Slot\(gpa=0x10000000.*has no guest_memfd: add it with guest_memfd=True"),
    ):
        guest.peek(REGION)
    set_attributes(vm, REGION, PAGE, 0)
    assert isinstance(guest.vcpu.run(), MemoryFault)  # its handler raised, so it is offered again
    assert guest.peek(REGION) == 0x77


def set_attributes(vm, gpa, size, attributes):
    """The raw ioctl, of which the converter knows nothing."""
    vm.ioctl(KVM_SET_MEMORY_ATTRIBUTES, struct.pack("<4Q", gpa, size, attributes, 0))


def test_a_slot_removed_while_private_leaves_a_hole_that_is_shared(vm):
    """Its addresses keep nothing: MMIO at once, and a new slot there starts shared."""
    vm.memory.add(REGION, 4 * PAGE, guest_memfd=True)
    vm.memory.convert(REGION, 4 * PAGE, private=True)
    guest = Guest(vm)
    guest.poke(REGION, 1)
    vm.memory.remove(REGION)
    guest.vcpu.regs.rip, guest.vcpu.regs.rdi = PROGRAMS["peek"][0], REGION
    exit = guest.vcpu.run(timeout=10)
    assert (type(exit), exit.gpa, exit.slot) == (Mmio, REGION, None)
    exit.data = bytes(8)
    assert isinstance(guest.vcpu.run(timeout=10), Io)
    vm.memory.add(REGION, 4 * PAGE, guest_memfd=True)
    put_word(vm, REGION, 0x4321)
    assert guest.peek(REGION) == 0x4321


def test_a_slot_removed_under_a_running_guest(vm):
    """The guest walks private memory while its slot comes and goes: MMIO in between, never anything fatal."""
    guest = Guest(vm)
    kinds = set()
    vm.on_mmio(REGION, 16 * PAGE, lambda vcpu, exit: kinds.add(type(exit)) or (None if exit.is_write else 0))
    vm.on_memory_fault(handler=lambda vcpu, exit: kinds.add(type(exit)))
    vm.on_pio(0x81, 1, lambda vcpu, exit: kinds.add(type(exit)))
    guest.vcpu.regs.rip, guest.vcpu.regs.rdi = PROGRAMS["peek"][0], REGION
    results = []
    thread = in_thread(lambda: results.append(guest.vcpu.run(timeout=60)))
    for _ in range(stress(200)):
        vm.memory.add(REGION, 16 * PAGE, guest_memfd=True)
        vm.memory.convert(REGION, 8 * PAGE, private=True)
        vm.memory.remove(REGION)
    guest.vcpu.kick()
    thread.join(60)
    assert [exit.cause for exit in results] == ["kick"]
    assert Io in kinds


# ---- MAP_GPA_RANGE ----


@pytest.mark.parametrize(
    ("first", "pages", "attributes"),
    [(0, 1, 0), (5, 1, 0), (0, 512, SIZE_2M), (512, 512, SIZE_2M), (1, 511, 0), (3, 1021, SIZE_2M), (511, 2, 0), (0, 1024, 2)],
)  # fmt: skip
def test_the_guest_asks_for_private_memory(vm, first, pages, attributes):
    """4 KiB, 2 MiB, odd ranges, across two slots: RAX 0, exactly these pages private, usable, and back again."""
    vm.memory.add(REGION, 2 * MIB, guest_memfd=True)
    vm.memory.add(REGION + 2 * MIB, 2 * MIB, guest_memfd=True)
    guest = Guest(vm)
    gpa, end = REGION + first * PAGE, REGION + (first + pages) * PAGE
    inside = sorted({gpa, (gpa + end) // 2 // PAGE * PAGE, end - PAGE})
    outside = [page for page in (gpa - PAGE, end) if REGION <= page < REGION + 4 * MIB]
    for page in inside + outside:
        put_word(vm, page, page | 1)
    assert guest.ask(gpa, pages, ENCRYPTED | attributes) == 0
    assert [(r.gpa, r.size) for r in vm.memory.ranges() if r.private] == [(gpa, pages * PAGE)]
    assert [guest.peek(page) for page in inside] == [0] * len(inside)
    assert [guest.peek(page) for page in outside] == [page | 1 for page in outside]
    for page in inside:
        guest.poke(page, page | 2)
    assert [guest.peek(page) for page in inside] == [page | 2 for page in inside]
    assert guest.ask(gpa, pages, attributes) == 0
    assert not [r for r in vm.memory.ranges() if r.private]
    assert [guest.peek(page) for page in inside] == [0] * len(inside)


def test_rubbish_is_refused_to_the_guest(vm):
    """-EINVAL for what cannot be; a hole is shared already; nothing changes, and the guest runs on."""
    vm.memory.add(REGION, 2 * PAGE, guest_memfd=True)
    guest = Guest(vm)
    before = vm.memory.ranges()
    for gpa, pages, attributes in [
        (REGION + 1, 1, ENCRYPTED), (REGION, 0, ENCRYPTED), (REGION, 1, ENCRYPTED | 1 << 5), (REGION, 1, 1 << 63),
        (REGION, 3, ENCRYPTED), (REGION, 1 << 40, ENCRYPTED), (0, 1, ENCRYPTED), ((1 << 64) - PAGE, 2, ENCRYPTED),
    ]:  # fmt: skip
        assert guest.ask(gpa, pages, attributes) == -22, (hex(gpa), pages, attributes)
    assert guest.ask(0xFEE0_0000, 16, 0) == 0
    assert guest.ask(REGION, 1 << 30, 0) == 0
    assert vm.memory.ranges() == before


def test_without_the_ready_made_handler_the_exit_comes_to_the_caller(private_vm):
    """Hypercall with its arguments; ret becomes RAX."""
    ram = private_vm.memory.add(0, MIB)
    ram[CODE : CODE + len(ASK)] = ASK
    with private_vm.on_hypercall(12, lambda vcpu, exit: kvmexit.STOP):
        guest = Guest(private_vm)
        guest.vcpu.regs.rax, guest.vcpu.regs.rbx, guest.vcpu.regs.rcx, guest.vcpu.regs.rdx = 12, REGION, 3, ENCRYPTED | 1
        exit = guest.vcpu.run(timeout=10)
        assert isinstance(exit, Hypercall)
        assert exit.map_gpa_range == (REGION, 3 * PAGE, True, 2 * MIB, 0)
        exit.ret = 0x1234
        assert guest.vcpu.run(timeout=10).port == 0x80
        assert guest.vcpu.regs.rax == 0x1234


# ---- several vCPUs ----


@pytest.mark.parametrize("natively", [False, True], ids=["python", "native"])
def test_two_vcpus_convert_the_same_pages_in_opposite_directions(vm, natively):
    """A minute at KVMEXIT_STRESS=1: no deadlock, pages that stay shared keep their data, and in the end the shadow is what the
    guest sees."""
    pages = 64
    if natively:
        convert = native.Convert(vm)
        vm.on_hypercall(12, convert)
        vm.on_memory_fault(handler=convert)
    vm.memory.add(REGION, 32 * PAGE, guest_memfd=True)
    vm.memory.add(REGION + 32 * PAGE, 33 * PAGE, guest_memfd=True)
    kept = [REGION + 17 * PAGE, REGION + pages * PAGE]  # never asked for
    for gpa in kept:
        put_word(vm, gpa, gpa | 5)
    ends = time.monotonic() + max(stress(60), 1)
    counts, wrong = [0, 0], []
    guests = [Guest(vm, 0), Guest(vm, 1)]

    def ask(which):
        chance = random.Random(which)
        while time.monotonic() < ends and not wrong:
            low, high = (0, 17) if chance.random() < 0.5 else (18, pages)
            first = chance.randrange(low, high)
            count = chance.randrange(1, high - first + 1)
            if guests[which].ask(REGION + first * PAGE, count, ENCRYPTED if which else 0) != 0:
                wrong.append((which, first, count))
            gpa = chance.choice(kept)
            if guests[which].peek(gpa) != gpa | 5:
                wrong.append(hex(gpa))
            counts[which] += 1

    threads = [in_thread(lambda which=which: ask(which)) for which in (0, 1)]
    for thread in threads:
        thread.join(max(stress(60), 1) + 60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert min(counts) > 10
    print(f"conversions asked for: {counts}")
    guests[1].ask(REGION + 3 * PAGE, 7, ENCRYPTED)  # so that both kinds are there in the end
    guests[0].ask(REGION + 40 * PAGE, 5, 0)
    check_shadow(vm, guests[0], range(REGION, REGION + pages * PAGE, PAGE))
    if natively:
        assert convert.hypercalls == sum(counts) + 2


def check_shadow(vm, guest, gpas):
    """The guest sees what the host writes exactly where the shadow says shared."""
    for gpa in gpas:
        put_word(vm, gpa, gpa | 7)
    seen = {gpa: guest.peek(gpa) == gpa | 7 for gpa in gpas}
    assert seen == {gpa: not vm.memory.is_private(gpa) for gpa in gpas}
    assert len(set(seen.values())) == 2


def test_two_vcpus_fault_on_the_same_pages(vm):
    """Both touch every page; each fault is answered once, and the one that came late re-enters."""
    pages = stress(2000)
    slot = vm.memory.add(REGION, pages * PAGE, guest_memfd=True)
    vm.memory.convert(REGION, pages * PAGE, private=True)
    slot.close_guest_memfd()
    answered = threading.Semaphore(0)

    @vm.on_memory_fault()
    def to_shared(vcpu, fault):
        vm.memory.convert(fault.gpa, fault.size, private=False)
        answered.release()

    guests = [Guest(vm, 0), Guest(vm, 1)]
    threads = [in_thread(lambda g=g: g.do("walk", rdi=REGION, rsi=REGION + pages * PAGE)) for g in guests]
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    assert vm.memory.ranges()[1:] == [(REGION, pages * PAGE, False)]
    # add is not atomic in the guest: each of the two ran over every page
    assert {host_word(vm, gpa) // gpa for gpa in range(REGION, REGION + pages * PAGE, PAGE)} <= {1, 2}


def test_conversions_race_with_accesses_routes_kicks_and_pauses(vm):
    """Everything at once: the guest goes on, and the shadow is right in the end."""
    vm.memory.add(REGION, 32 * PAGE, guest_memfd=True)
    guest, prober = Guest(vm, 0), Guest(vm, 1)
    ignored = vm.on_pio(0x81, 1, lambda vcpu, exit: None)
    guest.vcpu.regs.rip, guest.vcpu.regs.rdi = PROGRAMS["peek"][0], REGION
    ends = time.monotonic() + max(stress(10), 2)
    kicks = []

    def run():
        while time.monotonic() < ends:
            kicks.append(guest.vcpu.run(timeout=ends - time.monotonic() + 0.1).cause)

    def convert(seed):
        chance = random.Random(seed)
        while time.monotonic() < ends:
            first = chance.randrange(32)
            vm.memory.convert(REGION + first * PAGE, chance.randrange(1, 33 - first) * PAGE, private=chance.random() < 0.5)

    def disturb():
        while time.monotonic() < ends:
            with vm.on_mmio(0x9000_0000, PAGE, lambda vcpu, exit: None):
                guest.vcpu.kick()
            vm.pause()
            time.sleep(0.001)
            vm.resume()

    threads = [in_thread(work) for work in (run, lambda: convert(1), lambda: convert(2), disturb)]
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert "kick" in kicks
    ignored.remove()
    vm.memory.convert(REGION, 4 * PAGE, private=True)
    vm.memory.convert(REGION + 4 * PAGE, 4 * PAGE, private=False)
    check_shadow(vm, prober, range(REGION, REGION + 32 * PAGE, PAGE))


# ---- failure ----


def test_a_conversion_that_cannot_be_leaves_the_guest_running(vm):
    """Typed errors, nothing changed, and the guest goes on."""
    vm.memory.add(REGION, 2 * PAGE, guest_memfd=True)
    buffer = bytearray(0)
    guest = Guest(vm)
    guest.poke(REGION, 0x11)
    for gpa, size, error in [
        (REGION, 3 * PAGE, ConversionError), (0, PAGE, ConversionError), (REGION + 1, PAGE, ValueError), (REGION, 0, ValueError),
        (REGION, PAGE + 1, ValueError), ((1 << 64) - PAGE, 2 * PAGE, ValueError), (-PAGE, PAGE, ValueError),
    ]:  # fmt: skip
        with pytest.raises(error):
            vm.memory.convert(gpa, size, private=True)
    assert guest.peek(REGION) == 0x11
    assert not [r for r in vm.memory.ranges() if r.private]
    assert not buffer


def test_a_huge_range_is_converted_while_python_runs(vm):
    """Steps without the GIL: another thread counts meanwhile; and the guest's view is right at both ends."""
    size = max(stress(512), 64) * MIB
    vm.memory.add(REGION, size, guest_memfd=True)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.005)

    thread = in_thread(tick)
    began = time.monotonic()
    vm.memory.convert(REGION, size, private=True)
    took = time.monotonic() - began
    done.set()
    thread.join()
    during = [t for t in ticks if began <= t <= began + took]
    assert len(during) >= took / 0.005 / 20
    guest = Guest(vm)
    for gpa in (REGION, REGION + size - PAGE):
        put_word(vm, gpa, 0x99)
        assert guest.peek(gpa) == 0
