"""kvmexit, with a native handler."""

from by_kvmexit import run

from kvmexit import native

run(native.Ignore())
