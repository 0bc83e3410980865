"""One bounded HTTP GET: public hosts only, one deadline for everything, bounded in bytes, retried with jitter."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from preceptor.data.articles.network import LONGEST_SILENCE_SECONDS, Network
from preceptor.errors import ConfigError, DataError, MissingExtraError, ServiceError
from preceptor.version import __version__

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONTACT_URL = "https://github.com/preceptor-rl/preceptor"
USER_AGENT = f"Preceptor/{__version__} ({CONTACT_URL}) python-httpx"

_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
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
        timeout_seconds: limit of everything together: all tries, their redirects and the waits between them.
        num_attempts: tries in all, at least 1; only what may pass (429, 5xx, timeouts, lost connections) is retried.
        backoff_seconds: after try ``k`` (from 0) comes a wait drawn from U(0, 2^k · this). A wait that the time left
            does not allow, or a longer one that the server asks for, ends the fetch at once.
        max_bytes: limit of the decompressed body.
        allow_private_hosts: also reach loopback, private and link-local addresses (for a wiki of one's own).
        sleep, resolve: the clock and the resolver, parameters so that tests need neither time nor DNS.
    """

    user_agent: str = USER_AGENT
    timeout_seconds: float = 60.0
    num_attempts: int = 5
    backoff_seconds: float = 1.0
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
            ServiceError: no network, no such host, access refused, or no answer in ``num_attempts`` tries or
                ``timeout_seconds``.
        """
        return self.retry(url, lambda deadline: self.attempt(url, deadline=deadline, params=params))

    def retry(self, url: str, attempt: Callable[[float], T]) -> T:
        """The result of ``attempt(deadline)``, tried again after full-jitter exponential back-off on `TransientError`.

        Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
        """
        # Not the module's global generator: the wait must not shift the random numbers of a run.
        uniform = random.SystemRandom().uniform
        deadline = time.monotonic() + self.timeout_seconds
        for attempt_index in range(self.num_attempts):
            try:
                return attempt(deadline)
            except TransientError as error:
                failure = error
            # The longer of our own wait and the server's: Retry-After is an order, not a hint.
            wait = max(uniform(0.0, self.backoff_seconds * 2.0**attempt_index), failure.retry_after)
            # A wait that ends past the deadline would end in a failure anyway, so fail now.
            is_last = attempt_index + 1 == self.num_attempts or time.monotonic() + wait >= deadline
            if is_last:
                break
            self.sleep(wait)
        asks = f", and asks to wait {failure.retry_after:.0f} s" if failure.retry_after else ""
        raise ServiceError(
            f"{url}: {failure}{asks} (tried {attempt_index + 1} times); check the network, try again later or pass a "
            "file"
        ) from failure

    def attempt(self, url: str, *, deadline: float, params: dict[str, str] | None = None) -> Fetched:
        """One try of `get`, over by ``deadline`` (`time.monotonic`); `TransientError` for what is worth another."""
        try:
            import httpcore
            import httpx
        except ImportError as error:
            raise MissingExtraError("fetching over the network", package="httpx", extra="web") from error

        # Parsed and checked before a socket is opened.
        address = _checked_url(url)
        # trust_env off: proxies and certificates from the environment would undo the check of addresses, and only the
        # command line reads the environment.
        transport = httpx.HTTPTransport(trust_env=False)
        # httpx has no public way to hand its transport a network backend; httpcore's pool has.
        transport._pool = httpcore.ConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            network_backend=Network(deadline, self.allow_private_hosts, self.resolve),  # type: ignore[arg-type]
        )
        with httpx.Client(
            transport=transport,
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            event_hooks={"response": [_check_redirect]},
            # gzip only: httpx counts decompressed bytes, so `max_bytes` bounds what an archive bomb unpacks to.
            headers={"User-Agent": self.user_agent, "Accept-Encoding": "gzip"},
        ) as client:
            try:
                with client.stream("GET", address, params=params) as response:
                    return self._read(response)
            except httpx.TooManyRedirects:
                raise DataError(f"{url} redirects more than {_MAX_REDIRECTS} times; pass the final URL") from None
            except httpx.TimeoutException as error:
                seconds = min(self.timeout_seconds, LONGEST_SILENCE_SECONDS)
                raise TransientError(f"no answer within {seconds:g} s") from error
            except httpx.ConnectError as error:
                raise TransientError(f"cannot connect ({error})") from error
            except httpx.HTTPError as error:
                raise TransientError(f"connection lost ({str(error) or type(error).__name__})") from error

    def _read(self, response: httpx.Response) -> Fetched:
        status, url = response.status_code, response.url
        phrase = f"{status} {response.reason_phrase}".strip()
        # Transient first, then what will not change by itself.
        if status in _TRANSIENT_STATUSES:
            raise TransientError(f"the server answered {phrase}", retry_after=_retry_after(response))
        if status in {404, 410}:
            raise DataError(f"there is no page at {url} ({phrase}); check the address")
        if status != 200:
            raise ServiceError(f"{url}: the server answered {phrase}; open the page in a browser and pass it as a file")
        body = bytearray()
        for part in response.iter_bytes():
            body += part
            # Checked while reading, since a Content-Length may be absent or wrong.
            if len(body) > self.max_bytes:
                raise DataError(f"{url} is over {self.max_bytes:,} bytes; save the part you want and pass it as a file")
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return Fetched(str(url), media_type, response.charset_encoding, bytes(body))


def _checked_url(url: str) -> httpx.URL:
    """``url`` parsed; `DataError` unless it is http(s) with a host, without a user name."""
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


def _check_redirect(response: httpx.Response) -> None:
    if response.has_redirect_location:
        target = _checked_url(str(response.url.join(response.headers["Location"])))
        # From https to http an attacker on the line could rewrite the article.
        if response.url.scheme == "https" and target.scheme != "https":
            raise DataError(f"{response.url} redirects to the unencrypted {target}; pass that URL if you trust it")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the answer's ``Retry-After`` (seconds or an HTTP date) asks to wait; 0 if absent or unreadable."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
