"""A private CA in use: which certificates are trusted."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import ConfigError, DeviceUnreachableError, FedbptError
from fedbpt.net import certs
from fedbpt.net.tls import Tls, is_loopback, url_of
from fedbpt.net.tokens import Credentials
from fedbpt.protocol.rounds import DeviceInfo
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises


def status_of(client: HttpClient) -> DeviceInfo:
    """The device's status by a client that leaves no connection open, also where the handshake fails."""

    async def ask() -> DeviceInfo:
        try:
            return await client.status()
        finally:
            await client.aclose()
            await asyncio.sleep(0.05)  # a connection that is being closed is closed before the loop is

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA with certificates of a server and a device, and another CA in ``other``."""
    folder = tmp_path_factory.mktemp("certs")
    for at in (folder, folder / "other"):
        certs.init(at)
        certs.issue(at, "server", ["127.0.0.1", "localhost"])
        certs.issue(at, "pi5")
    certs.issue(folder, "elsewhere", ["elsewhere.example"])
    return folder


def tls(folder: Path, name: str | None = None, client_certs: bool = False) -> Tls:
    files = certs.pair(folder, name) if name else (None, None)
    return Tls(*files, ca=folder / "ca.pem", client_certs=client_certs)


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    with AgentServer(AgentService(FakeDevice("a")), tls=tls(folder, "server")) as server:
        yield server.url


def status(url: str, client: Tls) -> int:
    with httpx.Client(verify=client.client_context(), trust_env=False) as http:
        return http.get(f"{url}/healthz").status_code


def test_a_server_with_a_certificate_of_the_ca_is_believed(served: str, folder: Path) -> None:
    assert served.startswith("https://127.0.0.1:")
    assert status(served, tls(folder)) == 200


def test_a_server_of_another_ca_is_not(served: str, folder: Path) -> None:
    for client in (tls(folder / "other"), Tls()):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            status(served, client)


def test_a_server_with_the_certificate_of_another_host_is_not(folder: Path) -> None:
    with AgentServer(AgentService(FakeDevice("a")), tls=tls(folder, "elsewhere")) as server:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            status(server.url, tls(folder))


OUT_OF_TIME = {"not valid yet": {"LEEWAY_DAYS": -30}, "expired": {"LEEWAY_DAYS": 9, "CERTIFICATE_DAYS": -5}}


@pytest.fixture(params=OUT_OF_TIME)
def untimely(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Tls]:
    """A certificate that is not valid by the client's clock: the problem, and the server's TLS settings."""
    at = folder / request.param
    if not at.exists():
        at.mkdir()
        for file in certs.pair(folder, "ca"):
            shutil.copy(file, at)
        for constant, days in OUT_OF_TIME[request.param].items():
            monkeypatch.setattr(certs, constant, days)
        certs.issue(at, "server", ["127.0.0.1"])
    return request.param, tls(at, "server")


def test_a_client_of_a_device_reports_that_the_clock_may_be_wrong(untimely: tuple[str, Tls], folder: Path) -> None:
    with AgentServer(AgentService(FakeDevice("a")), tls=untimely[1]) as server:
        with pytest.raises(DeviceUnreachableError) as error:
            status_of(HttpClient(server.url, tls=tls(folder), retry_s=0.1))
    assert untimely[0] in str(error.value)
    assert "clock" in str(error.value)


def test_a_device_that_calls_in_reports_that_the_clock_may_be_wrong(untimely: tuple[str, Tls], folder: Path) -> None:
    told: list[str] = []
    with DeviceRegistry(folder / "devices.db") as registry, CoordinatorServer(registry, tls=untimely[1]) as server:
        with pytest.raises(FedbptError) as error:
            enrol(server.url, registry.invite("a"), tls=tls(folder))
        credentials = Credentials(server.url, "a", "secret")
        with Poller(AgentService(FakeDevice("a")), credentials, tls=tls(folder), tell=told.append):
            wait_until(lambda: bool(told))
    for line in (str(error.value), told[0]):
        assert untimely[0] in line
        assert "clock" in line
        assert "\n" not in line


def test_an_error_about_another_ca_does_not_mention_the_clock(served: str, folder: Path) -> None:
    for call in (
        lambda: status_of(HttpClient(served, tls=tls(folder / "other"), retry_s=0.1)),
        lambda: enrol(served, "CODE", tls=tls(folder / "other")),
    ):
        with pytest.raises(FedbptError, match="--ca") as error:
            call()
        assert "clock" not in str(error.value)


def test_a_certificate_for_another_name_is_reported(folder: Path) -> None:
    with AgentServer(AgentService(FakeDevice("a")), tls=tls(folder, "elsewhere")) as server:
        with pytest.raises(DeviceUnreachableError) as caught:
            status_of(HttpClient(server.url, tls=tls(folder), retry_s=0.1))
    assert "certificate" in str(caught.value)
    assert "clock" not in str(caught.value)


def test_an_authority_that_is_not_valid_now_signs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certs, "LEEWAY_DAYS", -30)
    certs.init(tmp_path)
    with pytest.raises(ConfigError, match="clock"):
        certs.issue(tmp_path, "pi5")
    assert not certs.pair(tmp_path, "pi5").cert.exists()


def test_plain_http_is_refused(served: str) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(served.replace("https:", "http:") + "/healthz", trust_env=False)


def test_client_certs_must_be_signed_by_the_ca(folder: Path) -> None:
    with AgentServer(AgentService(FakeDevice("a")), tls=tls(folder, "server", client_certs=True)) as server:
        assert status(server.url, tls(folder, "pi5")) == 200
        stranger = Tls(*certs.pair(folder / "other", "pi5"), ca=folder / "ca.pem")
        for client in (tls(folder), stranger):
            with pytest.raises(httpx.TransportError):
                status(server.url, client)


def test_certificates_satisfy_strict_verification(folder: Path) -> None:
    strict = Tls(*certs.pair(folder, "pi5"), ca=folder / "ca.pem").client_context()
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    with AgentServer(AgentService(FakeDevice("a")), tls=tls(folder, "server")) as server:
        with httpx.Client(verify=strict, trust_env=False) as http:
            assert http.get(f"{server.url}/healthz").status_code == 200


def test_only_the_owner_can_read_keys(folder: Path) -> None:
    keys = list(folder.glob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_device_cannot_sign_certificates(folder: Path) -> None:
    made = x509.load_pem_x509_certificate((folder / "pi5.pem").read_bytes())
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not made.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_nothing_is_replaced(folder: Path) -> None:
    before = (folder / "ca.pem").read_bytes()
    for call, name in ((lambda: certs.init(folder), "ca.pem"), (lambda: certs.issue(folder, "pi5"), "pi5.pem")):
        with raises(ConfigError) as caught:
            call()
        assert name in str(caught.value)
    assert (folder / "ca.pem").read_bytes() == before


@pytest.mark.parametrize(("name", "host", "field"), [("x", "ü.example", "host"), ("x" * 65, "x", "name")])
def test_an_invalid_name_or_host_is_refused(folder: Path, name: str, host: str, field: str) -> None:
    with raises(ConfigError, field=field):
        certs.issue(folder, name, [host])
    assert not certs.pair(folder, name).cert.exists()


def test_without_an_authority_nothing_is_issued(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.key"):
        certs.issue(tmp_path, "pi5")


def test_inconsistent_tls_files_are_refused(folder: Path, tmp_path: Path) -> None:
    cert, key = certs.pair(folder, "pi5")
    with raises(ConfigError, field="--key"):
        Tls(cert)
    with raises(ConfigError, field="--ca"):
        Tls(cert, key, client_certs=True)
    with raises(ConfigError, field="--cert") as caught:
        Tls(tmp_path / "absent", key)
    assert str(tmp_path / "absent") in str(caught.value)
    (tmp_path / "text").write_text("hello")
    for broken in (Tls(tmp_path / "text", key), Tls(cert, certs.pair(folder, "server").key)):
        with raises(ConfigError) as caught:
            broken.server_options()
        assert str(broken.cert) in str(caught.value)
    with raises(ConfigError) as caught:
        Tls(ca=tmp_path / "text").client_context()
    assert str(tmp_path / "text") in str(caught.value)


def test_beyond_loopback_a_device_requires_authentication(folder: Path) -> None:
    service = AgentService(FakeDevice("a"))
    with pytest.raises(ConfigError, match="--token-file"):
        AgentServer(service, "0.0.0.0", tls=tls(folder, "server"))
    AgentServer(service, "0.0.0.0", tls=tls(folder, "server"), token="x" * 43).stop()
    AgentServer(service, "0.0.0.0", tls=tls(folder, "server", client_certs=True)).stop()
    with raises(ConfigError, field="--cert"):
        AgentServer(service, "0.0.0.0", token="x" * 43)


def test_addresses() -> None:
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "pi5", "localhost.example")] == [False] * 4
    assert url_of("::1", 80, True) == "https://[::1]:80"
    assert url_of("pi5", 8401, False) == "http://pi5:8401"
