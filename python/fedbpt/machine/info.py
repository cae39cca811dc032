"""The machine's processor, board and battery, and whether it is throttled by heat."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec

from fedbpt.machine.system_files import PROC, SYSFS, entries, number, text

# MIDR implementer and part, as in /proc/cpuinfo, of the cores in common boards and phones
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
    (0x51, 0x804): "Kryo 4xx Gold",
    (0x51, 0x805): "Kryo 4xx Silver",
}
_PI_LIMITS = 0b1110  # bits of get_throttled: frequency capped, throttled, soft temperature limit


class Heat(msgspec.Struct, frozen=True):
    """The machine's thermal state at one moment. None: not reported by the system."""

    celsius: float | None  # of the processor's hottest zone
    limited: bool | None  # the clock is throttled now
    throttle_events: int | None  # since boot


def cpu_name(proc: Path = PROC) -> str:
    """The name of the processor, or of its types of core."""
    info = text(proc / "cpuinfo") or ""
    named = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    if named:
        return named[1].strip()
    makers = re.findall(r"^CPU implementer\s*:\s*(0x[0-9a-fA-F]+)$", info, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)$", info, re.MULTILINE)
    cores = [_ARM_CORES.get((int(a, 16), int(b, 16)), f"Arm {a}/{b}") for a, b in zip(makers, parts, strict=False)]
    return " + ".join(dict.fromkeys(cores)) or platform.processor() or platform.machine()


def physical_cores(sysfs: Path = SYSFS) -> int:
    """Number of physical cores that this process may run on."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    topology = "devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return max(1, len({text(sysfs / topology.format(cpu)) or str(cpu) for cpu in allowed}))


def board_name(proc: Path = PROC, sysfs: Path = SYSFS) -> str | None:
    """The model name of the board or computer; None: not reported by the system."""
    return text(proc / "device-tree/model") or text(sysfs / "class/dmi/id/product_name") or None


def heat(sysfs: Path = SYSFS) -> Heat:
    """Read the machine's thermal state."""
    return Heat(_celsius(sysfs), _limited(sysfs), _throttle_events(sysfs))


def battery_percent(sysfs: Path = SYSFS) -> float | None:
    """Charge of the battery; None: no battery, or not reported by the system."""
    levels = [number(supply / "capacity") for supply in entries(sysfs, "class/power_supply/*")]
    return next((float(level) for level in levels if level is not None and 0 <= level <= 100), None)


def _celsius(sysfs: Path) -> float | None:
    zones = []
    for zone in entries(sysfs, "class/thermal/thermal_zone*"):
        millidegrees = number(zone / "temp")
        if millidegrees is not None and 0 < millidegrees < 150_000:
            zones.append(((text(zone / "type") or "").lower(), millidegrees / 1000))
    processor = [celsius for kind, celsius in zones if re.search("cpu|pkg|soc|core", kind)]
    # the zone of a power management chip is not real on some boards
    return max(processor or [celsius for kind, celsius in zones if "pmic" not in kind], default=None)


def _limited(sysfs: Path) -> bool | None:
    states = [number(device / "cur_state") for device in _cpu_coolers(sysfs)]
    pi = number(sysfs / "devices/platform/soc/soc:firmware/get_throttled", base=16)
    states.append(None if pi is None else pi & _PI_LIMITS)
    known = [state for state in states if state is not None]
    return any(known) if known else None


def _cpu_coolers(sysfs: Path) -> list[Path]:
    """The cooling devices that throttle the processor."""
    devices = entries(sysfs, "class/thermal/cooling_device*")
    return [device for device in devices if re.search("cpufreq|processor", (text(device / "type") or "").lower())]


def _throttle_events(sysfs: Path) -> int | None:
    counts = [number(path) for path in entries(sysfs, "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
