"""What the benchmarks share: the controls, compiled against the installed kvmexit; figures; and where they are from."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import kvmexit


def build_control(build=None):
    """Compile control.pyx, and import it. build: the folder it goes to, unless it is there already."""
    build = build or tempfile.mkdtemp(prefix="kvmexit-control-")
    if not list(Path(build).glob("control.*.so")):
        compile_control(build)
    sys.path.insert(0, str(build))
    import control

    return control


def compile_control(build):
    """Compile control.pyx against the kvmexit that is imported, into a folder."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    here, package = Path(__file__).parent, Path(kvmexit.__file__).parent
    extension = Extension("control", [str(here / "control.pyx")], include_dirs=[str(package)],
                          extra_compile_args=["-O3", "-fno-plt", "-w"])
    modules = cythonize([extension], include_path=[str(package.parent)], build_dir=str(build), quiet=True)
    distribution = Distribution({"ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(build), str(build)
    command.ensure_finalized()
    command.run()


def percentile(values, share):
    """The value that so many of the others are not above."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def machine():
    """Where the figures are from."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    pgo = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    abi = "abi3" if "abi3" in kvmexit._loop.__file__ else "version-specific"
    return (f"{model}, Linux {platform.release()}, CPython {sys.version.split()[0]} {'' if pgo else 'without '}PGO, "
            f"kvmexit {kvmexit.__version__} ({abi} ABI)")


def compiler():
    """What the control was compiled with, and kvmexit where it was built here."""
    command = [*shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC")), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
