/* The loop that a C programmer writes around KVM_RUN: the control of the others. __main__.py says what it has to do. */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define BASE 0xf0000u
#define SIZE 0x10000u

int main(int argc, char **argv)
{
    struct kvm_userspace_memory_region region = {.guest_phys_addr = BASE, .memory_size = SIZE};
    struct kvm_regs regs = {.rflags = 2};
    struct kvm_sregs sregs;
    struct kvm_run *run;
    void *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), rom = argc == 2 ? open(argv[1], O_RDONLY) : -1, vm, vcpu;
    if (kvm < 0 || memory == MAP_FAILED || rom < 0 || read(rom, memory, SIZE) != SIZE)
        err(1, "ROM and /dev/kvm wanted");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    ioctl(vm, KVM_SET_TSS_ADDR, 0x70000000ul); /* Intel's processors want it for real mode */
    region.userspace_addr = (unsigned long)memory;
    if (vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0 || (vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0)
        err(1, "no VM");
    run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
        err(1, "no vCPU");
    sregs.cs.base = BASE;
    sregs.cs.selector = BASE >> 4;
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
        err(1, "no registers");
    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0)
            err(1, "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
            errx(1, "exit %u", run->exit_reason);
        if (run->io.port == 0xf4)
            return 0;
    }
}
