"""What the tests share: a VM on the real /dev/kvm where there is one, and a scripted one everywhere."""

import os

import pytest

import kvmexit
from kvmexit.testing import ScriptedVM


@pytest.fixture
def scripted():
    """A VM whose vCPUs follow a script."""
    with ScriptedVM() as vm:
        yield vm


def kvm_missing():
    """Why no guest can run here, or None."""
    try:
        kvmexit.VM().close()
    except kvmexit.Error as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def kvm():
    """Skips where no guest can run; with KVMEXIT_REQUIRE_KVM=1 that is a failure."""
    why = kvm_missing()
    if why and os.environ.get("KVMEXIT_REQUIRE_KVM") == "1":
        pytest.fail(f"no KVM: {why}")
    if why:
        pytest.skip(f"no KVM: {why}")


@pytest.fixture
def vm(kvm):
    """A VM on /dev/kvm."""
    with kvmexit.VM() as made:
        yield made
