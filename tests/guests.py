"""Guests for the tests: machine code with its assembly beside it, and a vCPU about to run it."""

import os

import kvmexit
from kvmexit.testing import ScriptedVM

CODE = 0x1000
STRESS = float(os.environ.get("KVMEXIT_STRESS", "1"))

SPIN = bytes.fromhex("eb fe")  # jmp $

# loop: out 0x80, al; jmp loop
OUT_FOREVER = bytes.fromhex("e6 80 eb fc")


def load(vm, code, *, cpl=3, size=1 << 20, mode=kvmexit.x86.long_mode, **options):
    """-> a vCPU at the beginning of `code`, in `size` bytes of memory at 0."""
    ram = vm.memory.add(0, size)
    ram[CODE : CODE + len(code)] = code
    vcpu = vm.create_vcpu(len(vm.memory.slots) - 1)
    if mode is kvmexit.x86.long_mode:
        options["cpl"] = cpl
    mode(vcpu, CODE, **options)
    return vcpu


def stress(count):
    """A count for a stress test, scaled by KVMEXIT_STRESS (1)."""
    return max(1, int(count * STRESS))


class Typed(ScriptedVM):
    """A scripted VM of any type."""

    def __init__(self, type, attributes):
        self.wanted = type
        super().__init__(attributes=attributes)

    def _set_up(self, handle, type, device):
        super()._set_up(handle, self.wanted, device)
