"""The vCPUs of one VM: which there are, and stopping all of them (pause) for as long as somebody works on the VM.

A vCPU stands still when its run() has returned, when run() has parked it (Vcpu.park), or when its handler itself waits in
pause(). Everything in `Vcpus`, of all VMs, changes with the GIL held, on free-threaded Python in the critical section on
`_still`; owners and `parked` change without (_page.h). What reaches a guest that runs is the PAUSE bit of its request word
(_control.h). So a run() that began before the bit was set is seen here as an owner and waited for, and one that begins later
sees the bit and parks first.

Two handlers that pause at the same time would wait for each other for ever. So a thread that waits in pause() counts as
stopped, and a handler's pause takes effect only while nobody else's is.

Nothing here that changes what others see runs Python code, or waits: so it happens at once for other threads, and no
exception of a signal handler, Ctrl-C first of all, leaves it half done. Nor is there a lock that a forked child could find
taken: fork() stops all threads first, and critical sections are let go where a thread waits or is stopped.
"""

import weakref

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint32_t

from kvmexit._ioctl cimport Handle
from kvmexit._page cimport Page, kvmexit_owner, kvmexit_parked, kvmexit_set_parked, kvmexit_shut
from kvmexit.errors import Error, KvmError

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from *:
    """
    #include <limits.h>
    #include <linux/futex.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static uint32_t kvmexit_changes; /* a vCPU of any VM came to stand still, or a pause ended */

    static void kvmexit_changed(void)
    {
        __atomic_fetch_add(&kvmexit_changes, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, &kvmexit_changes, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }

    static uint32_t kvmexit_seen_changes(void)
    {
        return __atomic_load_n(&kvmexit_changes, __ATOMIC_SEQ_CST);
    }

    static int kvmexit_await_change(uint32_t seen, long ms)
    {
        struct timespec t = {ms / 1000, ms % 1000 * 1000000};
        return (int)syscall(SYS_futex, &kvmexit_changes, FUTEX_WAIT_PRIVATE, seen, &t, NULL, 0);
    }
    """
    uint32_t kvmexit_seen_changes()
    void kvmexit_changed() nogil
    int kvmexit_await_change(uint32_t, long) nogil


_AGAIN_S = 0.1  # asked once more after so long: a signal may have found the queue full, or been deferred
cdef list _all = []  # weak references to the Vcpus there are
cdef object _still = object()  # what the critical section of all this is on
cdef object _ask_to_pause = None, _release_page = None  # of _loop, which has the thread-local state, and imports this module


cdef void stopped_one() noexcept nogil:
    """Tell who waits in pause() that a vCPU came to stand still."""
    kvmexit_changed()


cdef list alive(list references):
    """-> what weak references still refer to; the others go from the list."""
    cdef list found = []
    for reference in references:
        thing = reference()
        if thing is not None:
            found.append(thing)
    return found


cdef bint alone(unsigned long me, list held):
    """Whether nobody else's pause is in effect in these VMs, in whose handlers a thread is.

    P1: such a pause was granted because that thread's vCPUs were parked.
    """
    cdef Vcpus vcpus
    for vcpus in held:
        if vcpus.granted and list(vcpus.granted) != [me]:
            return False
    return True


cdef bint paused_by(unsigned long me, Page own):
    """Whether a thread holds a pause of a VM in whose handlers it is, beside the run() of `own`."""
    cdef Vcpus vcpus
    with cython.critical_section(_still):
        for vcpus in alive(_all):
            if me in vcpus.granted and [page for page in vcpus.run_by(me) if page is not own]:
                return True
    return False


cdef class Vcpus:
    """Internal: what VM and Memory share of the vCPUs."""

    def __init__(self, Handle handle):
        self.handle = handle
        self.weak_pages = []
        self.granted = {}
        mine = weakref.ref(self)
        with cython.critical_section(_still):
            _all[:] = [reference for reference in _all if reference() is not None]
            _all.append(mine)

    def pages(self):
        """The Pages there are."""
        with cython.critical_section(_still):
            return alive(self.weak_pages)

    def add(self, Page page):
        """A new vCPU; Error where the VM is closed."""
        global _ask_to_pause, _release_page
        from kvmexit import _loop
        _ask_to_pause, _release_page = _loop.ask_to_pause, _loop.release_page
        reference = weakref.ref(page)
        with cython.critical_section(_still):
            self.handle.check()
            self.weak_pages = [ref for ref in self.weak_pages if ref() is not None] + [reference]
            if self.pauses:
                _ask_to_pause(page)  # P14: a vCPU made while the VM is paused is paused

    def pause(self):
        """See VM.pause()."""
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef list mine = [], held = []
        cdef uint32_t seen
        cdef long again = <long>(_AGAIN_S * 1000)
        cdef Vcpus vcpus
        self.handle.check()
        with cython.critical_section(_still):
            for vcpus in alive(_all):
                pages = vcpus.run_by(me)
                if pages:
                    mine += pages
                    held.append(vcpus)
            self.pauses += 1
        try:
            for page in mine:
                kvmexit_set_parked(&(<Page>page).c, True)  # P2: as good as parked, or two handlers would wait for each other
            kvmexit_changed()
            self.ask()
            while True:
                with cython.critical_section(_still):
                    seen = kvmexit_seen_changes()
                    # In this order: the first may wait, and let the section go, but who stands still stays so.
                    if self.stopped(me) and alone(me, held):
                        self.granted[me] = self.granted.get(me, 0) + 1
                        for page in mine:
                            kvmexit_set_parked(&(<Page>page).c, False)  # P3: in the section that grants
                        return
                with nogil:
                    kvmexit_await_change(seen, again)
                PyErr_CheckSignals()
                self.handle.check()
                if seen == kvmexit_seen_changes():
                    self.ask()
        except BaseException:
            self.end()  # P4: taken back at once; but no handler goes on under another's pause, not even with an exception
            while True:
                with cython.critical_section(_still):
                    seen = kvmexit_seen_changes()
                    if alone(me, held):
                        for page in mine:
                            kvmexit_set_parked(&(<Page>page).c, False)
                        break
                with nogil:
                    kvmexit_await_change(seen, again)
            raise

    def resume(self):
        """See VM.resume()."""
        self.handle.check()
        me = PyThread_get_thread_ident()
        with cython.critical_section(_still):
            if not self.granted:
                raise Error("resume() without a pause() in effect")
            holder = me if me in self.granted else next(iter(self.granted))
            self.granted[holder] -= 1
            if not self.granted[holder]:
                del self.granted[holder]
        self.end()

    def end(self):
        """One pause less; the last one lets the vCPUs go (P7)."""
        with cython.critical_section(_still):
            self.pauses -= 1
            if not self.pauses:
                self.release()
        kvmexit_changed()  # P9: also when pauses are left, one less may be what a handler waits for

    cdef int release(self) except -1:
        """No pause is asked for any longer."""
        for page in alive(self.weak_pages):
            _release_page(page)
        return 0

    cdef list run_by(self, unsigned long me):
        """The Pages of vCPUs in whose run() a thread is."""
        return [page for page in alive(self.weak_pages) if kvmexit_owner(&(<Page>page).c) == me]

    cdef bint stopped(self, unsigned long me):
        """Whether all vCPUs but this thread's own stand still."""
        cdef unsigned long owner
        for page in alive(self.weak_pages):
            with cython.critical_section(page):  # nobody holds it for a look: Page.hold()
                owner = kvmexit_owner(&(<Page>page).c)
            if owner and owner != me and not kvmexit_parked(&(<Page>page).c):
                return False
        return True

    def close(self):
        """The VM is being closed: no run() begins any more, and no pause holds any longer."""
        with cython.critical_section(_still):
            self.granted.clear()
            for page in alive(self.weak_pages):
                kvmexit_shut(&(<Page>page).c)
            self.release()
        kvmexit_changed()

    cdef int ask(self) except -1:
        for page in self.pages():
            try:
                _ask_to_pause(page)
            except KvmError:
                pass  # the signal queue is full: again in a moment
        return 0
