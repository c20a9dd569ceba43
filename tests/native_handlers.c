/* Native handlers for tests/test_native.py: struct kvmexit_exit * and an opaque pointer. */
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "../src/kvmexit/include/kvmexit/kvmexit.h"

uint32_t misuses;

int note(struct kvmexit_exit *exit, void *opaque)
{
    memcpy(opaque, exit, sizeof *exit);
    return KVMEXIT_PASS;
}

int verdict(struct kvmexit_exit *exit, void *opaque)
{
    (void)exit;
    return opaque ? *(int *)opaque : KVMEXIT_PASS;
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

/* words: may be used, how often it was */
int use(struct kvmexit_exit *exit, void *opaque)
{
    uint32_t *words = opaque;
    int i;
    (void)exit;
    for (i = 0; i < 50; i++)
        if (!__atomic_load_n(&words[0], __ATOMIC_SEQ_CST))
            __atomic_fetch_add(&misuses, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&words[1], 1, __ATOMIC_SEQ_CST);
    return KVMEXIT_PASS;
}
