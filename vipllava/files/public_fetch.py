"""Fetching what a stranger names: public addresses only, within bounds of size and time.

The address that was checked is the one that is connected to, so a name that is looked up twice
cannot point elsewhere the second time; redirects are checked like the first address. Proxies of the
environment are not used: behind one it would be the proxy that looks up the name.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urljoin, urlsplit

from vipllava import __version__
from vipllava.types import VipLlavaError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MOST_BYTES: Final = 64 * 2**20
TIMEOUT_S: Final = 20.0
_MOST_REDIRECTS: Final = 3
_MOST_ADDRESSES: Final = 4
"""Of one name that are tried."""
_LONGEST_URL: Final = 4096
_CHUNK: Final = 1 << 16
_KEPT: Final = "!#$%&'()*+,/:;=?@[]~"
_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PUBLIC_V6: Final = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC: Final = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # of the protocols; some clouds serve keys there
            "192.88.99.0/24",  # once relays of 6to4
            "168.63.129.16/32",  # what Azure's machines ask about themselves
            "2001::/23",  # Teredo and others; they hold addresses of version 4
            "2002::/16",  # 6to4 likewise
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
        ),
    )
)


class FetchError(VipLlavaError):
    """An address is not fetched: it is not public, too large, too slow, or does not answer."""


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public internet, of version 4 or 6.

    Not so are private, local and shared ones, those of many machines (multicast), reserved ones,
    and those of version 6 that hold one of version 4.
    """
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in _PUBLIC_V6:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def look_up(host: str, port: int) -> list[Address]:
    """Return the addresses of a host, as the system finds them; OSError if there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(place[4][0]) for place in found]


def fetch_public(url: str, max_bytes: int = MOST_BYTES, timeout_s: float = TIMEOUT_S) -> bytes:
    """Return what a public http or https address has.

    Args:
        url: without user and password.
        max_bytes: more is refused, as soon as it is known.
        timeout_s: seconds for all of it: looking up, connecting, redirects, every byte.

    Raises:
        FetchError: naming the address and what is wrong.
    """
    return Fetcher(max_bytes, timeout_s).fetch(url)


@dataclass
class Fetcher:
    """One fetch; what looks up and what allows are arguments for the sake of tests."""

    max_bytes: int
    timeout_s: float
    look_up: Callable[[str, int], list[Address]] = look_up
    allows: Callable[[Address], bool] = is_public
    context: Callable[[], ssl.SSLContext] = ssl.create_default_context

    def fetch(self, url: str) -> bytes:
        """See :func:`fetch_public`."""
        shown = _shown(url)
        deadline = time.monotonic() + self.timeout_s
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                target = _Target.of(url)
                found = self._ask(target, deadline)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except FetchError as error:
            raise FetchError(f"{shown}: {error}") from error
        except TimeoutError as error:
            reason = f"it took longer than {self.timeout_s:g} s"
            raise FetchError(f"{shown}: {reason}; try again, or fetch it yourself") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise FetchError(f"{shown}: it cannot be fetched ({reason[:200]})") from error
        raise FetchError(f"{shown}: more than {_MOST_REDIRECTS} redirects; give the last address")

    def _ask(self, target: _Target, deadline: float) -> bytes | str:
        """Return the body, or where a redirect leads to."""
        wire = self._connect(target, deadline)
        try:
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = wire
            headers = {
                "Host": target.netloc,
                "User-Agent": f"vipllava/{__version__}",
                "Accept-Encoding": "identity",
                "Connection": "close",
            }
            connection.request("GET", target.path, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS and (place := response.headers.get("Location")):
                return place
            return self._body(response)
        finally:
            wire.sock.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != http.HTTPStatus.OK:
            raise FetchError(f"the server answers {response.status} {response.reason[:100]}")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise FetchError(f"it comes as {encoding[:40]!r}, though nothing packed was asked for")
        too_large = f"it has more than {self.max_bytes} bytes, the limit"
        if (response.length or 0) > self.max_bytes:
            raise FetchError(too_large)
        body = bytearray()
        while chunk := response.read(min(_CHUNK, self.max_bytes + 1 - len(body))):
            body += chunk
            if len(body) > self.max_bytes:
                raise FetchError(too_large)
        if response.length:
            raise FetchError(f"the connection ended {response.length} bytes too early")
        return bytes(body)

    def _connect(self, target: _Target, deadline: float) -> _Wire:
        addresses = list(dict.fromkeys(self._addresses(target, deadline)))[:_MOST_ADDRESSES]
        error: OSError = OSError("no address")
        for number, address in enumerate(addresses):
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            plain = socket.socket(family, socket.SOCK_STREAM)
            wire = _Wire(plain, deadline)
            try:
                plain.settimeout(_left(deadline) / (len(addresses) - number))
                plain.connect((str(address), target.port))
                if target.scheme == "https":
                    wire.sock = self.context().wrap_socket(
                        plain, server_hostname=target.host, do_handshake_on_connect=False
                    )
                    wire.due().do_handshake()
            except OSError as each:
                wire.sock.close()
                if isinstance(each, ssl.SSLError):
                    raise
                error = each
            else:
                return wire
        raise error

    def _addresses(self, target: _Target, deadline: float) -> list[Address]:
        """Look up a host within the time, which the system's own look-up does not keep."""
        results: queue.Queue[list[Address] | Exception] = queue.Queue()

        def work() -> None:
            try:
                results.put(self.look_up(target.host, target.port))
            except (OSError, ValueError) as error:
                results.put(error)

        threading.Thread(target=work, daemon=True, name="look-up").start()
        try:
            found = results.get(timeout=_left(deadline))
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(found, Exception):
            raise FetchError(f"the host {target.host!r} is not found") from found
        if not found or not all(map(self.allows, found)):
            raise FetchError(f"the host {target.host!r} is not on the public internet")
        return found


@dataclass(frozen=True)
class _Target:
    """The parts of an address, as they are sent."""

    scheme: str
    host: str
    port: int
    path: str  # and query

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @classmethod
    def of(cls, url: str) -> _Target:
        expected = "expected http://HOST/PATH or https://HOST/PATH"
        if len(url) > _LONGEST_URL:
            raise FetchError(f"an address of {len(url)} letters; at most {_LONGEST_URL} are read")
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise FetchError(f"it has blanks, control characters or backslashes; {expected}")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host = host if host.isascii() else host.encode("idna").decode()
            path = quote(parts.path or "/", _KEPT) + (
                f"?{quote(parts.query, _KEPT)}" if parts.query else ""
            )
        except ValueError as error:
            raise FetchError(f"{error}; {expected}") from error
        if parts.scheme not in _PORTS or not re.fullmatch(r"[\w.:-]{1,255}", host) or port == 0:
            raise FetchError(expected)
        if parts.username is not None or parts.password is not None:
            raise FetchError(f"user and password are not sent to strangers; {expected}")
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], path)


@dataclass
class _Wire:
    """A socket whose every wait ends at the deadline; as much of one as http.client needs."""

    sock: socket.socket
    deadline: float

    def due(self) -> Any:
        """Return the socket, which from now on waits no longer than is left."""
        self.sock.settimeout(_left(self.deadline))
        return self.sock

    def sendall(self, data: bytes) -> None:
        self.due().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self))

    def close(self) -> None:
        """Leave it open: the connection ends itself before the body of its answer is read."""


class _Incoming(io.RawIOBase):
    def __init__(self, wire: _Wire) -> None:
        super().__init__()
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._wire.due().recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _shown(url: str) -> str:
    """Return an address for messages: printable, short, without password."""
    kept = re.sub(r"(?<=//)[^/?#]*@", "", url[:200])
    return kept.encode("ascii", "backslashreplace").decode() + ("..." if len(url) > 200 else "")
