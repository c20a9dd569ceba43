/* Native handlers for tests/test_coalesced.py: struct kvmexit_exit * and an opaque pointer. */
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "../src/kvmexit/include/kvmexit/kvmexit.h"

#define ROOM 1024

struct write {
    uint64_t address, base, size, value;
    uint32_t reason, vcpu, posted, wrong;
};

struct log {
    uint64_t count;
    struct write writes[ROOM];
};

int keep(struct kvmexit_exit *exit, void *opaque)
{
    struct log *log = opaque;
    struct write *w = &log->writes[log->count % ROOM];
    if (!exit->is_write)
        return KVMEXIT_PASS;
    memset(w, 0, sizeof *w);
    w->address = exit->address;
    w->base = exit->base;
    w->size = exit->size;
    memcpy(&w->value, exit->data, exit->size <= 8 ? exit->size : 8);
    w->reason = exit->reason;
    w->vcpu = exit->vcpu;
    w->posted = exit->run == NULL;
    w->wrong = exit->version != KVMEXIT_API_VERSION || exit->error || exit->count != 1 || exit->owes || exit->flags
        || exit->size == 0 || exit->size > 8;
    log->count++;
    return KVMEXIT_DONE;
}

/* words: inside, go */
int wait(struct kvmexit_exit *exit, void *opaque)
{
    uint32_t *words = opaque;
    (void)exit;
    __atomic_store_n(&words[0], 1, __ATOMIC_SEQ_CST);
    while (!__atomic_load_n(&words[1], __ATOMIC_SEQ_CST))
        usleep(100); /* where ThreadSanitizer lets signals through */
    return KVMEXIT_DONE;
}

/* words: may be used, how often it was, how often it was though it may not be */
int use(struct kvmexit_exit *exit, void *opaque)
{
    uint32_t *words = opaque;
    int i;
    (void)exit;
    for (i = 0; i < 50; i++)
        if (!__atomic_load_n(&words[0], __ATOMIC_SEQ_CST))
            __atomic_fetch_add(&words[2], 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&words[1], 1, __ATOMIC_SEQ_CST);
    return KVMEXIT_DONE;
}

/* Each vCPU counts up in a word of its own. Plain accesses: the ring's order is all that keeps them apart. */
struct counts {
    uint64_t last[4], rounds[4], limit, out_of_order, late;
};

int follow(struct kvmexit_exit *exit, void *opaque)
{
    struct counts *counts = opaque;
    uint64_t *last = &counts->last[(exit->address - exit->base) / 8 % 4], value;
    memcpy(&value, exit->data, 8);
    if (value != *last + 1)
        __atomic_fetch_add(&counts->out_of_order, 1, __ATOMIC_SEQ_CST);
    *last = value;
    return KVMEXIT_DONE;
}

/* What the guest has counted when it exits must have arrived. */
int check(struct kvmexit_exit *exit, void *opaque)
{
    struct counts *counts = opaque;
    uint32_t value;
    memcpy(&value, exit->data, 4);
    if (value != (uint32_t)counts->last[exit->vcpu % 4])
        __atomic_fetch_add(&counts->late, 1, __ATOMIC_SEQ_CST);
    return ++counts->rounds[exit->vcpu % 4] < counts->limit ? KVMEXIT_DONE : KVMEXIT_STOP;
}

int rubbish(struct kvmexit_exit *exit, void *opaque)
{
    (void)exit;
    (void)opaque;
    return 77;
}
