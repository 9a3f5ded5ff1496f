"""What a server is told: where it listens, and how much it takes."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vipllava.records.image_decode import MAX_PIXELS
from vipllava.types import ConfigError

MB = 1_000_000
_POSITIVE = (
    *("max_running", "max_body_mb", "picture_memory_mb", "picture_threads"),
    *("deadline_s", "body_timeout_s", "head_timeout_s", "write_timeout_s", "max_connections"),
    *("max_pixels", "max_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits and doors of one server.

    Raises:
        ConfigError: values that mean nothing; names all of them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)  # None lets everybody in
    cors_origins: tuple[str, ...] = ()  # web pages that may ask, e.g. https://example.org; or *
    # Names by which clients may address the server. On a loopback address others than localhost
    # are refused: a web page whose name is made to mean 127.0.0.1 is no client.
    allowed_hosts: tuple[str, ...] = ()
    allow_image_urls: bool = False  # whether images are fetched from public addresses
    prepend_system: bool = False  # whether system texts go in front of the first question
    max_running: int = 32  # requests that one model is given at a time
    max_queue: int = 64  # requests of one model that wait; further ones are refused
    deadline_s: float = 300.0  # of one request, from its body to its last byte
    grace_s: float = 30.0  # for what runs when the server is asked to end
    max_tokens: int = 512  # of an answer where the request says nothing
    max_body_mb: float = 32.0
    body_timeout_s: float = 30.0  # for a request's body to arrive
    head_timeout_s: float = 10.0  # for its header
    write_timeout_s: float = 30.0  # for a client to read what fills the connection
    max_connections: int = 1000
    max_pixels: int = 50_000_000  # of one image
    picture_memory_mb: float = 2048.0  # of all images that are held, and of bodies being read
    picture_threads: int = 2  # that decode, draw and encode images

    def __post_init__(self) -> None:
        """Refuse what means nothing; names and origins do not depend on case."""
        for name in ("cors_origins", "allowed_hosts"):
            object.__setattr__(self, name, tuple(each.lower() for each in getattr(self, name)))
        problems = [
            f"{name}={value}: expected a finite number above 0"
            for name in _POSITIVE
            if not 0 < (value := getattr(self, name)) < math.inf
        ]
        if self.max_queue < 0 or not 0 <= self.grace_s < math.inf:
            problems.append(
                f"max_queue={self.max_queue} and grace_s={self.grace_s} must be at least 0"
            )
        if not 0 <= self.port <= 65535:
            problems.append(f"port={self.port}: expected 0 to 65535")
        if self.max_pixels > MAX_PIXELS:
            problems.append(f"max_pixels={self.max_pixels}: at most {MAX_PIXELS} are ever read")
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key and key):
            problems.append("api_key is empty or has characters that no header can carry")
        for origin in self.cors_origins:
            url = urlsplit(origin)
            if origin != "*" and (
                url.scheme not in ("http", "https") or url.path or not url.netloc
            ):
                problems.append(f"cors={origin}: expected e.g. https://example.org, or *")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def knows_host(self, header: str) -> bool:
        """Tell whether the server may be addressed by a request's ``Host``."""
        try:
            name = urlsplit(f"//{header}").hostname if header else None
        except ValueError:
            return False
        if name in self.allowed_hosts:
            return True
        if self.is_loopback:
            return name is None or is_loopback(name)
        return not self.allowed_hosts


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
