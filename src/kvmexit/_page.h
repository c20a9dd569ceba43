/* A vCPU as the nogil burst sees it: the page it shares with KVM, and what userspace keeps beside it. */
#ifndef KVMEXIT_PAGE_H
#define KVMEXIT_PAGE_H

#include <stdint.h>
#include <sys/types.h>

#include "include/kvmexit/uapi.h"

struct kvmexit_vcpu {
    /* the seam: what "KVM_RUN" is; returns 0 or -errno */
    int (*enter)(struct kvmexit_vcpu *);
    struct kvm_run *run;
    struct kvmexit_stats *stats; /* _stats.h */
    const uint64_t *rip;         /* where KVM leaves the guest's on return, else kvmexit_no_rip */

    /* the exit in hand */
    uint64_t seq;    /* grows with every entry from Python: an Exit made under an older one can no longer be answered */
    uint64_t entries;
    uint32_t reason; /* kvm_run.exit_reason, read once */
    uint32_t place;  /* the same as an index: the reason where it is known and makes sense, else as _exits.pxd says */
    int error;       /* errno of KVM_RUN, or 0 */
    int needs;       /* KVM waits for an answer */
    int answered;    /* somebody wrote it */
    int unsettled;   /* not dispatched to its end yet, or its handler raised: to be offered again */
    int completes;   /* KVM finishes the operation only when re-entered */
    uint32_t fault_count; /* of the fault-loop guard, below */

    size_t run_size; /* bytes mapped at run: the page, the PIO data and what follows */
    void *script;    /* of a scripted enter */
    int fd;          /* -1: not backed by a kernel vCPU */
    pid_t pid;       /* the process that made it, for tgkill */
    const unsigned *forks; /* how often this process was forked into being, and ... */
    unsigned born;         /* ... how often it had been when this was made: a child must not touch the shared page */

    /* native handlers: _routes.h */
    const void **cell;  /* the VM's table; atomic */
    const int *fenced;
    uint64_t native;    /* atomic; odd while a table is in use */
    const struct kvmexit_table *table; /* the one in use when the burst ended, and ... */
    const struct kvmexit_route *chain; /* ... who comes next there; NULL: begin with the first of the VM's table */
    const void *hit;    /* the segment that was found last */
    uint64_t hit_serial;
    uint32_t hit_place;
    uint32_t id;

    struct kvmexit_coalesced *coalesced; /* the VM's posted writes: _coalesced.h */

    /* what may have repaired a fault: _convert.pxd */
    void *converter;
    uint64_t generation; /* at the last entry */
    int software_protected;

    /* written by other threads */
    uint32_t request; /* atomic */
    int32_t tid;      /* atomic; the thread inside run(), or 0 */

    /* of the run() in progress */
    int parked; /* with the GIL held: its thread stands still while a VM is paused */
    uint64_t deadline_ns; /* CLOCK_MONOTONIC, or KVMEXIT_NEVER */
    struct kvmexit_vcpu *outer;
    int main_thread, was_blocked;

    /* what the burst took on itself, for the record */
    uint64_t retried_unwritten, retried_eintr, retried_eagain, retried_enomem, retried_race;

    /* the fault-loop guard: the previous fault, and how often it may come in a row */
    uint32_t fault_limit;
    int regs_synced; /* KVM leaves the registers in the page; else they are asked for */
    uint64_t fault_payload[4];
#if defined(__x86_64__)
    struct kvm_regs fault_regs;
#endif
};

#endif /* KVMEXIT_PAGE_H */
