"""A command that starts with the machine: a systemd unit of the user's, or a Termux:Boot script on Android."""

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
_KEPT = ("FEDBPT_CACHE", "FEDBPT_CREDENTIALS", "FEDBPT_LLAMA_LOG")  # the environment that a command depends on


@dataclass(frozen=True)
class Installed:
    """What `install` wrote, or found written. ``enable`` and ``remove`` are shell lines for people, ``notes`` too."""

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
    """Write the file that starts ``command``, from this folder, when the machine starts. Enables nothing.

    Args:
        command: program and arguments; the program by its full path.
        device: the device's name where this machine may have several: each has a file of its own; None: the only one.
        max_memory: MiB beyond which systemd ends it; None: no limit.
        force: replace a file of other content.
        environment: ``PREFIX`` of Termux there means Termux.
        home: the user's home; None: of this process.

    Raises:
        ConfigError: a file of other content is there.
        FedbptError: it cannot be written.
    """
    service = SERVICE if device is None else f"{SERVICE}-{as_name(device)}"
    kept = {name: environment[name] for name in _KEPT if name in environment}
    instead = "set HOME, or XDG_CONFIG_HOME, to a folder of its own"
    if "com.termux" in environment.get("PREFIX", ""):
        home = home or folders.home(instead)
        path = home / ".termux/boot" / service
        log = home / f".{service}.log"
        text = boot_script(command, Path.cwd(), kept, environment["PREFIX"], log.name)
        found = Installed(
            path,
            f"install the app Termux:Boot and open it once; to start now: sh {shlex.quote(str(path))} &",
            f"rm {shlex.quote(str(path))}",
            f"it logs to {log}, anew at each start",
        )
    else:
        configuration = Path(environment.get("XDG_CONFIG_HOME") or (home or folders.home(instead)) / ".config")
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
    """The unit's text. Started again where it fails, but not where its command is wrong (exit code 2)."""
    lines = [
        "[Unit]",
        "Description=fedbpt device: tunes prompts on this machine's data for a coordinator",
        "After=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={' '.join(_quoted(word) for word in command)}",
        # a path of its own: no quotes there
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
    """The script's text; ``prefix``: of Termux; ``log``: a file's name in the home.

    A wake lock, or Android stops the processor with the screen off.
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
    """As systemd.syntax(7) and systemd.service(5) read it back: one word, nothing expanded."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _write(path: Path, text: str, force: bool) -> None:
    content = os.fsencode(text)  # paths in it need not be UTF-8
    try:
        if path.exists() and not force and path.read_bytes() != content:
            raise ConfigError(
                f"{path} is there and differs: look at it, then replace it with --force, or give another device on this"
                " machine a --name of its own"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: content})
        path.chmod(0o755 if path.suffix == "" else 0o644)
    except OSError as error:
        raise FedbptError(f"cannot write {path}: {error.strerror or error}") from error
