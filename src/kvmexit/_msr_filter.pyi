import enum
from collections.abc import Iterable
from typing import Any, NamedTuple, final

from typing_extensions import Buffer

class MsrExitReason(enum.IntFlag):
    INVALID = 1
    UNKNOWN = 2
    FILTER = 4

class MsrRange(NamedTuple):
    first: int
    nmsrs: int
    read: bool | Buffer | None = None
    write: bool | Buffer | None = None

@final
class MsrFilter:
    def __init__(self, ranges: Iterable[Any], default_allow: bool) -> None: ...
    @property
    def denies(self) -> bool: ...
