"""Faults of guest memory: why they happened (`explain()`), repairing them (`Fault`), telling the guest (`inject()`).

docs/faults.md says what is looked at, and what each repair does.
"""

from kvmexit.faults._explain import Candidate, Explanation, as_memory, explain
from kvmexit.faults._fault import Fault, OnFault
from kvmexit.faults._inject import enable_machine_checks, inject, skip
from kvmexit.faults._reach import Cause

__all__ = [
    "Candidate", "Cause", "Explanation", "Fault", "OnFault", "as_memory", "enable_machine_checks", "explain", "inject",
    "skip",
]  # fmt: skip
