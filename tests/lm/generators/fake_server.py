"""A server on loopback that speaks the part of vLLM's API that rollouts need."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from preceptor.lm.generators.base import OwnGenerator
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling


class FakeServer(ThreadingHTTPServer):
    """vLLM's endpoints over a model of ours, read from the weights that it is told of."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.lm = lm
        self.shift = 0.0
        self.status = 200
        self.drop: str = ""
        self.requests: list[tuple[str, dict[str, Any], str]] = []
        self.reloaded: list[Path] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(
            temperature=body["temperature"],
            top_k=max(body["top_k"], 0),
            top_p=body["top_p"],
            suppressed=[int(token) for token, bias in body["logit_bias"].items() if bias == -100],
        )
        found = OwnGenerator(self.lm).generate(
            body["prompt"],
            number=body["n"],
            num_tokens=body["max_tokens"],
            sampling=sampling,
            generator=torch.Generator().manual_seed(body["seed"]),
        )
        choices = []
        for index, (tokens, log_probs, mask) in enumerate(zip(found.tokens, found.log_probs, found.mask, strict=True)):
            said = (log_probs[mask] - self.shift).tolist()
            choices.append({"index": index, "token_ids": tokens[mask].tolist(), "logprobs": {"token_logprobs": said}})
        if self.drop:
            choices[0].pop(self.drop)
        return {"choices": choices[::-1]}  # a server may answer in any order


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *unused: Any) -> None:
        pass

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "starter"}]})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        self.server.requests.append((self.path, body, self.headers.get("Authorization", "")))
        if self.server.status != 200:
            self.answer({"error": f"no: {self.headers.get('Authorization')}"})
        elif self.path == "/v1/completions":
            self.answer(self.server.completions(body))
        elif self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            folder = body["kwargs"]["weights_path"]
            self.server.lm = load_language_model(folder, device=torch.device("cpu"))
            self.server.reloaded.append(Path(folder))
            self.answer({"results": [None]})
        else:
            self.answer({})


@contextlib.contextmanager
def serving(lm: LanguageModel) -> Iterator[FakeServer]:
    """A running server, until the block ends."""
    server = FakeServer(lm)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
