"""MMIO reads and writes, in no order, over 1,000 ranges, each of which answers something of its own."""

from __future__ import annotations

import random

from guest import REGION, Step
from ways import Device, Job, Workload, ways_of

RANGES, ACCESSES = 1000, 20_000


def make(share: float = 1.0) -> Workload:
    """share: how much of it."""
    chance = random.Random(0)
    ranges, base = [], REGION
    for _ in range(max(int(RANGES * share), 2)):
        size = 1 << chance.randrange(4, 13)
        ranges.append(Device(base, size, chance.getrandbits(32)))
        base += size + chance.choice((0, 0, 0x10, 0x1000))
    counts = [[0, 0] for _ in ranges]
    steps = []
    for _ in range(max(int(ACCESSES * share), 2)):
        which, is_write = chance.randrange(len(ranges)), chance.randrange(2)
        counts[which][is_write] += 1
        device = ranges[which]
        address = device.base + chance.randrange(device.size // 4) * 4
        steps.append(Step("write", address, chance.getrandbits(32)) if is_write
                     else Step("read", address, answer=device.value))  # fmt: skip
    job = Job([*steps, Step("end")], len(steps) + 1, ranges=ranges, counts=[(r, w) for r, w in counts])
    return Workload(f"{len(steps):,} MMIO reads and writes over {len(ranges):,} ranges", "KVM", "exit", job.exits,
                    ways_of(job))  # fmt: skip
