"""The fetcher reaches public hosts only, stays within its limits, and is patient in the way servers ask for."""

from __future__ import annotations

import gzip
import random
import sys
import time
from email.utils import formatdate
from typing import Any

import pytest

from preceptor.data.articles import network
from preceptor.data.articles.fetch import USER_AGENT, Fetcher, TransientError
from preceptor.errors import ConfigError, DataError, MissingExtraError, ServiceError


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def local(waits: list[float]) -> Fetcher:
    """A fetcher that may reach the loopback server and never really sleeps."""
    return Fetcher(allow_private_hosts=True, sleep=waits.append, num_attempts=3)


def test_encryption_is_not_given_up(internet: Any) -> None:
    internet.hosts = {"a.example": ["1.1.1.1"]}
    internet.answer = b"HTTP/1.1 301 Moved\r\nLocation: http://a.example/y\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(DataError, match=r"https://a\.example/ redirects to the unencrypted http://a\.example/y"):
        Fetcher(resolve=internet.resolve).get("https://a.example/")
    assert internet.connected == [("1.1.1.1", 443)]


@pytest.mark.parametrize("target", ["ftp://a.example/y", "http://user:secret@a.example/", "http://a.example:0/"])
def test_a_redirect_is_checked_like_the_first_url(site: Any, local: Fetcher, target: str) -> None:
    site.pages["/x"] = site.page(b"", status=302, headers={"Location": target})
    with pytest.raises(DataError) as caught:
        local.get(f"{site.url}/x")
    assert "secret" not in str(caught.value)
    assert len(site.requests) == 1


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
    """The waits fill the whole of [0, base · 2^k], and leave the global random numbers alone."""

    def busy(deadline: float) -> None:
        raise TransientError("busy")

    waits: list[list[float]] = []
    state = random.getstate()
    for _ in range(200):
        waits.append([])
        fetcher = Fetcher(num_attempts=5, backoff_seconds=1.0, sleep=waits[-1].append)
        with pytest.raises(ServiceError, match=r"busy \(tried 5 times\)"):
            fetcher.retry("http://a.example/", busy)
    for wait_index, ceiling in enumerate([1.0, 2.0, 4.0, 8.0]):
        column = [row[wait_index] for row in waits]
        assert len(column) == 200
        # the chance that 200 uniform draws miss the lowest or the highest fifth is 2 · 0.8^200 < 1e-19
        assert min(column) < 0.2 * ceiling < 0.8 * ceiling < max(column) <= ceiling
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


@pytest.mark.parametrize("fault", ["hang", "drip", "drip_head"])
def test_slow_servers_are_left_by_the_deadline(site: Any, fault: str) -> None:
    site.pages["/x"] = site.page(b"x" * 1_000)  # dripping, it would take 50 s
    site.script.extend([fault] * 5)
    fetcher = Fetcher(allow_private_hosts=True, timeout_seconds=0.3)
    start = time.monotonic()
    with pytest.raises(ServiceError, match=r"within 0\.3 s"):
        fetcher.get(f"{site.url}/x")
    assert time.monotonic() - start < 1.5


def test_one_deadline_holds_for_all_tries_and_redirects(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LONGEST_SILENCE_SECONDS", 0.2)
    site.pages["/x"] = site.page(b"", status=302, headers={"Location": "/y"})
    site.pages["/y"] = site.page(b"text")
    site.script.extend([None, "hang"] * 3)  # the redirect is answered, its target is not
    start = time.monotonic()
    with pytest.raises(ServiceError, match="no answer"):
        Fetcher(allow_private_hosts=True, timeout_seconds=0.5, backoff_seconds=0.0).get(f"{site.url}/x")
    assert time.monotonic() - start < 1.0
    assert 2 <= len(site.requests) <= 6  # a silent server is asked again while there is time


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
