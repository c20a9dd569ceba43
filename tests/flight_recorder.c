/* The flight recorder between two threads, for tests/test_stats.py: as close together as they can come. */
#include "../src/kvmexit/_stats.h"

static struct kvm_run run;
static struct kvmexit_vcpu vcpu = {.run = &run, .rip = &run.s.regs.regs.rip};
static struct kvmexit_stats *stats;
static int done;

int start(void)
{
    stats = kvmexit_new_stats(0);
    return stats != NULL;
}

/* Exits that say in each word which they are. */
void write_exits(uint64_t count)
{
    uint64_t i, *payload = (uint64_t *)&run.hw;
    for (i = 0; i < count; i++) {
        payload[0] = payload[1] = payload[2] = run.s.regs.regs.rip = i;
        vcpu.reason = (uint32_t)i;
        kvmexit_remember(stats, &vcpu);
    }
    __atomic_store_n(&done, 1, __ATOMIC_SEQ_CST);
}

/* -> how many that were read are not what was written, or not in order. */
uint64_t read_exits(void)
{
    struct kvmexit_record r[KVMEXIT_LAST];
    uint64_t wrong = 0;
    while (!__atomic_load_n(&done, __ATOMIC_SEQ_CST)) {
        size_t i, count = kvmexit_last(stats, r);
        for (i = 0; i < count; i++)
            wrong += r[i].payload[0] != r[i].rip || r[i].payload[1] != r[i].rip || r[i].payload[2] != r[i].rip
                || r[i].reason != (uint32_t)r[i].rip || r[i].rip != r[0].rip + i;
    }
    return wrong;
}
