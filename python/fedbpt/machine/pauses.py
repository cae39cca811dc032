"""When a device should let its owner have the machine: on battery, when hot, while somebody uses it.

What tells, and what that means: docs/device.md.
"""

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

LOOK_EVERY_S = 5.0
HOT_CELSIUS = 80.0  # a Raspberry Pi 5 starts to slow down here
COOL_CELSIUS = 70.0  # and so cool must it be again
_COMMAND_TIMEOUT_S = 10.0

Ask: TypeAlias = Callable[[list[str]], str | None]
"""Runs a program; its output, or None where it is not there or fails."""


class Pauses:
    """Says whether to pause now. Looks every `LOOK_EVERY_S`, since looking may start a program. Thread-safe.

    Args:
        on: what to pause for.
        on_change: told why the device pauses, and "" when it goes on.
        sysfs: the root of the system's files.
        ask: runs a program.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        on: Collection[Trigger],
        on_change: Callable[[str], None] = lambda _reason: None,
        sysfs: Path = SYSFS,
        ask: Ask | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on = tuple(trigger for trigger in TRIGGERS if trigger in on)
        self._on_change = on_change
        self._sysfs = sysfs
        self._ask = ask or _output
        self._clock = clock
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._reason = ""
        self._hot = False

    def untold(self) -> list[Trigger]:
        """Those of the triggers that this system tells nothing of."""
        return [trigger for trigger in self._on if self._tells(trigger) is None]

    def reason(self) -> str:
        """Why to pause: ``on battery``, ``hot``, ``in use``; empty: there is no reason to."""
        with self._lock:
            now = self._clock()
            if self._looked is None or now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                before, self._reason = self._reason, self._look()
                if self._reason != before:
                    self._on_change(self._reason)
            return self._reason

    def _look(self) -> str:
        named: Mapping[Trigger, str] = {"battery": "on battery", "heat": "hot", "user": "in use"}
        return ", ".join(named[trigger] for trigger in self._on if self._tells(trigger))

    def _tells(self, trigger: Trigger) -> bool | None:
        """None: the system does not."""
        if trigger == "battery":
            told = _on_battery(self._sysfs)
            return _termux_on_battery(self._ask) if told is None else told
        return self._too_hot() if trigger == "heat" else _in_use(self._ask)

    def _too_hot(self) -> bool | None:
        now = heat(self._sysfs)
        if now.celsius is None and now.limited is None:
            return None
        # once hot, until it is cool: not on and off at every look
        celsius = 0.0 if now.celsius is None else now.celsius
        self._hot = bool(now.limited) or celsius >= (COOL_CELSIUS if self._hot else HOT_CELSIUS)
        return self._hot


def _on_battery(sysfs: Path) -> bool | None:
    """A battery of the machine (not of its mouse) gives power, and no mains supply does."""
    batteries, mains = [], []
    for supply in entries(sysfs, "class/power_supply/*"):
        kind = text(supply / "type")
        if kind == "Battery" and text(supply / "scope") != "Device":
            batteries.append(text(supply / "status"))
        elif kind in ("Mains", "USB", "Wireless"):
            mains.append(text(supply / "online"))
    if not any(batteries):
        return None
    return "Discharging" in batteries and "1" not in mains


def _termux_on_battery(ask: Ask) -> bool | None:
    """By Termux:API, on Android: /sys is closed to its programs."""
    said = ask(["termux-battery-status"])
    if said is None:
        return None
    try:
        return bool(json.loads(said).get("plugged") == "UNPLUGGED")
    except (ValueError, AttributeError):  # it prints an error where the Termux:API app is missing
        return None


def _in_use(ask: Ask) -> bool | None:
    """By systemd-logind: some session of a person is not idle. A desktop says when; a terminal is by its last key."""
    said = ask(["loginctl", "show-session", "--property=IdleHint", "--value"])
    return {"yes": False, "no": True}.get((said or "").strip())


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
    except (OSError, subprocess.TimeoutExpired):  # as good as not there: no telling is no reason to pause
        return None
    return done.stdout if done.returncode == 0 else None
