"""Failures of the system calls under every operation: inject.py has what is tried, and what must hold."""

import inject
import pytest
from guests import STRESS
from processes import compiled, needs_gil, unsanitized


@needs_gil("its allocator makes system calls of its own")
@unsanitized("it stands before libc's calls, where the sanitizers stand")
@pytest.mark.timeout(900)
def test_whatever_system_call_fails_nothing_is_lost_or_left_behind(tmp_path_factory, kvm):
    """One errno of each call that each operation makes, all of them with KVMEXIT_STRESS=2; a table: python tests/inject.py."""
    found = inject.run(compiled(tmp_path_factory, "inject"), errnos=1 if STRESS <= 1 else 99)
    assert found["broken"] == []
    assert len(found["tried"]) >= 80
    assert {one[0] for one in found["tried"]} == {case.__name__ for case in inject.CASES}
