"""Energy from fake system files, with a fake clock."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedbpt.machine.energy import EnergyMeter


class Tree:
    """A fake /sys with a clock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0

    def write(self, path: str, value: object) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        return file

    def meter(self) -> EnergyMeter:
        return EnergyMeter(self.root, interval_s=3600.0, clock=lambda: self.now)

    def rapl(self, zone: str, name: str, microjoules: int) -> None:
        self.write(f"class/powercap/{zone}/name", name)
        self.write(f"class/powercap/{zone}/energy_uj", microjoules)
        self.write(f"class/powercap/{zone}/max_energy_range_uj", 10_000_000)

    def rail(self, number: int, label: str, millivolts: int, milliamperes: int) -> None:
        self.write("class/hwmon/hwmon3/name", "ina3221")
        self.write(f"class/hwmon/hwmon3/in{number}_label", label)
        self.write(f"class/hwmon/hwmon3/in{number}_input", millivolts)
        self.write(f"class/hwmon/hwmon3/curr{number}_input", milliamperes)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "sys")


def test_without_a_source_there_are_no_joules_but_a_reason(tree: Tree) -> None:
    with tree.meter() as meter:
        assert meter.joules() is None
        assert meter.source is None
        assert meter.why_not


def test_rapl_adds_packages_and_memory_but_not_zones_within_a_package(tree: Tree) -> None:
    tree.rapl("intel-rapl:0", "package-0", 1_000_000)
    tree.rapl("intel-rapl:0:0", "core", 500_000)
    tree.rapl("intel-rapl:0:1", "dram", 100_000)
    tree.rapl("intel-rapl:1", "psys", 100_000)
    meter = tree.meter()
    assert meter.source == "RAPL package-0 + RAPL dram"
    assert meter.why_not is None
    assert meter.joules() == 0
    tree.rapl("intel-rapl:0", "package-0", 3_500_000)
    tree.rapl("intel-rapl:0:0", "core", 2_500_000)
    tree.rapl("intel-rapl:0:1", "dram", 350_000)
    tree.rapl("intel-rapl:1", "psys", 9_000_000)
    assert meter.joules() == pytest.approx(2.75)
    assert meter.joules() == pytest.approx(2.75)


def test_a_counter_may_start_again_from_zero(tree: Tree) -> None:
    tree.rapl("intel-rapl:0", "package-0", 9_000_000)
    meter = tree.meter()
    for microjoules, joules in ((1_000_000, 2.0), (8_000_000, 9.0), (0, 11.0)):
        tree.rapl("intel-rapl:0", "package-0", microjoules)
        assert meter.joules() == pytest.approx(joules)


def test_power_is_integrated_over_time(tree: Tree) -> None:
    tree.rail(1, "VDD_GPU_SOC", 5000, 400)  # 2 W
    tree.rail(2, "VDD_CPU_CV", 5000, 200)  # 1 W
    meter = tree.meter()
    assert meter.source == "ina3221 VDD_GPU_SOC + ina3221 VDD_CPU_CV"
    tree.now += 10
    assert meter.joules() == pytest.approx(30.0)
    tree.rail(2, "VDD_CPU_CV", 5000, 600)  # rises to 3 W: 2 W on average
    tree.now += 10
    assert meter.joules() == pytest.approx(70.0)


def test_the_input_rail_of_a_board_holds_the_others(tree: Tree) -> None:
    tree.rail(1, "VDD_IN", 5000, 1000)
    tree.rail(2, "VDD_CPU_GPU_CV", 5000, 200)
    meter = tree.meter()
    assert meter.source == "ina3221 VDD_IN"
    tree.now += 2
    assert meter.joules() == pytest.approx(10.0)


def test_rails_under_nvidias_older_kernels(tree: Tree) -> None:
    folder = "bus/i2c/drivers/ina3221x/0-0041/iio:device1"
    for number, (name, milliwatts) in enumerate([("VDD_SYS_CPU", 700), ("VDD_IN", 4000), ("VDD_SYS_DDR", 300)]):
        tree.write(f"{folder}/rail_name_{number}", name)
        tree.write(f"{folder}/in_power{number}_input", milliwatts)
    meter = tree.meter()
    assert meter.source == "ina3221 VDD_IN"
    tree.now += 0.5
    assert meter.joules() == pytest.approx(2.0)


def test_hwmon_power_is_in_microwatts_and_a_graphics_card_is_left_out(tree: Tree) -> None:
    tree.write("class/hwmon/hwmon0/name", "amdgpu")
    tree.write("class/hwmon/hwmon0/power1_input", 90_000_000)
    tree.write("class/hwmon/hwmon1/name", "ina226")
    tree.write("class/hwmon/hwmon1/power1_input", 6_000_000)
    tree.write("class/hwmon/hwmon1/in1_input", 5000)  # the same again, as volts and amperes
    tree.write("class/hwmon/hwmon1/curr1_input", 1200)
    meter = tree.meter()
    assert meter.source == "ina226 power1"
    tree.now += 1
    assert meter.joules() == pytest.approx(6.0)


def test_hwmon_energy_counts_a_socket_not_its_cores(tree: Tree) -> None:
    def write(microjoules: int) -> None:
        tree.write("class/hwmon/hwmon0/name", "amd_energy")
        for number, label in ((1, "Ecore000"), (2, "Esocket0")):
            tree.write(f"class/hwmon/hwmon0/energy{number}_label", label)
            tree.write(f"class/hwmon/hwmon0/energy{number}_input", microjoules)

    write(1_000_000)
    meter = tree.meter()
    assert meter.source == "amd_energy Esocket0"
    write(4_000_000)
    assert meter.joules() == pytest.approx(3.0)


@pytest.mark.parametrize(
    "files",
    [
        {"power_now": 3_000_000},
        {"current_now": -750_000, "voltage_now": 4_000_000},  # a phone's: negative while it discharges
    ],
)
def test_a_battery_is_measured_while_it_discharges(tree: Tree, files: dict[str, int]) -> None:
    for name, value in {"type": "Battery", "status": "Discharging", **files}.items():
        tree.write(f"class/power_supply/bms/{name}", value)
    meter = tree.meter()
    assert meter.source == "battery bms"
    tree.now += 4
    assert meter.joules() == pytest.approx(12.0)


@pytest.mark.parametrize(("type", "status"), [("Battery", "Charging"), ("Battery", "Full"), ("Mains", "Discharging")])
def test_a_charging_battery_is_not_measured(tree: Tree, type: str, status: str) -> None:
    for name, value in {"type": type, "status": status, "power_now": 3_000_000}.items():
        tree.write(f"class/power_supply/BAT0/{name}", value)
    assert tree.meter().source is None


def test_a_counter_that_may_not_be_read_is_the_reason(tree: Tree) -> None:
    tree.rapl("intel-rapl:0", "package-0", 1)
    (tree.root / "class/powercap/intel-rapl:0/energy_uj").unlink()
    meter = tree.meter()
    assert meter.joules() is None
    assert "energy_uj" in (meter.why_not or "")
    tree.write("class/power_supply/BAT0/type", "Battery")  # what may be read is used instead
    tree.write("class/power_supply/BAT0/status", "Discharging")
    tree.write("class/power_supply/BAT0/power_now", 1)
    assert tree.meter().source == "battery BAT0"
    assert tree.meter().why_not is None


def test_a_source_that_goes_away_ends_the_count(tree: Tree) -> None:
    for name, value in {"type": "Battery", "status": "Discharging", "power_now": 3_000_000}.items():
        tree.write(f"class/power_supply/BAT0/{name}", value)
    meter = tree.meter()
    (tree.root / "class/power_supply/BAT0/power_now").unlink()
    assert meter.joules() is None
    assert meter.why_not
    assert meter.source is None


def test_a_counter_that_holds_no_number_is_the_reason(tree: Tree) -> None:
    tree.rapl("intel-rapl:0", "package-0", 1)
    tree.write("class/powercap/intel-rapl:0/energy_uj", "")
    assert tree.meter().source is None
    assert "energy_uj" in (tree.meter().why_not or "")


def test_inside_the_block_a_thread_reads_and_is_gone_after_it(tree: Tree) -> None:
    tree.rail(1, "VDD_IN", 5000, 1000)
    read = threading.Event()
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        if calls > 3:
            read.set()
        return float(calls)

    with EnergyMeter(tree.root, interval_s=0.001, clock=clock):
        assert "fedbpt-energy" in [thread.name for thread in threading.enumerate()]
        assert read.wait(30)
    assert "fedbpt-energy" not in [thread.name for thread in threading.enumerate()]
