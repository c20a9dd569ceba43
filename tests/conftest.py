"""What the tests share: a VM on the real /dev/kvm where there is one, and a scripted one everywhere."""

import errno
import mmap
import os
import platform
import shutil
import sys
import sysconfig

import pytest
from processes import off_main

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


@pytest.fixture
def iced():
    """iced-x86, which decodes a guest's instructions; skips without it."""
    pytest.importorskip("iced_x86", reason="iced-x86 is not installed")


@pytest.fixture
def private_vm(kvm):
    """A VM that has private memory."""
    try:
        made = kvmexit.VM(kvmexit.VMType.SW_PROTECTED)
    except kvmexit.KvmError:
        pytest.skip("this kernel has no VM type with private memory")
    with made:
        yield made


@pytest.fixture(scope="session")
def hypercalls(kvm):
    """Skips where a guest that makes a hypercall does not come back from it."""
    from guests import load

    with open("/proc/cpuinfo") as cpuinfo:
        code = "0f 01 d9" if "AuthenticAMD" in cpuinfo.read() else "0f 01 c1"
    with kvmexit.VM() as vm:
        if isinstance(load(vm, bytes.fromhex(f"{code} e6 80"), cpl=0).run(timeout=2), kvmexit.Interrupted):
            pytest.skip("a guest's hypercall does not exit on this machine")


@pytest.fixture(scope="session")
def uffd():
    """Skips where no userfaultfd is to be had that sees the kernel's accesses."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        kvmexit.faults.Pager(memory, bytes(mmap.PAGESIZE)).close()
    except kvmexit.KvmError as error:
        if error.call != "userfaultfd":
            raise
        pytest.skip("this kernel has no userfaultfd" if error.errno == errno.ENOSYS else "userfaultfd is not permitted here")


def pytest_collection_modifyitems(items):
    """Whatever runs a guest is marked so."""
    for item in items:
        if "kvm" in getattr(item, "fixturenames", ()):
            item.add_marker("kvm")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run what is marked so off the main thread."""
    if pyfuncitem.get_closest_marker("off_main") is None:
        return None
    off_main(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
    return True


KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])

# Skips that are right on some machine; with KVMEXIT_STRICT_SKIPS=1 (.ci/run) any other fails the run.
EXPECTED_SKIPS = [
    "not under a sanitizer",  # processes.unsanitized() has why
    "own-GIL sub-interpreters came with Python 3.12",
    "needs root to become somebody else",
    "numpy is missing",  # kvmexit does without
    "hypothesis is missing",  # so do tests/sanitize and the lab
    "kvmexit[bench] is not installed",  # likewise, and tests/freethreaded
    "pyperf is missing",  # kvmexit[benchmarks]: .ci/run's benchmarks have it
    *([] if shutil.which("valgrind") else ["valgrind is missing"]),
    "iced-x86 is not installed",  # likewise, with kvmexit[faults]
    "this kernel has no userfaultfd",
    "userfaultfd is not permitted here",
    "everybody has userfaultfd on this machine",
    "this kernel has no VM type with private memory",
    "this kernel does not poison memory on request",  # lab/newer's does
    "this VM type has private memory",
    "this kernel has no guest_memfd",  # in an ordinary VM
    "this kernel has no KVM_PRE_FAULT_MEMORY",
    *([] if KERNEL >= (6, 12) else ["this kernel has no KVM_X86_QUIRK_SLOT_ZAP_ALL"]),
    "this kernel does not poison memory on request",  # the lab's does
    "poison can be real here",
    "a guest's hypercall does not exit on this machine",
    "this kernel's KVM has no Hyper-V",  # nor Xen: a choice when it is configured; the lab's has both
    "this kernel's KVM has no Xen",
    "a guest has no SVM on this machine",
    "RLIMIT_NOFILE is",
    *([] if KERNEL >= (6, 1) else ["this kernel has no KVM_CAP_"]),
    *([] if sys.version_info < (3, 13) else ["numba is not installed"]),  # pyproject.toml spares the later ones its 80 MB
    *(["free-threaded", "cffi is not installed", "ziglang is missing"] if sysconfig.get_config_var("Py_GIL_DISABLED")
      else ["this Python has a GIL"]),
    *([] if KERNEL >= (6, 18) else ["this kernel's guest_memfd has no MMAP and INIT_SHARED"]),
    *([] if os.path.exists("/dev/kvm") else ["no KVM"]),
    *([] if os.path.isdir("/sys/kernel/mm/hugepages") else ["no huge pages here"]),
]


def pytest_terminal_summary(terminalreporter):
    """Name the skips nobody expected."""
    for reason in unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"unexpected skip: {reason}", red=True)


def unexpected_skips(terminalreporter):
    """-> reasons of skips that EXPECTED_SKIPS does not have."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])]
    return [reason for reason in reasons if not any(expected in reason for expected in EXPECTED_SKIPS)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail on skips that nobody expected."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("KVMEXIT_STRICT_SKIPS") == "1" and reporter and unexpected_skips(reporter) and session.exitstatus == 0:
        session.exitstatus = 1
    at_least = int(os.environ.get("KVMEXIT_AT_LEAST", "0"))
    passed = len(reporter.stats.get("passed", [])) if reporter else 0
    if passed < at_least and session.exitstatus == 0:
        reporter.write_line(f"{passed} tests passed, at least {at_least} were expected", red=True)
        session.exitstatus = 1
