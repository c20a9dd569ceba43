"""Which guest memory is private, and how a range becomes private or shared.

The converter is plain C data and functions that need no GIL. Its lock covers everything that has to agree: the shadow of
KVM's attributes (KVM has no way to read them back), the ioctl that changes them, and the discard of the side that went
out of use. Nobody waits for the GIL while holding the lock, nor for the lock while holding the GIL: a function here that
takes the lock gives up after LOCK_WAIT_MS (BUSY), so that its caller can look at signals and come back.

The lock excludes conversions, not accesses of the guest or views of the host: data in a range that is being converted is
lost at some moment of it.
"""

from operator import index

cimport cython
from libc.errno cimport EINTR, ENOMEM, ENOSPC, errno
from libc.stdint cimport UINT64_MAX, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove, memset
from posix.mman cimport munmap

from kvmexit._ioctl cimport Handle
from kvmexit._uapi cimport (
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION, kvm_memory_attributes,
    kvm_userspace_memory_region2,
)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *address, size_t size, int advice)
    const int MADV_DONTNEED
    const int MADV_REMOVE

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long long offset, long long size)
    const int FALLOC_FL_PUNCH_HOLE
    const int FALLOC_FL_KEEP_SIZE

cdef extern from * nogil:
    int __builtin_ctzll(unsigned long long)


cdef enum:
    PAGE_SHIFT = 12
    PAGE = 1 << PAGE_SHIFT
    LOCK_WAIT_MS = 100
    CHUNK = 1 << 26  # bytes converted before the lock is given up: some ms of the kernel's time


# ---- the shadow: a bit a page ----

cdef uint64_t find(Region *r, uint64_t page, uint64_t end, bint private, bint wanting) noexcept nogil:
    """The first page of [page, end) that still has to become private (shared), or that need not; `end` if there is none.

    Pages are counted from the region's beginning. A page whose state is not known still has to.
    """
    cdef uint64_t word, at
    while page < end:
        word = r.bits[page >> 6] if r.bits != NULL else 0
        if private:
            word = ~word
        if r.known != NULL:
            word |= ~r.known[page >> 6]
        if not wanting:
            word = ~word
        word >>= page & 63
        if word:
            at = page + <uint64_t>__builtin_ctzll(word)
            return at if at < end else end
        page = (page | 63) + 1
    return end


cdef void mark(Region *r, uint64_t page, uint64_t end, bint private) noexcept nogil:
    """Note that the pages [page, end) have this state."""
    cdef uint64_t mask, upto
    if r.bits == NULL:
        return  # always shared
    while page < end:
        upto = (page | 63) + 1
        if upto > end:
            upto = end
        mask = (UINT64_MAX >> (64 - (upto - page))) << (page & 63)
        if private:
            r.bits[page >> 6] |= mask
        else:
            r.bits[page >> 6] &= ~mask
        if r.known != NULL:
            r.known[page >> 6] |= mask
        page = upto


cdef uint64_t page_at(Region *r, uint64_t gpa) noexcept nogil:
    """The page that holds `gpa`, or the first one where that lies before the region."""
    return (max(gpa, r.first) - r.first) >> PAGE_SHIFT


cdef uint64_t pages_upto(Region *r, uint64_t last) noexcept nogil:
    """How many pages there are up to address `last`, or in all."""
    return ((min(last, r.last) - r.first) >> PAGE_SHIFT) + 1


cdef uint64_t address(Region *r, uint64_t page) noexcept nogil:
    return r.first + (page << PAGE_SHIFT)


cdef int give_bits(Region *r, bint unknown) except -1:
    """Room for the shadow. It is zeros that the host gives pages for only once they are written: uniformly shared memory
    costs none."""
    cdef uint64_t words = (pages_upto(r, r.last) + 63) >> 6
    r.bits = <uint64_t *>calloc(words, sizeof(uint64_t))
    if r.bits == NULL:
        raise MemoryError
    if unknown:
        r.known = <uint64_t *>calloc(words, sizeof(uint64_t))
        if r.known == NULL:
            raise MemoryError
    return 0


cdef void free_region(Region *r) noexcept:
    free(r.bits)
    free(r.known)
    free(r.pieces)
    if r.private_side != NULL:
        munmap(r.private_side, r.last - r.first + 1)
    memset(r, 0, sizeof(r[0]))
    r.gmem_fd = -1


# ---- the table of regions ----

cdef size_t position(Converter *c, uint64_t gpa) noexcept nogil:
    """Of the first region that ends at `gpa` or above."""
    cdef size_t low = 0, high = c.count, middle
    while low < high:
        middle = (low + high) // 2
        if c.regions[middle].last < gpa:
            low = middle + 1
        else:
            high = middle
    return low


@cython.final
cdef class Conversions:
    """Internal: the converter of one VM's memory."""

    def __cinit__(self, Handle handle, AttributesBackend backend, list numbers):
        if pthread_mutex_init(&self.c.lock, NULL) != 0:
            raise MemoryError
        self.c.chunk = CHUNK
        if backend is not None:
            backend.bind(handle, &self.c)
            self.backend = backend
        if numbers and not 0 <= min(numbers) <= max(numbers) < 1 << 16:
            raise ValueError(f"slot numbers are in 0..65535, not {min(numbers)}..{max(numbers)}")
        self.c.number_limit = max(numbers, default=0) + 1
        self.c.numbers = <uint64_t *>calloc((self.c.number_limit + 63) >> 6, sizeof(uint64_t))
        if self.c.numbers == NULL:
            raise MemoryError
        for number in numbers:
            put_number(&self.c, number)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.c.lock)
        free(self.c.regions)
        free(self.c.numbers)


cdef Step insert(Converter *c, Region *r) noexcept nogil:
    """Let conversions find a region. BUSY, SET_FAILED where there is no memory, DONE."""
    cdef Region **grown
    cdef size_t i
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return BUSY
    grown = <Region **>realloc(c.regions, (c.count + 1) * sizeof(Region *))
    if grown != NULL:
        c.regions = grown
        i = position(c, r.first)
        memmove(&grown[i + 1], &grown[i], (c.count - i) * sizeof(Region *))
        grown[i] = r
        c.count += 1
    pthread_mutex_unlock(&c.lock)
    return DONE if grown != NULL else SET_FAILED


cdef Result withdraw(Converter *c, Region *r) noexcept nogil:
    """Make a region shared, so that its addresses keep nothing of it, and let conversions no longer find it."""
    cdef Result result
    cdef size_t i
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return Result(BUSY, 0, 0, 0)
    result = change(c, r.first, r.last, False, False, NULL)
    if result.step == DONE:
        i = position(c, r.first)
        if i < c.count and c.regions[i] == r:
            memmove(&c.regions[i], &c.regions[i + 1], (c.count - i - 1) * sizeof(Region *))
            c.count -= 1
    pthread_mutex_unlock(&c.lock)
    return result


cdef int take_number(Converter *c) noexcept nogil:
    """A free memslot number, or -1. The lock is held."""
    cdef size_t word
    cdef uint32_t bit
    for word in range((c.number_limit + 63) >> 6):
        if c.numbers[word]:
            bit = <uint32_t>__builtin_ctzll(c.numbers[word])
            c.numbers[word] &= c.numbers[word] - 1
            return <int>(word * 64 + bit)
    return -1


cdef void put_number(Converter *c, uint32_t number) noexcept nogil:
    """Give a memslot number back. The lock is held."""
    c.numbers[number >> 6] |= <uint64_t>1 << (number & 63)


cdef int reserve_number(Converter *c) noexcept nogil:
    """As take_number(), with the lock taken; -2: BUSY."""
    cdef int number
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return -2
    number = take_number(c)
    pthread_mutex_unlock(&c.lock)
    return number


cdef Step release_number(Converter *c, uint32_t number) noexcept nogil:
    """As put_number(), with the lock taken."""
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return BUSY
    put_number(c, number)
    pthread_mutex_unlock(&c.lock)
    return DONE


cdef Step exclude(Converter *c, Region *r, int *fd) noexcept nogil:
    """Take a region's guest_memfd from it; the caller closes it."""
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return BUSY
    fd[0] = kvmexit_take_fd(&r.gmem_fd)
    pthread_mutex_unlock(&c.lock)
    return DONE


# ---- converting ----

cdef Result examine(Converter *c, uint64_t first, uint64_t last, bint private) noexcept nogil:
    """Whether a range can become private (shared): asked before anything is done."""
    cdef Result result
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return Result(BUSY, 0, first, first)
    result = refuse(c, first, last) if private else Result(DONE, 0, last, last)
    pthread_mutex_unlock(&c.lock)
    return result


cdef Result refuse(Converter *c, uint64_t first, uint64_t last) noexcept nogil:
    """Why a range cannot become private, and where; or DONE. Pages that are private already need nothing."""
    cdef Region *r
    cdef uint64_t at = first, page, end, undone = last
    cdef bint all_done = True
    cdef Step step
    cdef size_t i = position(c, first)
    while True:
        if i == c.count or c.regions[i].first > at:
            return Result(NO_SLOT, 0, at if all_done else undone, at)
        r = c.regions[i]
        end = pages_upto(r, last)
        page = find(r, page_at(r, at), end, True, True)
        if page < end:
            at = address(r, page)
            if all_done:
                undone, all_done = at, False
            step = DONE
            if c.backend == NULL:
                step = NO_BACKEND
            elif r.gmem_fd < 0:
                step = NO_PRIVATE_SIDE
            elif r.shared_discard == UNDECIDED:
                step = UNDECIDED_DISCARD
            if step != DONE:
                return Result(step, 0, undone, at)
        if r.last >= last:
            return Result(DONE, 0, last, last)
        at = r.last + 1
        i += 1


cdef Result examine_fault(
        Converter *c, uint64_t first, uint64_t last, bint private, uint64_t *low, uint64_t *high) noexcept nogil:
    """What a fault over a range asks for. DONE: [low, high] are the slots that it lies in, and `at` is before `last` where a
    page has not the wanted state. NO_SLOT; NO_PRIVATE_SIDE, whatever the state: what is private without one faults for ever.
    """
    cdef Result result = Result(DONE, 0, last, last)
    cdef Region *r
    cdef uint64_t at = first, page, end
    cdef size_t i
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return Result(BUSY, 0, first, first)
    i = position(c, first)
    while True:
        if i == c.count or c.regions[i].first > at:
            result = Result(NO_SLOT, 0, first, at)
            break
        r = c.regions[i]
        if private and r.gmem_fd < 0:
            result = Result(NO_PRIVATE_SIDE, 0, first, at)
            break
        if at == first:
            low[0] = r.first
        high[0] = r.last
        end = pages_upto(r, last)
        page = find(r, page_at(r, at), end, private, True)
        if page < end:
            result.at = address(r, page)
        if r.last >= last:
            break
        at = r.last + 1
        i += 1
    pthread_mutex_unlock(&c.lock)
    return result


cdef Result convert_chunk(Converter *c, uint64_t first, uint64_t last, bint private, Tally *tally) noexcept nogil:
    """Convert [first, last], or its first chunk: `at` says up to where every page has the wanted state. `tally`: what is
    converted is added to it; or NULL."""
    cdef Result result
    cdef size_t i
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return Result(BUSY, 0, first, first)
    if not private:  # over a hole in one step: a guest may ask for all of 2**64
        i = position(c, first)
        if i == c.count or c.regions[i].first > last:
            pthread_mutex_unlock(&c.lock)
            return Result(DONE, 0, last, last)
        first = max(first, c.regions[i].first)
    if last - first >= c.chunk:
        last = first | (c.chunk - 1)
    result = Result(DONE, 0, last, last)
    if private:
        result = refuse(c, first, last)
    if result.step == DONE:
        result = change(c, first, last, private, True, tally)
    pthread_mutex_unlock(&c.lock)
    return result


cdef Result change(
        Converter *c, uint64_t first, uint64_t last, bint private, bint discards, Tally *tally) noexcept nogil:
    """Give every page of a range that lies in a region the wanted state, with one call of the backend a run that has the
    other. The lock is held. Where there is no region everything is shared already."""
    cdef Result result
    cdef Region *r
    cdef uint64_t page, end, run_last = last
    cdef size_t i = position(c, first), n
    while i < c.count and c.regions[i].first <= last:
        r = c.regions[i]
        end = pages_upto(r, last)
        page = find(r, page_at(r, first), end, private, True)
        if page == end:
            i += 1
            continue
        if c.backend == NULL:
            return Result(NO_BACKEND, 0, address(r, page), address(r, page))
        n = end_of_run(c, i, page, last, private, &run_last)
        result = change_run(c, i, n, address(r, page), run_last, private, discards, tally)
        if result.step != DONE or run_last == last:
            return result
        first = run_last + 1
        i = n
    return Result(DONE, 0, last, last)


cdef size_t end_of_run(
        Converter *c, size_t i, uint64_t page, uint64_t last, bint private, uint64_t *run_last) noexcept nogil:
    """Where the run that begins at a page of region i ends: before a page that has the wanted state; or it goes on in the
    regions that adjoin, where the backend can. -> the region it ends in."""
    cdef Region *r = c.regions[i]
    cdef uint64_t end
    while True:
        end = pages_upto(r, last)
        page = find(r, page, end, private, False)
        run_last[0] = address(r, page) - 1
        if page < end or run_last[0] == last or not c.backend.merges or i + 1 == c.count:
            return i
        if c.regions[i + 1].first != run_last[0] + 1 or find(c.regions[i + 1], 0, 1, private, True) != 0:
            return i
        i += 1
        r = c.regions[i]
        page = 0


cdef Result change_run(
        Converter *c, size_t i, size_t n, uint64_t first, uint64_t last, bint private, bint discards,
        Tally *tally) noexcept nogil:
    """Convert a run that lies in the regions i to n: attributes, shadow, then discard what went out of use.

    Where a discard fails the attributes are put back, so that the guest goes on with the data it has, and asking again does
    everything again. But where nobody knows what they were (adopted memory): to put them back could turn a page around that
    was as it should be.
    """
    cdef uint64_t from_, to
    cdef Region *r
    cdef size_t k
    cdef int error = c.backend.set(c.backend, c.regions[i], first, last - first + 1, private)
    if error:
        return Result(SET_FAILED, error, first, first)
    mark_run(c, i, n, first, last, private)
    kvmexit_next_generation(&c.generation)
    for k in range(i, n + 1 if discards else i):
        r = c.regions[k]
        from_, to = max(first, r.first), min(last, r.last)
        error = discard(r, from_, to - from_ + 1, private)
        if error:
            if adopted(c, k, n) or c.backend.set(c.backend, r, from_, last - from_ + 1, not private) != 0:
                return Result(STUCK, error, from_, from_)
            mark_run(c, k, n, from_, last, not private)
            return Result(DISCARD_FAILED, error, from_, from_)
    if tally != NULL:
        tally.runs += 1
        tally.pages += ((last - first) >> PAGE_SHIFT) + 1
    return Result(DONE, 0, last, last)


cdef bint adopted(Converter *c, size_t i, size_t n) noexcept nogil:
    """Whether the regions i to n have pages that are not known, or were not before they were marked."""
    cdef size_t k
    for k in range(i, n + 1):
        if c.regions[k].known != NULL:
            return True
    return False


cdef void mark_run(Converter *c, size_t i, size_t n, uint64_t first, uint64_t last, bint private) noexcept nogil:
    cdef Region *r
    cdef size_t k
    for k in range(i, n + 1):
        r = c.regions[k]
        mark(r, page_at(r, first), pages_upto(r, last), private)


cdef int discard(Region *r, uint64_t gpa, uint64_t size, bint private) noexcept nogil:
    """Give back the memory of the side that `gpa` no longer uses. 0, or errno."""
    cdef uint64_t offset = gpa - r.first
    cdef void *shared = <void *><uintptr_t>(r.hva + offset)
    cdef Discard how = r.shared_discard if private else r.private_discard
    cdef int rc = 0
    while True:
        if how == DONTNEED:
            rc = madvise(shared, size, MADV_DONTNEED)
        elif how == REMOVE:
            rc = madvise(shared, size, MADV_REMOVE)
        elif how == PUNCH and r.gmem_fd >= 0:  # closed, it keeps nothing
            rc = fallocate(r.gmem_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r.gmem_offset + offset, size)
        if rc == 0 or errno != EINTR:
            return errno if rc != 0 else 0


# ---- looking ----

cdef int state_at(Converter *c, uint64_t gpa) noexcept nogil:
    """1 private, 0 shared, -1 not known, -2 BUSY."""
    cdef int state = 0
    cdef size_t i
    cdef uint64_t page
    cdef Region *r
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return -2
    i = position(c, gpa)
    if i < c.count and c.regions[i].first <= gpa:
        r = c.regions[i]
        page = page_at(r, gpa)
        if r.known != NULL and not r.known[page >> 6] >> (page & 63) & 1:
            state = -1
        elif r.bits != NULL:
            state = r.bits[page >> 6] >> (page & 63) & 1
    pthread_mutex_unlock(&c.lock)
    return state


cdef int has_state(Converter *c, uint64_t first, uint64_t last, bint private) noexcept nogil:
    """Whether every page of a range in one region surely has this state; -1 while somebody converts: it may be changing."""
    cdef int has = 0
    cdef size_t i
    cdef uint64_t end
    cdef Region *r
    if pthread_mutex_trylock(&c.lock) != 0:
        return -1
    i = position(c, first)
    if i < c.count and c.regions[i].first <= first and last <= c.regions[i].last:
        r = c.regions[i]
        end = pages_upto(r, last)
        has = find(r, page_at(r, first), end, private, True) == end
    pthread_mutex_unlock(&c.lock)
    return has


cdef bint locate(Converter *c, uint64_t hva, uint64_t span, uint64_t *gpa, uint64_t *size, bint *private) noexcept nogil:
    """Whether a host address is a region's, of either side, and where it is in the guest's memory: `span` bytes around it, a
    power of two, as far as they are the region's. Waits for the lock: _poison.h has why a signal handler may."""
    cdef Region *r
    cdef uint64_t base = 0, first, last
    cdef size_t i
    cdef bint found = False
    pthread_mutex_lock(&c.lock)
    for i in range(c.count):
        r = c.regions[i]
        base = r.hva
        private[0] = r.private_side != NULL and hva - <uint64_t><uintptr_t>r.private_side <= r.last - r.first
        if private[0]:
            base = <uint64_t><uintptr_t>r.private_side
        if hva - base <= r.last - r.first:
            first, last = max(hva & ~(span - 1), base), min(hva | (span - 1), base + (r.last - r.first))
            gpa[0], size[0] = r.first + (first - base), last - first + 1
            found = True
            break
    pthread_mutex_unlock(&c.lock)
    return found


cdef Step renew_private(Converter *c, Region *r, uint64_t gpa, uint64_t size, int *error) noexcept nogil:
    """Give up pages of the private side for new ones, of zeros. error: 0, or errno. NO_PRIVATE_SIDE: its guest_memfd is
    closed, or the region gone. With the lock: without it the descriptor may be another file's already."""
    cdef uint64_t offset = gpa - r.first
    cdef Step step = NO_PRIVATE_SIDE
    cdef size_t i
    cdef int rc = 0
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return BUSY
    for i in range(c.count):
        if c.regions[i] == r and r.gmem_fd >= 0:
            step = DONE
    if step == DONE:
        while True:
            rc = fallocate(r.gmem_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r.gmem_offset + offset, size)
            if rc == 0 or errno != EINTR:
                break
        if rc == 0 and r.private_side != NULL:  # its page tables still say that the page is poisoned
            rc = madvise(r.private_side + offset, size, MADV_DONTNEED)
        error[0] = errno if rc != 0 else 0
        kvmexit_next_generation(&c.generation)
    pthread_mutex_unlock(&c.lock)
    return step


cdef Step list_runs(Converter *c, Run **runs, size_t *count) noexcept nogil:
    """All regions as maximal runs of one state, malloc'ed; pages whose state is not known are left out."""
    cdef Run *grown
    cdef Region *r
    cdef size_t i, room = 0
    cdef uint64_t page, upto, end
    cdef bint private
    runs[0], count[0] = NULL, 0
    if kvmexit_lock_for(&c.lock, LOCK_WAIT_MS) != 0:
        return BUSY
    for i in range(c.count):
        r = c.regions[i]
        page, end = 0, pages_upto(r, r.last)
        while page < end:
            private = find(r, page, page + 1, True, True) != page
            if not private and find(r, page, page + 1, False, True) == page:
                page = page + 1 if r.known[page >> 6] else (page | 63) + 1  # neither: not known
                continue
            upto = find(r, page, end, private, True)
            if count[0] and runs[0][count[0] - 1].private == private and runs[0][count[0] - 1].last + 1 == (
                    address(r, page)):
                count[0] -= 1
            else:
                if count[0] == room:
                    room = room * 2 + 16
                    grown = <Run *>realloc(runs[0], room * sizeof(Run))
                    if grown == NULL:
                        pthread_mutex_unlock(&c.lock)
                        free(runs[0])
                        return SET_FAILED
                    runs[0] = grown
                runs[0][count[0]].first = address(r, page)
                runs[0][count[0]].private = private
            runs[0][count[0]].last = address(r, upto) - 1
            count[0] += 1
            page = upto
    pthread_mutex_unlock(&c.lock)
    return DONE


# ---- backends ----

cdef class AttributesBackend:
    """How a range of guest memory becomes private or shared. Passed to VM(attributes=...), one object a VM."""

    cdef int bind(self, Handle handle, Converter *c) except -1:
        if self.backend.set == NULL:
            raise TypeError("attributes is a KvmAttributes, SlotRebind or RecordedAttributes")
        if self.bound:
            raise ValueError(f"{self!r} belongs to another VM already: make one for each")
        self.bound = True
        self.backend.fd = handle.fd
        self.backend.own = c
        c.backend = &self.backend
        return 0

    def __repr__(self):
        return f"{type(self).__name__}()"


@cython.final
cdef class KvmAttributes(AttributesBackend):
    """KVM_SET_MEMORY_ATTRIBUTES on the VM: what a VM uses that has private memory.

    Source: Documentation/virt/kvm/api.rst; virt/kvm/kvm_main.c, kvm_vm_set_mem_attributes.
    """

    def __cinit__(self):
        self.backend.set = set_attributes
        self.backend.merges = True


cdef int set_attributes(Backend *b, Region *r, uint64_t gpa, uint64_t size, bint private) noexcept nogil:
    cdef kvm_memory_attributes argument
    argument.address = gpa
    argument.size = size
    argument.attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    argument.flags = 0
    while ioctl(b.fd, KVM_SET_MEMORY_ATTRIBUTES, &argument) < 0:
        if errno != EINTR:
            return errno
    return 0


@cython.final
cdef class SlotRebind(AttributesBackend):
    """Conversion for kernels without memory attributes: a slot's private side is a second memory, and a conversion makes
    KVM's memslots point to the one or the other, while the VM is paused.

    For prototypes, on any kernel: what is private is out of the reach of the slot's views and of memory.read(), but nothing
    protects it, and no exit tells shared from private accesses: the guest has to ask. Each run of private or shared pages
    takes one of KVM's memslots (KVM_CAP_NR_MEMSLOTS); ENOSPC when they are used up.
    """

    def __cinit__(self):
        self.backend.set = rebind


cdef int set_piece(Backend *b, Region *r, Piece *p, bint exists) noexcept nogil:
    """Make or delete a memslot. 0, or errno."""
    cdef kvm_userspace_memory_region2 region
    cdef uint64_t offset = p.first - r.first
    memset(&region, 0, sizeof(region))
    region.slot = p.number
    region.guest_phys_addr = p.first
    region.memory_size = p.last - p.first + 1 if exists else 0
    region.userspace_addr = (<uint64_t><uintptr_t>r.private_side if p.private else r.hva) + offset
    if b.fd < 0:
        return 0
    while ioctl(b.fd, KVM_SET_USER_MEMORY_REGION, &region) < 0:  # the older struct is the newer one's beginning
        if errno != EINTR:
            return errno
    return 0


cdef int rebind(Backend *b, Region *r, uint64_t gpa, uint64_t size, bint private) noexcept nogil:
    """Put the pieces of a region right for a run that changes: what is before it, it with neighbours of its new state, what
    is behind it. On failure the old pieces are put back."""
    cdef Converter *c = <Converter *>b.own
    cdef Piece fresh[3]
    cdef Piece *grown
    cdef Piece *old
    cdef Piece *whole = r.pieces
    cdef Piece joined = Piece(gpa, gpa + (size - 1), 0, private)
    cdef uint64_t last = joined.last
    cdef size_t begin = 0, end, n = 0, k, made = 0, deleted = 0
    cdef int error = 0, number
    while whole.last < gpa:  # pieces lie close and alternate, so the run is part of one
        whole += 1
        begin += 1
    end = begin + 1
    if whole.first < gpa:
        fresh[n] = Piece(whole.first, gpa - 1, 0, not private)
        n += 1
    elif begin > 0:
        begin -= 1
        joined.first = r.pieces[begin].first
    if whole.last == last and end < r.piece_count:
        joined.last = r.pieces[end].last
        end += 1
    fresh[n] = joined
    n += 1
    if whole.last > last:
        fresh[n] = Piece(last + 1, whole.last, 0, not private)
        n += 1
    for k in range(n):
        number = <int>r.pieces[begin + k].number if begin + k < end else take_number(c)
        if number < 0:
            error = ENOSPC
            n = k
            break
        fresh[k].number = <uint32_t>number
    if not error:
        grown = <Piece *>realloc(r.pieces, (r.piece_count + 2) * sizeof(Piece))
        if grown == NULL:
            error = ENOMEM
        else:
            r.pieces = grown
    old = r.pieces + begin
    while not error and deleted < end - begin:
        error = set_piece(b, r, &old[deleted], False)
        deleted += not error
    while not error and made < n:
        error = set_piece(b, r, &fresh[made], True)
        made += not error
    if error:
        for k in range(made):
            set_piece(b, r, &fresh[k], False)
        for k in range(deleted):
            set_piece(b, r, &old[k], True)
        for k in range(end - begin, n):
            put_number(c, fresh[k].number)
        return error
    for k in range(n, end - begin):
        put_number(c, old[k].number)
    memmove(old + n, old + (end - begin), (r.piece_count - end) * sizeof(Piece))
    for k in range(n):
        old[k] = fresh[k]
    r.piece_count = r.piece_count - (end - begin) + n
    return 0


@cython.final
cdef class RecordedAttributes(AttributesBackend):
    """For tests: notes what it is asked, changes nothing, and fails where told. What a ScriptedVM uses unless given another.

    failures: {number of the call, counted from 1: errno}. chunk: the most bytes of a conversion that
    come in one call, a power of two from 4096 on; with the failures it leaves conversions half done wherever a test wants
    them so. A real backend's is 64 MiB. (What memory.remove() makes shared comes as it lies.)
    Raises ValueError.
    """

    def __cinit__(self, failures=None, *, chunk=CHUNK):
        chunk = index(chunk)
        if not PAGE <= chunk < 1 << 63 or chunk & (chunk - 1):
            raise ValueError(f"chunk={chunk}: a power of two from {PAGE} on")
        self.chunk = chunk
        self.backend.set = record
        self.backend.merges = True
        failures = dict(failures or {})
        self.log.fail_at = <size_t *>calloc(max(len(failures), 1), sizeof(size_t))
        self.log.fail_with = <int *>calloc(max(len(failures), 1), sizeof(int))
        if self.log.fail_at == NULL or self.log.fail_with == NULL:
            raise MemoryError
        for at, error in failures.items():
            if index(at) < 1 or index(error) < 1:
                raise ValueError(f"failures {failures!r}: {{number of the call, from 1: errno}}")
            self.log.fail_at[self.log.fails] = at
            self.log.fail_with[self.log.fails] = error
            self.log.fails += 1

    def __dealloc__(self):
        free(self.log.calls)
        free(self.log.fail_at)
        free(self.log.fail_with)

    cdef int bind(self, Handle handle, Converter *c) except -1:
        AttributesBackend.bind(self, handle, c)
        self.backend.own = &self.log
        c.chunk = self.chunk
        return 0

    def __repr__(self):
        return f"RecordedAttributes({ {self.log.fail_at[i]: self.log.fail_with[i] for i in range(self.log.fails)} })"

    @property
    def calls(self):
        """-> [(gpa, size, private, errno or 0)], in order. Only while nothing converts."""
        return [(self.log.calls[i].gpa, self.log.calls[i].size, bool(self.log.calls[i].private), self.log.calls[i].error)
                for i in range(self.log.count)]

    @property
    def private(self):
        """-> the page addresses that are private by now, a set: what a kernel would hold."""
        pages = set()
        for gpa, size, private, error in self.calls:
            changed = range(gpa, gpa + size, PAGE)
            if not error:
                pages = pages.union(changed) if private else pages.difference(changed)
        return pages


cdef int record(Backend *b, Region *r, uint64_t gpa, uint64_t size, bint private) noexcept nogil:
    cdef Log *log = <Log *>b.own
    cdef Call *grown
    cdef size_t i
    cdef int error = 0
    if log.count == log.room:
        grown = <Call *>realloc(log.calls, (log.room * 2 + 64) * sizeof(Call))
        if grown == NULL:
            return ENOMEM
        log.calls = grown
        log.room = log.room * 2 + 64
    for i in range(log.fails):
        if log.fail_at[i] == log.count + 1:
            error = log.fail_with[i]
    log.calls[log.count] = Call(gpa, size, private, error)
    log.count += 1
    return error
