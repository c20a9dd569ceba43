"""`python -m kvmexit COMMAND`, also installed as `kvmexit`: one module a command."""

from __future__ import annotations

import argparse
import sys

from kvmexit._version import __version__
from kvmexit.cli import bench, decode, demo, doctor, trace
from kvmexit.errors import Error

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; -> the exit status: 0 done, 1 the command's own failure, 2 wrong usage or unfit machine."""
    parser = argparse.ArgumentParser(prog="kvmexit", description="KVM vCPUs at C speed.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (demo, doctor, bench, trace, decode):
        command.add_to(commands)
    chosen = parser.parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
    except Error as error:
        print(f"kvmexit: {error}", file=sys.stderr)
        return 2
    return status
