"""What this machine is, and whether heat slows it down."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import msgspec

from fedbpt.machine.energy import SYSFS

PROC = Path("/proc")

# MIDR implementer and part, as in /proc/cpuinfo: the cores of common boards and phones
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
_PI_LIMITS = 0b1110  # of get_throttled: frequency capped, throttled, soft temperature limit; bit 0 is the voltage


class Heat(msgspec.Struct, frozen=True):
    """The machine's temperature at one moment. None: the system does not tell."""

    celsius: float | None  # of the hottest zone of the processor
    limited: bool | None  # heat keeps the clock down right now
    throttle_events: int | None  # since the machine started


def cpu_name(proc: Path = PROC) -> str:
    """The processor's name, or those of its kinds of core."""
    info = proc / "cpuinfo"
    text = info.read_text() if info.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if named:
        return named[1].strip()
    makers = re.findall(r"^CPU implementer\s*:\s*(\w+)$", text, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*:\s*(\w+)$", text, re.MULTILINE)
    cores = [_ARM_CORES.get((int(a, 16), int(b, 16)), f"Arm {a}/{b}") for a, b in zip(makers, parts, strict=False)]
    return " + ".join(dict.fromkeys(cores)) or platform.processor() or platform.machine()


def physical_cores() -> int:
    """Physical cores that this process may run on: hyper-threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(cpu))
    return max(1, len(cores))


def board_name(proc: Path = PROC, sysfs: Path = SYSFS) -> str | None:
    """What the board or the computer is called; None: the system does not tell."""
    for path in (proc / "device-tree/model", sysfs / "class/dmi/id/product_name"):
        if path.is_file() and os.access(path, os.R_OK):
            return path.read_text().strip("\0\n ") or None
    return None


def heat(sysfs: Path = SYSFS) -> Heat:
    """The heat of now."""
    return Heat(_celsius(sysfs), _limited(sysfs), _throttle_events(sysfs))


def battery_percent(sysfs: Path = SYSFS) -> float | None:
    """How full the battery is; None: there is none, or the system does not tell."""
    levels = [_number(supply / "capacity") for supply in sysfs.glob("class/power_supply/*")]
    return next((float(level) for level in levels if level is not None and 0 <= level <= 100), None)


def _celsius(sysfs: Path) -> float | None:
    zones = {}
    for zone in sysfs.glob("class/thermal/thermal_zone*"):
        millidegrees = _number(zone / "temp")
        if millidegrees is not None and 0 < millidegrees < 150_000:
            zones[zone] = ((zone / "type").read_text().strip().lower(), millidegrees / 1000)
    processor = [celsius for kind, celsius in zones.values() if re.search("cpu|pkg|soc|core", kind)]
    # a power chip's zone is made up on some boards
    return max(processor or [celsius for kind, celsius in zones.values() if "pmic" not in kind], default=None)


def _limited(sysfs: Path) -> bool | None:
    states = [_number(device / "cur_state") for device in _cpu_coolers(sysfs)]
    pi = sysfs / "devices/platform/soc/soc:firmware/get_throttled"
    if pi.is_file():
        states.append(int(pi.read_text(), 16) & _PI_LIMITS)
    known = [state for state in states if state is not None]
    return any(known) if known else None


def _cpu_coolers(sysfs: Path) -> list[Path]:
    """The cooling devices that cool by slowing the processor down."""
    devices = sysfs.glob("class/thermal/cooling_device*")
    return [device for device in devices if re.search("cpufreq|processor", (device / "type").read_text().lower())]


def _throttle_events(sysfs: Path) -> int | None:
    counts = [_number(path) for path in sysfs.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # a sensor that is switched off says so this way
        return None
