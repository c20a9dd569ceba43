"""The converter against a model that knows each page: what the backend is asked, what ranges() says, how far a failure got."""

import contextlib
import errno
import mmap
import os
import random

import pytest
from guests import stress

import kvmexit
from kvmexit import ConversionError
from kvmexit.testing import RecordedAttributes, ScriptedVM

PAGE = 4096
STEP = (64 << 20) // PAGE  # pages converted at a time; here an edge between two steps is page STEP
END = (1 << 64) // PAGE
THEIRS = 1 << 40  # a page out of the others' way
COUNTS = [1, 2, 3, 62, 63, 64, 65, 66, 127, 128, 129, 190]


class Checked:
    """A scripted VM and its model: every method calls the VM, and checks that it does what the model says. In pages."""

    def __init__(self, vm, recorded, failures=None):
        self.vm, self.recorded, self.failures = vm, recorded, failures or {}
        self.slots = {}  # first page: [count, whether they can be private, the Slot]
        self.state = {}  # page: private (True, False), or None where that is not known
        self.calls = []
        self.failed = 0
        self.theirs = mmap.mmap(-1, max(COUNTS) * PAGE)  # what adopted slots are made of
        self.hva = vm.memory.add(THEIRS * PAGE, max(COUNTS) * PAGE, buffer=self.theirs).hva
        self._note(THEIRS, max(COUNTS), False, None)

    def _note(self, first, count, able, slot, state=False):
        self.slots[first] = [count, able, slot]
        self.state.update(dict.fromkeys(range(first, first + count), state))

    def add(self, first, count, able=True, adopts=False):
        pages = range(first, first + count)
        if pages[-1] >= END or any(page in self.state for page in pages):
            with pytest.raises(ValueError, match="wraps|overlaps"):
                self._add(first, count, able, adopts)
        else:
            self._note(first, count, able, self._add(first, count, able, adopts), None if adopts else False)

    def _add(self, first, count, able, adopts):
        if not adopts:
            return self.vm.memory.add(first * PAGE, count * PAGE, guest_memfd=able, discard=False)
        fd = os.memfd_create("theirs")
        try:
            return self.vm.memory.adopt(9, first * PAGE, count * PAGE, self.hva, fd if able else None, 0, False)
        finally:
            os.close(fd)

    def remove(self, first):
        count, _, slot = self.slots[first]
        with self._change(first, count, False, set()):
            self.vm.memory.remove(slot)
            del self.slots[first]
            for page in range(first, first + count):
                del self.state[page]

    def close_guest_memfd(self, first):
        _, able, slot = self.slots[first]
        with contextlib.nullcontext() if able else pytest.raises(kvmexit.Error, match="no guest_memfd"):
            slot.close_guest_memfd()
        self.slots[first][1] = False

    def convert(self, first, count, private):
        why = self._refusal(first, count) if private else None
        if why:
            with pytest.raises(ConversionError, match=why) as caught:
                self.vm.memory.convert(first * PAGE, count * PAGE, private=True)
            undone = next(page for page in range(first, first + count) if self.state.get(page) is not True)
            self._check_error(caught.value, first, count, True, (undone - first) * PAGE, None)
        else:
            with self._change(first, count, private, self._steps(first, first + count - 1, private)):
                self.vm.memory.convert(first * PAGE, count * PAGE, private=private)

    def _refusal(self, first, count):
        """Why the range cannot become private, or None."""
        for page in range(first, first + count):
            if page not in self.state:
                return f"no slot covers gpa {page * PAGE:#x}"
            if self.state[page] is not True and not next(
                able for at, (n, able, _) in self.slots.items() if at <= page < at + n
            ):
                return f"at gpa {page * PAGE:#x} has no guest_memfd"
        return None

    def _steps(self, first, last, private):
        """-> the pages where the next step of a huge conversion begins. Holes are passed over."""
        begins = set()
        while True:
            if not private:
                ahead = [max(first, at) for at, (count, _, _) in self.slots.items() if at + count > first]
                first = min(ahead, default=END)
            if last - first < STEP:
                return begins
            first = first // STEP * STEP + STEP
            begins.add(first)

    @contextlib.contextmanager
    def _change(self, first, count, private, steps):
        """The with block's call asks the backend for each run of pages that are not so, in order, and stops at a failure."""
        runs = []
        for page in sorted(p for p, state in self.state.items() if first <= p < first + count and state is not private):
            if runs and runs[-1][-1] == page - 1 and page not in steps:
                runs[-1].append(page)
            else:
                runs.append([page])
        error = 0
        for run in runs:
            error = self.failures.get(len(self.calls) + 1, 0)
            self.calls.append((run[0] * PAGE, len(run) * PAGE, private, error))
            if error:
                break
            self.state.update(dict.fromkeys(run, private))
        if error:
            self.failed += 1
            with pytest.raises(ConversionError, match="RecordedAttributes at") as caught:
                yield
            self._check_error(caught.value, first, count, private, (run[0] - first) * PAGE, error)
        else:
            yield

    def _check_error(self, error, first, count, private, done, number):
        assert (error.gpa, error.size, error.private, error.done, error.errno) == (
            first * PAGE, count * PAGE, private, done, number)

    def check(self):
        ranges = []
        for page in sorted(self.state):
            gpa, private = page * PAGE, self.state[page]
            if ranges and sum(ranges[-1][:2]) == gpa and ranges[-1][2] is private:
                ranges[-1][1] += PAGE
            else:
                ranges.append([gpa, PAGE, private])
        assert self.vm.memory.ranges() == [tuple(r) for r in ranges if r[2] is not None]
        assert self.recorded.calls == self.calls

    def is_private(self, page, offset):
        assert self.vm.memory.is_private(page * PAGE + offset) is self.state.get(page, False)

    def check_backend(self):
        assert self.recorded.private == {page * PAGE for page, state in self.state.items() if state}


def a_place(chance):
    """-> first page and count: around an edge between two steps, or up to the end of the address space."""
    count = chance.choice(COUNTS)
    if chance.random() < 0.7:
        return STEP - 200 + chance.randrange(300), count
    return END - chance.choice([count, count, 1, 64, 65, 100]), count


@pytest.mark.parametrize("failing", [False, True])
def test_whatever_is_called_the_model_has_it(failing):
    """Slots made, adopted and removed, guest_memfds closed, ranges converted, of all sizes and at all edges."""
    failed = 0
    for seed in range(stress(30)):
        chance = random.Random(seed)
        failures = {n: chance.choice([errno.ENOMEM, errno.EIO]) for n in range(1, 5000) if failing and chance.random() < 0.15}
        recorded = RecordedAttributes(failures)
        with ScriptedVM(attributes=recorded) as vm:
            checked = Checked(vm, recorded, failures)
            for _ in range(200):
                first, count = a_place(chance)
                what = chance.random()
                ours = [at for at in checked.slots if at != THEIRS]
                if what < 0.1 or len(ours) < 3:
                    checked.add(first, count, able=chance.random() < 0.8, adopts=chance.random() < 0.3)
                elif what < 0.15:
                    checked.remove(chance.choice(ours))
                elif what < 0.17:
                    checked.close_guest_memfd(chance.choice(ours))
                elif END - first < count:
                    checked.convert(first, END - first, chance.random() < 0.6)
                else:
                    at = chance.choice([first, chance.choice(ours)])
                    checked.convert(at, min(count, END - at), chance.random() < 0.6)
                checked.check()
                checked.is_private(a_place(chance)[0] % END, chance.choice([0, chance.randrange(PAGE), PAGE - 1]))
                at = chance.choice(ours or [THEIRS])
                if at in checked.slots:
                    checked.is_private(at + checked.slots[at][0] - 1, PAGE - 1)
            checked.check_backend()
            failed += checked.failed
    assert bool(failed) == failing


def fragmented(failures):
    """-> a Checked VM: slots that adjoin, holes, edges of steps, the last page there is; every third page private."""
    recorded = RecordedAttributes(failures)
    checked = Checked(ScriptedVM(attributes=recorded), recorded, failures)
    for first, count in [(0, 3), (3, 2), (10, 3), (STEP - 4, 3), (STEP - 1, 4), (3 * STEP + 7, 2 * STEP + 1), (END - 4, 4)]:
        checked.add(first, count)
    for page in sorted(checked.state):
        if page % 3 == 0 and (page < 2 * STEP or page in (3 * STEP + 9, 4 * STEP - 1, 4 * STEP, END - 1)):
            checked.convert(page, 1, True)
    return checked


@pytest.mark.parametrize(
    ("first", "count", "private"), [(0, END, False), (0, 5, True), (STEP - 4, 7, True), (3 * STEP + 7, 2 * STEP + 1, True)]
)
def test_a_failure_at_any_call_is_reported_and_asking_again_finishes_the_rest(first, count, private):
    """The first, the second, and so on up to the last: across slots, holes, steps."""
    checked = fragmented({})
    before = len(checked.calls)
    checked.convert(first, count, private)
    every = len(checked.calls) - before
    checked.vm.close()
    assert every > 1
    for n in range(1, every + 1):
        checked = fragmented({before + n: errno.ENOMEM})
        checked.convert(first, count, private)
        assert (checked.failed, len(checked.calls)) == (1, before + n)
        checked.check()
        checked.convert(first, count, private)
        assert len(checked.calls) == before + every + 1  # the failed one again, and those after it
        checked.check()
        checked.vm.close()
