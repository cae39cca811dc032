"""Links to the dashboard: the operator's, and a read-only one for other machines, also as QR code."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final, NamedTuple

import segno

from fedbpt.net.tls import is_loopback, url_of
from fedbpt.net.tokens import watch_token

_EXTERNAL_ADDRESS: Final = ("192.0.2.1", 9)
"""An address reserved for documentation (RFC 5737), to find the interface of the default route."""


class Links(NamedTuple):
    """``everybodys``: the read-only link for other machines; None: they cannot reach the dashboard."""

    operators: str
    everybodys: str | None


def links(host: str, port: int, encrypted: bool, token: str | None) -> Links:
    """The links to a dashboard bound to ``host``. ``token``: the operator's; None: there is none."""
    reachable = url_of(reachable_host(host), port, encrypted)
    # Without encryption, the operator's link uses loopback, to keep the token off the network.
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
    """The name or address at which other machines reach a server bound to ``host``."""
    return own_address() or socket.gethostname() if is_every_address(host) else host


def own_address() -> str:
    """This machine's address on the network; empty if it has none. Connects a UDP socket, which sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_EXTERNAL_ADDRESS)
        except OSError:  # no route
            return ""
        address = str(probe.getsockname()[0])
    return "" if is_loopback(address) else address


def qr_svg(link: str) -> str:
    """A QR code of ``link`` as SVG. The text itself is not in it, so that nothing needs escaping."""
    return str(segno.make_qr(link).svg_inline(scale=4, omitsize=True, dark="#000", light="#fff"))


def qr_lines(link: str) -> list[str]:
    """A QR code for a dark terminal: each line draws the light modules of two rows."""
    dots = [[*row] for row in segno.make_qr(link).matrix_iter(border=2)]
    if len(dots) % 2:
        dots.append([1] * len(dots[0]))
    shown = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
    return [
        "".join(shown[pair] for pair in zip(*rows, strict=True)) for rows in zip(dots[::2], dots[1::2], strict=True)
    ]
