"""No allocation per exit: libc's allocator is counted, and Python's told to use it for everything."""

import pytest
from processes import compiled, python, unsanitized

PROGRAM = """
import ctypes, os
import kvmexit
from kvmexit import testing as t

count = ctypes.CDLL(os.environ["LD_PRELOAD"]).malloc_calls
count.restype = ctypes.c_long
steps = {steps}

def handler(vcpu, exit):
    return {answer}

def calls(exits):
    with t.ScriptedVM() as vm:
        vm.on(kvmexit.Exit, handler)
        vcpu = vm.create_vcpu(0, steps, repeat=exits // len(steps), keep=False)
        before = count()
        try:
            vcpu.run()
        except kvmexit.KvmError:
            pass
        return count() - before

calls(1000)
print(calls(1000) > 0, calls(20_000) - calls(10_000))
"""


@unsanitized("it has an allocator of its own, which is not counted")
@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        ('[t.pio_out(0x80, b"A")]', "None"),
        ('[t.pio_out(0x80, b"0123456789abcdef")]', "None"),
        ('[t.mmio_write(0x1000, b"ABCD")]', "None"),
        ("[t.pio_in(0x80)]", "7"),
        ("[t.mmio_read(0x1000, 4)]", "7"),
        ("[t.hypercall(12, 1, 2, 3)]", "0"),
        ("[t.memory_fault(0x1000, rip=1), t.memory_fault(0x2000, rip=2)]", "None"),
    ],
)
def test_ten_thousand_exits_more_allocate_nothing_more(tmp_path_factory, steps, answer):
    """Between a run of 10,000 exits and one of 20,000 there is not one call to malloc."""
    library = compiled(tmp_path_factory, "count_malloc")
    done = python(PROGRAM.format(steps=steps, answer=answer), env={"LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"})
    assert done.stdout == "True 0\n", done
