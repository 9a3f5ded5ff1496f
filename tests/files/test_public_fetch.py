"""What strangers name is fetched from public addresses alone, within bounds."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Generator
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from vipllava.files.public_fetch import Address, Fetcher, FetchError, fetch_public, is_public

Answer = Callable[[socket.socket, bytes], None]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@contextlib.contextmanager
def serving(
    answer: Answer, context: ssl.SSLContext | None = None
) -> Generator[tuple[int, list[bytes]]]:
    """Answer every connection of a loopback port by hand; give the port and what was asked."""
    asked: list[bytes] = []
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if context is not None:
                connection = context.wrap_socket(connection, server_side=True)
            request = b""
            while b"\r\n\r\n" not in request and (piece := connection.recv(4096)):
                request += piece
            asked.append(request)
            answer(connection, request)
            connection.close()

    def accept() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield listener.getsockname()[1], asked
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def saying(*pieces: bytes) -> Answer:
    return lambda connection, _: connection.sendall(b"".join(pieces))


def local(max_bytes: int = 1000, timeout_s: float = 30.0, **changed: object) -> Fetcher:
    """Return a fetcher whose names all lead to this machine, which it allows."""
    here: list[Address] = [ip_address("127.0.0.1")]
    fields = {"look_up": lambda host, port: here, "allows": lambda address: True} | changed
    return Fetcher(max_bytes, timeout_s, **fields)  # pyright: ignore[reportArgumentType]


def test_a_name_is_looked_up_once_and_its_address_asked():
    with serving(saying(OK)) as (port, asked):
        assert (
            local().fetch(f"http://pictures.example:{port}/a b?c=\u00e4#d".replace(" ", "%20"))
            == b"hello"
        )
    (request,) = asked
    assert request.startswith(b"GET /a%20b?c=%C3%A4 HTTP/1.1\r\n")
    assert f"\r\nHost: pictures.example:{port}\r\n".encode() in request
    assert b"\r\nConnection: close\r\n" in request


@pytest.mark.parametrize(
    "place",
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 255.255.255.255 "
    "224.0.1.1 239.1.1.1 240.0.0.1 192.0.2.1 198.18.0.1 192.0.0.192 192.88.99.1 168.63.129.16 "
    ":: ::1 fe80::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 "
    "::8.8.8.8 64:ff9b::808:808 64:ff9b:1::1 2002:7f00:1:: 2001:0:7f00:1:: 2001:db8::1 3fff::1 "
    "5f00::1 100::1".split(),
)
def test_an_address_that_is_not_public_is_not_asked(place: str):
    assert not is_public(ip_address(place))
    connected: list[object] = []

    def find(host: str, port: int) -> list[Address]:
        return [ip_address("8.8.8.8"), ip_address(place)]

    fetcher = Fetcher(10, 30.0, find, context=lambda: connected.append(0))  # pyright: ignore
    with pytest.raises(
        FetchError, match=r"the host 'inside.example' is not on the public internet"
    ):
        fetcher.fetch("https://inside.example/")
    assert not connected


@pytest.mark.parametrize("place", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1"])
def test_a_public_address_is_public(place: str):
    assert is_public(ip_address(place))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "127.1", "0x7f.1", "2130706433", "[::ffff:7f00:1]"]
)
def test_this_machine_is_not_public_however_it_is_written(host: str):
    with (
        serving(saying(OK)) as (port, asked),
        pytest.raises(FetchError, match=r"not on the public|not found"),
    ):
        fetch_public(f"http://{host}:{port}/")
    assert asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://a.example/", "ftp://a.example/: expected http://HOST/PATH or https://HOST/PATH"),
        ("file:///etc/passwd", "expected http://"),
        ("http:///x", "expected http://"),
        ("http://a.example:0/", "expected http://"),
        ("http://a.example:99999/", "Port out of range"),
        ("http://[::1/", "Invalid IPv6 URL"),
        ("http://me:secret@a.example/", "http://a.example/: user and password are not sent to st"),
        ("http://a.example/a b", "it has blanks, control characters or backslashes"),
        ("http://a.example/\r\nX: y", "it has blanks, control characters or backslashes"),
        ("http://a.example\\@b.example/", "it has blanks, control characters or backslashes"),
        ("http://a$b.example/", "expected http://"),
        ("http://\u2100.example/", "under NFKC normalization"),
        ("http://" + "\u00e4" * 99 + ".example/", "label empty or too long"),
        ("http://a.example/" + "x" * 5000, "an address of 5017 letters; at most 4096 are read"),
    ],
)
def test_what_is_no_address_is_refused(url: str, message: str):
    with pytest.raises(FetchError, match=re.escape(message)) as caught:
        local().fetch(url)
    assert "secret" not in str(caught.value)


def test_redirects_are_followed_and_checked_like_the_first_address():
    def answer(connection: socket.socket, request: bytes) -> None:
        number = int(request.split()[1][1:])
        place = f"/{number - 1}".encode()
        connection.sendall(
            OK if number == 0 else b"HTTP/1.1 302 x\r\nLocation: " + place + b"\r\n\r\n"
        )

    with serving(answer) as (port, asked):
        assert local().fetch(f"http://a.example:{port}/3") == b"hello"
        assert len(asked) == 4
        with pytest.raises(FetchError, match="/4: more than 3 redirects; give the last address"):
            local().fetch(f"http://a.example:{port}/4")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (b"http://inside.example/", "a.example:.*: the host 'inside.example' is not on the public"),
        (b"//inside.example/", "the host 'inside.example' is not on the public"),
        (b"file:///etc/passwd", "expected http://HOST/PATH"),
        (b"http://me:pw@b.example/", "user and password are not sent"),
    ],
)
def test_a_redirect_leads_to_the_public_alone(place: bytes, message: str):
    def find(host: str, port: int) -> list[Address]:
        return [ip_address("10.0.0.1" if host == "inside.example" else "127.0.0.1")]

    redirect = b"HTTP/1.1 301 x\r\nLocation: " + place + b"\r\nContent-Length: 0\r\n\r\n"
    fetcher = local(look_up=find, allows=lambda address: str(address) != "10.0.0.1")
    with serving(saying(redirect)) as (port, asked), pytest.raises(FetchError, match=message):
        fetcher.fetch(f"http://a.example:{port}/")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the server answers 404 Not Found"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "the server answers 302 Found"),
        (b"HTTP/1.1 206 x\r\nContent-Length: 1\r\n\r\nx", "the server answers 206 x"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n",
            "it has more than 1000 bytes, the lim",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001, "it has more than 1000 bytes, the limit"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000,
            "more than",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
            "the connection ended 4 bytes too ea",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7d\r\nx", "it cannot be fetched"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b",
            "it comes as 'gzip', though",
        ),
        (b"hello", "it cannot be fetched"),
        (b"", "it cannot be fetched"),
    ],
)
def test_what_is_not_the_whole_file_within_the_limit_is_refused(reply: bytes, message: str):
    with serving(saying(reply)) as (port, _), pytest.raises(FetchError, match=message):
        local().fetch(f"http://a.example:{port}/")


def test_a_thousand_bytes_are_a_thousand():
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"x" * 1000
    for reply in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000,
        chunked + b"\r\n0\r\n\r\n",
    ):
        with serving(saying(reply)) as (port, _):
            assert local().fetch(f"http://a.example:{port}/") == b"x" * 1000


def drip(connection: socket.socket, _: bytes, start: bytes) -> None:
    """Send a byte now and then, until the other side has had enough."""
    connection.sendall(start)
    ended = threading.Event()
    for _ in range(500):
        connection.sendall(b"x")
        ended.wait(0.02)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b""])
def test_who_drips_is_left_at_the_deadline(start: bytes):
    slow = pytest.raises(FetchError, match=r"it took longer than 0\.3 s; try again")
    with serving(partial(drip, start=start)) as (port, _), slow:
        local(timeout_s=0.3).fetch(f"http://a.example:{port}/")


def test_a_name_that_is_looked_up_for_ever_ends_at_the_deadline():
    ended = threading.Event()

    def find(host: str, port: int) -> list[Address]:
        ended.wait()
        return []

    try:
        with pytest.raises(FetchError, match=r"it took longer than 0\.1 s"):
            local(timeout_s=0.1, look_up=find).fetch("http://a.example/")
    finally:
        ended.set()


def test_a_name_without_an_address_is_said():
    def find(host: str, port: int) -> list[Address]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(FetchError, match=r"the host 'a.example' is not found"):
        local(look_up=find).fetch("http://a.example/")
    with pytest.raises(FetchError, match=r"the host 'a.example' is not on the public internet"):
        local(look_up=lambda host, port: []).fetch("http://a.example/")


def test_the_next_address_is_tried_where_one_does_not_answer():
    with serving(saying(OK)) as (port, _):
        places: list[Address] = [ip_address("127.0.0.2"), ip_address("127.0.0.1")]
        assert local(look_up=lambda host, p: places).fetch(f"http://a.example:{port}/") == b"hello"
        with pytest.raises(FetchError, match=r"it cannot be fetched .*refused"):
            local(look_up=lambda host, p: places[:1]).fetch(f"http://a.example:{port}/")


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch):
    with serving(saying(b"HTTP/1.1 200 OK\r\n\r\nproxy")) as (proxy, at_proxy):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        with serving(saying(OK)) as (port, _):
            assert local().fetch(f"http://a.example:{port}/") == b"hello"
    assert at_proxy == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_the_certificate_is_of_the_name_and_not_of_the_address(tmp_path: Path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=a.example",
         "-addext", "subjectAltName=DNS:a.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusting = partial(ssl.create_default_context, cafile=certificate)
    with serving(saying(OK), context) as (port, asked):
        assert local(context=trusting).fetch(f"https://a.example:{port}/") == b"hello"
        for host, fetcher in (("b.example", local(context=trusting)), ("a.example", local())):
            with pytest.raises(FetchError, match="CERTIFICATE_VERIFY_FAILED"):
                fetcher.fetch(f"https://{host}:{port}/")
    assert len(asked) == 1
