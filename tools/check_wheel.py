"""Check that a wheel keeps what its name promises: ``python tools/check_wheel.py dist/fedbpt-*.whl``.

A wheel named manylinux_2_27_aarch64 runs on any Linux of that architecture with glibc 2.27 or newer (PEP 600): so its
libraries are for that architecture, ask for no newer symbol of glibc, and for no library but their own and glibc's.
Nothing checks that at install time: a wheel that breaks its promise fails on the board, at import.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

MAX_BYTES = 4_500_000
MACHINES = {"aarch64": "EM_AARCH64", "x86_64": "EM_X86_64"}
# what glibc itself brings; libstdc++ and libgcc_s are not in it: an old system's may be too old
GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread))\.so\.\d+")
NAME = re.compile(
    r"fedbpt-[^-]+-cp(?P<python>\d+)-cp(?P=python)-(?P<platform>manylinux_2_(?P<glibc>\d+)_(?P<machine>\w+))\.whl"
)


class WheelError(Exception):
    """One line that says what is wrong with the wheel."""


@dataclass(frozen=True)
class Library:
    """What the dynamic linker reads of a shared library."""

    path: str
    machine: str
    needed: tuple[str, ...]
    runpath: str
    versions: tuple[str, ...]  # of other libraries' symbols, as GLIBC_2.17
    digest: str

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def read_library(path: str, data: bytes) -> Library:
    elf = ELFFile(BytesIO(data))
    needed: list[str] = []
    versions: list[str] = []
    runpath = ""
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)  # type: ignore[attr-defined]
                elif tag.entry.d_tag in ("DT_RUNPATH", "DT_RPATH"):
                    runpath = getattr(tag, tag.entry.d_tag[3:].lower())
        elif isinstance(section, GNUVerNeedSection):
            versions += [version.name for _, wanted in section.iter_versions() for version in wanted]
    digest = hashlib.sha256(data).hexdigest()
    return Library(path, elf.header.e_machine, tuple(needed), runpath, tuple(versions), digest)


def problems(wheel: Path, max_bytes: int = MAX_BYTES) -> Iterator[str]:
    """What is wrong with ``wheel``, the gravest first; nothing where it keeps its promise."""
    name = NAME.fullmatch(wheel.name)
    if name is None:
        yield "its name has no tag like cp311-cp311-manylinux_2_27_aarch64"
        return
    if wheel.stat().st_size > max_bytes:
        yield f"it has {wheel.stat().st_size} bytes, {max_bytes} are allowed"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        tags = [re.findall(r"^Tag: (.*)$", archive.read(f).decode(), re.M) for f in files if f.endswith("/WHEEL")]
        libraries = [read_library(f, archive.read(f)) for f in files if re.search(r"\.so(\.|$)", f)]
    python = f"cp{name['python']}"
    if tags != [[f"{python}-{python}-{name['platform']}"]]:
        yield f"its metadata have the tags {tags}, its name another"
    yield from problems_of_set(libraries, name)
    for library in libraries:
        yield from problems_of_library(library, name, {other.name for other in libraries})


def problems_of_set(libraries: list[Library], name: re.Match[str]) -> Iterator[str]:
    """The module for one Python, a CPU backend, and each library once."""
    found = {library.name for library in libraries}
    module = f"_native.cpython-{name['python']}-{name['machine']}-linux-gnu.so"
    modules = {library for library in found if library.startswith("_native.")}
    if modules != {module}:
        yield f"it should have the module {module} and has {', '.join(sorted(modules)) or 'none'}"
    if not any(library.startswith("libggml-cpu-") for library in found):
        yield "it has no CPU backend (libggml-cpu-*.so)"
    stems: dict[str, str] = {}
    for library in libraries:
        # libllama.so.0 and what auditwheel grafts, libllama-0a1b2c3d.so, are libllama too
        for key in (library.digest, re.sub(r"(-[0-9a-f]{8})?\.so.*", "", library.name)):
            if stems.setdefault(key, library.path) != library.path:
                yield f"it has {library.path} and {stems[key]}: one library twice"
                break


def problems_of_library(library: Library, name: re.Match[str], beside: set[str]) -> Iterator[str]:
    if library.machine != MACHINES.get(name["machine"]):
        yield f"{library.name} is for {library.machine}"
    newer = [v for v in library.versions if glibc_minor(v) > int(name["glibc"])]
    if newer:
        yield f"{library.name} needs {', '.join(sorted(set(newer)))}, the tag promises glibc 2.{name['glibc']}"
    foreign = [needed for needed in library.needed if needed not in beside and not GLIBC.fullmatch(needed)]
    if foreign:
        yield f"{library.name} needs {', '.join(foreign)}, which the wheel has not"
    common = [needed for needed in library.needed if needed in beside and not needed.startswith("libfedbpt-")]
    if common:
        yield f"{library.name} needs {', '.join(common)}, a name that another package's library may have taken"
    if beside.intersection(library.needed) and library.runpath != "$ORIGIN":
        yield f"{library.name} looks for its libraries in {library.runpath or 'no place'} instead of $ORIGIN"


def glibc_minor(version: str) -> int:
    """27 of GLIBC_2.27; -1 of another library's version."""
    match = re.match(r"GLIBC_2\.(\d+)", version)
    return int(match[1]) if match else -1


def check(wheel: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raises WheelError with the gravest problem."""
    try:
        first = next(problems(wheel, max_bytes), None)
    except (OSError, zipfile.BadZipFile) as error:
        first = f"it cannot be read ({error})"
    if first:
        raise WheelError(f"{wheel.name}: {first}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    try:
        for wheel in parser.parse_args().wheels:
            check(wheel)
            print(f"{wheel.name}: {wheel.stat().st_size} bytes, keeps its promise")
    except WheelError as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
