"""A loopback server that answers as OpenAI's embeddings endpoint does, and misbehaves by script.

It is the tests' independent book-keeper: ``delivered`` counts how often a valid vector of a text left in an answer that
a client could use, ``resent`` how often such a text was asked for again, ``billed_tokens`` what the service charges.
Vectors are those of no real model: unit norm, seeded by the text, and, as text-embedding-ada-002's are, slightly
different each time they are bought.
"""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import socket
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import numpy as np

DIMENSIONS = {"text-embedding-ada-002": 1536, "text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
OTHER_DIMENSION = 16

# Refusals: nothing is billed.
REFUSALS = (
    "429", "429_retry_after", "429_date", "insufficient_quota", "500", "503_html", "400", "401_echoes_key", "403",
    "500_echoes_key", "redirect",
)  # fmt: skip
# Nothing whole comes back, but the service may have worked: billed.
SILENCES = ("hang", "disconnect", "cut_body")
# Paid answers that are wrong in whole or in part.
WRONG = (
    "cut_json", "not_json", "wrong_dimension", "nan_item", "zero_item", "bad_base64",
    "missing_item", "duplicate_index", "foreign_index",
)  # fmt: skip
# Unusual but right.
ODD = ("shuffled", "floats", "no_usage")
# What another model's vectors may be: not of unit norm.
LONG = "long_vectors"
FAULTS = REFUSALS + SILENCES + WRONG + ODD


def count_tokens(text: str) -> int:
    """About four bytes a token as English has, but one a token for non-ASCII text: the worst case of the real ones."""
    return math.ceil(len(text) / 4) if text.isascii() else len(text.encode())


class FakeOpenAI:
    """``with FakeOpenAI(script) as server``: one scripted fault per request, then right answers; see ``FAULTS``."""

    def __init__(self, script: Iterable[str] = ()) -> None:
        self.script = deque(script)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.faults_played: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.resent: Counter[str] = Counter()
        self.sold: Counter[str] = Counter()
        self.billed_tokens = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                fake._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that hangs up is part of the play."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def vector(self, text: str, dimension: int, *, sale: int) -> np.ndarray:
        """Unit norm; the same text sold again differs by about 1e-5."""
        exact = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(dimension)
        noise = np.random.default_rng(sale).standard_normal(dimension)
        vector = exact + 1e-5 * noise
        return (vector / np.linalg.norm(vector)).astype("<f4")

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        key = (handler.headers["Authorization"] or handler.headers["api-key"]).removeprefix("Bearer ")
        with self._lock:
            self.requests.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.paths.append(handler.path)
            self.resent.update(text for text in body["input"] if text in self.delivered)
            fault = self.script.popleft() if self.script else "ok"
            self.faults_played[fault] += 1
        if fault in REFUSALS:
            self._refuse(handler, fault, key)
            return
        texts: list[str] = body["input"]
        tokens = sum(map(count_tokens, texts))
        with self._lock:
            self.billed_tokens += tokens
        if fault == "hang":
            self._stopping.wait(timeout=5)
            handler.close_connection = True
        elif fault == "disconnect":
            handler.close_connection = True
        elif fault.startswith("kill:"):
            os.kill(int(fault.removeprefix("kill:")), signal.SIGKILL)
            handler.close_connection = True
        else:
            self._deliver(handler, fault, body, texts, tokens)

    def _refuse(self, handler: BaseHTTPRequestHandler, fault: str, key: str) -> None:
        status = {"insufficient": 429, "redirect": 302}.get(fault.split("_")[0]) or int(fault.split("_")[0])
        code = {"insufficient_quota": "insufficient_quota", "401_echoes_key": "invalid_api_key"}.get(fault)
        message = f"wrong key {key}, see\nhelp" if fault.endswith("echoes_key") else f"refused by script: {fault}"
        data = json.dumps(
            {"error": {"message": message, "type": code or "error", "param": None, "code": code}}
        ).encode()
        if fault == "503_html":
            data = b"<html><body>upstream down</body></html>"
        headers = {
            "429_retry_after": "Retry-After: 7\r\n",
            "429_date": f"Retry-After: {formatdate(time.time() + 30, usegmt=True)}\r\n",
            "redirect": "Location: http://127.0.0.1:9/steal\r\n",
        }
        _send(handler, status, data, extra=headers.get(fault, ""))

    def _deliver(
        self, handler: BaseHTTPRequestHandler, fault: str, body: dict[str, Any], texts: list[str], tokens: int
    ) -> None:
        dimension = body.get("dimensions") or DIMENSIONS.get(body["model"], OTHER_DIMENSION)
        items = []
        spoilt = len(texts) // 2  # the item that a one-item fault hits
        for index, text in enumerate(texts):
            with self._lock:
                self.sold[text] += 1
                vector = self.vector(text, dimension, sale=self.sold[text])
            if fault == LONG:
                vector = vector * np.float32(3)
            if fault == "wrong_dimension":
                vector = vector[:-1]
            if index == spoilt and fault == "nan_item":
                vector[3] = np.nan
            if index == spoilt and fault == "zero_item":
                vector[:] = 0
            encoded: object = base64.b64encode(vector.tobytes()).decode()
            if body.get("encoding_format") != "base64" or fault == "floats":
                encoded = vector.tolist()
            if index == spoilt and fault == "bad_base64":
                encoded = "!!!!"
            items.append({"object": "embedding", "index": index, "embedding": encoded})
        lost = {spoilt} if fault in ("nan_item", "zero_item", "bad_base64") else set()
        if fault == "missing_item":
            del items[spoilt]
            lost = {spoilt}
        if fault == "duplicate_index":
            items.append(dict(items[spoilt]))
            lost = {spoilt}
        if fault == "foreign_index":
            items[spoilt]["index"] = len(texts)
            lost = {spoilt}
        if fault == "shuffled":
            items = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
        answer: dict[str, Any] = {"object": "list", "data": items, "model": body["model"]}
        if fault != "no_usage":
            answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        data = json.dumps(answer).encode()
        if fault == "cut_json":
            data = data[: len(data) // 2]
        if fault == "not_json":
            data = b"<html>fine</html>"
        if fault not in ("wrong_dimension", "cut_json", "cut_body", "not_json"):
            with self._lock:
                self.delivered.update(text for index, text in enumerate(texts) if index not in lost)
        _send(handler, 200, data, promise=len(data) + 100 * (fault == "cut_body"))
        handler.close_connection = fault == "cut_body"


def _send(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, *, promise: int | None = None, extra: str = ""
) -> None:
    """One write for head and body, so that no delayed acknowledgement slows the tests."""
    length = promise or len(data)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{extra}\r\n"
    handler.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handler.wfile.write(head.encode() + data)
