"""Faults without an address: `explain()`, docs/faults.md. Memory that comes when touched: `Pager`, docs/paging.md."""

from kvmexit.faults._explain import Candidate, Explanation, as_memory, explain
from kvmexit.faults._pager import Pager, PagerError, PagerStats
from kvmexit.faults._reach import Cause

__all__ = ["Candidate", "Cause", "Explanation", "Pager", "PagerError", "PagerStats", "as_memory", "explain"]
