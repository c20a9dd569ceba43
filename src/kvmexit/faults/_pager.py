"""Pager: guest memory whose pages come from a source when first touched. The native half: _pager.h, _pager.pyx."""

from __future__ import annotations

import errno as errnos
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable
from operator import index, itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self, cast

from kvmexit._exits import InternalError, MemoryFault, Mmio, UnexplainedFault
from kvmexit._memory import Slot
from kvmexit._pager import AWAITED, BROUGHT, WAS_THERE, WITHHELD, BringIn, Worker, says_where
from kvmexit.errors import Error
from kvmexit.faults import _operands
from kvmexit.faults._explain import FIRST, PROTECTED, Look
from kvmexit.faults._reach import Cause
from kvmexit.handlers import PASS

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer

    from kvmexit._loop import Vcpu
    from kvmexit._memory import Memory
    from kvmexit._routes import Route
    from kvmexit._vm import VM

    class _HasFileno(Protocol):
        def fileno(self) -> int: ...

    _Source = (
        Callable[[int, int], Buffer] | Buffer | str | os.PathLike[str] | int | _HasFileno
        | tuple[int | _HasFileno, int | _HasFileno]
    )  # fmt: skip
    _Failure = tuple[int, int, int, int, int, BaseException | None]

__all__ = ["Pager", "PagerError", "PagerStats"]

_PAGE = mmap.PAGESIZE
_LARGEST = 2 << 20
_EMULATION = 1  # suberror of InternalError
_PATIENCE = 1.0  # seconds that close() waits for a callable that does not return
_SHORT, _LONG, _CLOSED, _ERRNO, _RAISED, _UNFILLED, _UNSHARED = range(1, 8)  # as in _pager.h


class PagerError(Error):
    """A source did not give pages. __cause__: what a callable raised, or the OSError.

    gpa, size: what was asked for (of plain memory, from its beginning). offset: in the source. why: a text. errno: the
    system's, or None.
    """

    gpa: int
    size: int
    offset: int
    why: str
    errno: int | None

    def __init__(self, gpa: int, size: int, offset: int, why: str, errno: int | None = None) -> None:
        super().__init__(gpa, size, offset, why, errno)
        self.gpa, self.size, self.offset, self.why, self.errno = gpa, size, offset, why, errno

    def __str__(self) -> str:
        return f"page at gpa {self.gpa:#x}, size {self.size:#x} from offset {self.offset:#x} of the source: {self.why}"


class PagerStats(NamedTuple):
    """What a Pager did.

    faults: the kernel's messages, or what vCPUs' handlers asked for; several where several threads touch one page.
    fetches: answers of the source. pages, bytes: filled. errors: pages that failed. missing: pages not known to be
    there.
    """

    faults: int
    fetches: int
    pages: int
    bytes: int
    errors: int
    missing: int


class Pager:
    """Fills a slot's pages from a source when they are first touched: lazy restore of a snapshot, post-copy migration.

        with faults.Pager(slot, "snapshot.bin", window=256 << 10) as pager:
            vcpu.run()

    slot: a Slot of ordinary memory, without guest_memfd; or plain page-aligned memory (an mmap.mmap), which then has
    gpa 0. Pages that are there already stay. source: from `offset` on it has what the slot is to have,

    * a buffer (bytes, mmap.mmap, memoryview), kept meanwhile, and copied by the kernel,
    * a file: a path, or an open file or its descriptor, read with pread(2),
    * a socket, or a pair (read, write) of descriptors, to a process that answers: a question is 16 bytes, offset and
      size as little-endian 64-bit numbers, and the answer exactly `size` bytes. Nobody else may use it meanwhile,
    * a callable (offset, size) -> size bytes.

    Descriptors are duplicated. All but callables are asked without the GIL, in a thread of the Pager's own, by
    userfaultfd. window: bytes asked for at once, around the page that was touched: a power of two from 4 KiB to 2 MiB;
    it ends where the slot does, or at a page that is there.

    **Errors.** A page that the source does not give becomes inaccessible (PROT_NONE), so a guest that touches it ends
    run() with an UnexplainedFault, and memory.read() raises; `error_at(gpa)` then says why, `retry()` opens it again,
    and on_error(error), where it is given, is called in the Pager's thread. A window that fails is asked for once more
    as the one page that was touched; a stream that closed, or gave too much, is not asked again.

    **mode="faults"**, with the slot's vm=: nobody waits in the kernel. What is missing fails, and handlers of the vm's
    vCPUs bring it: native ones of MMIO, and of memory faults where the VM has memory attributes; else explain() finds
    the page, by iced-x86. It needs no privilege. memory.read() and write() raise KvmError for what is missing, views
    are a SIGBUS: prefetch() first. What the source does not give, run() raises as PagerError, and the vCPU is where it
    was; with on_error the exit goes on to the next handler, or the caller. A source that blocks holds up no kick.

    **The end.** close(), or the end of a with block, or the last reference going: nothing is filled any more, and pages
    that never came become inaccessible too, instead of zeros. fill_all() first, and the source may go. A vCPU that
    waits for a page can be kicked, and has time-outs. memory.read() and write() wait without the GIL, a view of the
    slot *with* it: where the source is a callable, or in this process, touching a missing page by a view is a deadlock.

    Raises ValueError and TypeError for arguments that do not fit, KvmError where userfaultfd is not to be had (it says
    what would allow it) or not for this memory, OSError where the file cannot be opened, Error where mode="faults"
    needs iced-x86 and has it not.
    Source: Documentation/admin-guide/mm/userfaultfd.rst.
    """

    def __init__(
        self,
        slot: Slot | Buffer,
        source: _Source,
        *,
        offset: int = 0,
        window: int = 64 << 10,
        on_error: Callable[[PagerError], object] | None = None,
        mode: Literal["userfaultfd", "faults"] = "userfaultfd",
        vm: VM | None = None,
    ) -> None:
        memory, self._gpa = _memory_of(slot)
        guest = _guest_of(mode, slot, vm)
        self.size = len(memory)
        self._offset, window = index(offset), index(window)
        if not _PAGE <= window <= _LARGEST or window & (window - 1):
            raise ValueError(f"window {window:#x} must be a power of two from {_PAGE:#x} to {_LARGEST:#x}")
        if not 0 <= self._offset <= (1 << 63) - 1 - self.size:
            raise ValueError(f"offset {offset:#x} must be from 0 to 2**63 - 1 - {self.size:#x}")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error {on_error!r} must be callable")
        kind, what, read_fd, write_fd = _open(source, self._offset + self.size)
        tell = None if on_error is None else _teller(on_error, self._gpa, self._offset)
        self._worker = Worker(
            memory, not memory.readonly, kind, what, read_fd, write_fd, self._offset, window, tell, *guest
        )  # fmt: skip
        self._prefetching = threading.Lock()
        self._thread = threading.Thread(target=self._worker.serve, name="kvmexit-pager", daemon=True)
        routes: list[Route] = []
        self._finalizer = weakref.finalize(self, _end, self._worker, routes)  # and where the interpreter exits
        try:
            if vm is not None and isinstance(slot, Slot):
                _Faults(self._worker, slot, self._offset, on_error is not None).register(vm, routes)
            self._thread.start()
        except BaseException:
            self._finalizer()
            raise

    def close(self) -> None:
        """Fill nothing any more: pages that never came are inaccessible from now on.

        Ends the thread; a callable that does not return is waited for a second, and then not any more. Again: nothing
        happens.
        """
        self._finalizer()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def prefetch(self, gpa: int, size: int) -> None:
        """Fill `size` bytes from `gpa`, in windows; faults come first. Waits without the GIL; Ctrl-C ends it.

        Raises PagerError for what the source did not give, which stays missing, or had failed before; ValueError for a
        range that is not in the slot, or not of whole pages; Error where the Pager is closed, and in its own thread.
        """
        first, pages = self._pages(gpa, size)
        if self._thread is threading.current_thread():
            raise Error("prefetch() in the Pager's own thread would wait for itself")
        with self._prefetching:
            failure = self._worker.prefetch(first, pages)
        if failure is not None:
            raise _error(failure, self._gpa, self._offset)
        failed = self._worker.first_failed(first, pages)
        if failed is not None:
            at = self._gpa + failed * _PAGE
            raise self.error_at(at) or PagerError(at, _PAGE, self._offset + failed * _PAGE, "failed long ago")

    def fill_all(self) -> None:
        """Fill everything that is missing: the source may go then. As prefetch()."""
        self.prefetch(self._gpa, self.size)

    def retry(self, gpa: int | None = None, size: int | None = None) -> None:
        """Open what failed again, in a range or everywhere: the next touch asks the source again.

        Raises as prefetch(), and KvmError where the kernel has no room for the mapping.
        """
        if (gpa is None) != (size is None):
            raise ValueError("give gpa and size, or neither")
        self._worker.retry(*self._pages(self._gpa if gpa is None else gpa, self.size if size is None else size))

    @property
    def errors(self) -> list[PagerError]:
        """Why pages were not given: the last 64, oldest first."""
        return _errors(self._worker, self._gpa, self._offset)

    def error_at(self, gpa: int) -> PagerError | None:
        """Why the page at `gpa` (any byte of it) was not given.

        None where it did not fail, was opened again, or has failed too long ago (errors).
        """
        page = (index(gpa) - self._gpa) // _PAGE
        if not 0 <= page < self.size // _PAGE or self._worker.first_failed(page, 1) is None:
            return None
        return _last_error(self._worker, self._gpa, self._offset, self._gpa + page * _PAGE)

    @property
    def stats(self) -> PagerStats:
        """Counts so far."""
        faults, fetches, pages, errors, missing = self._worker.counts()
        return PagerStats(faults, fetches, pages, pages * _PAGE, errors, missing)

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return not self._finalizer.alive

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.stats.missing} pages missing"
        return f"<Pager of gpa {self._gpa:#x}, size {self.size:#x}: {state}>"

    def _pages(self, gpa: int, size: int) -> tuple[int, int]:
        gpa, size = index(gpa), index(size)
        if gpa % _PAGE or size % _PAGE or size <= 0 or not self._gpa <= gpa <= gpa + size <= self._gpa + self.size:
            raise ValueError(
                f"gpa {gpa:#x}, size {size:#x}: give whole pages of gpa {self._gpa:#x}, size {self.size:#x}"
            )
        return (gpa - self._gpa) // _PAGE, size // _PAGE


class _Faults:
    """What handlers of mode="faults" do that is not native. Refers to no Pager, so that one that is dropped goes.

    A bare fault says no address: what explain() looks at is asked, with a _Host in place of the host. Each fault brings
    one page, the likeliest; if that was not it, the guest faults again, and it is the next one's turn. Where none is
    missing any more another vCPU may have been faster: then the guest tries once more, and again only after something
    else was filled. So no fault repeats without a page.
    """

    def __init__(self, worker: Worker, slot: Slot, offset: int, told: bool) -> None:
        self.worker, self.slot, self.offset, self.told = worker, slot, offset, told
        self.tried: dict[int, int] = {}  # by vCPU: pages filled, when it tried once more

    def register(self, vm: VM, routes: list[Route]) -> None:
        gpa, size = self.slot.gpa, self.slot.size
        native = BringIn(self.worker)
        routes.append(vm.on(UnexplainedFault, self.bare))
        routes.append(vm.on(InternalError, self.emulated))
        for handler in (self.failed, native):  # the newest is called first
            routes.append(vm.on_mmio(gpa, size, handler))
            if says_where(vm.memory):
                routes.append(vm.on_memory_fault(gpa, size, handler))

    def failed(self, vcpu: Vcpu, exit: MemoryFault | Mmio) -> object:
        """What the native handler passed on."""
        page = (exit.gpa - self.slot.gpa) // _PAGE
        return PASS if self.worker.first_failed(page, 1) is None else self.refuse(page)

    def refuse(self, page: int) -> object:
        if self.told:
            return PASS
        at = self.slot.gpa + page * _PAGE
        raise _last_error(self.worker, self.slot.gpa, self.offset, at) or PagerError(
            at, _PAGE, self.offset + page * _PAGE, "failed long ago"
        )

    def bare(self, vcpu: Vcpu, fault: UnexplainedFault) -> object:
        return self.find(vcpu) if fault.errno == errnos.EFAULT else PASS

    def emulated(self, vcpu: Vcpu, error: InternalError) -> object:
        """KVM could not read the instruction that it was to emulate, and has left everything as it was."""
        return self.find(vcpu) if error.suberror == _EMULATION else PASS

    def find(self, vcpu: Vcpu) -> object:
        if vcpu.vm.type in PROTECTED or not any(slot is self.slot for slot in vcpu.vm.memory.slots):
            return PASS
        host = _Host(self.worker, self.slot)
        look = Look(vcpu, host)
        if not look.state.delivering:
            look.instruction(FIRST)
        if not host.missing:
            look.bare()
        likeliest = [c.gpa for _, c in sorted(look.found.values(), key=itemgetter(0)) if c.slot is self.slot]
        failed = None
        for page in dict.fromkeys((gpa - self.slot.gpa) // _PAGE for gpa in likeliest) | host.pages:
            outcome = self.worker.bring(page)
            filled = self.worker.counts()[2]  # what was filled since is of no fault of this vCPU's
            if outcome in (BROUGHT, AWAITED):
                return None
            if outcome == WAS_THERE and self.tried.get(vcpu.id) != filled:
                self.tried[vcpu.id] = filled
                return None
            if outcome == WITHHELD and failed is None:
                failed = page
        return PASS if failed is None else self.refuse(failed)


class _Host:
    """The host as explain() asks it: what a Pager lacks cannot be reached, all else can.

    pages: what was asked for, in order. missing: whether one of them is.
    """

    unsure = False

    def __init__(self, worker: Worker, slot: Slot) -> None:
        self.worker, self.slot = worker, slot
        self.pages: dict[int, None] = {}
        self.missing = False

    def cause(self, hva: int, write: bool, probe: bool) -> Cause | None:
        page = (hva - self.slot.hva) // _PAGE
        if not 0 <= page < self.slot.size // _PAGE:
            return None
        self.pages[page] = None
        if not self.worker.lacks(page):
            return None
        self.missing = True
        return Cause.USERFAULTFD


def _end(worker: Worker, routes: list[Route]) -> None:
    if worker.stop():
        for route in routes:
            route.remove()


def _guest_of(mode: str, slot: Slot | Buffer, vm: VM | None) -> tuple[()] | tuple[Slot, Memory]:
    """-> what a Worker needs to know of who faults."""
    if mode not in ("userfaultfd", "faults"):
        raise ValueError(f"mode {mode!r} must be 'userfaultfd' or 'faults'")
    if mode == "userfaultfd":
        if vm is not None:
            raise ValueError("vm= is for mode='faults': a userfaultfd sees to whoever touches the memory")
        return ()
    if not isinstance(slot, Slot):
        raise ValueError("mode='faults' answers the faults of vCPUs: give a Slot; plain memory has mode='userfaultfd'")
    if vm is None:
        raise ValueError("mode='faults' answers the faults of vCPUs: give their vm=")
    if not any(slot is one for one in vm.memory.slots):
        raise ValueError(f"{slot!r} is not in the memory of {vm!r}")
    if not says_where(vm.memory) and vm.type in PROTECTED:
        raise ValueError(f"KVM does not say here which page was missing, and a {vm.type.name} guest's registers do not "
                         "show: use mode='userfaultfd'")  # fmt: skip
    if not says_where(vm.memory) and _operands.decoder_missing():
        raise Error("KVM does not say here which page was missing, and to find it mode='faults' needs iced-x86: "
                    "pip install 'kvmexit[faults]'; or use mode='userfaultfd'")  # fmt: skip
    return slot, vm.memory


def _memory_of(slot: Slot | Buffer) -> tuple[memoryview, int]:
    """-> its bytes, and where a guest has them."""
    if isinstance(slot, Slot):
        if slot.guest_memfd is not None:
            raise ValueError(f"{slot!r} has a guest_memfd, whose pages a userfaultfd does not see: use a slot without")
        return slot.view, slot.gpa
    view = memoryview(slot).cast("B")
    if not len(view) or len(view) % _PAGE:
        raise ValueError(f"memory of {len(view):#x} bytes: it must be whole pages of {_PAGE:#x}")
    return view, 0


def _open(source: _Source, end: int) -> tuple[str, memoryview | Callable[[int, int], Buffer] | None, int, int]:
    """-> what kind of source it is, the object that is one, and the descriptors, duplicated; -1 where there is none."""
    if isinstance(source, tuple):
        if len(source) != 2:
            raise TypeError("source: a pair is (descriptor to read from, descriptor to write to)")
        read_fd = os.dup(_number(source[0]))
        try:
            return "stream", None, read_fd, os.dup(_number(source[1]))
        except BaseException:
            os.close(read_fd)
            raise
    if isinstance(source, (str, os.PathLike)):
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    elif isinstance(source, int) or hasattr(source, "fileno"):
        fd = os.dup(_number(source))
    elif callable(source):
        return "call", source, -1, -1
    else:
        try:
            view = memoryview(source).cast("B")
        except TypeError:
            raise TypeError(f"source {source!r}: give a callable, buffer, path, file, socket or pair") from None
        _must_reach(len(view), end)
        return "memory", view, -1, -1
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            return "stream", None, fd, os.dup(fd)
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ValueError(
                f"source {source!r} is no file, block device or socket; of two pipes give the pair (read, write)"
            )
        if stat.S_ISREG(mode):
            _must_reach(os.fstat(fd).st_size, end)
        return "file", None, fd, -1
    except BaseException:
        os.close(fd)
        raise


def _number(file: object) -> int:
    return file if isinstance(file, int) else cast("_HasFileno", file).fileno()


def _must_reach(size: int, end: int) -> None:
    if size < end:
        raise ValueError(f"source of {size:#x} bytes is too short: offset and slot end at {end:#x}")


def _teller(on_error: Callable[[PagerError], object], gpa: int, offset: int) -> Callable[[_Failure], object]:
    return lambda failure: on_error(_error(failure, gpa, offset))


def _errors(worker: Worker, gpa: int, offset: int) -> list[PagerError]:
    return [_error(failure, gpa, offset) for failure in worker.failures()]


def _last_error(worker: Worker, gpa: int, offset: int, at: int) -> PagerError | None:
    errors = reversed(_errors(worker, gpa, offset))
    return next((error for error in errors if error.gpa <= at < error.gpa + error.size), None)


def _error(failure: _Failure, gpa: int, offset: int) -> PagerError:
    page, pages, why, error, got, raised = failure
    at, size = page * _PAGE, pages * _PAGE
    call = {_UNFILLED: " from UFFDIO_COPY", _UNSHARED: " from KVM_SET_MEMORY_ATTRIBUTES"}.get(why, "")
    text = {
        _SHORT: f"it gave {got:#x} of {size:#x} bytes",
        _LONG: f"it gave more than the {size:#x} bytes it was asked for",
        _CLOSED: "the other side closed it",
        _RAISED: f"it raised {raised!r}",
    }.get(why, f"{os.strerror(error)} (errno {error}){call}")
    made = PagerError(gpa + at, size, offset + at, text, error or None)
    made.__cause__ = raised if raised is not None else OSError(error, os.strerror(error)) if error else None
    return made
