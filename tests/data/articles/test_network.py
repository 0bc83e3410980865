"""Only public hosts are reached, at the very address that was checked."""

from __future__ import annotations

import _socket
import socket
from typing import Any

import pytest

from preceptor.data.articles.fetch import Fetcher
from preceptor.data.articles.network import is_public
from preceptor.errors import DataError, ServiceError

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
def test_private_hosts_are_refused(url: str) -> None:
    def numeric(host: str, port: int, **_: Any) -> Any:
        # The C function under the one that the tests keep off the network; this flag keeps it off, too.
        return _socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)

    waits: list[float] = []
    with pytest.raises(DataError, match="not a public address"):
        Fetcher(sleep=waits.append, resolve=numeric).get(url)
    assert waits == []


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "208.80.154.224", "2620:0:861::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


def test_one_private_address_among_public_ones_is_enough(internet: Any) -> None:
    internet.hosts = {"mixed.example": ["1.1.1.1", "10.0.0.7"]}
    with pytest.raises(DataError, match=r"'mixed\.example' is at 10\.0\.0\.7"):
        Fetcher(resolve=internet.resolve).get("http://mixed.example/")
    assert internet.connected == []


def test_a_redirect_to_a_private_host_is_refused(internet: Any) -> None:
    """A public server redirects to an address inside; the second hop must never be connected to."""
    internet.hosts = {"public.example": ["1.1.1.1"], "metadata.internal": ["169.254.169.254"]}
    internet.answer = b"HTTP/1.1 302 Found\r\nLocation: https://metadata.internal/secret\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(DataError, match=r"169\.254\.169\.254, which is not a public address"):
        Fetcher(resolve=internet.resolve).get("https://public.example/a?b=c")
    assert internet.connected == [("1.1.1.1", 443)]
    assert internet.sent.startswith(b"GET /a?b=c HTTP/1.1\r\n")


def test_each_host_is_resolved_once_and_pinned(internet: Any) -> None:
    """A name that is public when checked and private when asked again (DNS rebinding) is asked only once."""
    internet.hosts = {"rebind.example": ["1.1.1.1"]}
    fetched = Fetcher(resolve=internet.resolve).get("https://rebind.example:8443/x")
    assert (fetched.url, fetched.body) == ("https://rebind.example:8443/x", b"text")
    assert internet.lookups == ["rebind.example"]
    assert internet.connected == [("1.1.1.1", 8443)]
    assert b"Host: rebind.example:8443\r\n" in internet.sent
    assert internet.certified == ["rebind.example"]  # the certificate is checked for the name, not the address


def test_the_next_address_is_tried(site: Any) -> None:
    """127.0.0.2 refuses (nothing listens there), 127.0.0.1 answers."""
    site.pages["/x"] = site.page(b"text")
    port = int(site.url.rsplit(":", 1)[1])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    fetcher = Fetcher(allow_private_hosts=True, resolve=resolve)
    assert fetcher.get(f"http://two.example:{port}/x").body == b"text"
    assert site.requests[0][2]["Host"] == f"two.example:{port}"


def test_a_host_without_an_address_is_no_connection(internet: Any) -> None:
    internet.hosts = {"empty.example": []}
    with pytest.raises(ServiceError, match=r"'empty\.example' has no address"):
        Fetcher(resolve=internet.resolve, num_attempts=1).get("http://empty.example/")
