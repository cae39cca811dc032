"""Build the wheels to ship: one a Python, each for every CPU of an architecture (``make wheel``).

llama.cpp is compiled once an architecture: the wheels of all Pythons are built one after another in one build folder,
where only the module changes. Compiler and C library come with the package ziglang, see cmake/toolchains/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from check_wheel import WheelError, check

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
GLIBC = "2_27"  # as in cmake/toolchains/
# In the environment of each Python; cmake and ninja are those on PATH. tomli is for Python 3.10.
BUILD_PACKAGES = ("pip", "scikit-build-core", "pybind11", "tomli; python_version < '3.11'")


class BuildError(Exception):
    """One line that says what to do."""


def candidates(version: str) -> Iterator[Path]:
    """Where a Python may be: on PATH, or among those of pyenv."""
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)


def find_python(version: str) -> Path:
    """A Python of ``version`` with its C headers."""
    asks = "import os, sys, sysconfig; print('%d.%d' % sys.version_info[:2]); "
    asks += "sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    for path in candidates(version):
        if path.is_file():
            done = subprocess.run([path, "-c", asks], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() == version:
                return path
    raise BuildError(f"found no Python {version} with C headers: install it, or choose others with PYTHONS='3.11 3.12'")


def chosen(asked: Sequence[str] | None) -> list[str]:
    """What to build for: what was asked for, all of which must be here, or else those of `PYTHONS` that are."""
    if asked is not None:
        for version in asked:
            find_python(version)  # all of them, before the first one's minutes
        return list(asked)
    found, missing = [], []
    for version in PYTHONS:
        try:
            find_python(version)
            found.append(version)
        except BuildError:
            missing.append(version)
    if not found:
        raise BuildError(f"found no Python of {', '.join(PYTHONS)} with C headers: install one")
    if missing:
        print(f"fedbpt: left out, not here with C headers: Python {', '.join(missing)}", file=sys.stderr)
    return found


def run(command: list[object], environment: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, env={**os.environ, **(environment or {})}, check=False).returncode != 0:
        raise BuildError(f"this failed, see the lines above: {' '.join(words)}")


def headers_elsewhere(include: Path, folder: Path) -> Path | None:
    """A folder in ``folder`` from which the rest of a Python's C headers is found; None: ``include`` has them all.

    Debian's ``pyconfig.h`` includes ``<TRIPLET/pythonX.Y/pyconfig.h>`` of ``/usr/include``, which a compiler with a C
    library of its own must not search.
    """
    found = re.search(r"<([^>]+)/pyconfig\.h>", (include / "pyconfig.h").read_text())
    if found is None:
        return None
    inside = folder / found[1]
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.unlink(missing_ok=True)
    inside.symlink_to(include.parent / found[1])
    return folder


def include_of(python: Path) -> Path:
    """Where Python.h is."""
    asks = "import sysconfig; print(sysconfig.get_path('include'))"
    return Path(subprocess.run([python, "-c", asks], capture_output=True, text=True, check=True).stdout.strip())


def environment_for(version: str, folder: Path) -> Path:
    """The Python of an environment with what builds a wheel in it; made once."""
    python = folder / "bin" / "python"
    stamp = folder / "ready"
    if not stamp.is_file():
        run([find_python(version), "-m", "venv", "--clear", folder])
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--constraint", ROOT / "constraints.txt", *BUILD_PACKAGES])
        stamp.touch()
    return python


def build_wheel(machine: str, version: str, out: Path) -> Path:
    """One wheel, in the build folder that all Pythons share."""
    build = ROOT / "build" / f"wheel-{machine}"
    # CMake would keep the last Python's paths; what is compiled stays
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    python = environment_for(version, ROOT / "build" / "wheel-pythons" / version)
    tag = "cp" + version.replace(".", "")
    wheel_tag = f"{tag}-{tag}-manylinux_{GLIBC}_{machine}"
    settings = {"build-dir": build, "cmake.args": f"--preset={machine}-manylinux", "wheel.tags": wheel_tag}
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip = [python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    headers = headers_elsewhere(include_of(python), build / f"headers-{version}")
    run([*pip, *options, "--wheel-dir", out, ROOT], {"CPLUS_INCLUDE_PATH": str(headers)} if headers else None)
    (wheel,) = out.glob(f"fedbpt-*-{wheel_tag}.whl")
    return wheel


def require_whole(wheel: Path, package: Path = ROOT / "python" / "fedbpt") -> None:
    """Raises `BuildError` where ``wheel`` lacks a module of ``package``: what excludes files may match too much."""
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
    wanted = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
    if missing := sorted(wanted - there):
        raise BuildError(f"{wheel.name} lacks {len(missing)} modules, {missing[0]} for one: see [tool.scikit-build]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=("aarch64", "x86_64"))
    parser.add_argument(
        "--pythons", nargs="+", metavar="VERSION", help=f"default: those of {' '.join(PYTHONS)} that this machine has"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheels")
    args = parser.parse_args()
    try:
        for version in chosen(args.pythons):
            for old in args.out.glob(f"fedbpt-*-cp{version.replace('.', '')}-*_{args.machine}.whl"):
                old.unlink()
            wheel = build_wheel(args.machine, version, args.out)
            check(wheel)
            require_whole(wheel)
            print(f"{wheel}: {wheel.stat().st_size} bytes")
    except (BuildError, WheelError, OSError) as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
