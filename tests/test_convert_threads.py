"""Conversions and other threads: races that are lost, close(), signals, the GIL."""

import pytest
from processes import python

HUGE = 1 << 42  # bytes; takes some tenths of a second to convert, and as long to look at


# ---- close() ----


@pytest.mark.parametrize("what", ["ranges()", "is_private(0)"])
def test_close_waits_for_who_looks(what):
    """The table is looked through without the GIL. In a process of its own: it crashed."""
    done = python(f"""
import kvmexit
from processes import in_thread
from kvmexit.testing import ScriptedVM
for _ in range(10):
    vm = ScriptedVM()
    vm.memory.add(0, {HUGE}, guest_memfd=True, discard=False)
    looked, errors = [], []
    def look():
        try:
            while True:
                vm.memory.{what}
                looked.append(1)
        except kvmexit.Error as error:
            errors.append(str(error))
    thread = in_thread(look)
    while not looked:
        pass
    vm.close()
    thread.join(30)
    assert errors == ["this VM is closed"], errors
print("done")
""")
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
