"""The vCPUs of one VM: which there are, and stopping all of them (pause) for as long as somebody works on the VM.

A vCPU stands still when its run() has returned, when run() has parked it (Vcpu.park), or when its handler itself waits in
pause(). Owners, `parked` and everything in `Vcpus` change with the GIL held; what reaches a guest that runs is the PAUSE
bit of its request word (_control.h). So a run() that began before the bit was set is seen here as an owner and waited for,
and one that begins later sees the bit and parks first.

Two handlers that pause at the same time would wait for each other for ever. So a thread that waits in pause() counts as
stopped, and a handler's pause takes effect only while nobody else's is.
"""

import threading
import weakref

from kvmexit._ioctl cimport Handle
from kvmexit._page cimport Page
from kvmexit.errors import Error, KvmError

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil


_AGAIN_S = 0.1  # asked once more after so long: a signal may have found the queue full, or been deferred
_changed = threading.Condition()  # a vCPU of any VM came to stand still, or a pause ended


cdef int stopped_one() except -1:
    """Tell who waits in pause() that a vCPU came to stand still."""
    with _changed:
        _changed.notify_all()
    return 0


cdef class Vcpus:
    """Internal: what VM and Memory share of the vCPUs."""

    def __init__(self, Handle handle):
        self.handle = handle
        self.lock = threading.RLock()
        self.weak_pages = weakref.WeakSet()
        self.granted = {}

    def pages(self):
        """The Pages there are."""
        with self.lock:
            return list(self.weak_pages)

    def add(self, Page page):
        """A new vCPU; Error where the VM is closed."""
        with self.lock:
            self.handle.check()
            self.weak_pages.add(page)
        if self.pauses:
            _control().ask_to_pause(page)

    def pause(self):
        """See VM.pause()."""
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef list mine
        with _changed:
            self.handle.check()
            mine = [page for page in self.pages() if (<Page>page).owner == me]
            self.pauses += 1
            try:
                for page in mine:
                    (<Page>page).c.parked = True
                _changed.notify_all()
                self.ask()
                while not self.stopped(me, len(mine) > 0):
                    if not _changed.wait(_AGAIN_S):
                        self.ask()
                    self.handle.check()
            except BaseException:
                self.end()
                raise
            finally:
                for page in mine:
                    (<Page>page).c.parked = False
            self.granted[me] = self.granted.get(me, 0) + 1

    def resume(self):
        """See VM.resume()."""
        with _changed:
            self.handle.check()
            if not self.granted:
                raise Error("resume() without a pause() in effect")
            me = PyThread_get_thread_ident()
            holder = me if me in self.granted else next(iter(self.granted))
            self.granted[holder] -= 1
            if not self.granted[holder]:
                del self.granted[holder]
            self.end()

    def end(self):
        """One pause less; the last one lets the vCPUs go."""
        with _changed:
            self.pauses -= 1
            if not self.pauses:
                for page in self.pages():
                    _control().release_page(page)
            _changed.notify_all()

    def release(self):
        """The VM is being closed: no pause holds any longer."""
        with _changed:
            for page in self.pages():
                _control().release_page(page)
            _changed.notify_all()

    cdef bint stopped(self, unsigned long me, bint in_handler):
        """Whether all vCPUs but ours stand still, and, for a handler, nobody else's pause is in effect."""
        for page in self.pages():
            if (<Page>page).owner and (<Page>page).owner != me and not (<Page>page).c.parked:
                return False
        return not in_handler or not self.granted or list(self.granted) == [me]

    cdef int ask(self) except -1:
        for page in self.pages():
            try:
                _control().ask_to_pause(page)
            except KvmError:
                pass  # the signal queue is full: again in a moment
        return 0


def _control():
    """The module that has the thread-local state, which imports this one."""
    from kvmexit import _loop
    return _loop
