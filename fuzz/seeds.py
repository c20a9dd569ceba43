"""A first corpus: fuzz/seeds.py FOLDER writes inputs with an exit of each kind, as targets.pyx reads them."""

import random
import struct
import sys
from pathlib import Path

IO, HYPERCALL, HLT, MMIO, FAULT = 2, 3, 5, 6, 39
CLEAN, EFAULT = 0, 20


def step(reason, payload=b"", op=CLEAN):
    """One return of KVM_RUN; an action that answers follows, for those that no handler takes."""
    return bytes([op, reason, len(payload)]) + payload


def io(port, is_write, size=1, count=1, offset=4096):
    return step(IO, struct.pack("<BBHIQ", is_write, size, port, count, offset))


def mmio(gpa, is_write, size, data=b"12345678"):
    return step(MMIO, struct.pack("<Q8sIB", gpa, data, size, is_write))


def fault(page, count, private):
    return step(FAULT, struct.pack("<3Q", 8 * private, page << 12, count << 12), EFAULT)


def map_range(page, count, private):
    return step(HYPERCALL, struct.pack("<4Q", 12, page << 12, count, 16 * private))


def exits(rng):
    some = [
        lambda: io(rng.choice([0x3f8, 0x3f9, 0x60, 0x62, 0x80, 0x81, 0x100, 0x200, 0xffff]), rng.random() < 0.5,
                   rng.choice([1, 2, 4]), rng.choice([1, 1, 3, 64]), rng.choice([4096, 4096, 8191, 1 << 40])),
        lambda: mmio(rng.choice([0xd0000000, 0xd0000010, 0xd00000ff, 0xd0001000, 0x1000, 0xe0000000, 1 << 63]),
                     rng.random() < 0.5, rng.randrange(10)),
        lambda: fault(rng.randrange(250), rng.choice([1, 2, 70]), rng.random() < 0.6),
        lambda: map_range(rng.randrange(250), rng.choice([1, 8, 200]), rng.random() < 0.6),
        lambda: step(rng.choice([29, 30]), struct.pack("<BxxxxxxxIIQ", 0, 1, rng.choice([0x100, 0x102, 9]), 5)),
        lambda: step(HLT), lambda: step(rng.randrange(50), rng.randbytes(rng.randrange(30))),
        lambda: bytes([rng.choice([24, 25, 26, 27, 28, 29, 30, 31])]),
        lambda: bytes([128, HLT, 0, 2]) + rng.randbytes(14),
        lambda: bytes([64]) + io(0x10, 0)[1:],
    ]
    actions = [b"", b"\0", b"\0", bytes([rng.randrange(16)])]
    return b"".join(rng.choice(some)() + rng.choice(actions) for _ in range(rng.randrange(2, 24)))


def main(folder):
    """Write them."""
    rng = random.Random(1)
    for target, count in [("exits", 200), ("convert", 100), ("python", 100), ("serial", 40), ("devices", 40)]:
        (folder / target).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            head = {"exits": bytes([i]), "convert": rng.randbytes(7), "python": b""}.get(target)
            data = rng.randbytes(rng.randrange(4, 200)) if head is None else head + exits(rng)
            (folder / target / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
