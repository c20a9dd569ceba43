/*
 * kvmexit for programs in C: vCPUs are run, and their exits answered, by threads that know nothing of Python.
 *
 * Python is needed to make the VM, and once to fetch this table, with the GIL held:
 *
 *     #include <Python.h>
 *     #include <kvmexit/embed.h>
 *
 *     const struct kvmexit_api *api = kvmexit_import();     NULL: an exception is set
 *     struct kvmexit_vcpu *v = api->vcpu(object);           of a kvmexit.Vcpu: NULL, and TypeError, where it is none
 *
 * Everything but vcpu() is then called by any thread, with a thread state or without. Give up the GIL around run(), which may
 * last for ever:
 *
 *     const struct kvmexit_exit *exit;
 *     while ((what = api->run(v, KVMEXIT_FOREVER, &exit)) == KVMEXIT_RUN_EXIT && answer(exit))
 *         api->answer(v);
 *
 * A `struct kvmexit_vcpu *` is good for as long as its Vcpu exists: hold a reference to that, and let go of it with the GIL
 * when no call is under way. Closing the VM only makes them say -EBADF. The rules of Vcpu.run() hold here, too: an exit that
 * owes an answer is returned again until it has one, and vm.pause(), kick() and close() reach the thread; docs/embedding.md.
 * C11 and C++11.
 */
#ifndef KVMEXIT_EMBED_H
#define KVMEXIT_EMBED_H

#include "kvmexit.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KVMEXIT_EMBED_VERSION 1         /* another one: what was there means something else */
#define KVMEXIT_EMBED "kvmexit._C_API"  /* the capsule's name */
#define KVMEXIT_FOREVER UINT64_MAX

struct kvmexit_vcpu; /* a Vcpu, as the calls below see it */

/* What run() says, where nothing failed. */
enum {
    KVMEXIT_RUN_EXIT = 0,      /* an exit that no handler took, or one said KVMEXIT_STOP: as Vcpu.run() returns it */
    KVMEXIT_RUN_PYTHON = 1,    /* an exit that goes to the handlers again, Python's among them: answer() it, or have Python
                                  call vcpu.run() */
    KVMEXIT_RUN_KICKED = 2,    /* once for all kicks before; also where the VM is being closed */
    KVMEXIT_RUN_TIMED_OUT = 3,
    KVMEXIT_RUN_LOOPING = 4,   /* a fault came vcpu.fault_limit times in a row, and nothing was repaired between */
    KVMEXIT_RUN_BROKEN = 5     /* a native handler returned rubbish; the exit is offered again */
};

/*
 * The calls return 0 (or what is said) or a negative errno. Of them all:
 *   -EBADF    the VM is closed (but kick(), which then does nothing)
 *   -EBUSY    another thread runs the vCPU, Python's or not (answer() and exit() of another thread count for a moment)
 *   -ECHILD   it belongs to the process that this one was forked from
 */
struct kvmexit_api {
    uint32_t version; /* KVMEXIT_EMBED_VERSION */
    uint32_t size;    /* bytes that the running kvmexit has: members are only ever added at the end */

    /* The one for Python threads: `object` is a PyObject *, borrowed. */
    struct kvmexit_vcpu *(*vcpu)(void *object);

    /*
     * Run the guest; native handlers answer, as in Vcpu.run(). timeout_ns: KVMEXIT_FOREVER, or nanoseconds; 0 completes
     * what is pending and comes back. `exit` (or NULL) becomes the exit, or NULL where there is none: valid until the next
     * run(), whoever's: threads that take turns at a vCPU agree among themselves from run() to answer(). While the VM is
     * paused it waits, for resume(), a kick, or the time-out.
     * -EDEADLK: this thread is inside a run() already. -EAGAIN: no timer. -EPROTO: KVM_RUN gave no exit reason, a thousand
     * times in a row. Else the errno of KVM_RUN, or of KVM refusing registers that Python wrote. What was pending still is.
     */
    int (*run)(struct kvmexit_vcpu *vcpu, uint64_t timeout_ns, const struct kvmexit_exit **exit);

    /* The exit that pends, KVMEXIT_RUN_EXIT or KVMEXIT_RUN_PYTHON; -ENODATA where none does. `exit` as of run(). */
    int (*exit)(struct kvmexit_vcpu *vcpu, const struct kvmexit_exit **exit);

    /*
     * The exit that pends is answered: exit->data is written (or what it owes in exit->run), or it wanted nothing. Needed
     * where exit->owes, and for KVMEXIT_RUN_PYTHON; an exit that wants nothing counts as accepted anyway.
     * -ENODATA: none pends. -EINVAL: it contradicts itself, and cannot be answered.
     */
    int (*answer)(struct kvmexit_vcpu *vcpu);

    /* Vcpu.kick(): the run() in progress, or the next, says KVMEXIT_RUN_KICKED. -EAGAIN: noted, but the signal queue is
     * full. Async-signal-safe. */
    int (*kick)(struct kvmexit_vcpu *vcpu);

    /*
     * vm.memory.convert(gpa, size, private=to_private != 0), also from native handlers. `done` (or NULL): how many bytes
     * from gpa on are as wanted now. Waits while others convert.
     * -EINVAL: a range that is empty, unaligned or wraps. -ENXIO: no slot, or none with a guest_memfd, where it is to be
     * private. -EPERM: add() was not told whether to discard. -EOPNOTSUPP: no private memory in this VM, or SlotRebind, which
     * needs Python. Else the errno of KVM, or of the discard.
     */
    int (*convert)(struct kvmexit_vcpu *vcpu, uint64_t gpa, uint64_t size, int to_private, uint64_t *done);

    /*
     * For a program's own handler of SIGBUS (SA_SIGINFO), instead of kvmexit.faults.catch_poison(): 1 where the signal says
     * that the guest this thread runs wanted memory that the hardware has lost; return then, and the run has an exit for it,
     * KVM_EXIT_MEMORY_FAULT with error EHWPOISON. 0: it is not ours. `siginfo`, `context`: the handler's second and third
     * argument. Async-signal-safe. SIGBUS must not be blocked in threads that run vCPUs: the guest would wait for ever.
     */
    int (*poison)(const void *siginfo, const void *context);
};

#ifdef Py_PYTHON_H /* <Python.h> comes first, for those that need this */
/* Fetch the table, with the GIL held. NULL and ImportError: no kvmexit, or one that is too old or too new for this header. */
static inline const struct kvmexit_api *kvmexit_import(void)
{
    const struct kvmexit_api *api = (const struct kvmexit_api *)PyCapsule_Import(KVMEXIT_EMBED, 0);
    if (api && (api->version != KVMEXIT_EMBED_VERSION || api->size < sizeof *api)) {
        PyErr_Format(PyExc_ImportError,
                     "kvmexit's C API has version %u and %u bytes; this was compiled for version %u and %u bytes",
                     (unsigned)api->version, (unsigned)api->size, KVMEXIT_EMBED_VERSION, (unsigned)sizeof *api);
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif /* KVMEXIT_EMBED_H */
