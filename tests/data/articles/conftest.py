"""A loopback web server that answers as the MediaWiki API does, or misbehaves, and an internet without wires."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpcore
import pytest


@dataclass(frozen=True)
class Page:
    """What the server answers at one path."""

    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class FakeSite:
    """``script`` holds misbehaviour for the next requests, one entry each; without one the answer is right.

    Entries: ``None`` (a right answer), an HTTP status, ``(status, headers)``, "hang", "drip" and "drip_head" (byte by
    byte), "disconnect", "cut" (half of the JSON), "maxlag".
    """

    def __init__(self) -> None:
        self.extracts: dict[str, str] = {}
        self.redirects: dict[str, str] = {}
        self.ambiguous: dict[str, list[str]] = {}
        self.search_results: list[str] = []
        self.pages: dict[str, Page] = {}
        self.script: deque[Any] = deque()
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self._released = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    page = staticmethod(Page)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def endpoint(self) -> str:
        return f"{self.url}/w/api.php"

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        params = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.requests.append((parts.path, params, dict(handler.headers)))
        fault = self.script.popleft() if self.script else None
        page = self.pages.get(parts.path, Page(b"not here", status=404))
        if parts.path == "/w/api.php":
            page = Page(json.dumps(self._api(params)).encode(), "application/json; charset=utf-8")
        if isinstance(fault, int):
            page = Page(b"fault", status=fault)
        elif isinstance(fault, tuple):
            page = Page(b"fault", status=fault[0], headers=fault[1])
        elif fault == "maxlag":
            body = {"error": {"code": "maxlag", "info": "Waiting for db1: 7 seconds lagged", "lag": 7}}
            page = Page(json.dumps(body).encode(), "application/json", headers={"Retry-After": "5"})
        elif fault == "cut":
            page = Page(page.body[: len(page.body) // 2], page.content_type)
        elif fault == "hang":
            self._released.wait(20)
            return
        elif fault == "drip_head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self._released.wait(0.05):
                try:
                    handler.wfile.write(b"x")
                except OSError:  # the client gave up, as it should
                    break
            handler.close_connection = True
            return
        elif fault == "disconnect":
            handler.close_connection = True
            return
        handler.send_response(page.status)
        handler.send_header("Content-Type", page.content_type)
        handler.send_header("Content-Length", str(len(page.body)))
        for name, value in page.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            if fault == "drip":
                for byte in page.body:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    if self._released.wait(0.05):
                        return
            else:
                handler.wfile.write(page.body)
        except OSError:  # the client gave up, as it should
            handler.close_connection = True

    def _api(self, params: dict[str, str]) -> dict[str, Any]:
        assert params["format"] == "json"
        assert params["formatversion"] == "2"
        if params.get("list") == "search":
            return {"query": {"search": [{"ns": 0, "title": title} for title in self.search_results]}}
        asked = params["titles"]
        title = self.redirects.get(asked, asked)
        page: dict[str, Any] = {"ns": 0, "title": title}
        if params["prop"] == "links":
            page["links"] = [{"ns": 0, "title": name} for name in self.ambiguous[title]]
        elif title in self.ambiguous:
            page |= {"extract": f"{title} may refer to:", "pageprops": {"disambiguation": ""}}
        elif title in self.extracts:
            assert params["explaintext"] == "1"
            address = f"{self.url}/wiki/{title.replace(' ', '_')}"
            page |= {"pageid": 7, "extract": self.extracts[title], "fullurl": address}
        else:
            page["missing"] = True
        return {"batchcomplete": True, "query": {"pages": [page]}}


class FakeInternet:
    """Hosts by name with their addresses, each of which answers any request with ``answer``.

    ``connected`` lists the addresses and ports that were connected to, ``certified`` the names that TLS asked for,
    ``sent`` what was written.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, list[str]] = {}
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\ntext"
        self.connected: list[tuple[str, int]] = []
        self.certified: list[str] = []
        self.sent = b""
        self.lookups: list[str] = []

    def resolve(self, host: str, port: int, **_: Any) -> list[Any]:
        """A stand-in for ``socket.getaddrinfo``."""
        self.lookups.append(host)
        return [(2, 1, 6, "", (address, port)) for address in self.hosts[host]]

    def connect_tcp(self, backend: Any, host: str, port: int, **_: Any) -> Any:
        internet = self
        internet.connected.append((host, port))
        body = io.BytesIO(internet.answer)

        class Stream(httpcore.NetworkStream):
            def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
                return body.read(max_bytes)

            def write(self, buffer: bytes, timeout: float | None = None) -> None:
                internet.sent += buffer

            def start_tls(self, context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
                internet.certified.append(str(server_hostname))
                return self

            def close(self) -> None:
                pass

        return Stream()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> FakeInternet:
    internet = FakeInternet()
    monkeypatch.setattr(
        httpcore.SyncBackend,
        "connect_tcp",
        lambda backend, *args, **options: internet.connect_tcp(backend, *args, **options),
    )
    return internet


@pytest.fixture
def site() -> Iterator[FakeSite]:
    site = FakeSite()
    yield site
    site.close()
    # Let the handler threads of a hang see the release before the test's warnings are judged.
    time.sleep(0.01)
