/* The loop that a C programmer writes around KVM_RUN for these workloads: the control of the others. ways.py calls it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kvmexit/kvmexit.h>
#include <kvmexit/uapi.h>

enum { END = 0xf4, SERIAL = 0x3f8, LCR = 3, LSR = 5, MAP_GPA_RANGE = 12, ENCRYPTED = 1 << 4, PAGE = 4096 };

struct device { /* answers reads with a value, and counts */
    uint64_t base, size, value, reads, writes;
};

struct job {
    struct kvm_run *run;
    struct device *ports, *ranges; /* each sorted */
    uint64_t nports, nranges;
    uint64_t gpa, size, hva; /* of what can be converted */
    int vcpu, vm, gmem, console;
    uint8_t serial[8]; /* its registers */
};

static int compare(const void *key, const void *element)
{
    uint64_t address = *(const uint64_t *)key;
    const struct device *device = element;
    return address < device->base ? -1 : address - device->base >= device->size;
}

static int answer(struct device *devices, uint64_t count, uint64_t address, int is_write, void *data, size_t size)
{
    struct device *device = bsearch(&address, devices, count, sizeof *devices, compare);
    if (device == NULL || size > sizeof device->value)
        return -ENXIO;
    if (is_write) {
        device->writes++;
    } else {
        device->reads++;
        memcpy(data, &device->value, size);
    }
    return 0;
}

static int serial(struct job *job, unsigned offset, int is_write, uint8_t *data)
{
    if (!is_write)
        *data = offset == LSR ? 0x60 : job->serial[offset];
    else if (offset == 0 && !(job->serial[LCR] & 0x80))
        return write(job->console, data, 1) == 1 ? 0 : -EIO;
    else
        job->serial[offset] = *data;
    return 0;
}

static uint64_t convert(struct job *job, uint64_t gpa, uint64_t pages, uint64_t attributes)
{
    int private = !!(attributes & ENCRYPTED);
    uint64_t offset = gpa - job->gpa, size = pages * PAGE;
    struct kvm_memory_attributes set = {.address = gpa, .size = size,
                                        .attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0};
    if (offset >= job->size || pages > (job->size - offset) / PAGE)
        return (uint64_t)-EINVAL;
    if (ioctl(job->vm, KVM_SET_MEMORY_ATTRIBUTES, &set) < 0)
        return (uint64_t)-EAGAIN;
    if (private)
        return madvise((void *)(job->hva + offset), size, MADV_DONTNEED) ? (uint64_t)-EAGAIN : 0;
    return fallocate(job->gmem, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, (off_t)offset, (off_t)size)
        ? (uint64_t)-EAGAIN : 0;
}

/* Run the guest to its OUT to END; -> how many exits that were, or minus an errno. No more than `most`. */
long run_guest(struct job *job, long most)
{
    struct kvm_run *run = job->run;
    for (long exits = 1; exits <= most; exits++) {
        uint8_t *data = (uint8_t *)run;
        int error = 0;
        while (ioctl(job->vcpu, KVM_RUN, 0) < 0)
            if (errno != EINTR)
                return -errno;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (run->io.port == END)
                return exits;
            data += run->io.data_offset;
            if (run->io.port - (unsigned)SERIAL < sizeof job->serial)
                error = serial(job, run->io.port - SERIAL, run->io.direction, data);
            else
                error = answer(job->ports, job->nports, run->io.port, run->io.direction, data, run->io.size);
            break;
        case KVM_EXIT_MMIO:
            error = answer(job->ranges, job->nranges, run->mmio.phys_addr, run->mmio.is_write, run->mmio.data,
                           run->mmio.len);
            break;
        case KVM_EXIT_HYPERCALL:
            if (run->hypercall.nr != MAP_GPA_RANGE)
                return -ENOSYS;
            run->hypercall.ret = convert(job, run->hypercall.args[0], run->hypercall.args[1], run->hypercall.args[2]);
            break;
        default:
            return -EPROTO;
        }
        if (error)
            return error;
    }
    return -ETIMEDOUT;
}

/* For storm.py: a native handler that makes of a fault for private memory one for shared memory, and of that the other. */
int other_side(struct kvmexit_exit *exit, void *opaque)
{
    (void)opaque;
    exit->flags ^= KVM_MEMORY_ATTRIBUTE_PRIVATE;
    return KVMEXIT_PASS;
}
