"""The machine's energy use, as reported by Linux: RAPL counters of the CPU, a board's power monitors, or a battery.

They cover different parts (`EnergyMeter.source` names the one in use): RAPL a CPU package, a board's input rail the
whole board, a battery the whole device while it is not charging.
"""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from fedbpt.machine.system_files import SYSFS, read, text

INTERVAL_S = 0.1

# hwmon drivers that measure a board or a processor, but not for example a graphics card
_HWMON = re.compile(r"ina\d|fam15h_power|amd_energy|sc[mp]i_sensors|macsmc_hwmon")
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN")  # Jetson boards' rails that feed all others

Clock: TypeAlias = Callable[[], float]


class _Counter:
    """A counter of microjoules in a file, which wraps to 0 at ``wraps_at``."""

    def __init__(self, name: str, path: Path, wraps_at: int | None) -> None:
        self.name = name
        self._path = path
        self._wraps_at = wraps_at
        self._last = _number(path)

    def joules(self) -> float:
        """Joules since the last call."""
        now = _number(self._path)
        used = now - self._last
        if used < 0:
            used = used + self._wraps_at if self._wraps_at else 0
        self._last = now
        return used / 1e6


class _Power:
    """Current power as the product of numbers in files, integrated over time by the trapezoidal rule."""

    def __init__(self, name: str, paths: tuple[Path, ...], unit: float, clock: Clock) -> None:
        self.name = name
        self._paths = paths
        self._unit = unit
        self._clock = clock
        self._last = (clock(), self._watts())

    def _watts(self) -> float:
        watts = self._unit
        for path in self._paths:
            watts *= _number(path)
        return abs(watts)  # some batteries report discharging as negative

    def joules(self) -> float:
        """Joules since the last call."""
        last_time, last_watts = self._last
        now = self._clock()
        watts = self._watts()
        self._last = (now, watts)
        return (now - last_time) * (last_watts + watts) / 2


_Source: TypeAlias = _Counter | _Power


class EnergyMeter:
    """Measures energy from its construction on. As a context manager, it samples power readings in a thread.

    Args:
        sysfs: mount point of sysfs.
        interval_s: sampling interval in seconds.
        clock: monotonic time in seconds.
    """

    def __init__(self, sysfs: Path = SYSFS, interval_s: float = INTERVAL_S, clock: Clock = time.monotonic) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedbpt-energy", daemon=True)
        self._joules = 0.0
        self._sources: tuple[_Source, ...] = ()
        self.why_not: str | None = "this system does not report its energy use"
        for find in (_rapl, _hwmon, _jetson, _battery):
            try:
                self._sources = tuple(find(sysfs, clock))
            except OSError as error:
                self.why_not = f"cannot read {error.filename} ({error.strerror}): run as root"
            if self._sources:
                self.why_not = None
                break

    @property
    def source(self) -> str | None:
        """What is measured. None: nothing, for the reason in ``why_not``, one line."""
        return " + ".join(source.name for source in self._sources) or None

    def joules(self) -> float | None:
        """Joules since this meter was constructed; None if there is no source, or no longer."""
        with self._lock:
            try:
                self._joules += sum(source.joules() for source in self._sources)
            except OSError as error:  # such as an unplugged battery
                self._sources = ()
                self.why_not = f"cannot read {error.filename} any more: {error.strerror}"
            return self._joules if self._sources else None

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s) and self.joules() is not None:
            pass

    def __enter__(self) -> EnergyMeter:
        if self._sources:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def _rapl(sysfs: Path, _clock: Clock) -> Iterator[_Source]:
    """CPU packages and DRAM. The zones inside a package (core, uncore) are part of it."""
    for zone in sorted((sysfs / "class/powercap").glob("intel-rapl:*")):
        name = read(zone / "name")
        if name.startswith("package") or name == "dram":
            yield _Counter(f"RAPL {name}", zone / "energy_uj", _number(zone / "max_energy_range_uj"))


def _hwmon(sysfs: Path, clock: Clock) -> Iterator[_Source]:
    rails: list[tuple[str, _Source]] = []
    for device in sorted((sysfs / "class/hwmon").glob("hwmon*")):
        driver = text(device / "name") or ""
        if not _HWMON.match(driver):
            continue
        energies = [path for path in sorted(device.glob("energy*_input")) if not _label(path).startswith("Ecore")]
        powers = sorted(device.glob("power*_input"))
        for path in energies:  # without cores, which are part of their socket
            rails.append((_label(path), _Counter(f"{driver} {_label(path)}", path, None)))
        for path in [] if energies else powers:
            rails.append((_label(path), _Power(f"{driver} {_label(path)}", (path,), 1e-6, clock)))
        for volts in [] if energies or powers else sorted(device.glob("in[123]_input")):  # INA3221: mV and mA
            amperes = volts.with_name(volts.name.replace("in", "curr", 1))
            if amperes.is_file():
                rails.append((_label(volts), _Power(f"{driver} {_label(volts)}", (volts, amperes), 1e-6, clock)))
    yield from _of_board(rails)


def _jetson(sysfs: Path, clock: Clock) -> Iterator[_Source]:
    """The INA3221 in NVIDIA's kernels before 5.10, in milliwatts."""
    rails: list[tuple[str, _Source]] = []
    for power in sorted((sysfs / "bus/i2c/drivers/ina3221x").glob("*/iio:device*/in_power[012]_input")):
        label = read(power.with_name(f"rail_name_{power.name[len('in_power')]}"))
        rails.append((label, _Power(f"ina3221 {label}", (power,), 1e-3, clock)))
    yield from _of_board(rails)


def _battery(sysfs: Path, clock: Clock) -> Iterator[_Source]:
    for supply in sorted((sysfs / "class/power_supply").glob("*")):
        if text(supply / "type") != "Battery" or text(supply / "status") != "Discharging":
            continue
        if (supply / "power_now").is_file():
            yield _Power(f"battery {supply.name}", (supply / "power_now",), 1e-6, clock)
        elif (supply / "current_now").is_file():
            flow = (supply / "current_now", supply / "voltage_now")
            yield _Power(f"battery {supply.name}", flow, 1e-12, clock)


def _of_board(rails: list[tuple[str, _Source]]) -> list[_Source]:
    """The input rails if there are any, else all rails."""
    return [source for label, source in rails if label in _INPUT_RAILS] or [source for _, source in rails]


def _label(value: Path) -> str:
    """The driver's label for ``in1_input``, ``power2_input``, ...; without one, ``in1``, ``power2``."""
    stem = value.name.removesuffix("_input")
    return text(value.with_name(f"{stem}_label")) or stem


def _number(path: Path) -> int:
    found = read(path)
    try:
        return int(found)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"expected a number, found {found!r}", str(path)) from error
