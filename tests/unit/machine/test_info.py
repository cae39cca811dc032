"""Information on the machine, from fake system files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from fedbpt.machine.energy import EnergyMeter
from fedbpt.machine.info import Heat, battery_percent, board_name, cpu_name, heat, physical_cores
from fedbpt.machine.memory import memory_of_process
from fedbpt.machine.pauses import TRIGGERS, Pauses


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def core(implementer: str, part: str) -> str:
    return f"processor\t: 0\nCPU implementer\t: {implementer}\nCPU part\t: {part}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: A CPU @ 2.1 GHz\n\nprocessor\t: 1\nmodel name\t: A CPU\n", "A CPU @ 2.1 GHz"),
        (core("0x41", "0xd0b") * 4, "Cortex-A76"),
        (core("0x4e", "0x003") * 2 + core("0x41", "0xd07") * 4, "Denver 2 + Cortex-A57"),
        (core("0x41", "0xfff"), "Arm 0x41/0xfff"),
    ],
)
def test_cpu_name(tmp_path: Path, cpuinfo: str, name: str) -> None:
    assert cpu_name(write(tmp_path, {"cpuinfo": cpuinfo})) == name


def test_a_cpu_without_a_file_still_has_some_name(tmp_path: Path) -> None:
    assert cpu_name(tmp_path)


def test_board_name(tmp_path: Path) -> None:
    assert board_name(tmp_path, tmp_path) is None
    write(tmp_path, {"class/dmi/id/product_name": "A Laptop\n"})
    assert board_name(tmp_path, tmp_path) == "A Laptop"
    write(tmp_path, {"device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert board_name(tmp_path, tmp_path) == "Raspberry Pi 5 Model B Rev 1.0"


def zones(*given: tuple[str, int]) -> dict[str, str]:
    files = {}
    for number, (kind, millidegrees) in enumerate(given):
        files[f"class/thermal/thermal_zone{number}/type"] = f"{kind}\n"
        files[f"class/thermal/thermal_zone{number}/temp"] = f"{millidegrees}\n"
    return files


def test_without_thermal_files_heat_is_unknown(tmp_path: Path) -> None:
    assert heat(tmp_path) == Heat(None, None, None)


@pytest.mark.parametrize(
    ("given", "celsius"),
    [
        ([("battery", 60_000), ("cpu-0-0-usr", 41_500), ("cpu-1-0-usr", 43_000)], 43.0),
        ([("GPU-therm", 50_000), ("PMIC-Die", 100_000)], 50.0),
        ([("x86_pkg_temp", 55_000), ("acpitz", -273_000)], 55.0),
        ([("cpu-thermal", 999_000)], None),
    ],
)
def test_the_temperature_is_the_processors_hottest(
    tmp_path: Path, given: list[tuple[str, int]], celsius: float | None
) -> None:
    assert heat(write(tmp_path, zones(*given))).celsius == celsius


def test_a_sensor_that_is_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, zones(("cpu", 40_000), ("cpu", 90_000), ("cpu", 90_000)))
    (tmp_path / "class/thermal/thermal_zone1/temp").unlink()
    (tmp_path / "class/thermal/thermal_zone2/temp").write_text("\n")
    assert heat(tmp_path).celsius == 40.0


@pytest.mark.parametrize(
    ("files", "limited"),
    [
        ({"class/thermal/cooling_device0/type": "pwm-fan", "class/thermal/cooling_device0/cur_state": "4"}, None),
        ({"class/thermal/cooling_device0/type": "cpufreq-cpu0", "class/thermal/cooling_device0/cur_state": "0"}, False),
        (
            {
                "class/thermal/cooling_device0/type": "thermal-cpufreq-0",
                "class/thermal/cooling_device0/cur_state": "2",
            },
            True,
        ),
        ({"devices/platform/soc/soc:firmware/get_throttled": "0\n"}, False),
        ({"devices/platform/soc/soc:firmware/get_throttled": "50000\n"}, False),  # it was, since the start
        ({"devices/platform/soc/soc:firmware/get_throttled": "50004\n"}, True),
    ],
)
def test_whether_heat_keeps_the_clock_down(tmp_path: Path, files: dict[str, str], limited: bool | None) -> None:
    assert heat(write(tmp_path, files)).limited is limited


def test_throttle_events_add_up_over_cores(tmp_path: Path) -> None:
    counts = {f"devices/system/cpu/cpu{i}/thermal_throttle/core_throttle_count": str(i + 1) for i in range(3)}
    assert heat(write(tmp_path, counts)).throttle_events == 6


FILES = {
    "class/power_supply/battery/type": "Battery",
    "class/power_supply/battery/status": "Discharging",
    "class/power_supply/battery/capacity": "50",
    "class/power_supply/battery/power_now": "1000000",
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "10",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "100",
    "class/hwmon/hwmon0/name": "ina3221",
    "class/hwmon/hwmon0/power1_input": "10",
    "class/hwmon/hwmon0/power1_label": "VDD_IN",
    "class/thermal/thermal_zone0/type": "cpu",
    "class/thermal/thermal_zone0/temp": "50000",
    "class/thermal/cooling_device0/type": "cpufreq",
    "class/thermal/cooling_device0/cur_state": "1",
    "devices/platform/soc/soc:firmware/get_throttled": "0",
    "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3",
    "devices/system/cpu/cpu0/topology/thread_siblings_list": "0,1",
    "device-tree/model": "A Board",
    "class/dmi/id/product_name": "A Laptop",
    "cpuinfo": "model name: A CPU",
    "self/statm": "20 10 5 1 0 3 0",
}


def refuse(number: int) -> Callable[..., NoReturn]:
    def refused(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number), "a system file")

    return refused


def assert_nothing_is_told(root: Path) -> None:
    """Call everything that reads system files: none of it may raise."""
    assert cpu_name(root)
    assert physical_cores(root) >= 1
    assert memory_of_process(root)["rss"] > 0
    assert battery_percent(root) is None
    assert heat(root) == Heat(None, None, None)
    assert Pauses(TRIGGERS, sysfs=root, run_program=lambda _command: None).reason() == ""
    with EnergyMeter(root) as meter:
        assert meter.joules() is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV, errno.ENODATA])
@pytest.mark.parametrize("closed", [("read_bytes",), ("read_bytes", "stat"), ("glob", "read_bytes")])
def test_unreadable_system_files_give_no_information(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, closed: tuple[str, ...]
) -> None:
    write(tmp_path, FILES)
    for method in closed:
        monkeypatch.setattr(Path, method, refuse(number))
    assert_nothing_is_told(tmp_path)
    assert board_name(tmp_path, tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe\x00", b"none", b"1.25e1", b"1 2 3", b"0x", b"z" * 5000, b"1 -2"]
)
def test_malformed_system_files_give_no_information(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, FILES)
    for name in FILES:
        (tmp_path / name).write_bytes(content)
    assert_nothing_is_told(tmp_path)
