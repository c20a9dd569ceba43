"""kvmexit.testing, as users' own tests use it: exits by constructor, delays, several vCPUs, backends that fail."""

import errno
import signal
import threading
import time

import pytest
from processes import in_thread

import kvmexit
from kvmexit import ConversionError, KvmError, handlers, native, testing
from kvmexit.testing import (
    RecordedAttributes,
    ScriptedVM,
    ScriptStep,
    failure,
    hlt,
    memory_fault,
    pio_in,
    pio_out,
    spin,
)

PAGE = 4096
DELAY = 0.05  # seconds

CONSTRUCTED = {
    "debug": (testing.debug(3, 0x1000, 0xFFFF0FF0, 0x400), kvmexit.Debug, {"exception": 3, "pc": 0x1000, "dr6": 0xFFFF0FF0, "dr7": 0x400}),
    "dirty_ring_full": (testing.dirty_ring_full(), kvmexit.DirtyRingFull, {}),
    "fail_entry": (testing.fail_entry(0x80000021, 3), kvmexit.FailEntry, {"hardware_entry_failure_reason": 0x80000021, "cpu": 3}),
    "hlt": (hlt(), kvmexit.Hlt, {}),
    "hypercall": (testing.hypercall(5, 1, 2), kvmexit.Hypercall, {"nr": 5, "args": (1, 2, 0, 0, 0, 0), "flags": 1}),
    "hyperv_hypercall": (testing.hyperv_hypercall(0x5C, 7), kvmexit.Hyperv, {"type": 2, "input": 0x5C, "params": (7, 0)}),
    "internal_error": (testing.internal_error(3, 8, 9), kvmexit.InternalError, {"suberror": 3, "data": (8, 9)}),
    "ioapic_eoi": (testing.ioapic_eoi(0x31), kvmexit.IoapicEoi, {"vector": 0x31}),
    "irq_window_open": (testing.irq_window_open(), kvmexit.IrqWindowOpen, {}),
    "map_gpa_range": (testing.map_gpa_range(0x4000, 0x3000, private=True), kvmexit.Hypercall, {
        "nr": 12, "map_gpa_range": (0x4000, 0x3000, True, PAGE, 0)}),
    "map_gpa_range shared": (testing.map_gpa_range(0x4000, 0x3000, private=False), kvmexit.Hypercall, {
        "map_gpa_range": (0x4000, 0x3000, False, PAGE, 0)}),
    "memory_fault": (memory_fault(0x5000, 0x2000, private=True, errno=133), kvmexit.MemoryFault, {
        "gpa": 0x5000, "size": 0x2000, "private": True, "errno": 133}),
    "mmio_read": (testing.mmio_read(0xFEE0_0000, 4), kvmexit.Mmio, {"gpa": 0xFEE0_0000, "size": 4, "is_write": False, "data": None}),
    "mmio_write": (testing.mmio_write(0xFEE0_0000, b"abc"), kvmexit.Mmio, {"gpa": 0xFEE0_0000, "size": 3, "is_write": True, "data": b"abc"}),
    "pio_in": (pio_in(0x60, 2, 3), kvmexit.Io, {"port": 0x60, "size": 2, "count": 3, "is_write": False, "data": None}),
    "pio_out": (pio_out(0x80, b"abcd", 2), kvmexit.Io, {"port": 0x80, "size": 2, "count": 2, "is_write": True, "data": b"abcd"}),
    "rdmsr": (testing.rdmsr(0x10, 4), kvmexit.Rdmsr, {"index": 0x10, "why": 4}),
    "shutdown": (testing.shutdown(), kvmexit.Shutdown, {}),
    "snp_req_certs": (testing.snp_req_certs(0x7000, 2), kvmexit.SnpReqCerts, {"gpa": 0x7000, "npages": 2}),
    "system_event": (testing.system_event(2, 5), kvmexit.SystemEvent, {"type": 2, "data": (5,)}),
    "tdx": (testing.tdx(0x10002, 0x9000, 64), kvmexit.Tdx, {"nr": 0x10002, "gpa": 0x9000, "size": 64, "data": (0x9000, 64, 0, 0, 0)}),
    "unexplained": (failure(errno.EFAULT, rip=0x1234), kvmexit.UnexplainedFault, {"rip": 0x1234, "errno": errno.EFAULT}),
    "wrmsr": (testing.wrmsr(0x11, 77), kvmexit.Wrmsr, {"index": 0x11, "why": 2, "data": 77}),
    "xen_hypercall": (testing.xen_hypercall(17, 1, 2), kvmexit.Xen, {
        "type": 1, "longmode": 1, "cpl": 0, "input": 17, "params": (1, 2, 0, 0, 0, 0)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_an_exit_by_its_constructor(scripted, name):
    """run() returns it, with what the constructor was given, and nothing else in it."""
    step, kind, fields = CONSTRUCTED[name]
    exit = scripted.create_vcpu(0, [step]).run()
    assert type(exit) is kind
    assert {field: getattr(exit, field) for field in fields} == fields


def test_every_constructor_is_tried():
    """And is in __all__."""
    constructors = {name for name in testing.__all__ if name.islower()} - {"failure", "spin"}
    assert constructors == {name.split(" ")[0] for name in CONSTRUCTED} - {"unexplained"}


def test_too_many_numbers_are_refused():
    """Not cut off."""
    for make, most in [(testing.hypercall, 6), (testing.hyperv_hypercall, 2), (testing.xen_hypercall, 6), (testing.tdx, 5),
                       (testing.system_event, 16), (testing.internal_error, 16)]:  # fmt: skip
        make(1, *range(most))
        with pytest.raises(ValueError, match=f"{most + 1} numbers: KVM has room for {most}"):
            make(1, *range(most + 1))


def test_a_failure_is_raised_and_the_guest_goes_on(scripted):
    """As of KVM_RUN."""
    vcpu = scripted.create_vcpu(0, [failure(errno.EIO), hlt()])
    with pytest.raises(KvmError) as caught:
        vcpu.run()
    assert caught.value.errno == errno.EIO
    assert isinstance(vcpu.run(), kvmexit.Hlt)


# ---- delays ----


def test_a_delay_passes_in_the_guest(scripted):
    """At least so long, of which no handler and no caller see anything; without one it does not."""
    vcpu = scripted.create_vcpu(0, [hlt()._replace(delay=DELAY), hlt()])
    begun = time.monotonic()
    assert isinstance(vcpu.run(), kvmexit.Hlt)
    assert time.monotonic() - begun >= DELAY
    assert scripted.script(vcpu).position == 1


def test_delays_repeat_with_the_script(scripted):
    """Each pass has its own."""
    vcpu = scripted.create_vcpu(0, [hlt()._replace(delay=DELAY / 5)], repeat=5)
    begun = time.monotonic()
    for _ in range(5):
        vcpu.run()
    assert time.monotonic() - begun >= DELAY


def test_a_kick_ends_a_delay_and_the_rest_of_it_comes_after(scripted):
    """Nothing is given out before its time, however often KVM_RUN ends meanwhile."""
    vcpu = scripted.create_vcpu(0, [hlt()._replace(delay=DELAY)])
    begun, causes = time.monotonic(), []
    while True:
        if len(causes) % 2:
            vcpu.kick()
        exit = vcpu.run(timeout=DELAY / 10)
        causes.append(getattr(exit, "cause", None))
        if causes[-1] is None:
            break
    assert time.monotonic() - begun >= DELAY
    assert causes[:2] == ["timeout", "kick"]


def test_a_kick_from_another_thread_ends_a_long_delay(scripted):
    """A delay is no reason to hang."""
    vcpu = scripted.create_vcpu(0, [hlt()._replace(delay=1e6)])
    ends = []
    thread = in_thread(lambda: ends.append(vcpu.run()))
    while not vcpu.running:
        time.sleep(0)
    vcpu.kick()
    thread.join(60)
    assert [end.cause for end in ends] == ["kick"]


def test_a_signal_in_a_delay_is_noticed(scripted):
    """Its handler runs, and its exception is raised, before the delay is over."""

    class Alarm(Exception):
        pass

    def on(number, frame):
        raise Alarm

    vcpu = scripted.create_vcpu(0, [hlt()._replace(delay=1e6)])
    before = signal.signal(signal.SIGALRM, on)

    def run():
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        vcpu.run()

    try:
        with pytest.raises(Alarm):
            run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("delay", [-1, float("nan"), float("inf"), 1e9])
def test_bad_delays(scripted, delay):
    """Are refused when the script is made."""
    with pytest.raises(ValueError, match="a delay of"):
        scripted.create_vcpu(0, [ScriptStep(5, delay=delay)])


# ---- several vCPUs ----


def test_the_order_of_several_vcpus_is_made_of_delays_and_kicks(scripted):
    """One waits in the guest for what the other does."""
    order = []
    first = scripted.create_vcpu(0, [spin(), pio_out(0x80, b"2"), hlt()])
    second = scripted.create_vcpu(1, [pio_out(0x80, b"1")._replace(delay=DELAY / 5), hlt()])

    def on(vcpu, io):
        order.append((vcpu.id, io.data))
        while vcpu is second and scripted.script(first).position == 0:
            first.kick()  # again, where it came before the guest looped
            time.sleep(0.001)

    scripted.on_pio(0x80, 1, on)

    def run_to_the_end(vcpu):
        while not isinstance(vcpu.run(), kvmexit.Hlt):
            pass

    threads = [in_thread(lambda vcpu=vcpu: run_to_the_end(vcpu)) for vcpu in (first, second)]
    for thread in threads:
        thread.join(60)
    assert order == [(1, b"1"), (0, b"2")]


def test_two_vcpus_convert_the_same_pages():
    """A storm without a kernel: what the backend holds is what the shadow says, whoever came first."""
    backend = RecordedAttributes()
    with ScriptedVM(attributes=backend) as vm:
        storm(vm, backend)


def storm(vm, backend):
    vm.memory.add(0, 64 * PAGE, guest_memfd=True)
    convert = native.Convert(vm)
    vm.on_memory_fault(handler=convert)
    to_private, to_shared = ([memory_fault(page * PAGE, private=private) for page in range(64)] for private in (True, False))
    vcpus = [vm.create_vcpu(id, [*steps, hlt()]) for id, steps in enumerate((to_private, to_shared))]
    together = threading.Barrier(2)
    threads = [in_thread(lambda vcpu=vcpu: (together.wait(), vcpu.run())) for vcpu in vcpus]
    for thread in threads:
        thread.join(60)
    assert {page for page in range(0, 64 * PAGE, PAGE) if vm.memory.is_private(page)} == backend.private
    assert len(backend.calls) == convert.conversions


# ---- backends that fail ----


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_conversion_fails_half_way(at):
    """chunk= has it come to the backend page by page: the error says how far it got, and the shadow is the backend."""
    backend = RecordedAttributes({at: errno.ENOMEM}, chunk=PAGE)
    with ScriptedVM(attributes=backend) as vm:
        vm.memory.add(0, 4 * PAGE, guest_memfd=True)
        with pytest.raises(ConversionError) as caught:
            vm.memory.convert(0, 4 * PAGE, private=True)
        assert (caught.value.errno, caught.value.done) == (errno.ENOMEM, (at - 1) * PAGE)
        assert backend.private == set(range(0, (at - 1) * PAGE, PAGE))
        assert [vm.memory.is_private(page * PAGE) for page in range(4)] == [page < at - 1 for page in range(4)]
        vm.memory.convert(0, 4 * PAGE, private=True)  # again: only what is missing
        assert [call[:2] for call in backend.calls[at:]] == [(page * PAGE, PAGE) for page in range(at - 1, 4)]


def test_a_guests_hypercall_fails_half_way():
    """The handler that a user tests: the guest is told, and a retry finishes it."""
    backend = RecordedAttributes({3: errno.ENOMEM}, chunk=PAGE)
    with ScriptedVM(attributes=backend) as vm:
        vm.memory.add(0, 4 * PAGE, guest_memfd=True)
        vm.on_hypercall(12, handlers.map_gpa_range)
        ask = testing.map_gpa_range(0, 4 * PAGE, private=True)
        vcpu = vm.create_vcpu(0, [ask, hlt(), ask, hlt()])
        told = []
        for step in (0, 2):
            assert isinstance(vcpu.run(), kvmexit.Hlt)
            told.append(int.from_bytes(vm.script(vcpu).left(step)[0][56:64], "little", signed=True))
            assert len(backend.private) == (2 if step == 0 else 4)
        assert told[0] < 0
        assert told[1] == 0


@pytest.mark.parametrize("chunk", [0, 1, 4095, 4097, 3 * PAGE, -PAGE, 1 << 63])
def test_bad_chunks(chunk):
    """Are refused."""
    with pytest.raises(ValueError, match="a power of two from 4096 on"):
        RecordedAttributes(chunk=chunk)
