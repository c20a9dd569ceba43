/*
 * Native handlers for kvmexit: C functions that answer a vCPU's exits without Python, on the vCPU's thread, without the GIL.
 *
 *     static int answer(struct kvmexit_exit *exit, void *opaque)
 *     {
 *         if (exit->is_write)
 *             return KVMEXIT_DONE;
 *         memset(exit->data, 0xff, exit->size * exit->count);
 *         return KVMEXIT_DONE;
 *     }
 *
 * Registered like a Python handler, vm.on_pio(0x60, 5, handler), where handler is PyCapsule_New(answer, KVMEXIT_HANDLER, NULL), its
 * context being `opaque`; or a ctypes or cffi function pointer, a numba cfunc (kvmexit.native.Function), or a Cython function
 * (`from kvmexit cimport handler`). <kvmexit/embed.h> is for C code that runs vCPUs itself.
 *
 * A handler must not call Python, and is called by several threads at once where a VM has several vCPUs. It may block, but
 * kicks and pauses wait for it, and so does Route.remove(). C11 and C++11; needs nothing else of kvmexit.
 */
#ifndef KVMEXIT_KVMEXIT_H
#define KVMEXIT_KVMEXIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVMEXIT_API_VERSION 1

/* The name of a capsule that holds a handler: its signature. */
#define KVMEXIT_HANDLER "int (struct kvmexit_exit *, void *)"

struct kvm_run; /* of <linux/kvm.h> */

/* One exit. Valid during the call. What the guest gives is the guest's word: lengths are checked, contents are not. */
struct kvmexit_exit {
    uint32_t version;  /* KVMEXIT_API_VERSION of the running kvmexit: members are only ever added at the end */
    uint32_t reason;   /* KVM_EXIT_*; UINT32_MAX where KVM gave none (a bare EFAULT) */
    int32_t error;     /* errno of KVM_RUN: 0; of a memory fault EFAULT or EHWPOISON */
    uint32_t vcpu;     /* its id */
    uint64_t address;  /* what routes go by: the port, guest-physical address, hypercall number, MSR index; else 0 */
    uint64_t base;     /* where the route begins: address - base is an offset into the device */
    uint64_t size;     /* bytes of one access (PIO 1, 2, 4; MMIO 1 to 8; MSR, hypercall 8), or of a memory fault's range; else 0 */
    uint32_t count;    /* accesses one after another to the same port: a string instruction; else 1 */
    uint32_t is_write; /* data is what the guest writes. Else it waits for size * count bytes of data */
    uint32_t owes;     /* KVM waits for an answer: `data`, or where that is NULL something in `run` */
    uint32_t reserved;
    void *data;        /* NULL where there is none. Of a hypercall its result, of RDMSR the value */
    uint64_t flags;    /* of a memory fault: KVM_MEMORY_EXIT_FLAG_* */
    struct kvm_run *run; /* NULL for a posted write (vm.coalesce_mmio): it is no exit, and all but KVMEXIT_DONE only counts */
};

/* What a handler returns. Anything else makes run() raise Error, with the exit pending. */
enum {
    KVMEXIT_DONE = 0, /* answered: the vCPU re-enters */
    KVMEXIT_PASS = 1, /* not mine: the next handler, at last the caller of run(). `data` must be as it was */
    KVMEXIT_STOP = 2  /* run() returns this exit */
};

typedef int (*kvmexit_handler)(struct kvmexit_exit *exit, void *opaque);

#ifdef __cplusplus
}
#endif

#endif /* KVMEXIT_KVMEXIT_H */
