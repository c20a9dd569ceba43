/*
 * A 16550A's registers, and a file descriptor for its transmitter. No Python.
 *
 * Sources: the PC16550D data sheet (National Semiconductor, June 1995), section 8, and Linux's drivers/tty/serial/8250/
 * 8250_port.c, autoconfig() and size_fifo(), for what drivers hold it to.
 *
 * There is no time in it: what is sent is sent at once, so the transmitter is always empty, and what is received is there as
 * soon as there is room. Baud rate, parity and break are kept in their registers and do nothing.
 *
 * Threads. `lock` guards the registers and the receiver. It is held over one exit's register accesses, 4096 of them at most,
 * or over a copy of at most as many bytes; no system call is made under it, so who waits for it waits for a thread that is
 * not waiting for anything (feed() has the GIL meanwhile: a holder never wants it). The descriptor is written to outside of
 * it. That keeps the order of bytes as far as the guest can tell: a vCPU goes on only when its bytes are written, so what
 * it does afterwards, and whom it tells, comes later. Two vCPUs that send at the same time race, as they do on a wire.
 */
#ifndef KVMEXIT_SERIAL_H
#define KVMEXIT_SERIAL_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "include/kvmexit/kvmexit.h"
#include "include/kvmexit/uapi.h"

#define KVMEXIT_SERIAL_FIFO 16
#define KVMEXIT_SERIAL_LINE 4096        /* bytes fed that have not reached the FIFO */
#define KVMEXIT_SERIAL_CHUNK 4096       /* of one write(2): PIPE_BUF, which a pipe that polls as writable has room for */
#define KVMEXIT_SERIAL_TICK_MS 50       /* how long a signal just before poll(2) can stay unnoticed */
#define KVMEXIT_SERIAL_PATIENCE_MS 1000 /* for who reads the descriptor, where the vCPU is wanted elsewhere */

enum { /* offsets; those of the same number by direction, or by LCR_DLAB */
    KVMEXIT_RBR = 0, KVMEXIT_THR = 0, KVMEXIT_DLL = 0, KVMEXIT_IER = 1, KVMEXIT_DLM = 1, KVMEXIT_IIR = 2, KVMEXIT_FCR = 2,
    KVMEXIT_LCR = 3, KVMEXIT_MCR = 4, KVMEXIT_LSR = 5, KVMEXIT_MSR = 6, KVMEXIT_SCR = 7
};

enum {
    KVMEXIT_IER_RECEIVED = 1, KVMEXIT_IER_EMPTY = 2, KVMEXIT_IER_LINE = 4, KVMEXIT_IER_MODEM = 8,
    KVMEXIT_IIR_MODEM = 0, KVMEXIT_IIR_NONE = 1, KVMEXIT_IIR_EMPTY = 2, KVMEXIT_IIR_RECEIVED = 4, KVMEXIT_IIR_LINE = 6,
    KVMEXIT_IIR_FIFO = 0xc0,
    KVMEXIT_FCR_ENABLE = 1, KVMEXIT_FCR_RESET_RECEIVER = 2,
    KVMEXIT_LCR_DLAB = 0x80,
    KVMEXIT_MCR_LOOP = 0x10, KVMEXIT_MCR_BITS = 0x1f,
    KVMEXIT_LSR_READY = 1, KVMEXIT_LSR_OVERRUN = 2, KVMEXIT_LSR_EMPTY = 0x60, /* THRE and TEMT */
    KVMEXIT_MSR_CTS = 0x10, KVMEXIT_MSR_DSR = 0x20, KVMEXIT_MSR_RI = 0x40, KVMEXIT_MSR_DCD = 0x80
};

struct kvmexit_serial {
    int fd, waits;          /* waits: for who reads it; it may block */
    uint64_t sent, dropped; /* atomic */
    pthread_mutex_t lock;   /* of all that follows */
    uint8_t ier, fcr, lcr, mcr, scr, divisor[2];
    uint8_t lines, changed; /* MSR, high and low half */
    uint8_t overrun;
    uint8_t emptied;        /* the transmitter, and nobody has read it in IIR */
    uint8_t fifo[KVMEXIT_SERIAL_FIFO], line[KVMEXIT_SERIAL_LINE];
    size_t received;        /* bytes in fifo, the oldest first */
    size_t first, waiting;  /* bytes in line, a ring */
};

/* ---- the receiver; all with the lock held ---- */

static inline size_t kvmexit_serial_depth(const struct kvmexit_serial *s)
{
    return s->fcr & KVMEXIT_FCR_ENABLE ? KVMEXIT_SERIAL_FIFO : 1;
}

/* Take in what the line has, where there is room. In loopback the line is cut off, and waits. */
static inline void kvmexit_serial_receive(struct kvmexit_serial *s)
{
    while (s->waiting && s->received < kvmexit_serial_depth(s) && !(s->mcr & KVMEXIT_MCR_LOOP)) {
        s->fifo[s->received++] = s->line[s->first];
        s->first = (s->first + 1) % KVMEXIT_SERIAL_LINE;
        s->waiting--;
    }
}

/* A full FIFO loses what comes, a full register what it has. */
static inline void kvmexit_serial_loop(struct kvmexit_serial *s, uint8_t value)
{
    if (s->received < kvmexit_serial_depth(s)) {
        s->fifo[s->received++] = value;
        return;
    }
    s->overrun = KVMEXIT_LSR_OVERRUN;
    if (!(s->fcr & KVMEXIT_FCR_ENABLE))
        s->fifo[0] = value;
}

/* ---- registers; all with the lock held ---- */

static inline uint8_t kvmexit_serial_cause(const struct kvmexit_serial *s)
{
    if (s->ier & KVMEXIT_IER_LINE && s->overrun)
        return KVMEXIT_IIR_LINE;
    if (s->ier & KVMEXIT_IER_RECEIVED && s->received)
        return KVMEXIT_IIR_RECEIVED;
    if (s->ier & KVMEXIT_IER_EMPTY && s->emptied)
        return KVMEXIT_IIR_EMPTY;
    if (s->ier & KVMEXIT_IER_MODEM && s->changed)
        return KVMEXIT_IIR_MODEM;
    return KVMEXIT_IIR_NONE;
}

static inline uint8_t kvmexit_serial_lines(uint8_t mcr)
{
    if (!(mcr & KVMEXIT_MCR_LOOP))
        return KVMEXIT_MSR_DCD | KVMEXIT_MSR_DSR | KVMEXIT_MSR_CTS; /* somebody is there, and ready */
    return (uint8_t)((mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 0x0c) << 4); /* RTS: CTS, DTR: DSR, OUT1: RI, OUT2: DCD */
}

static inline uint8_t kvmexit_serial_read(struct kvmexit_serial *s, uint64_t offset)
{
    uint8_t value = 0;
    if (s->lcr & KVMEXIT_LCR_DLAB && offset <= KVMEXIT_DLM)
        return s->divisor[offset];
    switch (offset) {
    case KVMEXIT_RBR:
        if (s->received) {
            value = s->fifo[0];
            memmove(s->fifo, s->fifo + 1, --s->received);
            kvmexit_serial_receive(s);
        }
        return value;
    case KVMEXIT_IER:
        return s->ier;
    case KVMEXIT_IIR:
        value = kvmexit_serial_cause(s);
        if (value == KVMEXIT_IIR_EMPTY)
            s->emptied = 0;
        return s->fcr & KVMEXIT_FCR_ENABLE ? value | KVMEXIT_IIR_FIFO : value;
    case KVMEXIT_LCR:
        return s->lcr;
    case KVMEXIT_MCR:
        return s->mcr;
    case KVMEXIT_LSR:
        value = KVMEXIT_LSR_EMPTY | s->overrun | (s->received ? KVMEXIT_LSR_READY : 0);
        s->overrun = 0;
        return value;
    case KVMEXIT_MSR:
        value = s->lines | s->changed;
        s->changed = 0;
        return value;
    case KVMEXIT_SCR:
        return s->scr;
    }
    return 0xff; /* beyond */
}

/* -> whether the byte is to be sent. */
static inline int kvmexit_serial_write(struct kvmexit_serial *s, uint64_t offset, uint8_t value)
{
    uint8_t lines;
    if (s->lcr & KVMEXIT_LCR_DLAB && offset <= KVMEXIT_DLM) {
        s->divisor[offset] = value;
        return 0;
    }
    switch (offset) {
    case KVMEXIT_THR:
        s->emptied = 1;
        if (!(s->mcr & KVMEXIT_MCR_LOOP))
            return 1;
        kvmexit_serial_loop(s, value);
        return 0;
    case KVMEXIT_IER:
        if (value & ~s->ier & KVMEXIT_IER_EMPTY)
            s->emptied = 1; /* it is empty: drivers begin to send by enabling this */
        s->ier = value & 0x0f;
        return 0;
    case KVMEXIT_FCR: /* without ENABLE the other bits mean nothing; a change of it empties the FIFO */
        if ((value ^ s->fcr) & KVMEXIT_FCR_ENABLE || (value & KVMEXIT_FCR_ENABLE && value & KVMEXIT_FCR_RESET_RECEIVER))
            s->received = 0;
        s->fcr = value & KVMEXIT_FCR_ENABLE;
        kvmexit_serial_receive(s);
        return 0;
    case KVMEXIT_LCR:
        s->lcr = value;
        return 0;
    case KVMEXIT_MCR:
        s->mcr = value & KVMEXIT_MCR_BITS;
        lines = kvmexit_serial_lines(s->mcr);
        s->changed |= ((s->lines ^ lines) & ~KVMEXIT_MSR_RI) >> 4 | (s->lines & ~lines & KVMEXIT_MSR_RI) >> 4;
        s->lines = lines;
        kvmexit_serial_receive(s);
        return 0;
    case KVMEXIT_SCR:
        s->scr = value;
        return 0;
    }
    return 0; /* LSR, MSR, and beyond */
}

/* ---- the transmitter; without the lock ---- */

static inline int64_t kvmexit_serial_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/*
 * Wait for room, or for an error that write(2) will name. 0: whoever reads does not, and the vCPU is wanted elsewhere: kicks,
 * time-outs, pauses and the main thread's tick set immediate_exit, and end a poll(2) (never restarted, which a write(2) is).
 * Of a posted write there is no `run`: every vCPU of the VM waits for who drains it, so it does not wait at all.
 */
static inline int kvmexit_serial_wait(const struct kvmexit_serial *s, const struct kvm_run *run)
{
    struct pollfd room;
    int64_t begun = 0;
    room.fd = s->fd;
    room.events = POLLOUT;
    for (;;) {
        int found = poll(&room, 1, run == NULL ? 0 : KVMEXIT_SERIAL_TICK_MS);
        if (found > 0 || (found < 0 && errno != EINTR))
            return 1;
        if (begun == 0)
            begun = kvmexit_serial_now_ms();
        if (run == NULL
            || (__atomic_load_n(&run->immediate_exit, __ATOMIC_RELAXED)
                && kvmexit_serial_now_ms() - begun >= KVMEXIT_SERIAL_PATIENCE_MS))
            return 0;
    }
}

static inline void kvmexit_serial_send(struct kvmexit_serial *s, const uint8_t *at, size_t size, const struct kvm_run *run)
{
    size_t done = 0;
    while (done < size) {
        ssize_t n;
        if (s->waits && !kvmexit_serial_wait(s, run))
            break;
        n = write(s->fd, at + done, size - done);
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || (errno != EINTR && !(errno == EAGAIN && s->waits)))
            break;
    }
    __atomic_fetch_add(&s->sent, done, __ATOMIC_RELAXED);
    if (done < size)
        __atomic_fetch_add(&s->dropped, size - done, __ATOMIC_RELAXED);
}

/* ---- from outside ---- */

static inline uint64_t kvmexit_serial_counted(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

/* -> 0 or an errno. All else is zero already: after a reset, but for the divisor of 9600 baud, since guests divide by it. */
static inline int kvmexit_serial_init(struct kvmexit_serial *s, int fd, int waits)
{
    s->fd = fd;
    s->waits = waits;
    s->divisor[0] = 12;
    s->lines = kvmexit_serial_lines(0);
    return pthread_mutex_init(&s->lock, NULL);
}

/* -> how many there is room for. */
static inline size_t kvmexit_serial_feed(struct kvmexit_serial *s, const uint8_t *at, size_t size)
{
    size_t i;
    pthread_mutex_lock(&s->lock);
    for (i = 0; i < size && s->waiting < KVMEXIT_SERIAL_LINE; i++)
        s->line[(s->first + s->waiting++) % KVMEXIT_SERIAL_LINE] = at[i];
    kvmexit_serial_receive(s);
    pthread_mutex_unlock(&s->lock);
    return i;
}

static inline size_t kvmexit_serial_pending(struct kvmexit_serial *s)
{
    size_t pending;
    pthread_mutex_lock(&s->lock);
    pending = s->waiting + s->received;
    pthread_mutex_unlock(&s->lock);
    return pending;
}

/* A wider access is one of each of its bytes, low first, as a bus of eight bits has it. */
static inline int kvmexit_serial_access(struct kvmexit_exit *exit, void *opaque)
{
    struct kvmexit_serial *s = (struct kvmexit_serial *)opaque;
    uint8_t *data = (uint8_t *)exit->data, out[KVMEXIT_SERIAL_CHUNK];
    uint64_t offset = exit->address - exit->base, total = exit->size * exit->count, i;
    size_t n = 0;
    if (data == NULL || (exit->reason != KVM_EXIT_IO && exit->reason != KVM_EXIT_MMIO))
        return KVMEXIT_PASS;
    pthread_mutex_lock(&s->lock);
    for (i = 0; i < total; i++) {
        uint64_t at = offset + i % exit->size; /* a string instruction stays where it is */
        if (!exit->is_write)
            data[i] = kvmexit_serial_read(s, at);
        else if (kvmexit_serial_write(s, at, data[i])) {
            out[n++] = data[i];
            if (n == sizeof out) {
                pthread_mutex_unlock(&s->lock);
                kvmexit_serial_send(s, out, n, exit->run);
                n = 0;
                pthread_mutex_lock(&s->lock);
            }
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (n)
        kvmexit_serial_send(s, out, n, exit->run);
    return KVMEXIT_DONE;
}

#endif /* KVMEXIT_SERIAL_H */
