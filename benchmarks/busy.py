"""What busy Python threads cost an exit: a real guest on /dev/kvm that writes to a port for ever.

    python benchmarks/busy.py [--json FILE] [--cpl 0|3] [--exits N] [--rounds N]

The time from one exit's handler to the next, in us, with no, one and two other Python threads that compute all the
time. Four ways to answer take turns, each in a guest of its own: a C loop around KVM_RUN, kvmexit with a native
handler, with a Python handler, and the loop that people write in Python, ioctl(KVM_RUN) and struct.unpack.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import struct
import threading
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from dispatch import build_control, machine

import kvmexit

PORT = 0x80
OUT_FOREVER = bytes.fromhex("e6 80 eb fc")  # loop: out 0x80, al; jmp loop
KVM_RUN = 0xAE80


def guest(cpl):
    """-> a VM, and a vCPU about to write to PORT for ever."""
    vm = kvmexit.VM()
    vm.memory.add(0, 1 << 20)[0x1000 : 0x1000 + len(OUT_FOREVER)] = OUT_FOREVER
    vcpu = vm.create_vcpu()
    kvmexit.x86.long_mode(vcpu, 0x1000, cpl=cpl)
    return vm, vcpu


def enter(vcpu):
    """Have KVM take the registers, for who calls KVM_RUN by hand."""
    assert vcpu.run().port == PORT
    vcpu.complete()


@contextmanager
def busy(threads):
    """So many Python threads that compute all the time."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            sum(range(1000))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    yield
    stop.set()
    for worker in workers:
        worker.join()


def c_loop(control, vm, vcpu, exits):
    """The control."""
    enter(vcpu)
    times = control.Times(exits)
    times.c_loop(vcpu)
    return times.intervals()


def natively(control, vm, vcpu, exits):
    """kvmexit, with a native handler."""
    times = control.Times(exits)
    vm.on_pio(PORT, 1, times.handler())
    assert vcpu.run().port == PORT
    return times.intervals()


def in_python(control, vm, vcpu, exits):
    """kvmexit, with a Python handler."""
    times = []

    def handler(vcpu, io):
        times.append(time.monotonic_ns())
        return kvmexit.STOP if len(times) == exits else None

    vm.on_pio(PORT, 1, handler)
    vcpu.run()
    return [after - before for before, after in pairwise(times)]


def by_hand(control, vm, vcpu, exits):
    """The loop that people write in Python."""
    enter(vcpu)
    ioctl = ctypes.CDLL(None, use_errno=True).ioctl
    times = []
    with mmap.mmap(vcpu.fd, 4096 * 3, mmap.MAP_SHARED) as run:
        while len(times) < exits:
            if ioctl(vcpu.fd, KVM_RUN, 0) == 0 and struct.unpack_from("<I", run, 8)[0] == 2:
                struct.unpack_from("<BBHIQ", run, 32)
                times.append(time.monotonic_ns())
    return [after - before for before, after in pairwise(times)]


# In Python a busy thread makes exits so slow that fewer have to do.
WAYS = {
    "C loop": (c_loop, 1),
    "kvmexit, native": (natively, 1),
    "kvmexit, Python": (in_python, 0.1),
    "Python ioctl loop": (by_hand, 0.1),
}


def summary(ns):
    """p50, p99, p99.9 and max, in us."""
    ordered = sorted(ns)
    at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1000 for share in (0.5, 0.99, 0.999, 1)]
    return dict(zip(("p50", "p99", "p99.9", "max"), at, strict=True))


def main():
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpl", type=int, choices=(0, 3), default=3)
    parser.add_argument("--exits", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    control = build_control()
    result = {"machine": machine(), "cpl": options.cpl, "us": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), f"cpl {options.cpl}", sep=", ")
    print(f"{'us an exit':<14}{'':<20}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'p50 to C':>10}{'p99 to C':>10}")
    for threads in (0, 1, 2):
        samples = {name: [] for name in WAYS}
        with busy(threads):
            for _ in range(options.rounds):
                for name, (way, share) in WAYS.items():
                    exits = int(options.exits * (share if threads else 1))
                    vm, vcpu = guest(options.cpl)
                    with vm:
                        samples[name] += way(control, vm, vcpu, exits)
        rows = result["us"][threads] = {name: summary(ns) for name, ns in samples.items()}
        for name, s in rows.items():
            ratios = [s[key] / rows["C loop"][key] for key in ("p50", "p99")]
            title = f"{threads} busy" if name == "C loop" else ""
            figures = [f"{figure:>10.1f}" for figure in s.values()] + [f"{ratio:>10.2f}" for ratio in ratios]
            print(f"{title:<14}{name:<20}{''.join(figures)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
