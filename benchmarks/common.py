"""What the benchmarks share: the controls, compiled against the installed kvmexit; figures; and where they are from."""

from __future__ import annotations

import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

import kvmexit


def build_control():
    """Compile control.pyx, and import it."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    here, package = Path(__file__).parent, Path(kvmexit.__file__).parent
    build = tempfile.mkdtemp(prefix="kvmexit-control-")
    extension = Extension("control", [str(here / "control.pyx")], include_dirs=[str(package)],
                          extra_compile_args=["-O3", "-fno-plt", "-w"])
    modules = cythonize([extension], include_path=[str(package.parent)], build_dir=build, quiet=True)
    distribution = Distribution({"ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = build, build
    command.ensure_finalized()
    command.run()
    sys.path.insert(0, build)
    import control

    return control


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
