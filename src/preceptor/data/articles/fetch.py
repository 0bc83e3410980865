"""One polite HTTP GET: public hosts only, every hop checked and pinned, bounded in bytes and time, retried with jitter.

A URL comes from a user or from a redirect of a stranger's server, so it must not become a way to read what only this
machine can reach (server-side request forgery). Each hop's host is resolved once, refused if any of its addresses is
not public, and the connection goes to the very address that was checked: DNS rebinding changes nothing.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any, TypeVar

from preceptor.errors import ConfigError, DataError, MissingExtraError, ServiceError
from preceptor.version import __version__

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONTACT_URL = "https://github.com/preceptor-rl/preceptor"
USER_AGENT = f"Preceptor/{__version__} ({CONTACT_URL}) python-httpx"

_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_NAT64 = IPv6Network("64:ff9b::/96")
_MAX_REDIRECTS = 5


class TransientError(Exception):
    """Worth another try: ``retry_after`` is how many seconds the server asked to wait (0 if it did not say).

    Never leaves this package: `Fetcher.retry` turns the last one into a `ServiceError`.
    """

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Fetched:
    """A complete answer: ``url`` after all redirects, ``media_type`` without parameters, ``charset`` as declared."""

    url: str
    media_type: str
    charset: str | None
    body: bytes


@dataclass(frozen=True)
class Fetcher:
    """How to fetch; the defaults suit Wikimedia's rules for clients (contact address, back-off, Retry-After honoured).

    Args:
        user_agent: names the client and a way to reach its makers.
        timeout_seconds: limit of one attempt as a whole, redirects included, and of each wait within it.
        num_attempts: tries in all, at least 1; only what may pass (429, 5xx, timeouts, lost connections) is retried.
        backoff_seconds: after try ``k`` (from 0) comes a wait drawn from U(0, min(2^k · this, ``max_wait_seconds``)).
        max_wait_seconds: longest wait; a server that asks for more ends the fetch at once.
        max_bytes: limit of the decompressed body.
        allow_private_hosts: also reach loopback, private and link-local addresses (for a wiki of one's own).
        sleep, resolve: the clock and the resolver, parameters so that tests need neither time nor DNS.
    """

    user_agent: str = USER_AGENT
    timeout_seconds: float = 20.0
    num_attempts: int = 5
    backoff_seconds: float = 1.0
    max_wait_seconds: float = 60.0
    max_bytes: int = 10_000_000
    allow_private_hosts: bool = False
    sleep: Callable[[float], None] = time.sleep
    resolve: Callable[..., list[Any]] = field(default_factory=lambda: socket.getaddrinfo)

    def __post_init__(self) -> None:
        if self.num_attempts < 1:
            raise ConfigError(f"num_attempts must be at least 1, got {self.num_attempts}")

    def get(self, url: str, *, params: dict[str, str] | None = None) -> Fetched:
        """The answer to ``GET url``.

        Raises:
            DataError: a host that is not public, no such page, too many redirects, a body over ``max_bytes``.
            ServiceError: no network, no such host, access refused, or still failing after ``num_attempts`` tries.
        """
        return self.retry(url, lambda: self.attempt(url, params=params))

    def retry(self, url: str, attempt: Callable[[], T]) -> T:
        """The result of ``attempt``, tried again with full-jitter exponential back-off on `TransientError`."""
        # Not the module's global generator: the wait must not shift the random numbers of a run.
        uniform = random.SystemRandom().uniform
        for attempt_index in range(self.num_attempts):
            try:
                return attempt()
            except TransientError as error:
                failure = error
            if failure.retry_after > self.max_wait_seconds:
                raise ServiceError(
                    f"{url}: {failure}, and asks to wait {failure.retry_after:.0f} s; try again later or pass a file"
                ) from failure
            if attempt_index + 1 < self.num_attempts:
                wait = uniform(0.0, min(self.max_wait_seconds, self.backoff_seconds * 2.0**attempt_index))
                self.sleep(max(wait, failure.retry_after))
        raise ServiceError(
            f"{url}: {failure} (tried {self.num_attempts} times); check the network, try again later or pass a file"
        ) from failure

    def attempt(self, url: str, *, params: dict[str, str] | None = None) -> Fetched:
        """One try of `get`; raises `TransientError` for what is worth another."""
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("fetching over the network", package="httpx", extra="web") from error

        deadline = time.monotonic() + self.timeout_seconds
        # trust_env off: proxies and certificates from the environment would undo the pinning, and only the command line
        # reads the environment.
        with httpx.Client(trust_env=False, follow_redirects=False) as client:
            hop = _parse_url(url)
            if params:
                hop = hop.copy_merge_params(params)
            for _ in range(_MAX_REDIRECTS + 1):
                answer = self._one_hop(client, hop, deadline)
                if isinstance(answer, Fetched):
                    return answer
                if hop.scheme == "https" and answer.scheme != "https":
                    raise DataError(f"{hop} redirects to the unencrypted {answer}; pass that URL if you trust it")
                hop = answer
        raise DataError(f"{url} redirects more than {_MAX_REDIRECTS} times; pass the final URL")

    def _one_hop(self, client: httpx.Client, url: httpx.URL, deadline: float) -> Fetched | httpx.URL:
        """The answer of one server, or the URL that it redirects to."""
        import httpx

        failure: Exception | None = None
        for address in self._addresses(url):
            request = client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={"Host": url.netloc.decode("ascii"), "User-Agent": self.user_agent, "Accept-Encoding": "gzip"},
                # TLS still asks for, and verifies, the name and not the address.
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
                timeout=max(0.001, deadline - time.monotonic()),
            )
            try:
                response = client.send(request, stream=True)
                try:
                    return self._read(response, url, deadline)
                finally:
                    response.close()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error  # the host's next address may work
            except httpx.TimeoutException as error:
                raise TransientError(f"no answer within {self.timeout_seconds:g} s") from error
            except httpx.HTTPError as error:
                raise TransientError(f"connection lost ({str(error) or type(error).__name__})") from error
        raise TransientError(f"cannot connect ({failure})") from failure

    def _read(self, response: httpx.Response, url: httpx.URL, deadline: float) -> Fetched | httpx.URL:
        status = response.status_code
        if response.has_redirect_location:
            return _parse_url(str(url.join(response.headers["Location"])))
        phrase = f"{status} {response.reason_phrase}".strip()
        if status in _TRANSIENT_STATUSES:
            raise TransientError(f"the server answered {phrase}", retry_after=_retry_after(response))
        if status in {404, 410}:
            raise DataError(f"there is no page at {url} ({phrase}); check the address")
        if status != 200:
            raise ServiceError(f"{url}: the server answered {phrase}; open the page in a browser and pass it as a file")
        body = bytearray()
        for part in response.iter_bytes():
            body += part
            if len(body) > self.max_bytes:
                raise DataError(f"{url} is over {self.max_bytes:,} bytes; save the part you want and pass it as a file")
            if time.monotonic() > deadline:  # each wait has its limit, but drip by drip they would add up
                raise TransientError(f"no complete answer within {self.timeout_seconds:g} s")
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return Fetched(str(url), media_type, response.charset_encoding, bytes(body))

    def _addresses(self, url: httpx.URL) -> list[str]:
        """The addresses of the URL's host, all of them checked to be public.

        Raises:
            DataError: one of them is not, and ``allow_private_hosts`` is off.
            TransientError: the name does not resolve (no network looks the same).
        """
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            answers = self.resolve(url.raw_host.decode("ascii"), port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise TransientError(f"the host '{url.host}' cannot be resolved ({error})") from error
        addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
        if not addresses:
            raise TransientError(f"the host '{url.host}' has no address")
        for address in addresses:
            if not self.allow_private_hosts and not is_public(address):
                raise DataError(
                    f"{url} is at {address}, which is not a public address; save the page and pass it as a file"
                )
        return addresses


def is_public(address: str) -> bool:
    """Whether the IP ``address`` is one that anybody on the internet can reach.

    An IPv6 address that only wraps an IPv4 one (mapped, 6to4, Teredo, NAT64) counts as the address that it wraps.

    >>> is_public("192.168.0.1"), is_public("::ffff:127.0.0.1"), is_public("1.1.1.1")
    (False, False, True)
    """
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            wrapped = IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            ip = wrapped
    return ip.is_global and not ip.is_multicast


def _parse_url(url: str) -> httpx.URL:
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise DataError(f"'{url}' is not a valid URL ({error}); check it") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise DataError(f"'{url}' cannot be fetched; only http:// and https:// URLs with a host can")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise DataError(f"'{url}' has the port {parsed.port}; a port is a number from 1 to 65535")
    if parsed.userinfo:
        raise DataError(f"the URL of {parsed.host} carries a user name or password; remove it")
    return parsed


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the answer's ``Retry-After`` (seconds or an HTTP date) asks to wait; 0 if absent or unreadable."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
