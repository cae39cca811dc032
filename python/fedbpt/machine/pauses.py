"""Pauses of a device's work: on battery, when hot, while somebody uses the machine. See docs/device.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from fedbpt.machine.info import heat
from fedbpt.machine.system_files import SYSFS, entries, text

Trigger: TypeAlias = Literal["battery", "heat", "user"]
TRIGGERS: tuple[Trigger, ...] = ("battery", "heat", "user")

POLL_INTERVAL_S = 5.0
HOT_CELSIUS = 80.0  # a Raspberry Pi 5 starts to throttle here
COOL_CELSIUS = 70.0  # at which work resumes
_COMMAND_TIMEOUT_S = 10.0

RunProgram: TypeAlias = Callable[[list[str]], str | None]
"""Runs a program and returns its output, or None if it is missing or fails."""


class Pauses:
    """Decides whether to pause now. Polls at most every `POLL_INTERVAL_S`, as this may start a program. Thread-safe.

    Args:
        on: what to pause for.
        on_change: called with the reason for a pause, and with "" when work resumes.
        sysfs: mount point of sysfs.
        run_program: runs a program.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        on: Collection[Trigger],
        on_change: Callable[[str], None] = lambda _reason: None,
        sysfs: Path = SYSFS,
        run_program: RunProgram | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on = tuple(trigger for trigger in TRIGGERS if trigger in on)
        self._on_change = on_change
        self._sysfs = sysfs
        self._run_program = run_program or _output
        self._clock = clock
        self._lock = threading.Lock()
        self._polled: float | None = None
        self._reason = ""
        self._hot = False

    def unsupported(self) -> list[Trigger]:
        """The triggers whose state this system does not report."""
        return [trigger for trigger in self._on if self._state(trigger) is None]

    def reason(self) -> str:
        """The reason to pause: ``on battery``, ``hot``, ``in use``; empty if there is none."""
        with self._lock:
            now = self._clock()
            if self._polled is None or now - self._polled >= POLL_INTERVAL_S:
                self._polled = now
                before = self._reason
                self._reason = self._poll()
                if self._reason != before:
                    self._on_change(self._reason)
            return self._reason

    def _poll(self) -> str:
        reasons: Mapping[Trigger, str] = {"battery": "on battery", "heat": "hot", "user": "in use"}
        return ", ".join(reasons[trigger] for trigger in self._on if self._state(trigger))

    def _state(self, trigger: Trigger) -> bool | None:
        """Whether to pause for ``trigger``; None: not reported by the system."""
        if trigger == "battery":
            on_battery = _on_battery(self._sysfs)
            return _termux_on_battery(self._run_program) if on_battery is None else on_battery
        return self._too_hot() if trigger == "heat" else _in_use(self._run_program)

    def _too_hot(self) -> bool | None:
        now = heat(self._sysfs)
        if now.celsius is None and now.limited is None:
            return None
        # hysteresis: once hot, until it is cool
        celsius = 0.0 if now.celsius is None else now.celsius
        self._hot = bool(now.limited) or celsius >= (COOL_CELSIUS if self._hot else HOT_CELSIUS)
        return self._hot


def _on_battery(sysfs: Path) -> bool | None:
    """Whether the machine's battery (not a mouse's) discharges and no mains supply is online."""
    batteries = []
    mains = []
    for supply in entries(sysfs, "class/power_supply/*"):
        kind = text(supply / "type")
        if kind == "Battery" and text(supply / "scope") != "Device":
            batteries.append(text(supply / "status"))
        elif kind in ("Mains", "USB", "Wireless"):
            mains.append(text(supply / "online"))
    if not any(batteries):
        return None
    return "Discharging" in batteries and "1" not in mains


def _termux_on_battery(run_program: RunProgram) -> bool | None:
    """By Termux:API, as Android does not let programs read /sys."""
    output = run_program(["termux-battery-status"])
    if output is None:
        return None
    try:
        return bool(json.loads(output).get("plugged") == "UNPLUGGED")
    except (ValueError, AttributeError):  # it prints an error if the Termux:API app is missing
        return None


def _in_use(run_program: RunProgram) -> bool | None:
    """Whether a user session is not idle, by systemd-logind: as a desktop reports, or by a terminal's last input."""
    output = run_program(["loginctl", "show-session", "--property=IdleHint", "--value"])
    return {"yes": False, "no": True}.get((output or "").strip())


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # treated as missing: unknown is no reason to pause
        return None
    return done.stdout if done.returncode == 0 else None
