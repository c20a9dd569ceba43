"""What busy Python threads cost an exit: a real guest on /dev/kvm that writes to a port for ever.

    python benchmarks/busy.py [--json FILE] [--cpl 0|3] [--exits N] [--turns N] [--busy N ...]

The time from one exit's handler to the next, in us, with no, one and two other Python threads that compute all the
time. Four ways to answer, each in a guest of its own: a C loop around KVM_RUN, kvmexit with a native handler, with a
Python handler, and the loop that people write in Python, ioctl(KVM_RUN) and struct.unpack. They take turns of a few
milliseconds, in another order each round, so that what else the machine does hits all alike. Ratios to the C loop, with
what 95 of 100 resamplings of the rounds give.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import random
import struct
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import build_control, machine

import kvmexit

PORT = 0x80
OUT_FOREVER = bytes.fromhex("e6 80 eb fc")  # loop: out 0x80, al; jmp loop
KVM_RUN = 0xAE80


def guest(stack, cpl):
    """-> a VM, and a vCPU about to write to PORT for ever."""
    vm = stack.enter_context(kvmexit.VM())
    vm.memory.add(0, 1 << 20)[0x1000 : 0x1000 + len(OUT_FOREVER)] = OUT_FOREVER
    vcpu = vm.create_vcpu()
    kvmexit.x86.long_mode(vcpu, 0x1000, cpl=cpl)
    return vm, vcpu


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


# Each makes a guest, and returns a function: exits -> the ns between them.


def c_loop(control, vm, vcpu):
    """The control."""
    assert vcpu.run().port == PORT  # KVM has the registers, for who calls KVM_RUN by hand
    vcpu.complete()

    def turn(exits):
        times = control.Times(exits)
        times.c_loop(vcpu)
        return times.intervals()

    return turn


def natively(control, vm, vcpu):
    """kvmexit, with a native handler."""

    def turn(exits):
        times = control.Times(exits)
        with vm.on_pio(PORT, 1, times.handler()):
            assert vcpu.run().port == PORT
        return times.intervals()

    return turn


def in_python(control, vm, vcpu):
    """kvmexit, with a Python handler."""
    times, wanted = [], 0

    @vm.on_pio(PORT, 1)
    def handler(vcpu, io):
        times.append(time.monotonic_ns())
        return kvmexit.STOP if len(times) == wanted else None

    def turn(exits):
        nonlocal wanted
        times.clear()
        wanted = exits
        vcpu.run()
        return [after - before for before, after in pairwise(times)]

    return turn


def by_hand(control, vm, vcpu):
    """The loop that people write in Python."""
    c_loop(control, vm, vcpu)
    ioctl = ctypes.CDLL(None, use_errno=True).ioctl

    def turn(exits):
        times = []
        with mmap.mmap(vcpu.fd, 4096 * 3, mmap.MAP_SHARED) as run:
            while len(times) < exits:
                if ioctl(vcpu.fd, KVM_RUN, 0) == 0 and struct.unpack_from("<I", run, 8)[0] == 2:
                    struct.unpack_from("<BBHIQ", run, 32)
                    times.append(time.monotonic_ns())
        return [after - before for before, after in pairwise(times)]

    return turn


WAYS = {"C loop": c_loop, "kvmexit, native": natively, "kvmexit, Python": in_python, "Python ioctl loop": by_hand}
SLOW = 20  # beside busy threads Python's exits take 5 ms each: it has so many times fewer turns
SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1}


def measure(control, threads, options):
    """-> way -> an array of rounds by intervals, in us."""
    with ExitStack() as stack:
        turns = {name: way(control, *guest(stack, options.cpl)) for name, way in WAYS.items()}
        rounds = {name: [] for name in WAYS}
        stack.enter_context(busy(threads))
        for i in range(options.turns):
            order = list(WAYS)
            random.Random(i).shuffle(order)
            for name in order:
                if i % SLOW == 0 or not (threads and "Python" in name):
                    rounds[name].append(turns[name](options.exits))
    return {name: np.array(intervals) / 1000 for name, intervals in rounds.items()}


def ratio(own, control, share):
    """-> the ratio of two percentiles, and between what it lies in 95 of 100 resamplings."""
    generator = np.random.default_rng(0)

    def drawn(rounds):
        return np.quantile(rounds[generator.integers(len(rounds), size=len(rounds))], share)

    ratios = [drawn(own) / drawn(control) for _ in range(1000)]
    return np.quantile(own, share) / np.quantile(control, share), *np.quantile(ratios, (0.025, 0.975))


def main():
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpl", type=int, choices=(0, 3), default=3)
    parser.add_argument("--exits", type=int, default=200, help="a turn")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--busy", type=int, nargs="*", default=(0, 1, 2), help="Python threads")
    options = parser.parse_args()
    control = build_control()
    result = {"machine": machine(), "cpl": options.cpl, "us": {}}
    print(f"{result['machine']}, CPL {options.cpl}, {options.turns} turns of {options.exits} exits")
    print(f"{'us an exit':<8}{'':<20}{'p50':>10}{'p99':>10}{'p99.9':>10}{'max':>10}{'p50 to C':>20}{'p99 to C':>20}")
    for threads in options.busy:
        us = measure(control, threads, options)
        rows = result["us"][threads] = {}
        for name, own in us.items():
            row = rows[name] = {key: float(np.quantile(own, share)) for key, share in SHARES.items()}
            ratios = [ratio(own, us["C loop"], SHARES[key]) for key in ("p50", "p99")]
            row["to C"] = [[float(figure) for figure in figures] for figures in ratios]
            shown = "".join(f"{r:>8.3f} ({low:.2f}-{high:.2f})".rjust(20) for r, low, high in ratios)
            title = f"{threads} busy" if name == "C loop" else ""
            print(f"{title:<8}{name:<20}" + "".join(f"{row[key]:>10.1f}" for key in SHARES) + shown, flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
