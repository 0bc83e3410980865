"""Connections that reach public hosts only and end by a deadline, for httpx.

A URL comes from a user or from a redirect of a stranger's server, so it must not become a way to read what only this
machine can reach (server-side request forgery). Each host is resolved once, where the connection is made, and refused
if any of its addresses is not public; the connection goes to the very address that was checked, so that DNS rebinding
changes nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

from preceptor.errors import DataError

LONGEST_SILENCE_SECONDS = 15.0  # of one connection or read, so that a lost answer leaves time for another try
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Network:
    """httpcore's network backend over an ordinary one.

    Args:
        deadline: by `time.monotonic`; every connection, read and write ends by then.
        allow_private_hosts: also connect to addresses that are not public.
        resolve: `socket.getaddrinfo`, or a test's.
    """

    deadline: float
    allow_private_hosts: bool
    resolve: Callable[..., list[Any]]

    def connect_tcp(self, host: str, port: int, **options: Any) -> Any:
        """A stream to the first address of ``host`` that answers. `DataError` if one of them is not public."""
        import httpcore

        try:
            answers = self.resolve(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # no network looks the same as no such host
            raise httpcore.ConnectError(f"the host '{host}' cannot be resolved ({error})") from error
        # Each address once, in the resolver's order of preference.
        addresses = list(dict.fromkeys(str(answer[4][0]) for answer in answers))
        # All of them are checked, since the connection may end up at any.
        for address in addresses:
            if not self.allow_private_hosts and not is_public(address):
                raise DataError(
                    f"'{host}' is at {address}, which is not a public address; save the page and pass it as a file"
                )
        failure: Exception = httpcore.ConnectError(f"the host '{host}' has no address")
        for address in addresses:
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, port, **options | {"timeout": self.seconds()})
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error  # the next address may work
            else:
                return Stream(stream, self.seconds)
        raise failure

    def seconds(self) -> float:
        """How long the next operation may take; a time-out of httpcore's if no time is left."""
        import httpcore

        left = self.deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return min(LONGEST_SILENCE_SECONDS, left)


@dataclass(frozen=True)
class Stream:
    """httpcore's stream, but each operation may take only what is left of the time: drip by drip does not add up."""

    inner: Any
    seconds: Callable[[], float]

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return bytes(self.inner.read(max_bytes, timeout=self.seconds()))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, timeout=self.seconds())

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Stream:
        # The name and not the address is what the certificate is checked for.
        return Stream(self.inner.start_tls(ssl_context, server_hostname, timeout=self.seconds()), self.seconds)

    def close(self) -> None:
        self.inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)


def is_public(address: str) -> bool:
    """Whether the IP ``address`` is one that anybody on the internet can reach.

    An IPv6 address that only wraps an IPv4 one (mapped, 6to4, Teredo, NAT64) counts as the address that it wraps.

    >>> is_public("192.168.0.1"), is_public("::ffff:127.0.0.1"), is_public("1.1.1.1")
    (False, False, True)
    """
    ip: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    # An IPv6 form of a private IPv4 address would otherwise pass as global.
    if isinstance(ip, IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            wrapped = IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            ip = wrapped
    # 169.254.0.0/16 (cloud metadata), 10/8, loopback and the like are not global.
    return ip.is_global and not ip.is_multicast
