"""The serial console of a Linux boot: for each byte a read of the line status, and a write.

Of a real one's 32,018 exits 31,643 are that. The others here are the set-up of the port, and other devices' ports and
registers, between the lines.
"""

from __future__ import annotations

import random

from guest import LSR, REGION, TEXT, THR, Step
from ways import Device, Job, Workload, ways_of

BYTES, OTHERS = 15_821, 375  # 31,642 exits for the bytes, one to see that the last has gone; and those of other kinds
PORTS = [Device(0x61, 1, 0x20), Device(0x70, 2, 0x26), Device(0x80, 1, 0), Device(0xCFC, 4, 0xFF)]
RANGES = [Device(REGION, 0x400, 0x0429_B17F), Device(REGION + 0x1000, 0x400, 0x0005_0014)]
DRIVERS = ("acpi", "clocksource", "e820", "ehci", "hpet", "memblock", "mmu", "net", "pci 0000:00:1f.0", "rcu", "smp",
           "tty", "virtio_blk virtio0", "x86/fpu")  # fmt: skip
SAYS = ("registered as number {}", "{} pages set aside", "ready after {} us", "using queue {}", "no firmware, code {}",
        "window of {} KiB found", "enabled, mask {:#x}", "limit set to {}", "slot {} is empty")  # fmt: skip


def lines(size: int, chance: random.Random) -> list[bytes]:
    """A boot's log, `size` bytes of it, as the console sends it."""
    made, left, at = [], size, 0.0
    while left:
        at += chance.expovariate(40)
        said = chance.choice(SAYS).format(chance.randrange(1, 1 << chance.randrange(1, 20)))
        line = f"[{at:12.6f}] {chance.choice(DRIVERS)}: {said}\r\n".encode()[-left:]
        made.append(line)
        left -= len(line)
    return made


SET_UP = [  # as Linux's early console does: 8n1, no interrupts, no FIFO, DTR and RTS, 115200 baud
    Step("out", THR + 3, 0x03), Step("out", THR + 1, 0), Step("out", THR + 2, 0), Step("out", THR + 4, 0x03),
    Step("in", THR + 3, answer=0x03), Step("out", THR + 3, 0x83), Step("out", THR, 1), Step("out", THR + 1, 0),
    Step("out", THR + 3, 0x03),
]  # fmt: skip


def make(share: float = 1.0) -> Workload:
    """share: how much of it."""
    chance = random.Random(0)
    log = lines(max(int(BYTES * share), 1), chance)
    others = max(int(OTHERS * share), len(SET_UP) + 1) - len(SET_UP) - 1  # and the one that ends it
    counts = [[0, 0] for _ in (*PORTS, *RANGES)]
    between: list[list[Step]] = [[] for _ in log]
    for _ in range(others):
        which, is_write = chance.randrange(len(counts)), chance.randrange(2)
        counts[which][is_write] += 1
        device = (*PORTS, *RANGES)[which]
        size = 1 if which < len(PORTS) else 4
        do = (("in", "out") if which < len(PORTS) else ("read", "write"))[is_write]
        address = device.base + chance.randrange(device.size // size) * size
        chance.choice(between).append(Step(do, address, 0x33, 0 if is_write else device.value))
    steps, at = list(SET_UP), TEXT
    for line, accesses in zip(log, between, strict=True):
        steps += [*accesses, Step("send", at, len(line))]
        at += len(line)
    steps += [Step("in", LSR, answer=0x60), Step("end")]
    text = b"".join(log)
    job = Job(steps, 2 * len(text) + 1 + len(SET_UP) + others + 1, PORTS, RANGES, [(r, w) for r, w in counts], text)
    return Workload(f"the serial console of a boot: {len(text):,} bytes, a read and a write each, and "
                    f"{job.exits - 2 * len(text) - 1} others", "KVM", "exit", job.exits, ways_of(job))
