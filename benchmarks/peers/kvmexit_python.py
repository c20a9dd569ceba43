"""kvmexit, with a handler in Python."""

from by_kvmexit import run


def handler(vcpu, io):
    """Nothing to do."""


run(handler)
