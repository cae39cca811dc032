"""Models of any Hugging Face repository, named ``hf.co/OWNER/REPO:FILE.gguf``: pull, locate, list, remove."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt import models
from fedbpt.errors import DownloadError, InputError, ModelError, ModelFileError, ModelNotFoundError
from fedbpt.models import hub
from fedbpt.models.hub_names import parse_hub_name
from tests.support.hub_stand_in import COMMIT, Hub

REPO = "some-one/Model-1.5B-GGUF"
FILE = "model-1.5b.Q4_K_M.gguf"
NAME = f"hf.co/{REPO}:{FILE}"
CONTENT = b"GGUF" + bytes(range(256)) * 400
PARTS = [f"big/Model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
SPLIT = f"hf.co/{REPO}:{PARTS[0]}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDBPT_CACHE", str(folder))
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub, "_BACKOFF_S", 0.001)
    with Hub(REPO, FILE, CONTENT) as server:
        for i, part in enumerate(PARTS):
            server.add(part, CONTENT[i:])
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def left_over(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["hf.co/", "huggingface.co/", "https://hf.co/", "https://huggingface.co/"])
def test_a_name_may_begin_as_people_write_it(prefix: str) -> None:
    found = parse_hub_name(f"{prefix}{REPO}:{FILE}")
    assert found is not None
    assert (found.repo, found.files, str(found)) == (REPO, (FILE,), NAME)


@pytest.mark.parametrize("part", PARTS)
def test_any_part_names_all_of_a_split_model(part: str) -> None:
    found = parse_hub_name(f"hf.co/{REPO}:{part}")
    assert found is not None
    assert found.files == tuple(PARTS)
    assert str(found) == SPLIT


@pytest.mark.parametrize("name", ["smollm2-135m", "model.gguf", "./hf.co.gguf", "hf/some/model.gguf", ""])
def test_other_names_are_not_hub_names(name: str) -> None:
    assert parse_hub_name(name) is None


@pytest.mark.parametrize(
    "rest",
    [
        *(
            "",
            "owner",
            "owner/repo",
            "owner/repo:",
            "owner/repo:Q4_K_M",
            "owner/repo:model.safetensors",
            "owner:m.gguf",
        ),
        *("owner/repo/model.gguf", "a/b/c:m.gguf", "owner/..:m.gguf", "../x:m.gguf", "o/r:../../m.gguf", "o/r:/m.gguf"),
        *(
            "o/r:a//m.gguf",
            "o/r:./m.gguf",
            "o/r:.gguf",
            "o/r:a\nb.gguf",
            "o/r:m.gguf?x=y",
            "o/r:x/.gguf",
        ),
    ],
)
def test_a_hub_name_without_a_file_is_refused(rest: str) -> None:
    for use in (models.pull, models.locate, models.remove):
        with pytest.raises(InputError) as refused:
            use(f"hf.co/{rest}")
        assert len(str(refused.value).splitlines()) == 1
        assert "hf.co/OWNER/REPO:FILE.gguf" in str(refused.value)


# --- pull --------------------------------------------------------------------------------------------------------


def test_a_model_is_pulled_verified_and_found_by_its_name(server: Hub, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="models pull"):
        models.locate(NAME)
    seen: list[tuple[int, int | None]] = []
    path = models.pull(NAME, lambda done, total: seen.append((done, total)))
    assert path == cache / "models" / "hf.co" / REPO / FILE
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert models.locate(NAME) == models.locate(f"https://huggingface.co/{REPO}:{FILE}") == path
    assert COMMIT in json.loads(path.with_suffix(".json").read_text())["source"]
    assert not [left for left in left_over(cache) if "staging" in left.parts]
    n_requests = len(server.ranges)
    assert models.pull(NAME) == path
    assert len(server.ranges) == n_requests


def test_a_pulled_file_that_was_damaged_is_noticed_and_pulled_again(server: Hub) -> None:
    path = models.pull(NAME)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelFileError):
        models.locate(NAME)
    path.write_bytes(CONTENT[::-1])  # the same size: only the sha256 tells
    assert models.pull(NAME).read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_a_file_missing_from_the_repository_is_named(server: Hub) -> None:
    with pytest.raises(DownloadError, match=r"other\.gguf") as failed:
        models.pull(f"hf.co/{REPO}:other.gguf")
    assert len(str(failed.value).splitlines()) == 1
    assert server.ranges == []


def test_all_parts_of_a_split_model_are_pulled(server: Hub, cache: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    name = f"hf.co/{REPO}:{PARTS[1]}"
    first = models.pull(name, lambda done, total: seen.append((done, total)))
    assert [(cache / "models" / "hf.co" / REPO / part).read_bytes() for part in PARTS] == [
        CONTENT[i:] for i in range(3)
    ]
    assert first == models.locate(name) == models.locate(SPLIT) == cache / "models" / "hf.co" / REPO / PARTS[0]
    assert {total for _, total in seen} == {sum(len(CONTENT[i:]) for i in range(3))}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(server.ranges) == 3


def test_a_pull_of_parts_resumes(server: Hub) -> None:
    server.cut_after = [len(CONTENT), 1000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        models.pull(SPLIT)
    with pytest.raises(ModelNotFoundError):
        models.locate(SPLIT)
    server.cut_after, before = [], len(server.ranges)
    first = models.pull(SPLIT)
    assert [first.with_name(Path(part).name).read_bytes() for part in PARTS] == [CONTENT[i:] for i in range(3)]
    assert server.ranges[before:] == ["bytes=1000-", None]


def test_a_missing_part_is_an_error_before_anything_is_downloaded(server: Hub) -> None:
    server.paths = {path for path in server.contents if not path.endswith(PARTS[2])}
    with pytest.raises(DownloadError, match="Model-00003-of-00003"):
        models.pull(SPLIT)
    assert server.ranges == []


# --- list and remove ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
def test_what_was_pulled_is_listed_once(cache: Path) -> None:
    before = models.list_models()
    path, first = models.pull(NAME), models.pull(SPLIT)
    (cache / "models" / "hf.co" / "notes.json").write_text("{}")
    (cache / "models" / "hf.co" / "a" / "b c").mkdir(parents=True)
    (cache / "models" / "hf.co" / "a" / "b c" / "d.json").write_text("{}")
    added = models.list_models()[len(before) :]
    sizes = [sum(len(CONTENT[i:]) for i in range(3)), len(CONTENT)]
    assert [(entry.name, entry.path, entry.size) for entry in added] == [
        (SPLIT, first, sizes[0]),
        (NAME, path, sizes[1]),
    ]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("name", "freed"), [(NAME, len(CONTENT)), (SPLIT, 3 * len(CONTENT) - 3)])
def test_a_removed_model_leaves_nothing(cache: Path, name: str, freed: int) -> None:
    kept = models.pull(SPLIT if name == NAME else NAME)
    models.pull(name)
    assert models.remove(name) == freed
    assert models.locate(SPLIT if name == NAME else NAME) == kept
    with pytest.raises(ModelNotFoundError):
        models.locate(name)
    assert not [path for path in left_over(cache) if Path(name.partition(":")[2]).stem in path.name]
    with pytest.raises(ModelNotFoundError):
        models.remove(name)


def test_what_a_broken_pull_left_is_removed(server: Hub, cache: Path) -> None:
    server.cut_after = [1000, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError):
        models.pull(NAME)
    assert models.remove(NAME) == 1000
    assert left_over(cache) == []


def test_what_was_never_pulled_cannot_be_removed(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    for name in ("smollm2-135m", NAME, "nope", str(file)):
        with pytest.raises(ModelNotFoundError):
            models.remove(name)
    assert file.is_file()


@pytest.mark.usefixtures("server")
def test_a_file_that_cannot_be_removed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    models.pull(NAME)

    def refuse(self: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ModelError, match="Permission denied") as failed:
        models.remove(NAME)
    assert len(str(failed.value).splitlines()) == 1
