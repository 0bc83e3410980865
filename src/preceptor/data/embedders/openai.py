"""Vectors of OpenAI's hosted embedding models, bought at most once and never beyond a spending cap.

The life of one purchase, under the cache's lock so that no other process buys the same texts: reserve the worst case in
the ledger, send, settle what it did cost, put every valid vector on disk, and only then hand it out.

Why httpx and not the ``openai`` package: its retries resend without a reservation, repeat ``insufficient_quota``, and
its client passes answers through unchecked (an answer cut short, an item missing, ``index`` out of order). With retries
and parsing taken back into our hands, what remains of it here is one POST.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from preceptor.data.embedders.base import require_texts
from preceptor.data.embedders.openai_answer import Answer, Reply, read_answer, retry_after, service_error
from preceptor.data.embedders.spend_ledger import SpendLedger, format_usd
from preceptor.data.embedders.vector_cache import VectorCache, vector_key
from preceptor.errors import ConfigError, DataError, MissingExtraError, ServiceError, did_you_mean

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
PRICES_AS_OF = "2026-05"
# The service's limits. A token is at least one byte of UTF-8, so bytes bound tokens from above: what is within the
# limit in bytes is within it in tokens, and is paid by a reservation made in bytes, without a tokenizer at hand.
MAX_TEXT_TOKENS = 8_191
MAX_REQUEST_TOKENS = 300_000
MAX_REQUEST_TEXTS = 2_048

MAX_ANSWER_BYTES = 256 << 20  # above 2,048 vectors of 3,072 numbers written out in decimal
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class _Model:
    dimension: int
    nano_usd_per_token: int  # 1 USD per million tokens is 1,000
    shortens: bool  # accepts `dimensions`


MODELS = {
    "text-embedding-ada-002": _Model(1_536, 100, shortens=False),
    "text-embedding-3-small": _Model(1_536, 20, shortens=True),
    "text-embedding-3-large": _Model(3_072, 130, shortens=True),
}


class OpenAIEmbedder:
    """Unit-norm vectors of an OpenAI embedding model (extra ``openai``); an inner product is a cosine in [-1, 1].

    Vectors are the service's own numbers, not renormalised. text-embedding-ada-002 is not deterministic: exact
    repetition of a run rests on ``cache_dir``. A failed call loses nothing and is safe to repeat: every vector that
    arrived is on disk, and no text that is on disk is sent again. Not thread-safe; processes may share the folder.

    A refusal (status 4xx, 5xx) is taken as free. A request that went out and got no answer may have been billed and
    stays charged at its worst case, one per byte instead of per token. A faulty answer was paid for: its valid vectors
    are kept, and :class:`ServiceError` names the fault instead of buying the rest a second time unasked.

    Args:
        model: ``text-embedding-ada-002``, ``text-embedding-3-small`` or ``text-embedding-3-large``.
        api_key: sent to ``base_url`` only; never stored in an attribute, shown, logged or written.
        cache_dir: holds vectors (``<model>-<dimension>.vectors``) and, unless ``ledger`` says otherwise, the spending.
        max_usd: cap on all spending ever entered in the ledger, in US dollars.
        dimensions: shorten the vectors; 3-series only.
        base_url: the service, up to and without ``/embeddings``.
        ledger: the file that counts the spending, to give each run its own budget in a shared cache.
        batch_size: texts per request, 1 to 2,048; what one lost answer can cost at most.
        timeout: seconds for one request, from sending it to the last byte of its answer.
        max_retries: further attempts after 408, 409, 429, 5xx and broken connections. 401, 403 and exhausted quota
            are never retried.
        sleep: waits the given seconds.
        jitter: source of the random waits; its own stream, so that waiting never shifts a run's randomness.
    """

    name = "openai"

    def __init__(
        self,
        model: str = "text-embedding-ada-002",
        *,
        api_key: str,
        cache_dir: Path,
        max_usd: float,
        dimensions: int | None = None,
        base_url: str = OPENAI_URL,
        ledger: Path | None = None,
        batch_size: int = 256,
        timeout: float = 30.0,
        max_retries: int = 6,
        sleep: Callable[[float], None] = time.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise MissingExtraError("the OpenAI embedder", package="httpx", extra="openai") from None

        faults = _faults(model, dimensions, base_url, batch_size, timeout, max_retries)
        if not api_key.strip():
            faults.append("the OpenAI API key is empty; set the environment variable OPENAI_API_KEY")
        elif not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            # The HTTP library would refuse such a key too, and quote it in full.
            faults.append("the OpenAI API key holds a space, line break or non-ASCII character; copy it again")
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL:
            faults.append("base_url cannot be read as a URL")
        if faults:
            raise ConfigError(*faults)

        self.dimension: int = dimensions or MODELS[model].dimension
        self.version = f"{model}/{self.dimension}"
        self._model = model
        self._dimensions = dimensions
        self._price = MODELS[model].nano_usd_per_token
        self._url = base_url.rstrip("/") + "/embeddings"
        self._batch_size = batch_size
        self._timeout = timeout
        self._max_retries = max_retries
        self._sleep = sleep
        self._jitter = jitter or random.Random()
        self._cache = VectorCache(cache_dir / f"{model}-{self.dimension}.vectors", dimension=self.dimension)
        self._ledger = SpendLedger(ledger or cache_dir / "spend.jsonl", max_usd=max_usd)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            follow_redirects=False,  # the key goes to base_url and nowhere else
        )
        # A closure and not an attribute: vars(), repr() and pickle cannot show the key.
        self._redact: Callable[[str], str] = lambda text: text.replace(api_key, "<api key>")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.version!r}, cache={str(self._cache.path)!r})"

    @property
    def spent_usd(self) -> float:
        """US dollars spent so far according to the ledger, with what may have been billed."""
        return self._ledger.spent / 1e9

    @property
    def num_cached(self) -> int:
        """Vectors of this model and dimension on disk."""
        self._cache.refresh()
        return len(self._cache)

    def close(self) -> None:
        """Close the connections; the vectors on disk need no closing."""
        self._client.close()

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """See :meth:`~preceptor.data.embedders.base.TextEmbedder.embed`. Unit norm, kept on disk before it is used.

        Raises :class:`DataError` for a text that is empty or over 8,191 bytes, :class:`ServiceError` if the service
        fails, refuses or answers wrongly or the budget is reached, :class:`StorageError` if the disk does.
        """
        require_texts(texts)
        for position, text in enumerate(texts):
            size = _num_bytes(text)
            if size > MAX_TEXT_TOKENS:
                raise DataError(
                    f"text {position + 1} of {len(texts)} has {size:,} bytes, at most {MAX_TEXT_TOKENS:,} are sure to "
                    f"fit the model ({text[:40]!r}...); split it"
                )
        keys = [vector_key(self.version, text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        while self._missing(wanted):
            with self._cache.exclusive():  # another process may be buying the same texts right now
                if missing := self._missing(wanted):
                    self._buy(self._next_batch(missing))
        return self._cache.get(keys)

    def _missing(self, wanted: Mapping[bytes, str]) -> dict[bytes, str]:
        self._cache.refresh()
        return {key: text for key, text in wanted.items() if key not in self._cache}

    def _next_batch(self, missing: Mapping[bytes, str]) -> dict[bytes, str]:
        """The first of ``missing`` that fit one request and what is left of the budget; at least one."""
        limit = min(MAX_REQUEST_TOKENS, self._ledger.remaining // self._price)
        batch: dict[bytes, str] = {}
        total = 0
        for key, text in missing.items():
            total += _num_bytes(text)
            if batch and (len(batch) == self._batch_size or total > limit):
                break
            batch[key] = text
        return batch

    def _buy(self, batch: Mapping[bytes, str]) -> None:
        """Put the vectors of ``batch`` on disk, at one paid answer at most."""
        self._cache.require_space(len(batch))
        worst = self._price * sum(map(_num_bytes, batch.values()))
        for attempt in range(self._max_retries + 1):
            if not self._ledger.reserve(worst, note=f"{self._model}, {len(batch)} texts"):
                raise ServiceError(
                    f"budget reached: {self._ledger.state()}, {len(self._cache):,} texts cached; nothing is lost; "
                    f"the next call may cost {format_usd(worst)}, raise max_usd to go on"
                )
            reply = self._post(list(batch.values()))
            if reply.paid:
                self._keep(reply, batch, reserved=worst)
                return
            if reply.status is not None or not reply.sent:
                self._ledger.settle(reserved=worst, actual=0, note="refused" if reply.sent else "not sent")
            problem, retryable = self._describe(reply)
            wait = self._wait_seconds(reply, attempt)
            if not retryable or attempt == self._max_retries or wait > LONGEST_WAIT_SECONDS:
                asked = f", which asks to wait {wait:,.0f} s" if retryable and wait > LONGEST_WAIT_SECONDS else ""
                tries = f" after {attempt + 1} attempts" if attempt else ""
                raise ServiceError(f"{problem}{asked}{tries}; {self._kept()}")
            logger.info("%s; attempt %d of %d in %.1f s", problem, attempt + 2, self._max_retries + 1, wait)
            self._sleep(wait)

    def _keep(self, reply: Reply, batch: Mapping[bytes, str], *, reserved: int) -> None:
        """Settle a paid answer and put its valid vectors on disk; :class:`ServiceError` if it was not whole."""
        if reply.fault:
            answer = Answer({}, None, [reply.fault])
        else:
            answer = read_answer(reply.body, list(batch), dimension=self.dimension)
        if answer.num_tokens is not None:
            self._ledger.settle(reserved=reserved, actual=self._price * answer.num_tokens, note="billed")
        self._cache.append(answer.vectors)
        if answer.faults:
            more = f" (and {len(answer.faults) - 1} more)" if len(answer.faults) > 1 else ""
            raise ServiceError(
                f"the answer of {self._url} is faulty: {answer.faults[0]}{more}; {len(answer.vectors)} of {len(batch)} "
                f"vectors were usable, {self._kept()}, run again to buy the rest"
            )

    def _post(self, texts: Sequence[str]) -> Reply:
        """Send one request; what service and network do wrong is returned, so no error of httpx escapes."""
        import httpx

        body: dict[str, object] = {"model": self._model, "input": texts, "encoding_format": "base64"}
        if self._dimensions is not None:
            body["dimensions"] = self._dimensions
        status: int | None = None
        answer = bytearray()
        deadline = time.monotonic() + self._timeout  # httpx limits each read, which a dripping server never exceeds
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                status = response.status_code
                for chunk in response.iter_bytes():
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        return Reply(status, fault=f"it is longer than {MAX_ANSWER_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        return Reply(status, fault=f"it took longer than {self._timeout:g} s")
                return Reply(status, bytes(answer), response.headers)
        except httpx.HTTPError as error:
            sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            kind = (
                f"no answer within {self._timeout:g} s"
                if isinstance(error, httpx.TimeoutException)
                else str(error) or type(error).__name__
            )
            return Reply(status, fault=f"cut after {len(answer):,} bytes, {kind}" if status else kind, sent=sent)

    def _describe(self, reply: Reply) -> tuple[str, bool]:
        """What went wrong, in words that cannot hold the key, and whether to try again."""
        if reply.status is None:
            return self._redact(f"cannot get an answer from {self._url}: {_one_line(reply.fault)}"), True
        code, message = service_error(reply.body)
        said = f": {_one_line(self._redact(message))}" if message else ""
        if reply.status == 401:  # the service quotes part of the key; its words are not repeated
            return "the service refused the API key (HTTP 401); set OPENAI_API_KEY to a valid key", False
        if "insufficient_quota" in code:
            return f"the account's quota is used up (HTTP {reply.status}){said}; check plan and billing", False
        retryable = reply.status in (408, 409, 429) or reply.status >= 500
        return f"{self._url} answered HTTP {reply.status}{said}", retryable

    def _wait_seconds(self, reply: Reply, attempt: int) -> float:
        """Full jitter, uniform in [0, 0.5 * 2**attempt] s, but no less than the service asks for.

        Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
        """
        ceiling = min(LONGEST_WAIT_SECONDS, FIRST_BACKOFF_SECONDS * 2**attempt)
        return max(self._jitter.uniform(0, ceiling), retry_after(reply.headers))

    def _kept(self) -> str:
        return f"{self._ledger.state()}, {len(self._cache):,} texts cached"


def _faults(
    model: str, dimensions: int | None, base_url: str, batch_size: int, timeout: float, max_retries: int
) -> list[str]:
    faults = []
    if model not in MODELS:
        faults.append(
            f"embedding model {model!r} is unknown{did_you_mean(model, MODELS)}; allowed: {', '.join(MODELS)}"
        )
    elif dimensions is not None and not MODELS[model].shortens:
        faults.append(f"{model} cannot shorten its vectors, got dimensions={dimensions}; leave it out")
    elif dimensions is not None and not 1 <= dimensions <= MODELS[model].dimension:
        faults.append(f"dimensions of {model} must lie in 1 to {MODELS[model].dimension:,}, got {dimensions}")
    scheme, _, rest = base_url.partition("://")
    if scheme not in ("http", "https") or not rest or "@" in rest:
        # The URL is not repeated: one that holds user:password@ is a secret too.
        faults.append("base_url must be http(s)://host/path without a user name")
    if not 1 <= batch_size <= MAX_REQUEST_TEXTS:
        faults.append(f"batch_size must lie in 1 to {MAX_REQUEST_TEXTS:,}, got {batch_size}")
    if not (math.isfinite(timeout) and timeout > 0):
        faults.append(f"timeout must be a positive number of seconds, got {timeout}")
    if max_retries < 0:
        faults.append(f"max_retries must be at least 0, got {max_retries}")
    return faults


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
