from collections.abc import Callable
from typing import Final, final

from typing_extensions import Buffer

FROM: Final[dict[str, int]]

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
    ) -> None: ...
    def serve(self) -> None: ...
    def stop(self) -> None: ...
    def prefetch(self, first: int, pages: int) -> tuple[int, int, int, int, int, BaseException | None] | None: ...
    def retry(self, first: int, pages: int) -> None: ...
    def failures(self) -> list[tuple[int, int, int, int, int, BaseException | None]]: ...
    def first_failed(self, first: int, pages: int) -> int | None: ...
    def counts(self) -> tuple[int, int, int, int, int]: ...
