"""Autostart of a command at boot: a systemd user unit, or a Termux:Boot script on Android."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbpt.errors import ConfigError, FedbptError
from fedbpt.machine import folders
from fedbpt.machine.files import write_whole
from fedbpt.protocol.specs import as_name

SERVICE = "fedbpt-device"
# Variables that a command depends on.
_ENVIRONMENT = ("FEDBPT_CACHE", "FEDBPT_CREDENTIALS", "FEDBPT_LLAMA_LOG", "PYTHONPATH")


@dataclass(frozen=True)
class Installed:
    """The file that `install` wrote or found. ``enable`` and ``remove``: shell commands to show; ``notes``: text."""

    path: Path
    enable: str
    remove: str
    notes: str


def install(
    command: Sequence[str],
    *,
    device: str | None = None,
    max_memory: int | None = None,
    force: bool = False,
    environment: Mapping[str, str] = os.environ,
    home: Path | None = None,
) -> Installed:
    """Write the file that starts ``command`` at boot, in the current folder. Does not enable it.

    Args:
        command: program, by its full path, and arguments.
        device: the device's name, if this machine may have several, each with its own file; None: the only one.
        max_memory: memory limit that systemd enforces, in MiB; None: no limit.
        force: replace a file with different content.
        environment: environment variables; Termux is detected by its ``PREFIX``.
        home: the user's home folder; None: of this process.

    Raises:
        ConfigError: a file with different content exists.
        FedbptError: the file cannot be written.
    """
    service = SERVICE if device is None else f"{SERVICE}-{as_name(device)}"
    kept = {name: environment[name] for name in _ENVIRONMENT if name in environment}
    remedy = "set HOME or XDG_CONFIG_HOME to a folder of this user"
    if "com.termux" in environment.get("PREFIX", ""):
        home = home or folders.home(remedy)
        path = home / ".termux/boot" / service
        log = home / f".{service}.log"
        text = boot_script(command, Path.cwd(), kept, environment["PREFIX"], log.name)
        found = Installed(
            path,
            f"install the app Termux:Boot and open it once; to start now: sh {shlex.quote(str(path))} &",
            f"rm {shlex.quote(str(path))}",
            f"it logs to {log}, which each start overwrites",
        )
    else:
        configuration = Path(environment.get("XDG_CONFIG_HOME") or (home or folders.home(remedy)) / ".config")
        path = configuration / "systemd/user" / f"{service}.service"
        text = systemd_unit(command, Path.cwd(), kept, max_memory)
        found = Installed(
            path,
            f"systemctl --user daemon-reload && systemctl --user enable --now {service} && loginctl enable-linger",
            f"systemctl --user disable --now {service}; rm {shlex.quote(str(path))}",
            f"it logs to the journal: journalctl --user -u {service}",
        )
    _write(path, text, force)
    return found


def systemd_unit(command: Sequence[str], folder: Path, environment: Mapping[str, str], max_memory: int | None) -> str:
    """The text of the systemd unit. It restarts the command on failure, but not on a usage error (exit code 2)."""
    lines = [
        "[Unit]",
        "Description=fedbpt device: tunes prompts on this machine's data for a coordinator",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={' '.join(_quoted(word) for word in command)}",
        # takes the rest of the line, without quotes
        f"WorkingDirectory={str(folder).replace('%', '%%')}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()),
        "Restart=on-failure",
        "RestartSec=30",
        "RestartPreventExitStatus=2",
        "Nice=10",
        *([] if max_memory is None else [f"MemoryMax={max_memory}M"]),
        "",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def boot_script(command: Sequence[str], folder: Path, environment: Mapping[str, str], prefix: str, log: str) -> str:
    """The text of the Termux:Boot script. ``prefix``: Termux's; ``log``: name of a file in the home folder.

    It takes a wake lock, without which Android stops the processor when the screen is off.
    """
    lines = [
        f"#!{prefix}/bin/sh",
        "termux-wake-lock",
        f"cd {shlex.quote(str(folder))} || exit 1",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f'exec nice -n 10 {shlex.join(command)} >"$HOME"/{shlex.quote(log)} 2>&1',
    ]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """Quote a word for systemd.syntax(7) and systemd.service(5), without expansion."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _write(path: Path, text: str, force: bool) -> None:
    content = os.fsencode(text)  # paths in it need not be UTF-8
    try:
        if path.exists() and not force and path.read_bytes() != content:
            raise ConfigError(
                f"{path} exists with different content: check it and replace it with --force, or give another device on"
                " this machine its own --name"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content})
        path.chmod(0o755 if path.suffix == "" else 0o644)
    except OSError as error:
        raise FedbptError(f"cannot write {path}: {error.strerror or error}") from error
