"""`vendor/llama.cpp/assemble.py` on a small fake upstream; every build checks the real hooks."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

VENDOR = Path(__file__).resolve().parents[2] / "vendor" / "llama.cpp"

GRAPH = "first\nsecond\nthird\nfourth\n"
PATCH = "--- a/src/graph.cpp\n+++ b/src/graph.cpp\n@@ -1,0 +2 @@\n+ours one\n@@ -3,0 +5,2 @@\n+ours two\n+ours three\n"
PATCHED = "first\nours one\nsecond\nthird\nours two\nours three\nfourth\n"


def load_assemble() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assemble", VENDOR / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hash_of(line: str) -> str:
    return hashlib.sha256(line.strip().encode()).hexdigest()[:16]


def hook(line: int, before: str) -> str:
    return f'[[hook]]\nfile = "src/graph.cpp"\nline = {line}\nbefore = "{hash_of(before)}"\ndoes = "something"\n'


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A tree with the files that an upstream must have."""
    tree = tmp_path / "upstream"
    for folder in ("cmake", "common", "ggml", "include", "licenses", "src", "vendor"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "CMakeLists.txt").write_text(f"# {folder}\n")
    (tree / "CMakeLists.txt").write_text("# upstream\n")
    (tree / "LICENSE").write_text("MIT\n")
    (tree / "src" / "llama.cpp").write_text("int llama;\n")
    (tree / "src" / "graph.cpp").write_text(GRAPH)
    for name in load_assemble().FILES:
        (tree / name).write_text(f"// {name}\n")
    (tree / "tests").mkdir()
    (tree / "tests" / "big.cpp").write_text("never built\n")
    return tree


@pytest.fixture
def assemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with an overlay and a patch for the fake upstream."""
    module = load_assemble()
    here = tmp_path / "fork"
    (here / "overlay" / "src").mkdir(parents=True)
    (here / "overlay" / "src" / "ours.cpp").write_text("int ours;\n")
    (here / "patches").mkdir()
    (here / "patches" / "graph.patch").write_text(PATCH)
    (here / "UPSTREAM.toml").write_text(hook(2, "second") + hook(4, "fourth"))
    monkeypatch.setattr(module, "HERE", here)
    return module


def files_of(tree: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(tree)): (path.read_text(), path.stat().st_mtime_ns)
        for path in tree.rglob("*")
        if path.is_file()
    }


def test_tree_is_upstream_with_hunks_and_overlay(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    before = files_of(upstream)
    tree = tmp_path / "build" / "llama.cpp"
    assemble.assemble(tree, tmp_path / "cache", upstream)
    assert (tree / "src" / "graph.cpp").read_text() == PATCHED
    assert (tree / "src" / "ours.cpp").read_text() == "int ours;\n"
    assert not (tree / "tests").exists()
    assert files_of(upstream) == before
    assert [path.name for path in tree.parent.iterdir() if path.name.startswith("assembling-")] == []


def test_second_assembly_touches_nothing(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    tree = tmp_path / "build" / "llama.cpp"
    assemble.assemble(tree, tmp_path / "cache", upstream)
    before = files_of(tree)
    assemble.assemble(tree, tmp_path / "cache", upstream)
    assert files_of(tree) == before


def test_change_of_the_overlay_touches_only_its_file(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    tree = tmp_path / "build" / "llama.cpp"
    assemble.assemble(tree, tmp_path / "cache", upstream)
    for path in tree.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    (assemble.HERE / "overlay" / "src" / "ours.cpp").write_text("int changed;\n")
    (tree / "src" / "left-over.cpp").write_text("gone upstream\n")
    assemble.assemble(tree, tmp_path / "cache", upstream)
    touched = [name for name, (_, mtime) in files_of(tree).items() if mtime != 10**18]
    assert touched == ["src/ours.cpp"]
    assert (tree / "src" / "ours.cpp").read_text() == "int changed;\n"
    assert not (tree / "src" / "left-over.cpp").exists()


def test_a_line_that_moved_stops_the_build_in_one_line(
    assemble: ModuleType,
    upstream: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (upstream / "src" / "graph.cpp").write_text("new\n" + GRAPH)
    tree = tmp_path / "build" / "llama.cpp"
    monkeypatch.setattr(sys, "argv", ["assemble.py", str(tree), "--upstream", str(upstream)])
    assert assemble.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "graph.patch: upstream moved: src/graph.cpp:4" in said
    assert "README.md" in said
    assert not (tree / "CMakeLists.txt").exists()


def test_a_hunk_is_not_placed_at_an_empty_line(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    (upstream / "src" / "graph.cpp").write_text("first\n\nthird\nfourth\n")
    (assemble.HERE / "UPSTREAM.toml").write_text(hook(2, "") + hook(4, "fourth"))
    with pytest.raises(assemble.AssemblyError, match="empty line"):
        assemble.assemble(tmp_path / "tree", tmp_path / "cache", upstream)


def test_a_file_that_went_away_stops_the_build(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    (upstream / "src" / "graph.cpp").unlink()
    with pytest.raises(assemble.AssemblyError, match=r"upstream has no src/graph\.cpp"):
        assemble.assemble(tmp_path / "tree", tmp_path / "cache", upstream)


def test_a_failed_assembly_is_not_taken_for_done(assemble: ModuleType, upstream: Path, tmp_path: Path) -> None:
    tree = tmp_path / "build" / "llama.cpp"
    assemble.assemble(tree, tmp_path / "cache", upstream)
    (assemble.HERE / "UPSTREAM.toml").write_text(hook(2, "other") + hook(4, "fourth"))
    for _ in range(2):
        with pytest.raises(assemble.AssemblyError, match="moved"):
            assemble.assemble(tree, tmp_path / "cache", upstream)


def test_a_folder_without_an_upstream_is_refused(assemble: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(assemble.AssemblyError, match="no src/llama"):
        assemble.assemble(tmp_path / "tree", tmp_path / "cache", tmp_path)


@pytest.mark.parametrize("line", ["-removed", " context"])
def test_a_patch_may_only_insert(assemble: ModuleType, line: str) -> None:
    patch = assemble.HERE / "patches" / "graph.patch"
    patch.write_text(f"--- a/src/graph.cpp\n+++ b/src/graph.cpp\n@@ -1,0 +2 @@\n{line}\n")
    with pytest.raises(assemble.AssemblyError, match="not insert-only"):
        assemble.read_hunks(patch)


def test_a_kept_source_package_is_used_without_network(
    assemble: ModuleType, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = '[upstream]\npackage = "carrier"\nversion = "1.0"\nsha256 = "abcdefabcdefabcdef"\n'
    toml = assemble.HERE / "UPSTREAM.toml"
    toml.write_text(pin + toml.read_text())
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "carrier-1.0-abcdefabcdef.tar.gz", "w:gz") as archive:
        archive.add(upstream, "carrier-1.0/vendor/llama.cpp")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched although kept"))
    assemble.assemble(tmp_path / "tree", cache, None)
    assert (tmp_path / "tree" / "src" / "graph.cpp").read_text() == PATCHED
    assert not (tmp_path / "tree" / "tests").exists()


def test_a_failed_fetch_gives_the_way_without_network(
    assemble: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    pin = {"package": "carrier", "version": "1.0", "sha256": "abcdefabcdefabcdef"}
    with pytest.raises(assemble.AssemblyError, match=r"No matching distribution.*FEDBPT_LLAMA_CPP_DIR"):
        assemble.fetch_sdist(pin, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_anchors_tell_where_a_moved_line_is_now(
    assemble: ModuleType, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (upstream / "src" / "graph.cpp").write_text("first\nsecond\nnew\nthird\nfourth\n")
    assemble.print_anchors(upstream, assemble.anchors_of(assemble.read_pin()))
    said = capsys.readouterr().out
    assert "src/graph.cpp:2 holds" in said
    assert "src/graph.cpp:4 MOVED; its line is now at 5" in said
    assert f'before = "{hash_of("third")}"' in said


def test_our_own_patches_are_insert_only_and_every_hunk_is_explained() -> None:
    assemble = load_assemble()
    pin = assemble.read_pin()
    hunks = {f"{name}:{after + 1}" for _, name, after, _ in assemble.all_hunks()}
    assert hunks == set(assemble.anchors_of(pin))
    assert all(hook["does"] for hook in pin["hook"])
    assert all(added for _, _, _, added in assemble.all_hunks())


def test_an_incomplete_upstream_stops_the_build_in_one_line(
    assemble: ModuleType, upstream: Path, tmp_path: Path
) -> None:
    (upstream / "common" / "json.h").unlink()
    with pytest.raises(assemble.AssemblyError, match=r"has no common/json\.h") as caught:
        assemble.assemble(tmp_path / "build" / "tree", tmp_path / "cache", upstream)
    assert "\n" not in str(caught.value)
