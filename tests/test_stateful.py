"""Hypothesis drives a scripted VM, route by route, slot by slot and exit by exit, against a small model in Python: who takes which
exit, what is private, and what is left for the caller."""

import errno

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is missing")  # tests/sanitize and the lab do without
import hypothesis.strategies as st
from guests import STRESS
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

import kvmexit
from kvmexit import ConversionError, native
from kvmexit.testing import (
    RecordedAttributes,
    ScriptedVM,
    ScriptStep,
    hlt,
    hypercall,
    memory_fault,
    mmio_read,
    mmio_write,
    pio_in,
    pio_out,
)

PAGE = 4096
PAGES = 32  # of guest-physical memory that is played with; MMIO lies beyond
MMIO = PAGES * PAGE
SPAN = 5  # ports, and bytes of MMIO: few, so that ranges are equal, inside one another, and meet

ports = st.integers(0, SPAN - 1)
sizes = st.integers(1, 3)
pages = st.integers(0, PAGES - 1)
kinds = st.sampled_from(["pio", "mmio"])


class Handled:
    """A route and its handler, as the model has it. does: what becomes of an exit that it is offered."""

    def __init__(self, kind, first, count, does, serial):
        self.kind, self.first, self.last, self.does, self.serial = kind, first, first + count - 1, does, serial
        self.calls = 0
        self.counter = native.Counter() if does == "count" else None

    def covers(self, kind, at):
        return self.kind == kind and self.first <= at <= self.last

    def handler(self):
        if self.does == "count":
            return self.counter
        if self.does == "ignore":
            return native.Ignore(0xA5)
        if self.does == "stop natively":
            return native.Stop()
        return self.python

    def python(self, vcpu, exit):
        self.calls += 1
        if self.does == "raise":
            raise LookupError("as told")
        if self.does == "answer":
            return None if exit.is_write else 0x3C
        return {"pass": kvmexit.PASS, "stop": kvmexit.STOP}[self.does]


class Machine(RuleBasedStateMachine):
    """One VM; every exit has a vCPU of its own, whose script is that exit and HLT, so that each is run from its beginning."""

    routes = Bundle("routes")
    slots = Bundle("slots")

    def __init__(self):
        super().__init__()
        self.backend = RecordedAttributes()
        self.vm = ScriptedVM(attributes=self.backend)
        self.serial = self.vcpus = 0
        self.routed = []  # [Handled]
        self.mapped = {}  # page -> (slot, whether it can be private)
        self.private = set()
        self.pending = None  # (vCPU, kind, address, is_write): left for the caller, who has yet to answer

    def teardown(self):
        self.vm.close()
        for slot, _ in self.mapped.values():
            with pytest.raises(kvmexit.Error):
                _ = slot.view

    # ---- routes ----

    @rule(target=routes, several=st.lists(st.tuples(
        kinds, ports, sizes, st.sampled_from(["count", "ignore", "stop natively", "pass", "stop", "answer", "raise"])),
        min_size=3, max_size=8))  # fmt: skip
    def add_routes(self, several):
        return multiple(*[self.add_route(*one) for one in several])

    def add_route(self, kind, first, count, does):
        self.serial += 1
        entry = Handled(kind, first, count, does, self.serial)
        on, base = (self.vm.on_pio, 0) if kind == "pio" else (self.vm.on_mmio, MMIO)
        entry.route = on(base + first, count, entry.handler())
        self.routed.append(entry)
        return entry

    @rule(entry=consumes(routes))
    def remove_route(self, entry):
        entry.route.remove()
        entry.route.remove()
        self.routed.remove(entry)

    def chain(self, kind, at):
        return sorted([r for r in self.routed if r.covers(kind, at)], key=lambda r: (r.last - r.first, -r.serial))

    # ---- exits ----

    def new_vcpu(self, *steps):
        self.vcpus += 1
        return self.vm.create_vcpu(self.vcpus, [*steps, hlt()])

    def expect(self, kind, at, is_write):
        """-> what becomes of an exit: "taken", "caller" or "raise"; and adds up who was called."""
        for entry in self.chain(kind, at):
            if entry.does == "count":
                entry.counted = getattr(entry, "counted", 0) + 1
                continue
            if entry.does in ("pass", "stop", "answer", "raise"):
                entry.called = getattr(entry, "called", 0) + 1
            if entry.does == "pass":
                continue
            return {"ignore": "taken", "answer": "taken", "raise": "raise"}.get(entry.does, "caller")
        return "caller"

    @precondition(lambda self: self.pending is None)
    @rule(several=st.lists(st.tuples(kinds, ports, st.booleans()), min_size=3, max_size=8), kicked=st.booleans(),
          before=st.lists(st.sampled_from([errno.EINTR, errno.EAGAIN, errno.ENOMEM]), max_size=3))  # fmt: skip
    def exits(self, several, kicked, before):
        for kind, at, is_write in several:
            if self.pending is None:
                self.exit(kind, at, is_write, kicked, before)

    def exit(self, kind, at, is_write, kicked, before):
        make = {("pio", True): lambda: pio_out(at, b"A"), ("pio", False): lambda: pio_in(at),
                ("mmio", True): lambda: mmio_write(MMIO + at, b"A"), ("mmio", False): lambda: mmio_read(MMIO + at, 1)}[kind, is_write]  # fmt: skip
        vcpu = self.new_vcpu(*[ScriptStep(errno=number) for number in before], make())
        if kicked:
            vcpu.kick()
            assert vcpu.run().cause == "kick"
        self.run(vcpu, kind, at, is_write)

    def run(self, vcpu, kind, at, is_write):
        """Run to what the model says."""
        what = self.expect(kind, at, is_write)
        if what == "raise":
            with pytest.raises(LookupError, match="as told"):
                vcpu.run()
        else:
            exit = vcpu.run()
            assert isinstance(exit, kvmexit.Hlt) == (what == "taken"), exit
        if what == "taken":
            assert vcpu.pending is None
            return
        assert vcpu.pending.is_write == is_write
        assert (vcpu.pending.port if kind == "pio" else vcpu.pending.gpa - MMIO) == at
        if what == "raise" or not is_write:
            self.pending = vcpu, kind, at, is_write
        else:
            self.goes_on(vcpu)

    def goes_on(self, vcpu):
        assert isinstance(vcpu.run(), kvmexit.Hlt)

    @precondition(lambda self: self.pending is not None)
    @rule()
    def run_again_without_an_answer(self):
        """It is offered again, to the routes there are now; KVM is not entered before."""
        (vcpu, kind, at, is_write), self.pending = self.pending, None
        before = self.vm.script(vcpu).position
        assert before < 5
        self.run(vcpu, kind, at, is_write)

    @precondition(lambda self: self.pending is not None and not self.pending[3])
    @rule(value=st.integers(0, 255))
    def answer(self, value):
        (vcpu, kind, _, _), self.pending = self.pending, None
        vcpu.pending.data = value
        step = self.vm.script(vcpu).position - 1
        self.goes_on(vcpu)
        union, data = self.vm.script(vcpu).left(step)
        assert (data[0] if kind == "pio" else union[8]) == value

    @precondition(lambda self: self.pending is not None)
    @rule()
    def complete_what_owes(self):
        """complete() offers it again as well."""
        (vcpu, kind, at, is_write), self.pending = self.pending, None
        what = self.expect(kind, at, is_write)
        if what == "raise":
            with pytest.raises(LookupError, match="as told"):
                vcpu.complete()
            self.pending = vcpu, kind, at, is_write
            return
        exit = vcpu.complete()
        assert (exit is None) == (what == "taken")
        if what == "caller" and not is_write:
            self.pending = vcpu, kind, at, is_write
        else:
            self.goes_on(vcpu)

    # ---- memory ----

    @rule(target=slots, first=pages, count=st.integers(1, 12), able=st.booleans())
    def add_memory(self, first, count, able):
        count = min(count, PAGES - first)
        if any(page in self.mapped for page in range(first, first + count)):
            with pytest.raises(ValueError, match="overlaps"):
                self.vm.memory.add(first * PAGE, count * PAGE, guest_memfd=able)
            return multiple()
        slot = self.vm.memory.add(first * PAGE, count * PAGE, guest_memfd=able)
        self.mapped.update(dict.fromkeys(range(first, first + count), (slot, able)))
        return slot

    @rule(slot=consumes(slots))
    def remove_memory(self, slot):
        self.vm.memory.remove(slot)
        gone = [page for page, (other, _) in self.mapped.items() if other is slot]
        self.private -= set(gone)
        for page in gone:
            del self.mapped[page]

    def able(self, first, count):
        return all(page in self.private or self.mapped.get(page, (None, False))[1] for page in range(first, first + count))

    def now(self, first, count, private):
        covered = {page for page in range(first, first + count) if page in self.mapped}
        self.private = self.private | covered if private else self.private - covered

    @rule(first=pages, count=st.integers(1, 16), private=st.booleans())
    def convert(self, first, count, private):
        if private and not self.able(first, count):
            with pytest.raises(ConversionError) as caught:
                self.vm.memory.convert(first * PAGE, count * PAGE, private=True)
            done = caught.value.done // PAGE
            assert all(page in self.private for page in range(first, first + done))
            return
        self.vm.memory.convert(first * PAGE, count * PAGE, private=private)
        self.now(first, count, private)

    @rule(first=pages, count=st.integers(1, 16), private=st.booleans(), natively=st.booleans(), asks=st.booleans())
    def guest_converts(self, first, count, private, natively, asks):
        """By a fault or by a hypercall, answered natively or by Python."""
        handler = native.Convert(self.vm) if natively else kvmexit.handlers.map_gpa_range if asks else kvmexit.handlers.convert
        able = not private or self.able(first, count)
        if asks:
            vcpu = self.new_vcpu(hypercall(12, first * PAGE, count, 16 * private))
            route = self.vm.on_hypercall(12, handler)
        else:
            vcpu = self.new_vcpu(memory_fault(first * PAGE, count * PAGE, private=private))
            route = self.vm.on_memory_fault(handler=handler)
        with route:
            if asks or able:
                # What a fault names and no slot covers is Python's ConversionError, or left by native handlers: also to be shared.
                if not asks and not all(page in self.mapped for page in range(first, first + count)):
                    return
                assert isinstance(vcpu.run(), kvmexit.Hlt)
            else:
                if natively:
                    assert isinstance(vcpu.run(), kvmexit.MemoryFault)
                else:
                    with pytest.raises(ConversionError):
                        vcpu.run()
        if asks:
            union, _ = self.vm.script(vcpu).left(0)
            assert int.from_bytes(union[56:64], "little") == (0 if able else (1 << 64) - errno.EINVAL)
        if able:
            self.now(first, count, private)

    # ---- what always holds ----

    @invariant()
    def is_as_the_model_says(self):
        for entry in self.routed:
            if entry.counter is not None:
                assert entry.counter.reads + entry.counter.writes == getattr(entry, "counted", 0)
            else:
                assert entry.calls == getattr(entry, "called", 0)
        assert {page for page in range(PAGES) if self.vm.memory.is_private(page * PAGE)} == self.private
        assert {gpa // PAGE for gpa in self.backend.private} == self.private
        ranges = self.vm.memory.ranges()
        assert {page for run in ranges if run.private for page in range(run.gpa // PAGE, (run.gpa + run.size) // PAGE)} == self.private
        assert sum(run.size for run in ranges) == len(self.mapped) * PAGE


Machine.TestCase.settings = settings(
    max_examples=max(1, int(50 * STRESS)), stateful_step_count=30, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), print_blob=True)  # fmt: skip
TestWhateverIsDoneInWhateverOrder = pytest.mark.timeout(900)(Machine.TestCase)
