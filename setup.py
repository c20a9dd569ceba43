"""The extension modules. Everything else is in pyproject.toml.

KVMEXIT_BUILD in the environment, any of: debug (-O0 -g), asan (AddressSanitizer and UBSan), tsan (ThreadSanitizer),
coverage (line tracing and gcov), gcov (without the tracing: fuzz/coverage), fuzz (clang's, for fuzz/run), separated by
commas.
"""

import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("src/kvmexit")
SWITCHES = {
    "debug": ["-O0", "-g"],
    "asan": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-g", "-fsanitize=thread"],
    "coverage": ["-O0", "--coverage", "-DCYTHON_TRACE_NOGIL=1"],
    "gcov": ["-O0", "--coverage"],
    "fuzz": ["-g", "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined",
             "-fno-omit-frame-pointer", "-fno-sanitize=pointer-overflow"],  # Cython adds 0 to NULL
}
# No exit goes through these: small, not fast.
COLD = {"_bench", "_dirty", "_eventfd", "_ioctl", "_memory", "_msr_filter", "_pager", "_registers", "_stats", "_vm"}
MAKES_NOTHING = {"sdist", "egg_info", "--version", "--name"}  # the sdist has no generated C


def chosen():
    names = [name for name in os.environ.get("KVMEXIT_BUILD", "").split(",") if name]
    unknown = set(names) - set(SWITCHES)
    if unknown:
        sys.exit(f"KVMEXIT_BUILD: {', '.join(sorted(unknown))} unknown; there are {', '.join(SWITCHES)}")
    return names


def extensions():
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        sys.exit(f"kvmexit runs KVM's vCPUs on x86-64 Linux; this is {platform.machine()} {sys.platform}")
    names = chosen()
    flags = [flag for name in names for flag in SWITCHES[name]]
    links = [flag for flag in flags if flag.startswith(("-fsanitize", "--coverage"))]
    macros = [("Py_LIMITED_API", "0x030C0000")] if stable_abi() else []
    return [
        Extension(
            f"kvmexit.{path.stem}",
            [str(path)],
            include_dirs=[str(SOURCE)],
            define_macros=macros,
            # no-strict-aliasing: an exit's payload, an array of words, is read through struct kvm_run
            extra_compile_args=[
                "-std=gnu11", "-fvisibility=hidden", "-fno-plt", "-fno-strict-aliasing",
                *(flags or ["-g0", *(["-Os"] if path.stem in COLD else [])])],
            extra_link_args=links or ["-Wl,--strip-debug"],
            depends=[str(p) for p in sorted(SOURCE.rglob("*.h"))],
            py_limited_api=stable_abi(),
        )
        for path in sorted(SOURCE.glob("_*.pyx"))
    ]


def stable_abi():
    """One wheel for 3.12 and later; free-threaded builds have no stable ABI."""
    return sys.version_info >= (3, 12) and not sysconfig.get_config_var("Py_GIL_DISABLED")


def cythonized():
    if MAKES_NOTHING & set(sys.argv[1:]):
        return []
    from Cython.Build import cythonize

    return cythonize(
        extensions(),
        build_dir="build",
        nthreads=os.cpu_count(),
        include_path=["src"],
        compiler_directives={"language_level": "3", "auto_pickle": False, "nonecheck": True,
                             "freethreading_compatible": True, "linetrace": "coverage" in chosen()},
        emit_linenums=bool({"asan", "tsan", "gcov", "fuzz"} & set(chosen())),  # what they report is in the .pyx
    )


setup(
    ext_modules=cythonized(),
    options={"build_ext": {"parallel": os.cpu_count()}}
    | ({"bdist_wheel": {"py_limited_api": "cp312"}} if stable_abi() else {}),
)
