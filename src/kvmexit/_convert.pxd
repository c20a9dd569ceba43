from libc.stdint cimport uint32_t, uint64_t

from kvmexit._ioctl cimport Handle


cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <time.h>

    /* A count that other threads watch without the lock. */
    static inline uint64_t kvmexit_generation(const uint64_t *count)
    {
        return __atomic_load_n(count, __ATOMIC_ACQUIRE);
    }
    static inline void kvmexit_next_generation(uint64_t *count)
    {
        __atomic_fetch_add(count, 1, __ATOMIC_RELEASE);
    }

    /* A descriptor that several may want to close: one of them gets it. */
    static inline int kvmexit_take_fd(int *fd)
    {
        return __atomic_exchange_n(fd, -1, __ATOMIC_ACQ_REL);
    }

    /* 0, or ETIMEDOUT after so many milliseconds. */
    static inline int kvmexit_lock_for(pthread_mutex_t *mutex, unsigned ms)
    {
    #ifdef __SANITIZE_THREAD__ /* gcc 12's runtime does not know pthread_mutex_clocklock(), and would see an unlock only */
        const clockid_t clock = CLOCK_REALTIME;
    #define pthread_mutex_clocklock(mutex, clock, until) pthread_mutex_timedlock(mutex, until)
    #else
        const clockid_t clock = CLOCK_MONOTONIC;
    #endif
        struct timespec until;
        if (pthread_mutex_trylock(mutex) == 0) /* nearly always, and then looking at the clock would be most of it */
            return 0;
        clock_gettime(clock, &until);
        until.tv_nsec += ms % 1000 * 1000000L;
        until.tv_sec += ms / 1000 + until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
        return pthread_mutex_clocklock(mutex, clock, &until);
    }
    """
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *) nogil
    int pthread_mutex_destroy(pthread_mutex_t *) nogil
    int pthread_mutex_lock(pthread_mutex_t *) nogil
    int pthread_mutex_trylock(pthread_mutex_t *) nogil
    int pthread_mutex_unlock(pthread_mutex_t *) nogil
    uint64_t kvmexit_generation(const uint64_t *) nogil
    void kvmexit_next_generation(uint64_t *) nogil
    int kvmexit_lock_for(pthread_mutex_t *, unsigned) nogil
    int kvmexit_take_fd(int *) nogil


cdef enum Discard:  # what gives the memory of the side that went out of use back
    NOTHING
    DONTNEED        # madvise(MADV_DONTNEED): private mappings; on shared ones it does nothing, and says so to nobody
    REMOVE          # madvise(MADV_REMOVE): a hole in the file behind a shared mapping
    PUNCH           # fallocate(FALLOC_FL_PUNCH_HOLE): guest_memfd
    UNDECIDED       # the caller's memory, and the caller did not say


cdef struct Piece:  # of SlotRebind: one of KVM's memslots
    uint64_t first, last
    uint32_t number
    bint private


cdef struct Region:  # the guest-physical range of one Slot
    uint64_t first, last     # inclusive
    uint64_t hva             # the shared side
    int gmem_fd              # holds the private side; -1: it has none
    uint64_t gmem_offset
    Discard shared_discard, private_discard
    uint64_t *bits           # a bit a page, set where private; NULL: no page ever was
    uint64_t *known          # a bit a page, set where `bits` is sure of it; NULL: everywhere
    Piece *pieces            # of SlotRebind, in order; the private side is mapped at `private_side`
    size_t piece_count
    char *private_side


cdef struct Backend:
    int (*set)(Backend *, Region *, uint64_t gpa, uint64_t size, bint private) noexcept nogil  # 0 or errno
    bint merges              # a range may go beyond the region
    int fd
    void *own


cdef struct Converter:
    pthread_mutex_t lock     # of everything below but `generation`
    Region **regions         # by address
    size_t count
    Backend *backend         # NULL: this VM cannot convert
    uint64_t *numbers        # a bit a memslot number, set where free
    size_t number_limit
    uint64_t chunk           # bytes converted before the lock is given up
    uint64_t generation      # atomic; grows with what may have repaired a fault: conversions, memslots


cdef enum Step:
    DONE
    BUSY                     # the lock was held for longer than we waited: look at signals, come back
    NO_SLOT
    NO_PRIVATE_SIDE
    UNDECIDED_DISCARD
    NO_BACKEND
    SET_FAILED
    DISCARD_FAILED           # and the attributes are as they were
    STUCK                    # the discard failed, and so did putting the attributes back: they are the new ones


cdef struct Result:
    Step step
    int error
    uint64_t at              # every page below has the wanted state
    uint64_t where           # what the step is about


cdef struct Tally:  # of what was converted
    uint64_t runs            # a call of the backend each
    uint64_t pages


cdef struct Run:
    uint64_t first, last
    bint private


cdef Result examine(Converter *c, uint64_t first, uint64_t last, bint private) noexcept nogil
cdef Result examine_fault(
    Converter *c, uint64_t first, uint64_t last, bint private, uint64_t *low, uint64_t *high) noexcept nogil
cdef Result convert_chunk(Converter *c, uint64_t first, uint64_t last, bint private, Tally *tally) noexcept nogil
cdef Step insert(Converter *c, Region *r) noexcept nogil
cdef Result withdraw(Converter *c, Region *r) noexcept nogil
cdef int state_at(Converter *c, uint64_t gpa) noexcept nogil
cdef int has_state(Converter *c, uint64_t first, uint64_t last, bint private) noexcept nogil
cdef bint locate(Converter *c, uint64_t hva, uint64_t span, uint64_t *gpa, uint64_t *size, bint *private) noexcept nogil
cdef Step renew_private(Converter *c, Region *r, uint64_t gpa, uint64_t size, int *error) noexcept nogil
cdef Step list_runs(Converter *c, Run **runs, size_t *count) noexcept nogil
cdef int reserve_number(Converter *c) noexcept nogil
cdef Step release_number(Converter *c, uint32_t number) noexcept nogil
cdef Step exclude(Converter *c, Region *r, int *fd) noexcept nogil
cdef int give_bits(Region *r, bint unknown) except -1
cdef void free_region(Region *r) noexcept


cdef class AttributesBackend:
    cdef Backend backend
    cdef bint bound

    cdef int bind(self, Handle handle, Converter *c) except -1


cdef class Conversions:  # owns a Converter; refers to no Memory or Slot, so those make no cycle through it
    cdef Converter c
    cdef AttributesBackend backend


cdef class KvmAttributes(AttributesBackend):
    pass


cdef class SlotRebind(AttributesBackend):
    pass


cdef struct Call:
    uint64_t gpa, size
    bint private
    int error


cdef struct Log:
    Call *calls
    size_t count, room
    size_t *fail_at
    int *fail_with
    size_t fails


cdef class RecordedAttributes(AttributesBackend):
    cdef Log log
    cdef uint64_t chunk
