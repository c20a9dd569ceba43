"""A first corpus: fuzz/seeds.py FOLDER writes inputs with an exit of each kind. It needs kvmexit, built in any way."""

import contextlib
import random
import struct
import sys
import tempfile
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


def traced(rng):
    """An input of `trace` that builds files."""
    payloads = [
        lambda: (IO, struct.pack("<BBHIQ", rng.random() < 0.5, rng.choice([1, 2, 4]), rng.choice([0x60, 0x3f8]),
                                 rng.choice([1, 3, 64]), rng.choice([4096, 8191]))),
        lambda: (MMIO, struct.pack("<Q8sIB", rng.choice([0x1000, 0xd0002000]), b"12345678", rng.randrange(10),
                                   rng.random() < 0.5)),
        lambda: (HYPERCALL, struct.pack("<4Q", 12, rng.randrange(64) << 12, 3, 16)),
        lambda: (rng.choice([29, 30]), struct.pack("<B7xIIQ", 0, 1, 0x100, 5)),
        lambda: (FAULT, struct.pack("<3Q", 8, rng.randrange(64) << 12, 4096)),
        lambda: (rng.randrange(45), rng.randbytes(rng.randrange(100))),
        lambda: (HLT, b""),
    ]
    data = bytes([rng.randrange(256) & ~1, rng.randrange(7), rng.choice([0, 0, 1])])
    for _ in range(rng.randrange(1, 20)):
        reason, payload = rng.choice(payloads)()
        op = (16 if reason == FAULT else rng.choice([0] * 8 + [16, 19, 21, 25, 27])) | 128 * rng.randrange(2)
        data += bytes([op, rng.randrange(256), rng.randrange(9), reason, len(payload), *payload, rng.randrange(256)])
    return data


def recorded(rng):
    """A whole file, as vcpu.record() writes it."""
    import kvmexit
    from kvmexit import testing

    some = [testing.pio_out(0x80, b"x"), testing.pio_in(0x60, 4), testing.mmio_read(0x2000, 4), testing.hlt(),
            testing.mmio_write(0x1000, b"ab"), testing.hypercall(12, 1, 2, 3), testing.memory_fault(0x5000),
            testing.ScriptStep(29, struct.pack("<B7xIIQ", 0, 2, 9, 0)), testing.ScriptStep(None, errno=4)]
    with testing.ScriptedVM() as vm, tempfile.TemporaryDirectory() as folder:
        vm.on_pio(0x60, 4, kvmexit.native.Ignore(1))
        vm.on(kvmexit.Exit, lambda vcpu, exit: 1 if getattr(exit, "is_write", True) is False else kvmexit.PASS)
        vcpu = vm.create_vcpu(0, rng.sample(some, rng.randrange(1, len(some))))
        vcpu.timing = rng.random() < 0.5
        with vcpu.record(folder + "/t", registers=rng.random() < 0.2):
            for _ in range(20):
                with contextlib.suppress(kvmexit.Error):
                    vcpu.run()
        return bytes([rng.randrange(256) | 1]) + Path(folder + "/t").read_bytes()


def main(folder):
    """Write them."""
    rng = random.Random(1)
    counts = {"exits": 200, "convert": 100, "python": 100, "serial": 40, "devices": 40, "trace": 200}
    for target, count in counts.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            head = {"exits": bytes([i]), "convert": rng.randbytes(7), "python": b""}.get(target)
            if target == "trace":
                data = recorded(rng) if i % 8 == 0 else traced(rng)
            else:
                data = rng.randbytes(rng.randrange(4, 200)) if head is None else head + exits(rng)
            (folder / target / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
