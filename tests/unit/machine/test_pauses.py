"""Pauses of a device, with fake system files and programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbpt.machine.pauses import POLL_INTERVAL_S, TRIGGERS, Pauses, Trigger


class Machine:
    """Fake files of /sys, and the output of programs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.programs: dict[str, str] = {}
        self.now = 0.0
        self.commands: list[list[str]] = []

    def supply(self, name: str, **files: str) -> None:
        folder = self.root / "class/power_supply" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")

    def celsius(self, degrees: float) -> None:
        zone = self.root / "class/thermal/thermal_zone0"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text(f"{degrees * 1000:.0f}\n")

    def run_program(self, command: list[str]) -> str | None:
        self.commands.append(command)
        return self.programs.get(command[0])

    def pauses(self, *on: Trigger) -> Pauses:
        return Pauses(on or TRIGGERS, sysfs=self.root, run_program=self.run_program, clock=lambda: self.now)

    def reason(self, *on: Trigger) -> str:
        return self.pauses(*on).reason()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_an_unknown_state_is_no_reason_to_pause(machine: Machine) -> None:
    assert machine.reason() == ""
    assert machine.pauses().unsupported() == ["battery", "heat", "user"]
    assert machine.pauses("heat").unsupported() == ["heat"]


@pytest.mark.parametrize(
    ("status", "online", "reason"),
    [("Discharging", "0", "on battery"), ("Discharging", "1", ""), ("Charging", "1", ""), ("Full", "0", "")],
)
def test_a_battery_that_gives_power_pauses(machine: Machine, status: str, online: str, reason: str) -> None:
    machine.supply("BAT0", type="Battery", status=status)
    machine.supply("AC", type="Mains", online=online)
    assert machine.reason("battery") == reason
    assert machine.pauses("battery").unsupported() == []
    assert machine.reason("heat") == ""


def test_the_battery_of_a_mouse_is_not_the_machines(machine: Machine) -> None:
    machine.supply("hid-mouse", type="Battery", status="Discharging", scope="Device")
    assert machine.reason("battery") == ""
    assert machine.pauses("battery").unsupported() == ["battery"]


@pytest.mark.parametrize(("plugged", "reason"), [("UNPLUGGED", "on battery"), ("PLUGGED_AC", "")])
def test_termux_reports_the_battery_if_the_system_does_not(machine: Machine, plugged: str, reason: str) -> None:
    machine.programs["termux-battery-status"] = f'{{"plugged": "{plugged}", "percentage": 50}}'
    assert machine.reason("battery") == reason
    assert machine.pauses("battery").unsupported() == []


@pytest.mark.parametrize("said", ["Termux:API is not installed", "[]"])
def test_termux_without_its_api_reports_nothing(machine: Machine, said: str) -> None:
    machine.programs["termux-battery-status"] = said
    assert machine.pauses("battery").unsupported() == ["battery"]


def test_a_hot_machine_pauses_until_it_is_cool(machine: Machine) -> None:
    pauses = machine.pauses("heat")
    said = []
    for degrees in (75, 80, 75, 70, 69, 75):
        machine.celsius(degrees)
        said.append(pauses.reason())
        machine.now += POLL_INTERVAL_S
    assert said == ["", "hot", "hot", "hot", "", ""]


@pytest.mark.parametrize(("idle", "reason"), [("yes\n", ""), ("no\n", "in use")])
def test_somebody_at_the_machine_pauses(machine: Machine, idle: str, reason: str) -> None:
    machine.programs["loginctl"] = idle
    assert machine.reason("user") == reason
    assert machine.pauses("user").unsupported() == []


def test_all_reasons_are_named_and_changes_are_reported(machine: Machine) -> None:
    told: list[str] = []
    pauses = Pauses(TRIGGERS, told.append, machine.root, machine.run_program, lambda: machine.now)
    for degrees, idle in ((90, "no"), (90, "no"), (60, "no"), (60, "yes")):
        machine.celsius(degrees)
        machine.programs["loginctl"] = idle
        machine.now += POLL_INTERVAL_S
        pauses.reason()
    assert told == ["hot, in use", "in use", ""]


def test_it_looks_only_so_often(machine: Machine) -> None:
    pauses = machine.pauses("user")
    for _ in range(10):
        pauses.reason()
        machine.now += POLL_INTERVAL_S / 5
    assert len(machine.commands) == 2
