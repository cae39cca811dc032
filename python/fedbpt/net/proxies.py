"""Proxies for all HTTP clients, from the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

httpx's own support raises for a network in NO_PROXY (``10.0.0.0/8``), an address in brackets, and a SOCKS proxy without
its package. So clients are created with ``trust_env=False`` and the proxy found here.
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
    """The proxy for ``url``; None for a direct connection, as always to loopback.

    Raises `ConfigError` for an unusable proxy.
    """
    target = httpx.URL(url)
    found = urllib.request.getproxies()
    scheme = target.scheme if found.get(target.scheme) else "all"
    if not found.get(scheme) or is_loopback(target.host) or _is_excepted(target, found.get("no", "")):
        return None
    return _proxy(found[scheme], f"{scheme.upper()}_PROXY")


class ByProxy(httpx.BaseTransport):
    """Transport that chooses the proxy for each request: a redirect may need another one, or none.

    ``options``: as for `httpx.HTTPTransport`.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._transports: dict[httpx.URL | None, httpx.HTTPTransport] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        proxy = proxy_of(request.url)
        key = None if proxy is None else proxy.url
        if key not in self._transports:
            self._transports[key] = httpx.HTTPTransport(proxy=proxy, **self._options)
        return self._transports[key].handle_request(request)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()


def _proxy(value: str, variable: str) -> httpx.Proxy:
    """Parse the value of an environment variable. Errors do not quote it: it may hold a password."""
    scheme, separator, rest = value.rpartition("://")
    scheme = scheme.lower() if separator else "http"
    if scheme in _SOCKS:
        scheme = "socks5"  # with this, httpx lets the proxy resolve names, as for ``socks5h``
        if importlib.util.find_spec("socksio") is None:
            raise ConfigError(f"{variable} is a SOCKS proxy: pip install 'httpx[socks]'", field=variable)
    if scheme not in ("http", "https", "socks5"):
        raise ConfigError(f"{variable} has scheme {scheme!r}: use one of http, https, socks5", field=variable)
    invalid = ConfigError(
        f"{variable} is not a proxy's address: set it to one such as http://proxy:3128", field=variable
    )
    try:
        proxy = httpx.Proxy(f"{scheme}://{rest}")
    except (httpx.InvalidURL, ValueError) as error:
        raise invalid from error
    if not proxy.url.host:
        raise invalid
    return proxy


def _is_excepted(target: httpx.URL, no_proxy: str) -> bool:
    """Whether NO_PROXY covers ``target``, with curl's rules: a domain covers its subdomains."""
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
    """Split an entry into host or network, and port, which may be empty."""
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
