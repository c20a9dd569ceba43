"""After tools/testing/selftests/kvm/x86_64/sync_regs_test.c: registers that KVM and userspace hand over in kvm_run.

Required: bits that KVM does not know are EINVAL, in either direction; what comes over is what the ioctls say; what is
marked as written takes effect, and what is not marked does not; classes that are not asked for are left as they lie. And
whatever another thread does to the area while KVM reads it, KVM takes a state that holds together or refuses, and the
vCPU can be set right and go on. kvmexit's views keep the marks themselves, so where the original clears or forges them,
the test maps kvm_run, too.
"""

import errno
import mmap
import struct
import threading

import pytest
from guests import load, stress

import kvmexit
from kvmexit import KvmError, native

REGS, SREGS, EVENTS = 1, 2, 4
ALL, INVALID = REGS | SREGS | EVENTS, 0x8000_0000
SYNC_REGS = 74
# In kvm_run
VALID, DIRTY, RBX, CR4, EVENT = 288, 296, 304 + 8, 448 + 248, 760
GET = {REGS: 0x8090AE81, SREGS: 0x8138AE83, EVENTS: 0x8040AE9F}
SET = {REGS: 0x4090AE82, SREGS: 0x4138AE84, EVENTS: 0x4040AEA0}
AREA = {REGS: (304, 144), SREGS: (448, 312), EVENTS: (760, 64)}
PAE, LME = 1 << 5, 1 << 8
SET_MP_STATE, TRANSLATE = 0x4004AE99, 0xC018AE85

# again: in al, dx; add rbx, 1; jmp again
GUEST = bytes.fromhex("ec  48 83 c3 01  eb f9")
PORT = 0x80


@pytest.fixture
def vcpu(vm):
    """About to count its inputs in RBX."""
    if vm.check(SYNC_REGS) & ALL != ALL:
        pytest.skip("this kernel has no KVM_CAP_SYNC_REGS of all three classes")
    assert not vm.check(SYNC_REGS) & INVALID
    made = load(vm, GUEST)
    made.regs.rdx = PORT
    return made


@pytest.fixture
def area(vcpu):
    """kvm_run, as KVM and kvmexit have it."""
    with mmap.mmap(vcpu.fd, mmap.PAGESIZE) as page:
        yield page


def run(vcpu):
    """To the next input, the one before having been given 0."""
    if vcpu.pending:
        vcpu.pending.data = 0
    exit = vcpu.run(timeout=20)
    assert (type(exit), exit.port, exit.is_write) == (kvmexit.Io, PORT, False)


def put(area, offset, value):
    struct.pack_into("<Q", area, offset, value)


def get(area, offset):
    return struct.unpack_from("<Q", area, offset)[0]


def fetched(vcpu, which):
    """-> what KVM says by ioctl."""
    buffer = bytearray(AREA[which][1])
    vcpu.ioctl(GET[which], buffer)
    return bytes(buffer)


def agree(vcpu, area):
    """Whether area and ioctls say the same, of all three classes. (With an exit pending KVM takes its own values.)"""
    return all(area[at : at + size] == fetched(vcpu, which) for which, (at, size) in AREA.items())


@pytest.mark.parametrize("pending", [False, True])
def test_invalid(vcpu, area, pending):
    """read_invalid and set_invalid: alone or with others, KVM_RUN is EINVAL; the guest has not gone on, and does so once the
    bits are gone, with nothing lost of the input that was pending."""
    if pending:
        run(vcpu)
    rip = vcpu.regs.rip
    for field in (VALID, DIRTY):
        before = get(area, field)
        for bits in (INVALID, INVALID | ALL):
            put(area, field, bits)
            with pytest.raises(KvmError) as caught:
                run(vcpu)
            assert (caught.value.call, caught.value.errno) == ("KVM_RUN", errno.EINVAL)
            assert vcpu.regs.rip == rip
            assert bool(vcpu.pending) == pending
        put(area, field, before)
    run(vcpu)
    assert vcpu.regs.rbx == pending


def test_the_view_refuses_invalid_bits(vcpu):
    """Before KVM sees them, and nothing is changed by it."""
    vcpu.sync = ALL
    with pytest.raises(ValueError, match="0x80000000: this kernel can copy 0x7"):
        vcpu.sync = INVALID
    assert vcpu.sync == ALL
    run(vcpu)


def test_req_and_verify_all_valid(vcpu, area):
    """All three classes are there after an exit, and the views read them."""
    vcpu.sync = ALL
    run(vcpu)
    assert get(area, VALID) == ALL
    views = vcpu.regs.rip, vcpu.regs.rdx, vcpu.sregs.cr3, vcpu.events.flags
    assert agree(vcpu, area)
    assert views == (vcpu.regs.rip, PORT, vcpu.sregs.cr3, vcpu.events.flags)


@pytest.mark.parametrize("sync", [0, REGS, ALL])
def test_set_and_verify_various(vcpu, area, sync):
    """What the views are given arrives in the guest, by whichever way it goes there: RBX, which it counts on, and the APIC's
    base, which it leaves alone."""
    vcpu.sync = sync
    run(vcpu)
    vcpu.regs.rbx = 0xBAD_1DEA
    vcpu.sregs.apic_base = 1 << 11
    run(vcpu)
    assert (vcpu.regs.rbx, vcpu.sregs.apic_base) == (0xBAD_1DEA + 1, 1 << 11)
    assert struct.unpack_from("<Q", fetched(vcpu, REGS), 8)[0] == 0xBAD_1DEA + 1
    assert sync != ALL or agree(vcpu, area)
    run(vcpu)
    assert vcpu.regs.rbx == 0xBAD_1DEA + 2


def test_clear_kvm_dirty_regs_bits(vcpu, area):
    """What is not marked is not taken, and overwritten with what the guest has."""
    vcpu.sync = ALL
    put(area, RBX, 0xDEAD_BEEF)
    run(vcpu)
    assert get(area, RBX) == vcpu.regs.rbx == 0


def test_clear_kvm_valid_and_dirty_regs(vcpu, area):
    """Neither asked for nor marked: the area stays as it lies, and the guest has what the ioctl gave it."""
    vcpu.sync = ALL
    run(vcpu)
    vcpu.sync = 0
    put(area, RBX, 0xAAAA)
    regs = bytearray(fetched(vcpu, REGS))
    struct.pack_into("<Q", regs, 8, 0xBAC0)
    vcpu.ioctl(SET[REGS], regs)
    run(vcpu)
    assert get(area, RBX) == 0xAAAA
    assert vcpu.regs.rbx == 0xBAC0 + 1


def test_clear_kvm_valid_regs_bits(vcpu, area):
    """Marked, but not asked for: the guest takes it, and the area stays as it lies."""
    vcpu.sync = ALL
    run(vcpu)
    vcpu.sync = 0
    put(area, RBX, 0xBBBB)
    put(area, DIRTY, ALL)
    run(vcpu)
    assert (get(area, RBX), get(area, DIRTY)) == (0xBBBB, 0)
    assert vcpu.regs.rbx == 0xBBBB + 1


@pytest.mark.parametrize(
    ("marked", "at", "value"), [
        (SREGS, CR4, 0),  # long mode without PAE
        (EVENTS, EVENT, 1 | 255 << 8),  # injected: a vector that is no exception's
        (EVENTS, EVENT, 1 | 2 << 8),  # nor is the NMI's
    ])  # fmt: skip
def test_a_state_that_does_not_hold_together(vcpu, area, marked, at, value):
    """What the races below are about, without a race: EINVAL, and the guest has not gone on."""
    vcpu.sync = ALL
    run(vcpu)
    vcpu.pending.data = 0
    assert vcpu.complete() is None
    state = area[:]
    put(area, at, value)
    put(area, DIRTY, marked)
    with pytest.raises(KvmError) as caught:
        vcpu.run(timeout=20)
    assert (caught.value.call, caught.value.errno) == ("KVM_RUN", errno.EINVAL)
    start, size = AREA[marked]
    area[start : start + size] = state[start : start + size]
    put(area, DIRTY, 0)
    run(vcpu)
    assert vcpu.regs.rbx == 1


# ---- races: another thread writes to the area all the time ----


def race_cr4(area):
    """CR4.PAE comes and goes, without which there is no long mode."""
    cr4 = get(area, CR4)
    yield
    while True:
        put(area, DIRTY, SREGS)
        put(area, CR4, cr4)
        yield
        put(area, CR4, cr4 & ~PAE)
        yield


def race_exc(area):
    """A pending exception whose vector turns into one that there is not. (injected, nr, has_error_code, pending at EVENT)"""
    yield
    while True:
        put(area, DIRTY, EVENTS)
        struct.pack_into("<I", area, EVENT + 20, 0)
        area[EVENT + 1], area[EVENT + 3] = 6, 1
        area[EVENT + 1] = 255
        yield


def race_inj_pen(area):
    """An exception that is injected and pending at once."""
    area[EVENT + 1] = 6
    yield
    while True:
        put(area, DIRTY, EVENTS)
        struct.pack_into("<I", area, EVENT + 20, 0)
        area[EVENT], area[EVENT + 3] = 1, 1
        yield


@pytest.mark.parametrize("racer", [race_cr4, race_exc, race_inj_pen])
def test_race(vm, vcpu, area, racer):
    """run() returns an exit or raises EINVAL, each time; and with its state restored the guest counts on."""
    vcpu.sync = SREGS
    run(vcpu)
    assert vcpu.sregs.cr4 & PAE
    assert vcpu.sregs.efer & LME
    vcpu.pending.data = 0
    assert vcpu.complete() is None
    good = {which: fetched(vcpu, which) for which in (SREGS, REGS, EVENTS)}
    vcpu.sync = 0

    def restore():
        vcpu.ioctl(SET_MP_STATE, struct.pack("<I", 0))
        for which, state in good.items():
            vcpu.ioctl(SET[which], state)

    vm.on_pio(PORT, 1, native.Ignore())  # so that the guest comes and goes without Python, which the racer has
    over = threading.Event()

    def race():
        for _ in racer(area):
            if over.is_set():
                return

    thread = threading.Thread(target=race, daemon=True)
    thread.start()
    try:
        for _ in range(stress(100)):
            try:
                exit = vcpu.run(timeout=0.01)
            except KvmError as error:
                if (error.call, error.errno) != ("KVM_RUN", errno.EINVAL):
                    raise
                thread.join(0.001)  # the racer's turn
            else:
                if not isinstance(exit, kvmexit.Interrupted):
                    restore()
            vcpu.ioctl(TRANSLATE, bytearray(24))  # walks the page tables of what state there is
    finally:
        over.set()
        thread.join()
    put(area, DIRTY, 0)
    restore()
    before = vcpu.stats.exits
    assert vcpu.run(timeout=0.5).cause == "timeout"
    assert vcpu.stats.exits > before
    assert vcpu.regs.rbx > struct.unpack_from("<Q", good[REGS], 8)[0]
