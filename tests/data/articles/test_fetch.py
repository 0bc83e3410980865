"""The fetcher reaches public hosts only, stays within its limits, and is patient in the way servers ask for."""

from __future__ import annotations

import _socket
import gzip
import random
import socket
import sys
import time
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from preceptor.data.articles.fetch import USER_AGENT, Fetcher, TransientError, is_public
from preceptor.errors import ConfigError, DataError, MissingExtraError, ServiceError


def resolver(table: dict[str, list[str]]) -> Any:
    """A stand-in for ``socket.getaddrinfo`` with these answers."""

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in table[host]]

    return resolve


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def local(waits: list[float]) -> Fetcher:
    """A fetcher that may reach the loopback server and never really sleeps."""
    return Fetcher(allow_private_hosts=True, sleep=waits.append, timeout_seconds=5.0, num_attempts=3)


PRIVATE_URLS = [
    "http://127.0.0.1/",
    "http://127.1.2.3:8080/x",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/",
    "http://192.0.0.1/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fd12:3456::1]/",
    "http://[ff02::1]/",
    "http://[2002:7f00:1::]/",  # 6to4 of 127.0.0.1
    "http://[64:ff9b::7f00:1]/",  # NAT64 of 127.0.0.1
    "http://[64:ff9b::a00:1]/",  # NAT64 of 10.0.0.1
    # spellings that only the resolver understands
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f.0.0.1/",
    "http://017700000001/",
]


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_private_hosts_are_refused(url: str, waits: list[float]) -> None:
    def numeric(host: str, port: int, **_: Any) -> Any:
        # The C function under the one that the tests keep off the network; this flag keeps it off, too.
        return _socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    with pytest.raises(DataError, match="not a public address"):
        Fetcher(sleep=waits.append, resolve=numeric).get(url)
    assert waits == []


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "208.80.154.224", "2620:0:861::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_one_private_address_among_public_ones_is_enough(waits: list[float]) -> None:
    fetcher = Fetcher(resolve=resolver({"mixed.example": ["1.1.1.1", "10.0.0.7"]}), sleep=waits.append)
    with pytest.raises(DataError, match=r"mixed\.example/ is at 10\.0\.0\.7"):
        fetcher.get("http://mixed.example/")


def test_a_redirect_to_a_private_host_is_refused(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """A public server redirects to an address inside; the second hop must never be sent."""
    sent: list[str] = []

    def send(self: httpx.Client, request: httpx.Request, **_: Any) -> httpx.Response:
        sent.append(str(request.url))
        return httpx.Response(302, headers={"Location": "https://metadata.internal/secret"}, request=request)

    monkeypatch.setattr(httpx.Client, "send", send)
    table = {"public.example": ["1.1.1.1"], "metadata.internal": ["169.254.169.254"]}
    with pytest.raises(DataError, match=r"169\.254\.169\.254, which is not a public address"):
        Fetcher(resolve=resolver(table), sleep=waits.append).get("https://public.example/a?b=c")
    assert sent == ["https://1.1.1.1/a?b=c"]  # pinned: connected to the very address that was checked


def test_each_hop_is_resolved_once_and_pinned(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """A name that is public when checked and private when asked again (DNS rebinding) is asked only once."""
    answers = iter([["1.1.1.1"], ["127.0.0.1"]])
    sent: list[httpx.Request] = []

    def send(self: httpx.Client, request: httpx.Request, **_: Any) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, content=b"text", headers={"Content-Type": "text/plain"}, request=request)

    monkeypatch.setattr(httpx.Client, "send", send)

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in next(answers)]

    fetcher = Fetcher(resolve=resolve, sleep=waits.append)
    assert fetcher.get("https://rebind.example:8443/x").url == "https://rebind.example:8443/x"
    (request,) = sent
    assert request.url.host == "1.1.1.1"
    assert request.headers["Host"] == "rebind.example:8443"
    assert request.extensions["sni_hostname"] == "rebind.example"  # the certificate is checked for the name
    assert next(answers) == ["127.0.0.1"]


def test_the_next_address_is_tried(site: Any, local: Fetcher) -> None:
    """127.0.0.2 refuses (nothing listens there), 127.0.0.1 answers."""
    site.pages["/x"] = site.page(b"text")
    port = int(site.url.rsplit(":", 1)[1])
    fetcher = Fetcher(allow_private_hosts=True, resolve=resolver({"two.example": ["127.0.0.2", "127.0.0.1"]}))
    assert fetcher.get(f"http://two.example:{port}/x").body == b"text"
    assert site.requests[0][2]["Host"] == f"two.example:{port}"


def test_encryption_is_not_given_up(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    def send(self: httpx.Client, request: httpx.Request, **_: Any) -> httpx.Response:
        return httpx.Response(301, headers={"Location": "http://a.example/y"}, request=request)

    monkeypatch.setattr(httpx.Client, "send", send)
    with pytest.raises(DataError, match=r"unencrypted http://a\.example/y"):
        Fetcher(resolve=resolver({"a.example": ["1.1.1.1"]}), sleep=waits.append).get("https://a.example/")


def test_answer(site: Any, local: Fetcher) -> None:
    site.pages["/old"] = site.page(b"", status=302, headers={"Location": "new?a=1"})
    site.pages["/new"] = site.page("é".encode("latin-1"), content_type="Text/Plain; charset=ISO-8859-1")
    answer = local.get(f"{site.url}/old")
    assert (answer.url, answer.media_type, answer.charset) == (f"{site.url}/new?a=1", "text/plain", "iso-8859-1")
    assert answer.body == b"\xe9"
    assert site.requests[0][2]["User-Agent"] == USER_AGENT
    assert "https://" in USER_AGENT  # Wikimedia asks for a way to reach the makers
    assert [path for path, _, _ in site.requests] == ["/old", "/new"]


def test_redirects_end(site: Any, local: Fetcher) -> None:
    site.pages["/loop"] = site.page(b"", status=302, headers={"Location": "/loop"})
    with pytest.raises(DataError, match="redirects more than 5 times"):
        local.get(f"{site.url}/loop")
    assert len(site.requests) == 6


@pytest.mark.parametrize("compressed", [False, True])
def test_size_limit(site: Any, compressed: bool) -> None:
    body = b"a" * 100_001
    headers = {"Content-Encoding": "gzip"} if compressed else {}
    site.pages["/big"] = site.page(gzip.compress(body) if compressed else body, headers=headers)
    with pytest.raises(DataError, match="over 100,000 bytes"):
        Fetcher(allow_private_hosts=True, max_bytes=100_000).get(f"{site.url}/big")
    assert Fetcher(allow_private_hosts=True, max_bytes=100_001).get(f"{site.url}/big").body == body


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, "disconnect"])
def test_what_may_pass_is_tried_again(site: Any, local: Fetcher, waits: list[float], fault: Any) -> None:
    site.pages["/x"] = site.page(b"text")
    site.script.extend([fault, fault])
    assert local.get(f"{site.url}/x").body == b"text"
    assert len(site.requests) == 3
    assert len(waits) == 2
    assert 0 <= waits[0] <= 1  # U(0, 1 · 2^0)
    assert 0 <= waits[1] <= 2


def test_giving_up_says_how_often(site: Any, local: Fetcher, waits: list[float]) -> None:
    site.script.extend([503] * 3)
    with pytest.raises(ServiceError, match=r"503 Service Unavailable \(tried 3 times\)") as caught:
        local.get(f"{site.url}/x")
    assert caught.value.exit_code == 6
    assert len(waits) == 2


def test_full_jitter() -> None:
    """The waits fill the whole of [0, min(cap, base · 2^k)], and leave the global random numbers alone."""

    def busy() -> None:
        raise TransientError("busy")

    waits: list[list[float]] = []
    state = random.getstate()
    for _ in range(200):
        waits.append([])
        fetcher = Fetcher(num_attempts=5, backoff_seconds=1.0, max_wait_seconds=3.0, sleep=waits[-1].append)
        with pytest.raises(ServiceError, match=r"busy \(tried 5 times\)"):
            fetcher.retry("http://a.example/", busy)
    for wait_index, cap in enumerate([1.0, 2.0, 3.0, 3.0]):
        column = [row[wait_index] for row in waits]
        assert len(column) == 200
        # the chance that 200 uniform draws miss the lowest or the highest fifth is 2 · 0.8^200 < 1e-19
        assert min(column) < 0.2 * cap < 0.8 * cap < max(column) <= cap
    assert random.getstate() == state


def test_retry_after_is_honoured(site: Any, local: Fetcher, waits: list[float]) -> None:
    site.pages["/x"] = site.page(b"text")
    site.script.extend([(429, {"Retry-After": "7"}), (503, {"Retry-After": formatdate(time.time() + 30, usegmt=True)})])
    assert local.get(f"{site.url}/x").body == b"text"
    assert waits[0] == 7.0
    assert 25 < waits[1] <= 30


def test_too_long_a_retry_after_ends_it(site: Any, local: Fetcher, waits: list[float]) -> None:
    site.script.append((429, {"Retry-After": "3600"}))
    with pytest.raises(ServiceError, match="asks to wait 3600 s"):
        local.get(f"{site.url}/x")
    assert waits == []


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_slow_servers_are_left(site: Any, fault: str) -> None:
    site.pages["/x"] = site.page(b"x" * 1_000)  # dripping, it would take 50 s
    site.script.append(fault)
    fetcher = Fetcher(allow_private_hosts=True, timeout_seconds=0.3, num_attempts=1)
    start = time.monotonic()
    with pytest.raises(ServiceError, match=r"within 0\.3 s"):
        fetcher.get(f"{site.url}/x")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("status", "error"), [(404, DataError), (410, DataError), (401, ServiceError), (403, ServiceError)]
)
def test_refusals_are_final(site: Any, local: Fetcher, status: int, error: type[Exception]) -> None:
    site.script.append(status)
    with pytest.raises(error, match=str(status)):
        local.get(f"{site.url}/x")
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://a.example/", "only http:// and https://"),
        ("file:///etc/passwd", "only http:// and https://"),
        ("http:///x", "only http:// and https://"),
        ("http://user:secret@a.example/", "remove it"),
        ("http://a.example:99999/", "from 1 to 65535"),
        ("http://a.example:x/", "not a valid URL"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Fetcher().get(url)
    assert "secret" not in str(caught.value)


def test_no_network(waits: list[float]) -> None:
    with pytest.raises(ServiceError, match=r"'en\.wikipedia\.org' cannot be resolved") as caught:
        Fetcher(num_attempts=2, sleep=waits.append).get("https://en.wikipedia.org/")
    assert "check the network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="num_attempts must be at least 1, got 0"):
        Fetcher(num_attempts=0)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match=r"preceptor\[web\]"):
        Fetcher().get("https://a.example/")
