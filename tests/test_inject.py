"""Failures of the system calls under every operation: inject.py has what is tried, and what must hold."""

import inject
import pytest
from guests import STRESS
from processes import compiled, needs_gil, unsanitized

pytestmark = [
    needs_gil("its allocator makes system calls of its own"),
    unsanitized("it stands before libc's calls, where the sanitizers stand"),
    pytest.mark.timeout(900),
]


def check(library, cases, at_least):
    """One errno of each call that each operation makes, all of them with KVMEXIT_STRESS=2; a table: python tests/inject.py."""
    found = inject.run(library, cases, errnos=1 if STRESS <= 1 else 99)
    assert found["broken"] == []
    assert len(found["tried"]) >= at_least
    assert {one[0] for one in found["tried"]} == {case.__name__ for case in cases}


def test_whatever_system_call_fails_nothing_is_lost_or_left_behind(tmp_path_factory, kvm):
    """On any kernel."""
    check(compiled(tmp_path_factory, "inject"), inject.CASES, 80)


def test_whatever_system_call_fails_the_shadow_is_what_the_guest_finds(tmp_path_factory, private_vm):
    """Where memory is private in the kernel."""
    check(compiled(tmp_path_factory, "inject"), inject.PRIVATE_CASES, 15)
