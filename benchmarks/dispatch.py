"""What an exit costs that a native or a Python handler answers: on a scripted vCPU, with the kernel out of the way.

    python benchmarks/dispatch.py [--json FILE]

Six things run alternately over the same script, so that drift hits all alike: a C loop (enter, sentinel, payload),
Vcpu.run() with a native handler, the same with times measured (vcpu.timing), the same recorded (vcpu.record(), to the
folder for temporary files, pages populated ahead), the C loop taking the GIL and calling an empty Python function, and
Vcpu.run() with that function as its handler. Where the guest writes, a seventh: Vcpu.run() with native.Ring, drained
after each pass.
A sample is the mean of one pass over the script, in ns an exit; p50, p99 and max are over the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import kvmexit
from kvmexit import native, testing

EXITS, SAMPLES = 20_000, 120


def build_control():
    """Compile control.pyx against the installed package, and import it."""
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


def handler(vcpu, exit):
    """The empty handler."""


def in_handler(vcpu, exit):
    """Answers a read."""
    return 1


# The steps, the handler, and the one route that leads to it.
SCRIPTS = {
    "pio_out": ([testing.pio_out(0x3F8, b"A")], handler, lambda vm, f: vm.on_pio(0x3F8, 8, f)),
    "mmio_write": ([testing.mmio_write(0x1000, b"A")], handler, lambda vm, f: vm.on_mmio(0x1000, 8, f)),
    "memory_fault": (
        [testing.memory_fault(0x1000, rip=1), testing.memory_fault(0x2000, rip=2)], handler,
        lambda vm, f: vm.on_memory_fault(handler=f)),
    "pio_in": ([testing.pio_in(0x3FD)], in_handler, lambda vm, f: vm.on_pio(0x3F8, 8, f)),
    "hypercall": ([testing.hypercall(12, 0)], in_handler, lambda vm, f: vm.on_hypercall(12, f)),
}


def make(steps, function, register):
    """-> a vCPU about to give out EXITS exits, with one handler for them all."""
    vm = testing.ScriptedVM()
    register(vm, function)
    return vm.create_vcpu(0, steps, repeat=EXITS // len(steps), keep=False)


def run(vcpu):
    """Vcpu.run() to the script's end."""
    try:
        vcpu.run()
    except kvmexit.KvmError as error:
        if error.errno != 61:
            raise


def measure(control, steps, function, register):
    """-> name -> samples, in ns an exit."""
    ways = {
        "c": lambda vcpu: control.c_loop(vcpu),
        "native": run,
        "timed": run,
        "recorded": run,
        "c_calling": lambda vcpu: control.c_loop_calling(vcpu, function),
        "kvmexit": run,
    }
    ring = native.Ring(1 << EXITS.bit_length(), vcpus=SAMPLES)  # with a lane for each pass's vCPU, mostly the same one
    handlers = {name: native.Ignore() for name in ("native", "timed", "recorded")}
    if steps[0] in (testing.pio_out(0x3F8, b"A"), testing.mmio_write(0x1000, b"A")):
        ways["ring"], handlers["ring"] = run, ring
    samples = {name: [] for name in ways}
    path = Path(tempfile.gettempdir()) / f"kvmexit-{os.getpid()}.trace"
    for _ in range(SAMPLES):
        for name, way in ways.items():
            vcpu = make(steps, handlers.get(name, function), register)
            vcpu.timing = name == "timed"
            recorder = vcpu.record(path) if name == "recorded" else None
            if recorder:
                time.sleep(0.01)  # the pages of this pass are there, as in a recording that goes on
            begun = time.perf_counter_ns()
            way(vcpu)
            samples[name].append((time.perf_counter_ns() - begun) / EXITS)
            if recorder:
                recorder.close()
                path.unlink()
                if recorder.records <= EXITS:
                    raise AssertionError("the recording is not whole")
            if name == "ring" and len(ring.drain()) != EXITS:
                raise AssertionError("the ring did not take every write")
    return samples


def summary(values):
    """p50, p99 and max of samples."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[int(len(ordered) * 0.99) - 1], "max": ordered[-1]}


def machine():
    """Where the figures are from."""
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "?")
    return {
        "cpu": model, "kernel": platform.release(), "python": sys.version.split()[0],
        "python_build": (
            "PGO" if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "") else "no PGO"),
        "abi": "abi3" if "abi3" in kvmexit._loop.__file__ else "version-specific", "kvmexit": kvmexit.__version__,
    }


def main():
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    control = build_control()
    result = {"machine": machine(), "exits": EXITS, "samples": SAMPLES, "ns": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"{'ns an exit':<14}{'C loop':>22}{'native handler':>22}{'above':>7}{'times measured':>22}"
          f"{'more':>6}{'ratio':>7}{'recorded':>22}{'more':>6}{'C loop calling Python':>24}"
          f"{'Python handler':>24}{'above C loop':>14}{'ratio to calling':>18}{'native.Ring':>22}{'above':>7}")
    for name, (steps, function, register) in SCRIPTS.items():
        samples = measure(control, steps, function, register)
        s = {way: summary(values) for way, values in samples.items()}
        result["ns"][name] = s
        shown = ["{p50:.0f} p99 {p99:.0f} max {max:.0f}".format(**s[way]) for way in s]
        natively = s["native"]["p50"] - s["c"]["p50"]
        timed = s["timed"]["p50"] - s["native"]["p50"]
        recorded = s["recorded"]["p50"] - s["native"]["p50"]
        above = s["kvmexit"]["p50"] - s["c"]["p50"]
        ratio = s["kvmexit"]["p50"] / s["c_calling"]["p50"]
        print(f"{name:<14}{shown[0]:>22}{shown[1]:>22}{natively:>7.0f}{shown[2]:>22}"
              f"{timed:>6.0f}{s['timed']['p50'] / s['native']['p50']:>7.2f}{shown[3]:>22}{recorded:>6.0f}"
              f"{shown[4]:>24}{shown[5]:>24}{above:>14.0f}"
              f"{ratio:>18.2f}" + (f"{shown[6]:>22}{s['ring']['p50'] - s['c']['p50']:>7.0f}" if "ring" in s else ""))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
