from typing import Self, final

from kvmexit._native_ring import Ring
from kvmexit._routes import Native
from kvmexit._vm import VM
from kvmexit.errors import ConversionError

@final
class Convert(Native):
    def __new__(
        cls,
        vm: VM,
        gpa: int | None = None,
        size: int | None = None,
        *,
        window: int | None = None,
        adaptive: bool = False,
        journal: Ring | None = None,
    ) -> Self: ...
    @property
    def journal(self) -> Ring | None: ...
    @property
    def window(self) -> int: ...
    @property
    def adaptive(self) -> bool: ...
    @property
    def faults(self) -> int: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def hypercalls(self) -> int: ...
    @property
    def conversions(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def busy(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def failure(self) -> ConversionError | None: ...
