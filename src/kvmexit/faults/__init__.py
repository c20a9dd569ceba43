"""Faults of guest memory: explained, repaired (`Fault`), told to the guest (`inject()`), or wanted (`Pager`).

docs/faults.md says what is looked at, and what each repair does; docs/paging.md, memory that comes when it is touched.
"""

from kvmexit.faults._explain import Candidate, Explanation, as_memory, explain
from kvmexit.faults._fault import Fault, OnFault
from kvmexit.faults._inject import enable_machine_checks, inject, skip
from kvmexit.faults._pager import Pager, PagerError, PagerStats
from kvmexit.faults._poison import PoisonCatch, catch_poison
from kvmexit.faults._reach import Cause

__all__ = [
    "Candidate", "Cause", "Explanation", "Fault", "OnFault", "Pager", "PagerError", "PagerStats", "PoisonCatch",
    "as_memory", "catch_poison", "enable_machine_checks", "explain", "inject", "skip",
]  # fmt: skip
