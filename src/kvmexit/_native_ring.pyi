from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Never, Protocol, Self, final

from kvmexit._routes import Native

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

class RingEntry(NamedTuple):
    address: int
    data: int
    sequence: int
    vcpu: int
    size: int
    reason: int
    flags: int

@final
class RingBatch:
    def __init__(self, _: Never, /) -> None: ...  # a TypeError
    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> RingEntry: ...
    def __iter__(self) -> Iterator[RingEntry]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Ring(Native):
    dtype: ClassVar[list[tuple[str, str]]]
    def __new__(
        cls,
        entries: int = 4096,
        *,
        vcpus: int = 64,
        full: Literal["stop", "drop", "wait"] = "stop",
        eventfd: int | _HasFileno | None = None,
    ) -> Self: ...
    def drain(self, max: int | None = None) -> RingBatch: ...
    def fileno(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def vcpus(self) -> int: ...
    @property
    def full(self) -> Literal["stop", "drop", "wait"]: ...
