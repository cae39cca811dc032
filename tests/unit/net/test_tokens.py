"""Tokens, codes, and the private files that hold them."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path

import pytest

from fedbpt.errors import ConfigError
from fedbpt.net import tokens
from fedbpt.net.tokens import Credentials
from tests.support.raises import raises


def test_secrets_are_long_and_never_the_same() -> None:
    assert len({tokens.new_token() for _ in range(100)} | {tokens.new_code() for _ in range(100)}) == 200
    assert len(tokens.new_token()) >= 43  # 32 bytes in base64
    assert re.fullmatch(r"[A-Z2-7]{4}(-[A-Z2-7]{4}){3}", tokens.new_code())


def test_a_digest_is_sha256_and_matches_only_its_secret() -> None:
    assert tokens.digest("s") == hashlib.sha256(b"s").digest()
    assert tokens.matches("s", tokens.digest("s"))
    assert not tokens.matches("t", tokens.digest("s"))
    assert not tokens.matches("", bytes(32))


def test_a_typed_code_may_have_blanks_dashes_and_small_letters() -> None:
    assert tokens.plain_code(" k7qf-2m4p xw3a-tz6l\n") == "K7QF2M4PXW3ATZ6L"


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer a~b", "a~b"), ("bearer  x ", "x"), ("Basic eDp5", ""), ("", ""), ("Bearer", "")],
)
def test_the_bearer_token_of_a_header(header: str, token: str) -> None:
    assert tokens.bearer({"authorization": header}) == token


def test_credentials_survive_in_a_file_that_only_their_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "credentials.json"
    made = Credentials("https://c:8400", "pi5", tokens.new_token())
    made.save(path)
    made.save(path)
    assert Credentials.load(path) == made
    assert tokens.split(made.bearer) == ("pi5", made.secret)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_credentials_do_not_show_their_secret() -> None:
    made = Credentials("https://c:8400", "pi5", "the-secret")
    assert "the-secret" not in f"{made!r} {made}"


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    tokens.write_private(path, b"s")
    path.chmod(0o640)
    with raises(ConfigError) as caught:
        tokens.read_private(path)
    assert f"chmod 600 {path}" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"coordinator": 1, "device": "a", "secret": "s"}', b"\xff"])
def test_damaged_credentials_are_named(tmp_path: Path, content: bytes) -> None:
    tokens.write_private(tmp_path / "c", content)
    with raises(ConfigError) as caught:
        Credentials.load(tmp_path / "c")
    assert "--enrol" in str(caught.value)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with raises(ConfigError) as caught:
        Credentials.load(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    (tmp_path / "file").touch()
    with raises(ConfigError) as caught:
        tokens.write_private(tmp_path / "file" / "c", b"")
    assert str(tmp_path / "file" / "c") in str(caught.value)


def test_the_path_of_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDBPT_CREDENTIALS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tokens.default_credentials() == tmp_path / "fedbpt" / "credentials.json"
    monkeypatch.setenv("FEDBPT_CREDENTIALS", "c.json")
    assert tokens.default_credentials() == Path("c.json")
