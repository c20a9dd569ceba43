import os
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Never, Self, final, overload

from kvmexit._exits import Exit
from kvmexit._loop import Vcpu
from kvmexit.testing import ScriptedVM

ENDINGS: Final[tuple[str | None, ...]]

class TraceRecord(NamedTuple):
    number: int
    vcpu: int
    exit: Exit | None
    outcome: str
    settled: bool
    errno: int
    entered_ns: int
    left_ns: int
    rip: int | None
    immediate: bool
    begun: bool
    answer: bytes
    registers: bytes | None
    cr8: int
    if_flag: bool
    ready_for_interrupt_injection: bool
    waited_ns: tuple[int, int] | None

class Divergence(NamedTuple):
    record: TraceRecord
    recorded: bytes
    replayed: bytes | None

class TracePart(NamedTuple):
    path: str
    part: int
    vcpu: int
    records: int
    ended: str | None
    torn: int
    error: int
    lost: int

@final
class Source:
    def __init__(self, path: str) -> None: ...
    def error(self, offset: int, why: str) -> Exception: ...

@final
class Trace:
    def __init__(self, _: Never, /) -> None: ...  # a TypeError
    @staticmethod
    def _load(sources: list[Source]) -> Trace: ...
    @property
    def ns_per_tick(self) -> float: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def parts(self) -> list[TracePart]: ...
    @property
    def vcpus(self) -> list[int]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def torn(self) -> int: ...
    @property
    def lost(self) -> int: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, i: int, /) -> TraceRecord: ...
    @overload
    def __getitem__(self, i: slice, /) -> list[TraceRecord]: ...
    def __iter__(self) -> Iterator[TraceRecord]: ...
    def numpy(self) -> Any: ...

class Played(NamedTuple):
    records: int
    exits: int
    ns: int
    divergence: Divergence | None

@final
class Replay:
    def __init__(self, _: Never, /) -> None: ...  # a TypeError
    @staticmethod
    def _begin(trace: Trace, vm: ScriptedVM, strict: bool) -> Replay: ...
    def __getattr__(self, name: str) -> Any: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def vm(self) -> ScriptedVM: ...
    @property
    def vcpu(self) -> Vcpu: ...
    def run(self, timeout: float | None = None) -> Exit: ...
    def complete(self) -> Exit | None: ...
    @property
    def position(self) -> int: ...
    @property
    def divergence(self) -> Divergence | None: ...
    def play(self) -> Played: ...

@final
class Steps:
    def __new__(cls, trace: Trace) -> Self: ...

def load(path: str | os.PathLike[str]) -> Trace: ...
def replay(
    path: str | os.PathLike[str] | Trace, *, vm: ScriptedVM | None = None, vcpu: int | None = None, strict: bool = False
) -> Replay: ...
