"""Explaining faults that KVM gives no address for: `explain()`. docs/faults.md says what it looks at."""

from kvmexit.faults._explain import Candidate, Explanation, as_memory, explain
from kvmexit.faults._reach import Cause

__all__ = ["Candidate", "Cause", "Explanation", "as_memory", "explain"]
