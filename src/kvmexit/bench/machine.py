"""Where figures are from: the processor, the kernel and its KVM, what slows or steadies them, and the Python."""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import kvmexit._loop
from kvmexit._bench import clock_cost
from kvmexit._version import __version__
from kvmexit.bench.figures import percentile

__all__ = ["describe"]

PARAMETERS = ("nx_huge_pages", "halt_poll_ns", "ept", "npt", "avic", "enable_apicv", "tdp_mmu", "mitigate_smt_rsb")
CPU = Path("/sys/devices/system/cpu")


def describe(device: str) -> dict[str, Any]:
    """Texts, numbers and lists, by name; "" where the machine does not say."""
    flags = cpuinfo("flags").split()
    nested = "hypervisor" in flags
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return {
        "cpu": cpuinfo("model name"),
        "cores": len(os.sched_getaffinity(0)),
        "smt": read(CPU / "smt/active"),
        "virtualisation": next((flag for flag in ("vmx", "svm") if flag in flags), ""),
        "nested": nested,
        "hypervisor": read("/sys/hypervisor/type") or read("/sys/class/dmi/id/product_name") if nested else "",
        "governor": read(CPU / "cpu0/cpufreq/scaling_governor"),
        "turbo": read(CPU / "cpufreq/boost") or read(CPU / "intel_pstate/no_turbo"),
        "mitigations": mitigations(),
        "kernel": f"{platform.system()} {platform.release()}",
        "preemption": preemption(),
        "clocksource": read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "transparent_hugepages": chosen(read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "kvm": parameters(),
        "device": device,
        "load_average": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}",
        "python_optimised": "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""),
        "gil": gil,
        "switch_interval_s": sys.getswitchinterval(),
        "kvmexit": f"{__version__}, {'stable' if 'abi3' in str(kvmexit._loop.__file__) else 'version-specific'} ABI",
        "clock_ns": percentile(sorted(clock_cost(2000)), 50),
    }


def read(path: str | Path) -> str:
    """A file's text; "" where there is none."""
    try:
        return Path(path).read_text().strip("\0\n ")
    except OSError:
        return ""


def cpuinfo(key: str) -> str:
    found = re.search(rf"^{key}\s*: (.*)$", read("/proc/cpuinfo"), re.M)
    return found[1] if found else ""


def chosen(text: str) -> str:
    """The one in brackets."""
    found = re.search(r"\[(.*?)\]", text)
    return found[1] if found else text


def mitigations() -> dict[str, str]:
    """Of the processor's vulnerabilities: those that concern it."""
    folder = CPU / "vulnerabilities"
    found = {path.name: read(path) for path in sorted(folder.glob("*"))} if folder.is_dir() else {}
    return {name: text for name, text in found.items() if text and text != "Not affected"}


def preemption() -> str:
    return next((word for word in ("PREEMPT_RT", "PREEMPT_DYNAMIC", "PREEMPT") if word in platform.version()), "")


def parameters() -> dict[str, str]:
    """KVM's modules, and those of their parameters that an exit's time may depend on."""
    found = {}
    for module in sorted(Path("/sys/module").glob("kvm*")):
        found[module.name] = ""
        for name in PARAMETERS:
            if value := read(module / "parameters" / name):
                found[f"{module.name}.{name}"] = value
    return found
