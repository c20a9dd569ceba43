"""No allocation per exit: libc's allocator is counted, and Python's told to use it for everything. And no block is kept."""

import pytest
from processes import compiled, needs_gil, python, unsanitized

pytestmark = needs_gil("it makes an exit's object anew each time, and has an allocator of its own")

PROGRAM = """
import ctypes, gc, os, sys
import kvmexit
from kvmexit import native, testing as t

steps = {steps}

def handler(vcpu, exit):
    return {answer}

if "LD_PRELOAD" in os.environ:
    count = ctypes.CDLL(os.environ["LD_PRELOAD"]).malloc_calls
    count.restype = ctypes.c_long
else:
    count = sys.getallocatedblocks

def grows(exits):
    with t.ScriptedVM() as vm:
        vm.on(kvmexit.Exit, {handler})
        vcpu = vm.create_vcpu(0, steps, repeat=exits // len(steps), keep=False)
        vcpu.timing = {timing}
        gc.collect()
        gc.disable()
        before = count()
        try:
            vcpu.run()
        except kvmexit.KvmError:
            pass
        return count() - before

grows(1000)
for _ in range(5):  # the interpreter itself keeps a block now and then: an exit's would be there each time
    more = grows(20_000) - grows(10_000)
    if more == 0:
        break
print(more)
"""


@pytest.fixture(params=["malloc", "blocks"])
def counted(request, tmp_path_factory):
    """-> an environment in which count() is calls of malloc, or the blocks that Python has."""
    if request.param == "blocks":
        return {"PYTHONMALLOC": "pymalloc"}
    return {"LD_PRELOAD": str(compiled(tmp_path_factory, "count_malloc")), "PYTHONMALLOC": "malloc"}


STEPS = [
    ('[t.pio_out(0x80, b"A")]', "None"),
    ('[t.pio_out(0x80, b"0123456789abcdef")]', "None"),
    ('[t.mmio_write(0x1000, b"ABCD")]', "None"),
    ("[t.pio_in(0x80)]", "7"),
    ("[t.mmio_read(0x1000, 4)]", "7"),
    ("[t.hypercall(12, 1, 2, 3)]", "0"),
    ("[t.memory_fault(0x1000, rip=1), t.memory_fault(0x2000, rip=2)]", "None"),
]


@unsanitized("it has an allocator of its own, which is not counted")
@pytest.mark.parametrize(("steps", "answer"), STEPS)
@pytest.mark.parametrize(("handler", "timing"), [("handler", False), ("handler", True), ("native.Ignore(7)", True)])
def test_ten_thousand_exits_more_allocate_nothing_more(counted, steps, answer, handler, timing):
    """Between a run of 10,000 exits and one of 20,000 there is not one call to malloc, nor a block more: answered by Python or
    natively, with times measured or not."""
    done = python(PROGRAM.format(steps=steps, answer=answer, handler=handler, timing=timing), env=counted)
    assert done.stdout == "0\n", done


@unsanitized("it has an allocator of its own, which is not counted")
def test_what_is_allocated_is_counted(counted):
    """A handler that keeps a block of each exit shows."""
    keeps = "kept.append(object()) or None\n\nkept = []"
    done = python(PROGRAM.format(steps=STEPS[0][0], answer=keeps, handler="handler", timing=False), env=counted)
    assert int(done.stdout) >= 10_000, done
