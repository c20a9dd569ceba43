from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct Step:
    int error
    int64_t reason        # -1: not written
    uint16_t flags
    uint16_t used         # bytes of payload
    uint32_t data_size    # PIO bytes
    size_t data           # their place in the script's arena
    uint64_t rip
    uint64_t delay_ns
    int spin
    int second_half
    uint8_t payload[256]


cdef struct Entry:
    int immediate_exit
    uint64_t dirty_regs


cdef struct Program:
    Step *steps
    uint8_t *arena        # PIO bytes: what the guest wrote, or what userspace answered
    size_t count, position
    uint64_t repeat       # passes left, this one included
    uint64_t until        # when the guest will have run for the next step's delay; 0: it has not begun
    long open             # the step whose exit userspace is answering, or -1
    int keep              # whether answers and entries are kept
    Entry *entries        # the first MAX_ENTRIES of them
    size_t entered


cdef class Script:
    cdef Program program
