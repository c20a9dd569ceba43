"""One guest, run by each of what people would use: what an exit costs them all, side by side.

    python benchmarks/peers                      all that are here; --only c,kvmexit-native; --rounds 12
    python benchmarks/peers --peer rust=./loop   another one: a program that is given the ROM's path, and runs it

A peer is a program of this folder. It maps the 64 KiB ROM of its first argument at 0xf0000, starts a vCPU in real mode
at F000:0000, answers each OUT to port 0x80 with nothing, and ends at one to port 0xf4. The ROM makes so many of the
first kind. Each round runs every peer with a small and with a large count, in another order: the difference of the two
times, by that of the counts, is what an exit costs, whatever starting costs. Ratios are to the C loop's of that round.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
SMALL, LARGE = 2000, 32_000
TIMEOUT = 120  # seconds, for a run
CONTROL = "c"
IN_PYTHON = {"kvmexit-native": "kvmexit_native.py", "kvmexit-python": "kvmexit_python.py", "fcntl": "fcntl_loop.py",
             "ctypes": "ctypes_loop.py", "cffi": "cffi_loop.py"}  # fmt: skip
QEMU = [
    "-accel", "kvm", "-cpu", "max,-arch-capabilities", "-machine", "pc", "-m", "16", "-nodefaults", "-no-user-config",
    "-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-bios",
]  # fmt: skip


def rom(exits: int) -> bytes:
    """-> 64 KiB for the guest."""
    # mov ecx, EXITS; again: out 0x80, al; dec ecx; jnz again; out 0xf4, al; hlt; and where a PC starts: jmp 0xf000:0
    code = b"\x66\xb9" + struct.pack("<I", exits) + bytes.fromhex("e6 80  66 49  75 fa  e6 f4  f4")
    return code.ljust(0xFFF0, b"\x90") + bytes.fromhex("ea 00 00 00 f0").ljust(16, b"\x90")


def peers(folder: Path) -> dict[str, list[str] | str]:
    """-> by name the command that a ROM's path is put behind, or why there is none."""
    found: dict[str, list[str] | str] = {CONTROL: c_loop(folder)}
    for name, script in IN_PYTHON.items():
        found[name] = [sys.executable, str(HERE / script)]
    if subprocess.run([sys.executable, "-c", "import cffi"], stderr=subprocess.DEVNULL, check=False).returncode:
        found["cffi"] = "cffi is not installed"
    qemu = shutil.which("qemu-system-x86_64")
    found["qemu"] = [qemu, *QEMU] if qemu else "there is no qemu-system-x86_64 here: apt-get install qemu-system-x86"
    found["rust"] = "kvm-ioctls is in neither Debian 12 nor PyPI: build a loop with it, and give that: --peer rust=PATH"
    return found


def c_loop(folder: Path) -> list[str] | str:
    """c_loop.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "there is no C compiler here"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", folder / "c_loop", HERE / "c_loop.c"]
    subprocess.run(command, check=True)
    return [str(folder / "c_loop")]


def seconds(command: list[str], path: Path) -> float:
    """How long one run takes; RuntimeError where it fails. QEMU's debug exit makes its status 1, or 2 * al + 1."""
    begun = time.perf_counter()
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    took = time.perf_counter() - begun
    if done.returncode != 0 and not ("qemu" in command[0] and done.returncode & 1 and not done.stderr):
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return took


def measure(commands: dict[str, list[str]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """-> us an exit of each peer, a value a round."""
    roms = {count: folder / f"{count}.rom" for count in (SMALL, LARGE)}
    for count, path in roms.items():
        path.write_bytes(rom(count))
    found: dict[str, list[float]] = {name: [] for name in commands}
    generator = random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(list(commands), len(commands)):
            took = {count: seconds(commands[name], path) for count, path in roms.items()}
            found[name].append((took[LARGE] - took[SMALL]) / (LARGE - SMALL) * 1e6)
    return found


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, with commas between")
    parser.add_argument("--rounds", type=int, default=12, help="6 at least")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args()
    if options.rounds < 6:
        parser.error("fewer than 6 rounds give no interval")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        parser.error("/dev/kvm is not there, or not for this user")
    sys.path.insert(0, str(HERE.parent))
    from common import machine

    from kvmexit.bench.figures import median_interval

    with tempfile.TemporaryDirectory(prefix="kvmexit-peers-") as folder:
        there = peers(Path(folder)) | {name: [path] for name, _, path in (peer.partition("=") for peer in options.peer)}
        only = options.only.split(",") if options.only else list(there)
        unknown = [name for name in only if name not in there]
        if unknown:
            parser.error(f"no peer is called {', '.join(unknown)}: there are {', '.join(there)}")
        wanted = {name: there[name] for name in [CONTROL, *only]}
        commands = {name: command for name, command in wanted.items() if not isinstance(command, str)}
        if CONTROL not in commands:
            parser.error(str(there[CONTROL]))
        found = measure(commands, options.rounds, Path(folder))
    print(machine())
    print(f"us an exit (OUT to port 0x80, real mode), {options.rounds} rounds of {LARGE - SMALL:,} exits")
    print(f"{'':<16}{'p50':>8}{'max':>8}{'to C':>8}{'95 %':>16}")
    for name, values in sorted(found.items(), key=lambda item: median(item[1])):
        interval = median_interval([own / control for own, control in zip(values, found[CONTROL], strict=True)])
        ratio, low, high = interval or (float("nan"),) * 3
        print(f"{name:<16}{median(values):>8.2f}{max(values):>8.2f}{ratio:>8.3f}{low:>9.3f}-{high:.3f}")
    for name in only:
        if isinstance(there[name], str):
            print(f"{name:<16} skipped: {there[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
