"""Threads, processes and preloaded libraries for the tests, and what a process holds."""

import gc
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZER = os.environ.get("KVMEXIT_SANITIZER")  # asan, tsan: tests/sanitize runs us
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def unsanitized(reason):
    """Mark a test that makes no sense under a sanitizer."""
    return pytest.mark.skipif(SANITIZER is not None, reason=f"not under a sanitizer: {reason}")


def needs_gil(reason):
    """Mark a test of what only Python with a GIL does."""
    return pytest.mark.skipif(FREE_THREADED, reason=f"free-threaded Python: {reason}")


def in_thread(function):
    """Run a function in a thread; -> the thread, started."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def off_main(function, *args, **kwargs):
    """Call a function in a thread of its own, where no tick for Ctrl-C ends KVM_RUN, so that entries can be counted; -> its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args, **kwargs).result()


def python(code, *, env=None, timeout=120):
    """Run Python code in a process of its own; -> CompletedProcess with text."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]), **(env or {})},
        capture_output=True, text=True, timeout=timeout, check=False,
    )


def compiled(tmp_path_factory, name):
    """tests/NAME.c as a library to preload; -> its path."""
    compiler = shutil.which(sysconfig.get_config_var("CC").split()[0]) or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp(name) / f"{name}.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-Wall", "-Werror", "-o", library, HERE / f"{name}.c"], check=True)
    return library


def preload(library):
    """-> what puts a library in front of libc in an environment: behind what is preloaded already (tests/sanitize)."""
    return {"LD_PRELOAD": " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)])}


def leaks():
    """-> what a leak would make grow: descriptors, mappings. A sanitizer, and free-threaded Python's allocator, have anonymous
    mappings that come and go."""
    gc.collect()
    all_of_them = not SANITIZER and not FREE_THREADED
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum(1 for line in maps if all_of_them or len(line.split()) > 5)
