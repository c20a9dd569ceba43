from collections.abc import Iterable
from typing import final

from kvmexit.stats import LastExit, Stats

TSC: bool

@final
class Recorder:
    timing: bool
    def stats(self) -> Stats: ...
    def reset(self) -> None: ...
    def last_exits(self) -> list[LastExit]: ...

def sorted_into_buckets(ticks: Iterable[int]) -> Stats: ...
