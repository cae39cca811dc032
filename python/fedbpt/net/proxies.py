"""The machine's proxies, by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY of its environment, for every HTTP client.

httpx's own reading of them ends programs: at a network in NO_PROXY (``10.0.0.0/8``), an address in brackets, a SOCKS
proxy without the package for it. So clients are made with ``trust_env=False`` and what is found here.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import urllib.request
from typing import Any, Final, TypeAlias

import httpx

from fedbpt.errors import ConfigError
from fedbpt.net.tls import is_loopback

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_SOCKS: Final = ("socks", "socks5", "socks5h")
_PORTS: Final = {"http": 80, "https": 443}


def proxy_of(url: str | httpx.URL) -> httpx.Proxy | None:
    """The proxy to reach ``url`` by; None: it is reached directly, as loopback always is.

    Raises `ConfigError` for a proxy that cannot be used.
    """
    target = httpx.URL(url)
    found = urllib.request.getproxies()
    scheme = target.scheme if found.get(target.scheme) else "all"
    if not found.get(scheme) or is_loopback(target.host) or _is_excepted(target, found.get("no", "")):
        return None
    return _proxy(found[scheme], f"{scheme.upper()}_PROXY")


class ByProxy(httpx.BaseTransport):
    """Sends each request by its own address's proxy: a redirect may lead to one that has another, or none.

    ``options``: as for `httpx.HTTPTransport`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._ways: dict[httpx.URL | None, httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        proxy = proxy_of(request.url)
        way = None if proxy is None else proxy.url
        if way not in self._ways:
            self._ways[way] = httpx.HTTPTransport(proxy=proxy, **self._options)
        return self._ways[way].handle_request(request)

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def _proxy(named: str, variable: str) -> httpx.Proxy:
    """Errors do not quote ``named``: it may hold a password."""
    scheme, separator, rest = named.rpartition("://")
    scheme = scheme.lower() if separator else "http"
    if scheme in _SOCKS:
        scheme = "socks5"  # by which httpx lets the proxy look names up, as ``socks5h`` asks for
        if importlib.util.find_spec("socksio") is None:
            raise ConfigError(f"{variable} names a SOCKS proxy, which takes a package: pip install 'httpx[socks]'")
    if scheme not in ("http", "https", "socks5"):
        raise ConfigError(f"{variable} names a proxy of kind {scheme!r}: there are http, https and socks5")
    try:
        proxy = httpx.Proxy(f"{scheme}://{rest}")
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{variable} names no proxy's address: set it to one like http://proxy:3128") from error
    if not proxy.url.host:
        raise ConfigError(f"{variable} names no proxy's address: set it to one like http://proxy:3128")
    return proxy


def _is_excepted(target: httpx.URL, no_proxy: str) -> bool:
    """Whether an entry of NO_PROXY covers ``target``, as curl reads them: a domain covers what is below it."""
    return any(_covers(entry, target) for entry in re.split(r"[\s,]+", no_proxy.lower()) if entry)


def _covers(entry: str, target: httpx.URL) -> bool:
    scheme, _, rest = entry.rpartition("://")
    if scheme not in ("", "all", target.scheme):
        return False
    host, port = _split(rest.removesuffix("/"))
    if port and int(port) != (target.port or _PORTS.get(target.scheme)):
        return False
    network, address = _network(host), _network(target.host)
    if network is not None:
        return address is not None and address.network_address in network
    domain = host.removeprefix("*").strip(".")
    return host == "*" or (bool(domain) and f".{target.host.rstrip('.')}".endswith(f".{domain}"))


def _split(text: str) -> tuple[str, str]:
    """Host, or network, and port; the port is empty where there is none."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](/\d+)?(?::(\d{1,5}))?", text)
    if bracketed:
        return f"{bracketed[1]}{bracketed[2] or ''}", bracketed[3] or ""
    ported = re.fullmatch(r"([^:]*):(\d{1,5})", text)
    return (ported[1], ported[2]) if ported else (text, "")


def _network(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text.partition("%")[0] if "/" not in text else text, strict=False)
    except ValueError:
        return None
