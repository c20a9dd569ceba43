from typing import Literal, Protocol, Self, final

from typing_extensions import Buffer

from kvmexit._routes import Native

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

def foreign(function: object) -> Literal["capsule", "ctypes", "cffi", "numba"] | None: ...

@final
class Function(Native):
    def __new__(cls, function: object, opaque: int | Buffer | None = None) -> Self: ...
    @property
    def function(self) -> object: ...

@final
class Ignore(Native):
    def __new__(cls, value: int = 0) -> Self: ...

@final
class Stop(Native):
    def __new__(cls) -> Self: ...

@final
class Counter(Native):
    def __new__(cls) -> Self: ...
    @property
    def reads(self) -> int: ...
    @property
    def writes(self) -> int: ...
    @property
    def others(self) -> int: ...

@final
class EventFd(Native):
    def __new__(cls, eventfd: int | _HasFileno) -> Self: ...

@final
class Registers(Native):
    def __new__(cls, buffer: Buffer, read_only: Buffer | None = None, eventfd: int | _HasFileno | None = None
    ) -> Self: ...
    @property
    def eventfd(self) -> int | _HasFileno | None: ...
