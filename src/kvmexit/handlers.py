"""What may be a handler."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

if TYPE_CHECKING:
    from kvmexit._exits import Exit
    from kvmexit._loop import Vcpu

__all__ = ["PASS", "STOP", "Handler", "Verdict", "coerce"]

_E = TypeVar("_E", bound="Exit")
Handler: TypeAlias = Callable[["Vcpu", _E], object]
"""A handler of one class of exits: `Handler[Io]` takes (vcpu, io)."""


class Verdict(enum.Enum):
    """What a handler can return instead of an answer."""

    PASS = "PASS"
    """Not mine: the next handler, and at last the caller of run()."""
    STOP = "STOP"
    """run() returns this exit now."""

    def __repr__(self) -> str:
        return f"kvmexit.{self.name}"


PASS: Final = Verdict.PASS
STOP: Final = Verdict.STOP


def coerce(handler: Handler[Any]) -> Handler[Any]:
    """The handler as the dispatcher calls it, `handler(vcpu, exit)`. TypeError says what would be accepted."""
    if not callable(handler):
        raise TypeError(f"a handler is a callable taking (vcpu, exit), not {type(handler).__name__}")
    if (
        inspect.iscoroutinefunction(handler)
        or inspect.isgeneratorfunction(handler)
        or inspect.isasyncgenfunction(handler)
    ):
        raise TypeError(
            f"{handler!r} is a coroutine or generator function: a handler answers at once, as a plain function"
        )
    return handler
