"""The vCPUs of one VM: which there are, and stopping all of them (pause) for as long as somebody works on the VM.

A vCPU stands still when its run() has returned, when run() has parked it (Vcpu.park), or when its handler itself waits in
pause(). Everything in `Vcpus` changes with the GIL held, and so do owners and `parked` of Python's runs; those of the C
API change without it (_page.h). What reaches a guest that runs is the PAUSE bit of its request word (_control.h). So a run()
that began before the bit was set is seen here as an owner and waited for, and one that begins later sees the bit and parks
first.

Two handlers that pause at the same time would wait for each other for ever. So a thread that waits in pause() counts as
stopped, and a handler's pause takes effect only while nobody else's is.

Nothing here that changes what others see runs Python code: so it happens at once for other threads, and no exception of a
signal handler, Ctrl-C first of all, leaves it half done. Nor is there a lock that a forked child could find taken.
"""

import weakref

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
cdef object _loop = None  # the module that has the thread-local state, which imports this one


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
        _all[:] = [reference for reference in _all if reference() is not None]
        _all.append(weakref.ref(self))

    def pages(self):
        """The Pages there are."""
        return alive(self.weak_pages)

    def add(self, Page page):
        """A new vCPU; Error where the VM is closed."""
        global _loop
        if _loop is None:
            from kvmexit import _loop as module
            _loop = module
        reference = weakref.ref(page)
        self.handle.check()
        self.weak_pages = [ref for ref in self.weak_pages if ref() is not None] + [reference]
        if self.pauses:
            _loop.ask_to_pause(page)  # P14: a vCPU made while the VM is paused is paused

    def pause(self):
        """See VM.pause()."""
        cdef unsigned long me = PyThread_get_thread_ident()
        cdef list mine = [], held = []
        cdef uint32_t seen
        cdef long again = <long>(_AGAIN_S * 1000)
        cdef Vcpus vcpus
        self.handle.check()
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
                seen = kvmexit_seen_changes()
                if alone(me, held) and self.stopped(me):
                    break
                with nogil:
                    kvmexit_await_change(seen, again)
                PyErr_CheckSignals()
                self.handle.check()
                if seen == kvmexit_seen_changes():
                    self.ask()
        except BaseException:
            self.end()  # P4: taken back at once; but no handler goes on under another's pause, not even with an exception
            while True:
                seen = kvmexit_seen_changes()
                if alone(me, held):
                    break
                with nogil:
                    kvmexit_await_change(seen, again)
            raise
        finally:
            for page in mine:
                kvmexit_set_parked(&(<Page>page).c, False)  # P3: in the section that grants
        self.granted[me] = self.granted.get(me, 0) + 1

    def resume(self):
        """See VM.resume()."""
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
        """One pause less; the last one lets the vCPUs go (P7)."""
        self.pauses -= 1
        if not self.pauses:
            self.release()
        kvmexit_changed()  # P9: also when pauses are left, one less may be what a handler waits for

    def release(self):
        """No pause is asked for any longer."""
        for page in alive(self.weak_pages):
            _loop.release_page(page)

    cdef list run_by(self, unsigned long me):
        """The Pages of vCPUs in whose run() a thread is."""
        return [page for page in alive(self.weak_pages) if kvmexit_owner(&(<Page>page).c) == me]

    cdef bint stopped(self, unsigned long me):
        """Whether all vCPUs but this thread's own stand still."""
        cdef unsigned long owner
        for page in alive(self.weak_pages):
            owner = kvmexit_owner(&(<Page>page).c)
            if owner and owner != me and not kvmexit_parked(&(<Page>page).c):
                return False
        return True

    def close(self):
        """The VM is being closed: no run() begins any more, and no pause holds any longer."""
        self.granted.clear()
        for page in alive(self.weak_pages):
            kvmexit_shut(&(<Page>page).c)
        self.release()
        kvmexit_changed()

    cdef int ask(self) except -1:
        for page in alive(self.weak_pages):
            try:
                _loop.ask_to_pause(page)
            except KvmError:
                pass  # the signal queue is full: again in a moment
        return 0
