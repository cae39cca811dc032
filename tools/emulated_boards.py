"""Set up emulated 64-bit ARM boards with a wheel installed: ``python tools/emulated_boards.py [WHEEL]``.

Writes build/boards/CPU/python for every CPU of CPUS: a command that runs a real arm64 Python on an emulator of that CPU
(QEMU's user mode, in which system calls go to this machine's kernel). Emulator and Python are Debian packages,
downloaded through this machine's apt sources into a separate apt state and unpacked; nothing is installed, and root is
not needed.

``--x86 SITE``: does the same for X86_CPUS, with this Python and the package installed in the folder SITE.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOARDS = ROOT / "build" / "boards"
CPUS = ("cortex-a76", "cortex-a57")  # Raspberry Pi 5 and Pixel 5; Jetson TX2
X86_CPUS = ("Nehalem", "Haswell")  # x86-64-v2, the oldest that numpy supports; AVX2
EMULATED = ("aarch64", "x86_64")
# what tests/native imports
TEST_PACKAGES = ("gguf", "hypothesis", "pytest", "pytest-timeout")
# platforms of wheels for a system with glibc 2.27
PLATFORMS = ("manylinux_2_27_aarch64", "manylinux_2_17_aarch64")

COMMAND = """#!/bin/sh
# Python on an emulated {cpu}, written by tools/emulated_boards.py. -0: so that sys.executable is this file.
export PYTHONHOME="{system}/usr" PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONDONTWRITEBYTECODE=1
exec "{emulator}" -cpu {cpu} -L "{system}" -0 "$0" "{python}" "$@"
"""
X86_COMMAND = """#!/bin/sh
# Python on an emulated {cpu}, written by tools/emulated_boards.py.
export PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONDONTWRITEBYTECODE=1
exec "{emulator}" -cpu {cpu} "{python}" "$@"
"""


class BoardError(Exception):
    """A failure of the setup; one line that says what to do."""


def run(command: list[object], folder: Path | None = None) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BoardError(f"{' '.join(words[:2])} failed: {reason}")


def fetch_system(folder: Path) -> None:
    """Download Debian's Python for arm64 with its dependencies, and unpack it as a root file system."""
    for name in ("state/lists/partial", "cache/archives/partial", "system"):
        (folder / name).mkdir(parents=True)
    status = folder / "status"  # of a system without any packages
    status.touch()
    apt: list[object] = ["apt-get", "--quiet", "--yes"]
    for setting in (
        *("APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Install-Recommends=0", "APT::Sandbox::User="),
        *(f"Dir::State={folder / 'state'}", f"Dir::State::status={status}", f"Dir::Cache={folder / 'cache'}"),
        "Debug::NoLocking=1",
    ):
        apt += ["-o", setting]
    run([*apt, "update"])
    run([*apt, "install", "--download-only", "python3", "libstdc++6"])  # numpy needs libstdc++
    for package in sorted((folder / "cache" / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, folder / "system"])
    shutil.rmtree(folder / "cache")
    shutil.rmtree(folder / "state")


def fetch_emulator(folder: Path) -> None:
    """Download the package of emulators for this machine, and keep those of EMULATED."""
    run(["apt-get", "-o", "APT::Sandbox::User=", "download", "qemu-user-static"], folder)
    (package,) = folder.glob("qemu-user-static_*.deb")
    run(["dpkg-deb", "-x", package, folder / "unpacked"])
    for machine in EMULATED:
        name = f"qemu-{machine}-static"
        (folder / "unpacked" / "usr" / "bin" / name).replace(folder / name)
    shutil.rmtree(folder / "unpacked")
    package.unlink()


def prepare(cache: Path) -> Path:
    """The folder with the system and its emulators, downloaded if absent."""
    ready = cache / "emulated-boards"
    if ready.is_dir():
        return ready
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise BoardError(f"{tool} not found: emulated boards need a Debian or Ubuntu machine")
    fetching = cache / f"emulated-boards-{os.getpid()}"
    try:
        fetch_system(fetching)
        fetch_emulator(fetching)
        fetching.rename(ready)
    finally:
        shutil.rmtree(fetching, ignore_errors=True)
    return ready


def python_of(system: Path) -> Path:
    """The system's Python, such as .../usr/bin/python3.11."""
    return (system / "usr" / "bin" / "python3").resolve()


def install(wheel: Path, version: str, site: Path) -> None:
    """Install ``wheel``, its dependencies and the packages of tests, for arm64, in the folder ``site``."""
    constraints = ROOT / "constraints.txt"
    key = hashlib.sha256(wheel.read_bytes() + constraints.read_bytes() + repr(TEST_PACKAGES).encode()).hexdigest()
    stamp = site / "installed"
    if stamp.is_file() and stamp.read_text() == key:
        return
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", site]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    target = ["--python-version", version, "--implementation", "cp", "--only-binary", ":all:", *platforms]
    run([*pip, *target, "--constraint", constraints, wheel, *TEST_PACKAGES])
    stamp.write_text(key)


def write_command(cpu: str, text: str) -> Path:
    command = BOARDS / cpu / "python"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(text)
    command.chmod(0o755)
    return command


def write_commands(ready: Path, site: Path) -> list[Path]:
    system = ready / "system"
    parts = {"system": system, "site": site, "emulator": ready / "qemu-aarch64-static", "python": python_of(system)}
    return [write_command(cpu, COMMAND.format(cpu=cpu, **parts)) for cpu in CPUS]


def write_x86_commands(ready: Path, site: Path) -> list[Path]:
    parts = {
        "site": f"{site.resolve()}:{sysconfig.get_path('platlib')}",  # followed by the packages of this environment
        "emulator": ready / "qemu-x86_64-static",
        "python": Path(sys.executable).resolve(),
    }
    return [write_command(cpu, X86_COMMAND.format(cpu=cpu, **parts)) for cpu in X86_CPUS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "wheels",
        type=Path,
        nargs="*",
        metavar="WHEEL",
        help="default: print the version of the boards' Python",
    )
    parser.add_argument("--x86", type=Path, metavar="SITE", help="folder in which the package for x86-64 is installed")
    default = os.environ.get("FEDBPT_BUILD_CACHE") or Path.home() / ".cache" / "fedbpt" / "build"
    parser.add_argument("--cache", type=Path, default=Path(default), help="folder for emulator and system")
    args = parser.parse_args()
    try:
        ready = prepare(args.cache.resolve())
        if args.x86:
            for command in write_x86_commands(ready, args.x86):
                print(command)
            return 0
        version = python_of(ready / "system").name.removeprefix("python")
        if not args.wheels:
            print(version)
            return 0
        tag = f"-cp{version.replace('.', '')}-"
        fitting = [wheel for wheel in args.wheels if tag in wheel.name]
        if len(fitting) != 1:
            raise BoardError(f"the boards have Python {version}: give one wheel for it, {tag.strip('-')}")
        install(fitting[0], version, BOARDS / "site")
        for command in write_commands(ready, BOARDS / "site"):
            print(command)
    except (BoardError, OSError) as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
