"""How others come to watch: an address that they can reach, and a QR code of the link."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final, NamedTuple

import segno

from fedbpt.net.tls import is_loopback, url_of
from fedbpt.net.tokens import watch_token

_ELSEWHERE: Final = ("192.0.2.1", 9)
"""An address of documentation (RFC 5737): what leads there leads out of this machine."""


class Links(NamedTuple):
    """``everybodys``: for those who may look but not steer, from their own machines; None: none can reach it."""

    operators: str
    everybodys: str | None


def links(host: str, port: int, encrypted: bool, token: str | None) -> Links:
    """The links to a dashboard that is bound to ``host``, with its ``token``, if it has one."""
    reachable = url_of(reachable_host(host), port, encrypted)
    # a token need not cross a network in clear
    own = url_of("127.0.0.1", port, encrypted) if is_every_address(host) and not encrypted else reachable
    if token is None:
        return Links(own, None)
    return Links(f"{own}/?token={token}", None if is_loopback(host) else f"{reachable}/?token={watch_token(token)}")


def is_every_address(host: str) -> bool:
    """Whether a server bound to ``host`` listens on all of the machine's addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def reachable_host(host: str) -> str:
    """The name or address by which other machines reach a server that is bound to ``host``."""
    return own_address() or socket.gethostname() if is_every_address(host) else host


def own_address() -> str:
    """This machine's address towards the network; empty: it has none. Sends nothing: a UDP socket is only connected."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
        except OSError:  # no way out
            return ""
        address = str(probe.getsockname()[0])
    return "" if is_loopback(address) else address


def qr_svg(link: str) -> str:
    """A QR code as SVG, which holds nothing of ``link`` but its dots."""
    return str(segno.make_qr(link).svg_inline(scale=4, omitsize=True, dark="#000", light="#fff"))


def qr_lines(link: str) -> list[str]:
    """A QR code for a terminal, light dots drawn: two rows of them a line."""
    dots = [[*row] for row in segno.make_qr(link).matrix_iter(border=2)]
    if len(dots) % 2:
        dots.append([1] * len(dots[0]))
    shown = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
    return [
        "".join(shown[pair] for pair in zip(*rows, strict=True)) for rows in zip(dots[::2], dots[1::2], strict=True)
    ]
