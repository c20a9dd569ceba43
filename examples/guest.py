"""A guest that tries out the echo device: 600 times it writes a byte to port 0x10, reads it back, and adds that up.

On KVM_DEVICE, /dev/kvm unless the environment says otherwise; scripted where that is not to be had.
"""

import os

import kvmexit
from kvmexit import testing

CODE = bytes.fromhex(
    "31 db"  # xor bx, bx
    "b9 58 02"  # mov cx, 600
    "88 c8"  # again: mov al, cl
    "e6 10"  # out 0x10, al
    "e4 10"  # in al, 0x10
    "30 e4"  # xor ah, ah
    "01 c3"  # add bx, ax
    "e2 f4"  # loop again
    "f4"  # hlt
)
SUM = sum(~i & 0xFF for i in range(1, 601)) & 0xFFFF


def try_out(handler, state):
    """Run the guest with `handler` at port 0x10, and see what it read; `state` is the device's: state[0], state[1]."""
    try:
        vm = kvmexit.VM(device=os.environ.get("KVM_DEVICE", "/dev/kvm"))
    except kvmexit.Error as error:
        print(f"scripted: {error}")
        vm = testing.ScriptedVM()
    with vm:
        vm.on_pio(0x10, 1, handler)
        if isinstance(vm, testing.ScriptedVM):
            pairs = [(testing.pio_out(0x10, bytes([i & 0xFF])), testing.pio_in(0x10)) for i in range(600, 0, -1)]
            vcpu = vm.create_vcpu(0, [*sum(pairs, ()), testing.hlt()])
        else:
            vm.memory.add(0, 0x10000)[0x1000 : 0x1000 + len(CODE)] = CODE
            vcpu = vm.create_vcpu(0)
            kvmexit.x86.real_mode(vcpu, 0x1000)
        ended = vcpu.run(timeout=60)
        assert isinstance(ended, kvmexit.Hlt), ended
        if isinstance(vm, testing.ScriptedVM):
            read = sum(vm.script(vcpu).left(i)[1][0] for i in range(1, 1200, 2)) & 0xFFFF
        else:
            read = vcpu.regs.rbx & 0xFFFF
    assert (read, state[0], state[1]) == (SUM, 1, 1200), (read, state[0], state[1])
    print("echo: 1200 accesses, all answered without Python")
