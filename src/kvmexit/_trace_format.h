/* The trace file: docs/trace.md. What the writer (_record.h) and the reader (_replay.pyx) share. */
#ifndef KVMEXIT_TRACE_FORMAT_H
#define KVMEXIT_TRACE_FORMAT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "include/kvmexit/uapi.h"

#define KVMEXIT_TRACE_MAGIC "kvmexit\x1a"
#define KVMEXIT_TRACE_VERSION 1
#define KVMEXIT_TRACE_WORD 8u
#define KVMEXIT_TRACE_MOST_DATA 32768u /* PIO bytes of a record; a vCPU's mapping has room for less */

/* Why a part ended. In the order of _replay.ENDINGS. */
enum { KVMEXIT_TRACE_OPEN, KVMEXIT_TRACE_CLOSED, KVMEXIT_TRACE_ROTATED, KVMEXIT_TRACE_FAILED };

/* Of a record, beside an exit's outcome (_stats.h): what run() made of a return that is no exit. As in _replay.OUTCOMES. */
enum { KVMEXIT_TRACE_RETRIED = 16, KVMEXIT_TRACE_KICK, KVMEXIT_TRACE_TIMEOUT, KVMEXIT_TRACE_PAUSE, KVMEXIT_TRACE_DRAINED };

/* `how` of a record */
#define KVMEXIT_TRACE_IMMEDIATE 1u /* immediate_exit was set when KVM was entered */
#define KVMEXIT_TRACE_REGISTERS 2u /* struct kvm_regs follows */
#define KVMEXIT_TRACE_WAITED 8u    /* two words follow at the end: see kvmexit_trace_wait */
#define KVMEXIT_TRACE_BEGUN 4u     /* pending when recording began: `entered` and `left` are that moment */

struct kvmexit_trace_header {
    char magic[8];
    uint32_t version, header_size; /* bytes: the first record begins there */
    uint8_t recording[16];         /* random, the same in all parts of one recording */
    uint32_t part, vcpu;
    uint32_t run_size, vm_type;
    uint64_t first_ticks, first_ns; /* one moment: the records' clock, and CLOCK_REALTIME */
    double ns_per_tick;
    uint64_t size; /* bytes in use; 0 while it is written, and for ever where the writer was killed */
    uint32_t ended, error;
    uint64_t lost; /* records that could not be written */
    char kvmexit[24];
};
KVMEXIT_ASSERT(sizeof(struct kvmexit_trace_header) == 120);

struct kvmexit_trace_record {
    uint32_t sizes; /* of the whole in words (bits 0..15), of the union's copy in words (16..23). Written last: 0 before */
    uint16_t run_flags;
    uint8_t outcome;
    uint8_t settled; /* the answer is in */
    uint64_t entered, left; /* KVM, in ticks */
    uint64_t rip;           /* or all ones */
    uint32_t reason;
    uint16_t error;
    uint8_t state; /* cr8 (bits 0..3), if_flag (4), ready_for_interrupt_injection (5) */
    uint8_t how;
    /* then the union's first bytes; PIO bytes, or the answer; registers; the wait. Each in whole words */
};
KVMEXIT_ASSERT(sizeof(struct kvmexit_trace_record) == 40);

/* How the return before this one came to Python: it is not known any sooner. Only while times are measured. */
struct kvmexit_trace_wait {
    uint64_t asked, got; /* the GIL, in ticks */
};

/* What follows the payload and the data, in words. */
static inline size_t kvmexit_trace_tail(unsigned how)
{
    return ((how & KVMEXIT_TRACE_REGISTERS ? sizeof(struct kvm_regs) : 0)
               + (how & KVMEXIT_TRACE_WAITED ? sizeof(struct kvmexit_trace_wait) : 0))
        / KVMEXIT_TRACE_WORD;
}

static inline size_t kvmexit_trace_words(size_t bytes)
{
    return (bytes + KVMEXIT_TRACE_WORD - 1) / KVMEXIT_TRACE_WORD;
}

/* How much of the union each reason uses, in words. Beyond, and where s390 has layouts of its own: all of it. */
static const uint8_t kvmexit_trace_used[44] = {
    1, 1, 2, 9, 4, 0, 3, 0, 0, 2, 0, 0, 2, 32, 32, 3, 0, 17, 32, 11, 32, 0, 32, 1, 17, 32, 1, 7, 2, 3, 3, 0, 0, 0, 10, 10, 4, 1,
    3, 3, 8, 4, 2, 3};

/* Where userspace writes its answer: bytes of the union. PIO and MMIO reads are told apart by their payload. */
struct kvmexit_trace_span {
    uint16_t at, size;
};
static const struct kvmexit_trace_span kvmexit_trace_answers[44][2] = {
    [3] = {{56, 8}},           /* HYPERCALL: ret */
    [15] = {{4, 4}},           /* DCR: data */
    [18] = {{0, 256}},         /* OSI: gprs */
    [19] = {{8, 8}},           /* PAPR_HCALL: ret */
    [23] = {{0, 4}},           /* EPR */
    [27] = {{16, 8}, {24, 32}}, /* HYPERV: result; status, and up to pending_page */
    [29] = {{0, 1}, {16, 8}},  /* RDMSR: error, data */
    [30] = {{0, 1}},           /* WRMSR: error */
    [34] = {{24, 8}},          /* XEN: result */
    [35] = {{64, 16}},         /* RISCV_SBI: ret */
    [36] = {{24, 8}},          /* RISCV_CSR: ret_value */
    [38] = {{8, 8}},           /* LOONGARCH_IOCSR: data */
    [40] = {{16, 48}},         /* TDX: ret to r14 */
    [43] = {{8, 16}},          /* SNP_REQ_CERTS: npages, ret */
};

/* What a record of this exit holds beside its head: the union's words; PIO bytes (`data`, all within the mapping) and whether
 * they are the answer; or what else the answer is. Offsets are from the start of kvm_run. */
struct kvmexit_trace_shape {
    size_t words, data, answer_words;
    struct kvmexit_trace_span answer[2];
};

static inline void kvmexit_trace_look(struct kvmexit_trace_shape *s, const struct kvm_run *run, size_t run_size)
{
    const size_t hw = offsetof(struct kvm_run, hw);
    const uint32_t reason = run->exit_reason;
    const uint64_t data = (uint64_t)run->io.size * run->io.count;
    s->data = s->answer_words = 0;
    s->answer[0].size = s->answer[1].size = 0;
    s->words = reason < 44 ? kvmexit_trace_used[reason] : 32;
    if (reason == KVM_EXIT_IO) {
        /* As is_well_formed_io() of _exits.pxd; what contradicts itself is kept without its bytes. */
        if (run->io.direction > KVM_EXIT_IO_OUT || !data || (run->io.size != 1 && run->io.size != 2 && run->io.size != 4)
            || run->io.data_offset < sizeof *run || run->io.data_offset > run_size || data > run_size - run->io.data_offset
            || data > KVMEXIT_TRACE_MOST_DATA || run->io.data_offset > UINT16_MAX)
            return;
        s->data = data;
        if (run->io.direction != KVM_EXIT_IO_OUT) {
            s->answer[0].at = (uint16_t)run->io.data_offset;
            s->answer[0].size = (uint16_t)data;
            s->answer_words = kvmexit_trace_words(data);
        }
    } else if (reason == KVM_EXIT_MMIO) {
        if (run->mmio.is_write || !run->mmio.len || run->mmio.len > 8)
            return;
        s->answer[0].at = (uint16_t)(hw + 8);
        s->answer[0].size = (uint16_t)run->mmio.len;
        s->answer_words = 1;
    } else if (reason < 44 && kvmexit_trace_answers[reason][0].size) {
        size_t i;
        for (i = 0; i < 2; i++) {
            s->answer[i].at = (uint16_t)(hw + kvmexit_trace_answers[reason][i].at);
            s->answer[i].size = kvmexit_trace_answers[reason][i].size;
            s->answer_words += kvmexit_trace_words(s->answer[i].size);
        }
    }
}

/* Copy the answer out of the page, each span in whole words. SAFETY: a shape's spans are within the mapping. */
static inline void kvmexit_trace_gather(const struct kvmexit_trace_shape *s, const struct kvm_run *run, uint8_t *to)
{
    memcpy(to, (const uint8_t *)run + s->answer[0].at, s->answer[0].size);
    if (s->answer[1].size)
        memcpy(to + kvmexit_trace_words(s->answer[0].size) * KVMEXIT_TRACE_WORD,
            (const uint8_t *)run + s->answer[1].at, s->answer[1].size);
}

/* An exit, or a fault: else the return says nothing about the guest. */
static inline int kvmexit_trace_is_exit(int error, uint32_t reason)
{
    return error == 0 ? reason != KVMEXIT_REASON_SENTINEL : error == 14 /* EFAULT */ || error == 133 /* EHWPOISON */;
}

static inline int kvmexit_trace_has_payload(int error, uint32_t reason)
{
    return error == 0 ? reason != KVMEXIT_REASON_SENTINEL
                      : kvmexit_trace_is_exit(error, reason) && reason == KVM_EXIT_MEMORY_FAULT;
}

/* Whether KVM completed what was pending: on an exit and on EINTR. On other errors there was no entry (_loop.burst). */
static inline int kvmexit_trace_completes(int error, uint32_t reason)
{
    return error == 4 /* EINTR */ || kvmexit_trace_is_exit(error, reason);
}

#endif /* KVMEXIT_TRACE_FORMAT_H */
