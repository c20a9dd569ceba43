"""What kvmexit's two peers have in common."""

import sys
from pathlib import Path

import kvmexit


def run(handler):
    """Run the ROM that the command line names; port 0x80 is the handler's."""
    with kvmexit.VM() as vm:
        vm.memory.add(0xF0000, 0x10000)[:] = Path(sys.argv[1]).read_bytes()
        vm.on_pio(0x80, 1, handler)
        vcpu = vm.create_vcpu(0)
        kvmexit.x86.real_mode(vcpu, 0xF0000)
        exit = vcpu.run()
        if not isinstance(exit, kvmexit.Io) or exit.port != 0xF4:
            raise SystemExit(repr(exit))
