"""Poisoned memory: a SIGBUS that is a guest's becomes an exit of the vCPU, instead of the end of the process."""

from __future__ import annotations

from types import TracebackType

from kvmexit import _loop

__all__ = ["PoisonCatch", "catch_poison"]


class PoisonCatch:
    """What catch_poison() returns: a context manager."""

    def __init__(self) -> None:
        self._open = False
        _loop.catch_poison()
        self._open = True

    @property
    def first(self) -> bool:
        """Whether SIGBUS comes to kvmexit first. Else a handler was installed since, and has the first word."""
        return _loop.catches_first()

    def close(self) -> None:
        """Undo it; the last one takes the handler out. Closing twice is no error."""
        if self._open:
            self._open = False
            _loop.release_poison()

    def __enter__(self) -> PoisonCatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PoisonCatch, {'open' if self._open else 'closed'}>"


def catch_poison() -> PoisonCatch:
    """Have poisoned memory under a guest end KVM_RUN as a MemoryFault with errno EHWPOISON (133), of all VMs here.

    KVM sends SIGBUS for it, of which a process dies. This handles that signal in the process until close(), or for ever
    where nobody calls it; each call counts. Every other SIGBUS goes to the handler there was, or is what it was without
    one. One that is installed afterwards has the first word: it calls ours on, or asks `poison()` of the C API. In
    threads that run a vCPU SIGBUS is unblocked, from their next run() on.

    Raises KvmError where the handler cannot be installed. docs/faults.md; signal(7), mm/memory-failure.c.
    """
    return PoisonCatch()
