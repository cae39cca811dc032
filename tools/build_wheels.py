"""Build the wheels to ship, one per Python version, each for every CPU of an architecture (``make wheel``).

llama.cpp is compiled once per architecture: the wheels of all Pythons are built in one build folder, where only the
module changes. Compiler and C library come from the package ziglang, see cmake/toolchains/.
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
# Installed in the environment of each Python; cmake and ninja are taken from PATH.
BUILD_PACKAGES = ("pip", "scikit-build-core", "pybind11", "tomli; python_version < '3.11'")


class BuildError(Exception):
    """A build failure; one line that says what to do."""


def candidates(version: str) -> Iterator[Path]:
    """Possible paths of a Python: on PATH, and in pyenv."""
    for folder in os.get_exec_path():
        yield Path(folder) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True)


def find_python(version: str) -> Path:
    """Find a Python of ``version`` with its C headers. Raises `BuildError` if there is none."""
    code = "import os, sys, sysconfig; print('%d.%d' % sys.version_info[:2]); "
    code += "sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path('include'), 'Python.h')))"
    for path in candidates(version):
        if path.is_file():
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() == version:
                return path
    raise BuildError(
        f"no Python {version} with C headers found: install it, or set PYTHONS, such as PYTHONS='3.11 3.12'"
    )


def chosen(requested: Sequence[str] | None) -> list[str]:
    """The Python versions to build for: ``requested``, all of which must exist; None: those of `PYTHONS` that exist."""
    if requested is not None:
        for version in requested:
            find_python(version)  # check all before the first build
        return list(requested)
    found = []
    missing = []
    for version in PYTHONS:
        try:
            find_python(version)
            found.append(version)
        except BuildError:
            missing.append(version)
    if not found:
        raise BuildError(f"no Python of {', '.join(PYTHONS)} with C headers found: install one")
    if missing:
        print(f"fedbpt: skipped, not found with C headers: Python {', '.join(missing)}", file=sys.stderr)
    return found


def run(command: list[object], environment: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, env={**os.environ, **(environment or {})}, check=False).returncode != 0:
        raise BuildError(f"a command failed, see the lines above: {' '.join(words)}")


def headers_elsewhere(include: Path, folder: Path) -> Path | None:
    """Link C headers of a Python that are outside ``include`` into ``folder``; None: there are none.

    Debian's ``pyconfig.h`` includes ``<TRIPLET/pythonX.Y/pyconfig.h>`` from ``/usr/include``, which a compiler with its
    own C library must not search.
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
    """The folder of Python.h."""
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def environment_for(version: str, folder: Path) -> Path:
    """The Python of an environment with the build packages, created if absent."""
    python = folder / "bin" / "python"
    stamp = folder / "ready"
    if not stamp.is_file():
        run([find_python(version), "-m", "venv", "--clear", folder])
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--constraint", ROOT / "constraints.txt", *BUILD_PACKAGES])
        stamp.touch()
    return python


def build_wheel(machine: str, version: str, out: Path) -> Path:
    """Build one wheel, in the build folder that all Pythons share."""
    build = ROOT / "build" / f"wheel-{machine}"
    # it has the paths of the last Python; compiled files are kept
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
    """Raise `BuildError` if ``wheel`` lacks a module of ``package``, as an exclude pattern may match too much."""
    with zipfile.ZipFile(wheel) as archive:
        present = set(archive.namelist())
    wanted = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
    if missing := sorted(wanted - present):
        raise BuildError(f"{wheel.name} lacks {len(missing)} modules, such as {missing[0]}: see [tool.scikit-build]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=("aarch64", "x86_64"))
    parser.add_argument(
        "--pythons", nargs="+", metavar="VERSION", help=f"default: those of {' '.join(PYTHONS)} on this machine"
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
