"""Assemble the llama.cpp fork: upstream at its pinned release + overlay/ + patches/ → one source tree.

Called by CMake at configure time. Upstream is fetched by name and hash from the package registry and cached, so that
only the first build on a machine needs the network (with ``--upstream DIR``, none does).

Patches are insert-only and have no context lines: they contain our lines only, none of upstream's. Each hunk's position
is checked instead: UPSTREAM.toml has the SHA-256 of the upstream line that the hunk goes before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@")
# The parts of upstream that libllama and ggml are built from.
BUILT = ("CMakeLists.txt", "LICENSE", "cmake", "ggml", "include", "licenses", "src", "vendor")
# ... and grammars of JSON schemas.
GRAMMAR = ("json", "json-schema", "json-schema-to-grammar", "trie", "unicode")
FILES = (*(f"common/{name}.{kind}" for name in GRAMMAR for kind in ("cpp", "h")), "common/common.h")
HOW_TO_MOVE = "vendor/llama.cpp/README.md says how to move the fork"


class AssemblyError(Exception):
    """The tree cannot be assembled. The message is one line that says what to do."""


def line_hash(line: str) -> str:
    """First 16 hex digits of the SHA-256 of a line without surrounding white space."""
    return hashlib.sha256(line.strip().encode()).hexdigest()[:16]


def read_pin() -> dict[str, Any]:
    """Read UPSTREAM.toml."""
    pin: dict[str, Any] = tomllib.loads((HERE / "UPSTREAM.toml").read_text())
    return pin


def anchors_of(pin: dict[str, Any]) -> dict[str, str]:
    """Map ``file:line`` of upstream to the hash of the line there, for every hook."""
    return {f"{hook['file']}:{hook['line']}": hook["before"] for hook in pin["hook"]}


def read_hunks(patch: Path) -> list[tuple[str, int, list[str]]]:
    """Read a patch's hunks, in order: (file, number of the line to insert after, lines to insert)."""
    hunks: list[tuple[str, int, list[str]]] = []
    target = ""
    for line in patch.read_text().splitlines():
        if line.startswith("--- a/"):
            continue
        if line.startswith("+++ b/"):
            target = line.removeprefix("+++ b/")
        elif match := HUNK.match(line):
            hunks.append((target, int(match[1]), []))
        elif line.startswith("+") and hunks:
            hunks[-1][2].append(line[1:])
        else:
            raise AssemblyError(f"{patch.name} is not insert-only: {line!r}; patches hold added lines and no context")
    return hunks


def all_hunks() -> list[tuple[Path, str, int, list[str]]]:
    patches = sorted((HERE / "patches").glob("*.patch"))
    return [(patch, *hunk) for patch in patches for hunk in read_hunks(patch)]


def apply_patches(tree: Path, anchors: dict[str, str]) -> None:
    """Insert every hunk into ``tree``, from the end of each file, so that line numbers stay upstream's."""
    for patch, name, after, added in sorted(all_hunks(), key=lambda hunk: (hunk[1], -hunk[2])):
        path = tree / name
        if not path.is_file():
            raise AssemblyError(f"{patch.name}: upstream has no {name}; {HOW_TO_MOVE}")
        lines = path.read_text().splitlines(keepends=True)
        found = line_hash(lines[after]) if after < len(lines) else "end of file"
        if found == line_hash(""):
            raise AssemblyError(f"{patch.name}: {name}:{after + 1} is an empty line; {HOW_TO_MOVE}")
        expected = anchors.get(f"{name}:{after + 1}")
        if found != expected:
            raise AssemblyError(
                f"{patch.name}: upstream moved: {name}:{after + 1} hashes to {found}, "
                f"UPSTREAM.toml expects {expected}; {HOW_TO_MOVE}"
            )
        lines[after:after] = [line + "\n" for line in added]
        path.write_text("".join(lines))


def fetch_sdist(pin: dict[str, str], cache: Path) -> Path:
    """Return the pinned source package in ``cache``; fetch it by pip, with its hash required, if it is missing."""
    kept = cache / f"{pin['package']}-{pin['version']}-{pin['sha256'][:12]}.tar.gz"
    if kept.is_file():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as name:
        folder = Path(name)
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{pin['package']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
        command += ["-r", str(requirement), "-d", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        sdists = list(folder.glob("*.tar.gz"))
        if done.returncode != 0 or len(sdists) != 1:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise AssemblyError(
                f"cannot fetch {pin['package']}=={pin['version']} ({reason}); without network pass "
                "-C cmake.define.FEDBPT_LLAMA_CPP_DIR=/path/to/llama.cpp"
            )
        sdists[0].replace(kept)
    return kept


def unpack(sdist: Path, tree: Path) -> None:
    """Extract the `BUILT` parts and `FILES` of the sdist's ``*/vendor/llama.cpp`` into ``tree``."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, _, inside = member.name.partition("/vendor/llama.cpp/")
            wanted = inside.split("/")[0] in BUILT or inside in FILES
            if not (member.isfile() and wanted) or ".." in Path(inside).parts:
                continue
            path = tree / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            if source is None:
                raise AssemblyError(f"{sdist.name} is damaged at {member.name}; remove it and build again")
            with source, path.open("wb") as out:
                shutil.copyfileobj(source, out)


def copy_upstream(upstream: Path, tree: Path) -> None:
    if not (upstream / "src" / "llama.cpp").is_file():
        raise AssemblyError(f"{upstream} is not a llama.cpp source tree: it has no src/llama.cpp")
    for name in (*BUILT, *FILES):
        source = upstream / name
        if not source.exists():
            raise AssemblyError(f"{upstream} has no {name}: give a tree of the pinned release")
        if source.is_dir():
            shutil.copytree(source, tree / name)
        else:
            (tree / name).parent.mkdir(exist_ok=True)
            shutil.copy2(source, tree / name)


def key_of(upstream: Path | None) -> str:
    """Hash of everything that the assembled tree depends on."""
    digest = hashlib.sha256()
    ours = [Path(__file__), HERE / "UPSTREAM.toml", *(HERE / "patches").glob("*"), *(HERE / "overlay").rglob("*")]
    for path in sorted(path for path in ours if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    if upstream:
        for path in sorted(path for name in (*BUILT, "common") for path in (upstream / name).rglob("*")):
            stat = path.stat()
            digest.update(f"{path}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def sync(fresh: Path, tree: Path) -> None:
    """Make ``tree`` equal to ``fresh``; write only files that differ, so that the next build compiles only those."""
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for name in wanted:
        target = tree / name
        if not target.is_file() or target.read_bytes() != (fresh / name).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fresh / name, target)
    for path in [path for path in tree.rglob("*") if path.is_file() and path.relative_to(tree) not in wanted]:
        path.unlink()


def assemble(tree: Path, cache: Path, upstream: Path | None) -> None:
    """Bring ``tree`` up to date with upstream, overlay and patches."""
    stamp = tree.parent / f"{tree.name}.stamp"
    key = key_of(upstream)
    if stamp.is_file() and stamp.read_text() == key and (tree / "CMakeLists.txt").is_file():
        return
    stamp.unlink(missing_ok=True)
    tree.mkdir(parents=True, exist_ok=True)
    pin = read_pin()
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="assembling-") as scratch:
        fresh = Path(scratch)
        if upstream:
            copy_upstream(upstream, fresh)
        else:
            unpack(fetch_sdist(pin["upstream"], cache), fresh)
        apply_patches(fresh, anchors_of(pin))
        shutil.copytree(HERE / "overlay", fresh, dirs_exist_ok=True)
        sync(fresh, tree)
    stamp.write_text(key)


def print_anchors(upstream: Path, anchors: dict[str, str]) -> None:
    """Print where every hunk would go in ``upstream``, and where the line that it goes before is now."""
    for patch, name, after, _ in all_hunks():
        place = f"{name}:{after + 1}"
        lines = (upstream / name).read_text().splitlines()
        here = lines[after] if after < len(lines) else ""
        now = [str(number) for number, line in enumerate(lines, 1) if line_hash(line) == anchors.get(place)]
        if str(after + 1) in now:
            print(f"{patch.name}: {place} holds")
        else:
            print(f"{patch.name}: {place} MOVED; its line is now at {', '.join(now) or 'no line of this file'}")
        print(f'    before = "{line_hash(here)}"  # {here.strip()[:60]}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("FEDBPT_BUILD_CACHE") or Path.home() / ".cache" / "fedbpt" / "build"
    parser.add_argument("tree", type=Path, nargs="?", help="the tree to assemble or bring up to date")
    parser.add_argument("--cache", type=Path, default=Path(default), help="where the source package is kept")
    parser.add_argument("--upstream", type=Path, help="an existing llama.cpp tree of the pinned release; no network")
    parser.add_argument("--anchors", action="store_true", help="print the hooks' places in --upstream and exit")
    args = parser.parse_args()
    try:
        if args.anchors:
            if not args.upstream:
                raise AssemblyError("--anchors needs --upstream DIR")
            print_anchors(args.upstream, anchors_of(read_pin()))
        elif args.tree:
            assemble(args.tree.resolve(), args.cache, args.upstream.resolve() if args.upstream else None)
        else:
            raise AssemblyError("name the tree to assemble")
    except (AssemblyError, OSError) as error:
        print(f"fedbpt: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
