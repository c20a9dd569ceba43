from collections.abc import Callable
from typing import Final, final

from typing_extensions import Buffer

from kvmexit._memory import Memory, Slot
from kvmexit._routes import Native

FROM: Final[dict[str, int]]
def says_where(memory: Memory) -> bool: ...

AWAITED: Final[int]
BROUGHT: Final[int]
WAS_THERE: Final[int]
WITHHELD: Final[int]

@final
class Worker:
    def __init__(
        self,
        memory: memoryview,
        writable: bool,
        kind: str,
        source: memoryview | Callable[[int, int], Buffer] | None,
        read_fd: int,
        write_fd: int,
        offset: int,
        window: int,
        on_error: Callable[[tuple[int, int, int, int, int, BaseException | None]], object] | None,
        slot: Slot | None = None,
        vm_memory: Memory | None = None,
    ) -> None: ...
    def serve(self) -> None: ...
    def stop(self) -> bool: ...
    def prefetch(self, first: int, pages: int) -> tuple[int, int, int, int, int, BaseException | None] | None: ...
    def lacks(self, page: int) -> bool: ...
    def wait_long(self, ms: int) -> None: ...
    def bring(self, page: int) -> int: ...
    def retry(self, first: int, pages: int) -> None: ...
    def failures(self) -> list[tuple[int, int, int, int, int, BaseException | None]]: ...
    def first_failed(self, first: int, pages: int) -> int | None: ...
    def counts(self) -> tuple[int, int, int, int, int]: ...

@final
class BringIn(Native):
    def __new__(cls, worker: Worker) -> BringIn: ...
