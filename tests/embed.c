/* Threads of C's own for tests/test_embed.py: they call kvmexit's C API, and have no thread state. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "../src/kvmexit/include/kvmexit/embed.h"

struct job {
    const struct kvmexit_api *api;
    struct kvmexit_vcpu *vcpu;
    uint64_t timeout_ns;
    uint32_t drives;   /* 1: answer exits, and go on until something else comes; what is read is 0x5a. 2: others drive the
                          vCPU too, so that an exit may be theirs by the time it is looked at: it is answered unseen */
    uint32_t stop;     /* atomic; of `drives`: also past kicks, time-outs and -EBUSY, until this is set */
    int32_t what;      /* what the last run() said */
    uint32_t attached; /* the thread had a thread state */
    uint32_t exited;   /* run() gave an exit: */
    uint64_t exits, kicks, busy;
    struct kvmexit_exit exit;
    pthread_t thread;
};

static int once(struct job *job)
{
    const struct kvmexit_exit *exit = NULL;
    job->what = job->api->run(job->vcpu, job->timeout_ns, job->drives == 2 ? NULL : &exit);
    job->exited = exit != NULL;
    if (exit)
        job->exit = *exit;
    job->exits += job->what == KVMEXIT_RUN_EXIT || job->what == KVMEXIT_RUN_PYTHON;
    job->kicks += job->what == KVMEXIT_RUN_KICKED;
    job->busy += job->what == -16;
    return job->what;
}

static void *body(void *opaque)
{
    struct job *job = opaque;
    void *(*state)(void) = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    job->attached = state == NULL || state() != NULL;
    if (!job->drives) {
        once(job);
        return NULL;
    }
    for (;;) {
        int what = once(job);
        if (what == KVMEXIT_RUN_EXIT || what == KVMEXIT_RUN_PYTHON) {
            if (job->exited && job->exit.data && !job->exit.is_write)
                memset(job->exit.data, 0x5a, job->exit.size * job->exit.count);
            if (!job->exited || job->exit.owes || what == KVMEXIT_RUN_PYTHON)
                job->api->answer(job->vcpu); /* -EBUSY: another time */
        } else if (__atomic_load_n(&job->stop, __ATOMIC_SEQ_CST) != 1) /* 0: until something else; 1: go on; 2: stop */
            break;
    }
    return NULL;
}

int begin(struct job *job)
{
    return pthread_create(&job->thread, NULL, body, job);
}

int end(struct job *job)
{
    pthread_join(job->thread, NULL);
    return job->what;
}

void stop(struct job *job)
{
    __atomic_store_n(&job->stop, 2, __ATOMIC_SEQ_CST);
    job->api->kick(job->vcpu);
}

/* As a native handler: converts what faulted, and runs another vCPU, which it must not. */
struct device {
    const struct kvmexit_api *api;
    struct kvmexit_vcpu *vcpu, *other;
    int32_t converted, ran;
    uint64_t done;
};

int device(struct kvmexit_exit *exit, void *opaque)
{
    struct device *d = opaque;
    d->converted = d->api->convert(d->vcpu, exit->address, exit->size, (exit->flags & 8) != 0, &d->done);
    d->ran = d->api->run(d->other, KVMEXIT_FOREVER, NULL);
    return d->converted ? KVMEXIT_PASS : KVMEXIT_DONE;
}

/* LATER, so many times, then what is said. */
int later(struct kvmexit_exit *exit, void *opaque)
{
    int32_t *words = opaque;
    (void)exit;
    return words[0]-- > 0 ? INT32_MIN : words[1];
}
