from collections.abc import Mapping
from typing import final

from typing_extensions import disjoint_base

from kvmexit._ioctl import Handle

@disjoint_base
class AttributesBackend: ...

@final
class KvmAttributes(AttributesBackend): ...

@final
class SlotRebind(AttributesBackend): ...

@final
class RecordedAttributes(AttributesBackend):
    def __new__(cls, failures: Mapping[int, int] | None = None, *, chunk: int = 67108864) -> RecordedAttributes: ...
    @property
    def calls(self) -> list[tuple[int, int, bool, int]]: ...
    @property
    def private(self) -> set[int]: ...

@final
class Conversions:
    def __new__(cls, handle: Handle, backend: AttributesBackend | None, numbers: list[int]) -> Conversions: ...
