from collections.abc import Iterable
from typing import NamedTuple, Self, final

from kvmexit._page import Page

class ScriptStep(NamedTuple):
    reason: int | None = None
    payload: bytes = b""
    data: bytes = b""
    errno: int = 0
    flags: int = 0
    rip: int = 0
    spin: bool = False
    second_half: bool = False
    delay: float = 0.0

@final
class Script:
    def __new__(cls, steps: Iterable[ScriptStep], repeat: int = 1, keep: bool = True) -> Self: ...
    def left(self, i: int) -> tuple[bytes, bytes]: ...
    @property
    def entries(self) -> list[tuple[int, int]]: ...
    @property
    def position(self) -> int: ...

def scripted_page(script: Script) -> Page: ...
