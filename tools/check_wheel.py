"""Check that a wheel matches its tag: ``python tools/check_wheel.py dist/fedbpt-*.whl``.

A wheel tagged manylinux_2_27_aarch64 must run on any Linux of that architecture with glibc 2.27 or newer (PEP 600): its
libraries are for that architecture, need no newer symbol of glibc, and no library but the wheel's own and glibc's.
Nothing checks this at install time: a wrong wheel only fails at import, on the board.
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

MAX_BYTES = 4_800_000
MACHINES = {"aarch64": "EM_AARCH64", "x86_64": "EM_X86_64"}
# the libraries of glibc; not libstdc++ and libgcc_s, which may be too old on an old system
GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread))\.so\.\d+")
NAME = re.compile(
    r"fedbpt-[^-]+-cp(?P<python>\d+)-cp(?P=python)-(?P<platform>manylinux_2_(?P<glibc>\d+)_(?P<machine>\w+))\.whl"
)


class WheelError(Exception):
    """A wheel that does not match its tag; one line that says what is wrong."""


@dataclass(frozen=True)
class Library:
    """The parts of a shared library that the dynamic linker reads."""

    path: str
    machine: str
    needed: tuple[str, ...]
    runpath: str
    versions: tuple[str, ...]  # of required symbols, such as GLIBC_2.17
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
    """The problems of ``wheel``, the most serious first."""
    name = NAME.fullmatch(wheel.name)
    if name is None:
        yield "its name has no tag like cp311-cp311-manylinux_2_27_aarch64"
        return
    if wheel.stat().st_size > max_bytes:
        yield f"it has {wheel.stat().st_size} bytes, the limit is {max_bytes}"
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        tags = [re.findall(r"^Tag: (.*)$", archive.read(f).decode(), re.M) for f in files if f.endswith("/WHEEL")]
        libraries = [read_library(f, archive.read(f)) for f in files if re.search(r"\.so(\.|$)", f)]
    python = f"cp{name['python']}"
    if tags != [[f"{python}-{python}-{name['platform']}"]]:
        yield f"its metadata has the tags {tags}, unlike its name"
    yield from problems_of_set(libraries, name)
    for library in libraries:
        yield from problems_of_library(library, name, {other.name for other in libraries})


def problems_of_set(libraries: list[Library], name: re.Match[str]) -> Iterator[str]:
    """Problems of the set of libraries: it must have the module for one Python, a CPU backend, and no duplicates."""
    found = {library.name for library in libraries}
    module = f"_native.cpython-{name['python']}-{name['machine']}-linux-gnu.so"
    modules = {library for library in found if library.startswith("_native.")}
    if modules != {module}:
        yield f"it must have the module {module}, but has {', '.join(sorted(modules)) or 'none'}"
    if not any(library.startswith("libggml-cpu-") for library in found):
        yield "it has no CPU backend (libggml-cpu-*.so)"
    stems: dict[str, str] = {}
    for library in libraries:
        # libllama.so.0, and libllama-0a1b2c3d.so from auditwheel, are libllama too
        for key in (library.digest, re.sub(r"(-[0-9a-f]{8})?\.so.*", "", library.name)):
            if stems.setdefault(key, library.path) != library.path:
                yield f"it has a library twice: {library.path} and {stems[key]}"
                break


def problems_of_library(library: Library, name: re.Match[str], own: set[str]) -> Iterator[str]:
    if library.machine != MACHINES.get(name["machine"]):
        yield f"{library.name} is for {library.machine}"
    newer = [v for v in library.versions if glibc_minor(v) > int(name["glibc"])]
    if newer:
        yield f"{library.name} needs {', '.join(sorted(set(newer)))}, but the tag is for glibc 2.{name['glibc']}"
    foreign = [needed for needed in library.needed if needed not in own and not GLIBC.fullmatch(needed)]
    if foreign:
        yield f"{library.name} needs {', '.join(foreign)}, which the wheel lacks"
    common = [needed for needed in library.needed if needed in own and not needed.startswith("libfedbpt-")]
    if common:
        yield f"{library.name} needs {', '.join(common)}, a name that a library of another package may have"
    if own.intersection(library.needed) and library.runpath != "$ORIGIN":
        yield f"{library.name} has the run path {library.runpath or '(none)'} instead of $ORIGIN"


def glibc_minor(version: str) -> int:
    """27 for GLIBC_2.27; -1 for a version of another library."""
    match = re.match(r"GLIBC_2\.(\d+)", version)
    return int(match[1]) if match else -1


def check(wheel: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raise `WheelError` with the most serious problem, if any."""
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
            print(f"{wheel.name}: {wheel.stat().st_size} bytes, matches its tag")
    except WheelError as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
