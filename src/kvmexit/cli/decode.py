"""`kvmexit decode`: explains one kvm_run page, as a core dump, a debugger or a test has it.

FILE has the page's bytes, at least the 288 up to the end of the union, and the PIO data behind the page where there are
some; or the same in hexadecimal digits (--hex); - is stdin. --errno is what KVM_RUN failed with.
"""

from __future__ import annotations

import argparse
import errno
import json
import struct
import sys
from pathlib import Path
from typing import Any

from kvmexit._exits import Exit, ExitReason
from kvmexit.errors import KvmError
from kvmexit.testing import ScriptedVM, ScriptStep

__all__ = ["add_to"]

UNION, UNION_END, PAGE = 32, 288, 4096  # offsets in struct kvm_run (Linux, include/uapi/linux/kvm.h)
FLAGS, REASON, RIP = 14, 8, 432  # of RIP: where KVM leaves it if kvm_valid_regs asks for it
AGAIN = {
    errno.EINTR: "somebody interrupted KVM_RUN",
    errno.EAGAIN: "KVM asks for it",
    errno.ENOMEM: "KVM was short of memory",
}


def add_to(commands: Any) -> None:
    """Add the command to `kvmexit`."""
    parser = commands.add_parser(
        "decode", help="explain one kvm_run page", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--hex", action="store_true", help="FILE has hexadecimal digits")
    parser.add_argument("--errno", default="0", type=_errno, help="a number, or a name such as EFAULT")
    parser.add_argument("--json", action="store_true", help="an object, with the exit's fields by their names")
    parser.set_defaults(run=run, fail=parser.error)


def run(options: argparse.Namespace) -> int:
    """Decode, and print."""
    try:
        page = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        if options.hex:
            page = bytes.fromhex(page.decode("ascii"))
    except (OSError, ValueError) as error:
        options.fail(f"{options.file}: {error}")
    if len(page) < UNION_END:
        options.fail(f"{options.file}: {len(page)} bytes; struct kvm_run has {UNION_END} up to the end of its union")
    known = explain(page, options.errno)
    if options.json:
        print(json.dumps(known))
    else:
        print(known["text"])
        for name in ("reason", "flags", "errno", "meaning"):
            print(f"  {name:<8} {known[name]}")
    return 0


def explain(page: bytes, error: int = 0) -> dict[str, Any]:
    """What KVM_RUN's return meant, given the page it left.

    "text" (the exit as Python shows it, or "no exit"), "exit" (its class, or None), "fields" (by name), "owes" (whether
    KVM waits for an answer), "reason", "flags", "errno", "meaning".
    """
    reason, flags = struct.unpack_from("<I", page, REASON)[0], struct.unpack_from("<H", page, FLAGS)[0]
    exit, owes = decoded(page, reason, flags, error)
    if error in AGAIN:
        meaning = f"{AGAIN[error]}: kvmexit enters again"
    elif exit is None:
        meaning = "KVM_RUN failed: what was pending still is" if error else "KVM wrote no reason: kvmexit enters again"
    elif owes:
        meaning = "KVM waits for an answer"
    else:
        meaning = "it comes again, unless something is done" if error else "nothing is owed: the guest can go on"
    known = f" ({ExitReason(reason).name})" if reason in list(ExitReason) else ""
    return {
        "text": "no exit" if exit is None else repr(exit), "exit": None if exit is None else type(exit).__name__,
        "fields": fields(exit), "owes": owes, "reason": f"{reason}{known}", "flags": f"{flags:#x}",
        "errno": f"{error} ({errno.errorcode.get(error, '?')})" if error else "0", "meaning": meaning,
    }  # fmt: skip


def decoded(page: bytes, reason: int, flags: int, error: int) -> tuple[Exit | None, bool]:
    """The exit, or None where there is none, and whether it owes an answer: a vCPU that returns just this says so."""
    if error in AGAIN:
        return None, False
    rip = int.from_bytes(page[RIP : RIP + 8], "little")
    step = ScriptStep(reason, page[UNION:UNION_END], page[PAGE : 3 * PAGE], errno=error, flags=flags, rip=rip)
    with ScriptedVM() as vm:
        vcpu = vm.create_vcpu(0, [step])
        try:
            exit = vcpu.run()
        except KvmError:
            return None, False
        try:
            return exit, vcpu.run() is not None
        except KvmError:  # the script's end: it was entered
            return exit, False


def fields(exit: Exit | None) -> dict[str, Any]:
    """An exit's, as JSON has them."""
    names: tuple[str, ...] = () if exit is None else type(exit).__match_args__
    return {name: value.hex() if isinstance(value := getattr(exit, name), bytes) else value for name in names}


def _errno(text: str) -> int:
    number = getattr(errno, text.upper(), None) if not text.isdigit() else int(text)
    if not isinstance(number, int):
        raise argparse.ArgumentTypeError(f"no errno is called {text!r}")
    return number
