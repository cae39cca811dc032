"""``fedbpt certs``, ``fedbpt devices``, and a device's tokens."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedbpt.net
from fedbpt import cli
from fedbpt.cli.credentials import credentials_for, token_in
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import Credentials
from tests.support.raises import raises
from tests.support.toy_task import TASK_FILE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        return (int(caught.value.code or 0), *capfd.readouterr())

    return call


def as_json(answer: tuple[int, str, str]) -> Any:
    assert answer[0] == 0, answer
    return json.loads(answer[1])


def test_certificates_are_made_for_the_coordinator_and_for_devices(run: Run) -> None:
    made = as_json(run("certs", "init", "--host", "c.lan", "--json"))
    assert set(made) == {"ca", "coordinator"}
    assert run("certs", "issue", "pi5", "--host", "pi5.lan", "--quiet") == (0, "certs/pi5.pem\n", "")
    assert stat.S_IMODE(Path(made["ca"]["key"]).stat().st_mode) == 0o600
    for name in ("coordinator", "pi5"):
        assert Tls(Path(f"certs/{name}.pem"), Path(f"certs/{name}.key"), Path("certs/ca.pem")).server_options()
    code, _, err = run("certs", "init")
    assert code == 2
    assert "ca.pem" in err
    assert "keep it private" in run("certs", "issue", "pixel")[1]


def test_devices_are_invited_listed_and_revoked(run: Run) -> None:
    invited = as_json(run("devices", "invite", "pixel", "--json"))
    assert (invited["device"], invited["minutes"]) == ("pixel", 60.0)
    with DeviceRegistry("runs/devices.db") as registry:
        assert registry.enrol(invited["code"], bytes(32)) == "pixel"
    assert "once, within 5 minutes" in run("devices", "invite", "pi5", "--minutes", "5")[1]
    assert run("devices", "list", "--quiet") == (0, "pi5\npixel\n", "")
    listed = {line["device"]: line["state"] for line in as_json(run("devices", "list", "--json"))}
    assert listed == {"pi5": "invited", "pixel": "enrolled"}
    assert run("devices", "revoke", "pixel", "--quiet") == (0, "", "")
    assert as_json(run("devices", "revoke", "pixel", "--json")) == {"device": "pixel", "state": "revoked"}
    assert "revoked" in run("devices", "list")[1]
    assert "fedbpt devices invite pixel" in run("devices", "revoke", "pixel")[1]


def test_only_making_certificates_needs_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "fedbpt.net.certs", raising=False)
    monkeypatch.delattr(fedbpt.net, "certs", raising=False)
    code, _, err = run("certs", "init")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "pip install 'fedbpt[certs]'" in err
    loads = "import sys, fedbpt.cli; sys.exit('cryptography' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", loads], env=environment, check=False).returncode == 0


def test_a_devices_token_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = token_in(path)
    assert len(token) >= 43
    assert token_in(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("short")
    with pytest.raises(ConfigError, match=str(path)):
        token_in(path)


def test_a_token_for_another_coordinator_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    kept = Credentials("https://one:8400", "a", "secret")
    kept.save(path)
    assert credentials_for("https://one:8400/", None, path, Tls(), False) == kept
    assert credentials_for(None, None, path, Tls(), False) is None
    with raises(ConfigError, field="--credentials") as caught:
        credentials_for("https://two:8400", None, path, Tls(), False)
    assert "secret" not in str(caught.value)


def test_a_device_that_cannot_start_does_not_use_its_code(run: Run, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(TASK_FILE)
    (tmp_path / "mine.jsonl").write_text('{"text": "a", "label": "negative"}\n')
    with DeviceRegistry("devices.db") as registry, CoordinatorServer(registry) as server:
        code = registry.invite("pixel")
        wanted = ("--coordinator", server.url, "--enrol", code, "--credentials", "own.json")
        answer = run("device", "--model", "absent.gguf", "--task", "toy.toml", "--data", "mine.jsonl", *wanted)
        assert (answer[0], len(answer[2].splitlines())) == (2, 1)
        assert not Path("own.json").exists()
        assert registry.enrol(code, bytes(32)) == "pixel"
