/* The echo device as a C function: a native handler. opaque: uint64_t[2], the byte written last and a count of accesses. */
#include <string.h>

#include <kvmexit/kvmexit.h>

int echo(struct kvmexit_exit *exit, void *opaque)
{
    uint64_t *state = (uint64_t *)opaque;
    unsigned char *bytes = (unsigned char *)exit->data;
    if (!bytes)
        return KVMEXIT_PASS; /* no access to a port, an address or the like */
    if (exit->is_write)
        state[0] = bytes[exit->size * exit->count - 1];
    else
        memset(bytes, ~(int)state[0] & 0xff, exit->size * exit->count);
    state[1] += exit->count; /* one vCPU; with several: __atomic_fetch_add */
    return KVMEXIT_DONE;
}
