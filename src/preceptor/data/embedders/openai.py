"""Vectors of a hosted embedding model that speaks OpenAI's API, bought at most once and never beyond a spending cap.

One purchase runs under the cache's lock, so that no other process buys the same texts. The worst case is reserved
before each request leaves; the true cost and every valid vector are then stored in one transaction, and only then used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.config import is_service_url
from preceptor.data.embedders.answer import read_answer
from preceptor.data.embedders.base import require_texts
from preceptor.data.embedders.paid_cache import PaidCache, Vector, text_key
from preceptor.errors import ConfigError, DataError, MissingExtraError, PreceptorError, ServiceError, did_you_mean

OPENAI_URL = "https://api.openai.com/v1"
PRICES_AS_OF = "2026-05"
# The service's limits. A token is at least one byte of UTF-8, so bytes bound tokens from above: what is within the
# limit in bytes is within it in tokens, and is paid by a reservation made in bytes, without a tokenizer at hand.
MAX_TEXT_TOKENS = 8_191
MAX_REQUEST_TOKENS = 300_000
MAX_REQUEST_TEXTS = 2_048

_AZURE_VERSION = "2024-10-21"  # where the URL names none
# Errors of httpx before a request has left, so that nothing can have been billed. Names, since releases of the SDK
# differ in the package (httpx, httpx2) that they come from.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"})


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
    """Unit-norm vectors of a hosted embedding model (extra ``openai``); an inner product is a cosine in [-1, 1].

    Vectors of OpenAI's own models are the service's numbers as they are; those of other models are divided by their
    norm. text-embedding-ada-002 is not deterministic: exact repetition of a run rests on ``cache_dir``. A failed call
    loses nothing and is safe to repeat: no text that is on disk is sent again. Not thread-safe; processes may share
    the folder.

    A refusal (status 3xx, 4xx, 5xx) is taken as free. A request that went out and got no answer may have been billed
    and stays charged at its worst case, one per byte instead of per token. A faulty answer was paid for: its valid
    vectors are kept, and :class:`ServiceError` names the fault instead of buying the rest a second time unasked.

    Args:
        model: of OpenAI (`MODELS`), or any other that the service offers; on Azure, the name of the deployment.
        api_key: sent to ``base_url`` only; never stored in an attribute, shown, logged or written.
        cache_dir: holds ``embeddings.sqlite3``, with the vectors and what they cost.
        max_usd: cap on all spending ever recorded in that file, in US dollars.
        base_url: the service, up to and without ``/embeddings``; ``None`` is OpenAI's own. An Azure address (of a
            resource or a deployment, with ``?api-version=`` or without) is spoken to as Azure wants it.
        dimensions: components of a vector. Shortens those of OpenAI's 3-series; must be given for a model that is not
            in `MODELS`.
        usd_per_million_tokens: the price; ``None`` is that of `MODELS`, and for other models the highest of them.
        batch_size: texts per request, 1 to 2,048; what one lost answer can cost at most.
        timeout: seconds that the service may stay silent.
        max_retries: further attempts by the SDK after 408, 409, 429, 5xx and broken connections.
    """

    name = "openai"

    def __init__(
        self,
        model: str = "text-embedding-ada-002",
        *,
        api_key: str,
        cache_dir: Path,
        max_usd: float,
        base_url: str | None = None,
        dimensions: int | None = None,
        usd_per_million_tokens: float | None = None,
        batch_size: int = 256,
        timeout: float = 30.0,
        max_retries: int = 5,
    ) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise MissingExtraError("the OpenAI embedder", package="openai", extra="openai") from None

        url = (base_url or OPENAI_URL).rstrip("/")
        faults = list(
            _faults(model, api_key, url, dimensions, usd_per_million_tokens, batch_size, timeout, max_retries)
        )
        if faults:
            raise ConfigError(*faults)
        known = MODELS.get(model)
        dimension = dimensions or (known.dimension if known else 0)
        self.dimension: int = dimension
        # The same name may be another model elsewhere (on Azure it is whatever the deployment is called).
        self.version = f"{model}/{dimension}" + ("" if url == OPENAI_URL else f" at {url.partition('?')[0]}")
        self._model = model
        self._is_unit_norm = known is not None
        self._shortened = {"dimensions": dimensions} if known and dimensions else {}
        price = known or max(MODELS.values(), key=lambda priced: priced.nano_usd_per_token)
        self._price = (
            price.nano_usd_per_token if usd_per_million_tokens is None else math.ceil(1_000 * usd_per_million_tokens)
        )
        self._batch_size = batch_size
        self._cache = PaidCache(
            cache_dir / "embeddings.sqlite3", version=self.version, dimension=dimension, max_usd=max_usd
        )
        # What the request under way may cost, and the last purchase that was reserved for it.
        self._worst_cost = self._purchase = self._num_attempts = 0

        client = _client(
            openai,
            urlsplit(url),
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            http_client=_metered_http(openai, reserve=self._reserve, refund=self._refund),
        )
        # Closures and not attributes: vars(), repr() and pickle cannot show the key.
        self._create: Callable[..., Any] = client.embeddings.with_raw_response.create
        self._redact: Callable[[str], str] = lambda text: text.replace(api_key, "<api key>")
        self.close: Callable[[], None] = client.close

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.version!r}, cache={str(self._cache.path)!r})"

    @property
    def spent_usd(self) -> float:
        """US dollars spent so far by all users of the cache, with what may have been billed."""
        return self._cache.spent / 1e9

    @property
    def num_cached(self) -> int:
        """Vectors of this model and dimension on disk."""
        return len(self._cache)

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """See :meth:`~preceptor.data.embedders.base.TextEmbedder.embed`. Unit norm, kept on disk before it is used.

        Raises :class:`DataError` for a text that is empty or over 8,191 bytes, :class:`ServiceError` if the service
        fails, refuses or answers wrongly or the budget is reached, :class:`StorageError` if the disk does.
        """
        require_texts(texts)
        keys = [text_key(text) for text in texts]
        for position, text in enumerate(texts):
            if (size := len(text.encode())) > MAX_TEXT_TOKENS:
                raise DataError(
                    f"text {position + 1} of {len(texts)} has {size:,} bytes, at most {MAX_TEXT_TOKENS:,} are sure to "
                    f"fit the model ({text[:40]!r}...); split it"
                )
        wanted = dict(zip(keys, texts, strict=True))
        vectors = self._cache.get(wanted)
        while len(vectors) < len(wanted):
            with self._cache.exclusive():  # another process may have bought the same texts in the meantime
                vectors |= self._cache.get(wanted.keys() - vectors.keys())
                if missing := {key: text for key, text in wanted.items() if key not in vectors}:
                    vectors |= self._buy(self._next_batch(missing))
        stacked = [vectors[key] for key in keys]
        return torch.from_numpy(np.stack(stacked) if stacked else np.empty((0, self.dimension), dtype=np.float32))

    def _next_batch(self, missing: Mapping[bytes, str]) -> dict[bytes, str]:
        """The first of ``missing`` that fit one request and what is left of the budget; at least one."""
        limit = MAX_REQUEST_TOKENS
        if self._price:
            limit = min(limit, self._cache.remaining // self._price)
        batch: dict[bytes, str] = {}
        total = 0
        for key, text in missing.items():
            total += len(text.encode())
            if batch and (len(batch) == self._batch_size or total > limit):
                break
            batch[key] = text
        return batch

    def _buy(self, batch: Mapping[bytes, str]) -> dict[bytes, Vector]:
        """The vectors of ``batch``, on disk when this returns."""
        import openai

        self._cache.require_space(len(batch))
        self._worst_cost = self._price * sum(len(text.encode()) for text in batch.values())
        self._num_attempts = 0
        problem = ""
        try:
            answer = self._create(
                model=self._model, input=list(batch.values()), encoding_format="base64", **self._shortened
            )
        except openai.APIError as error:
            if isinstance(error.__cause__, PreceptorError):  # our own, which some releases of the SDK wrap
                raise error.__cause__ from None
            problem = self._describe(error)
        if problem:  # raised out here, so that the SDK's error, which may quote the key, is no part of the traceback
            tries = f" after {self._num_attempts} attempts" if self._num_attempts > 1 else ""
            raise ServiceError(f"{problem}{tries}; {self._cache.state()}")
        vectors, num_tokens, faults = read_answer(
            answer.http_response.content, list(batch), dimension=self.dimension, is_unit_norm=self._is_unit_norm
        )
        cost = None if num_tokens is None else self._price * num_tokens
        self._cache.settle(self._purchase, cost, vectors)
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ServiceError(
                f"the answer to {self.version} is faulty: {faults[0]}{more}; {len(vectors)} of {len(batch)} vectors "
                f"were usable, {self._cache.state()}, run again to buy the rest"
            )
        return vectors

    def _reserve(self) -> None:
        self._num_attempts += 1
        self._purchase = self._cache.reserve(self._worst_cost, note=self.version)

    def _refund(self) -> None:
        self._cache.settle(self._purchase, 0)

    def _describe(self, error: Any) -> str:
        """What went wrong, in words that cannot hold the key."""
        status = getattr(error, "status_code", None)
        if status is None:
            cause = error.__cause__ or error
            return self._redact(f"{self.version}: no answer ({_one_line(str(cause) or type(cause).__name__)})")
        said = error.body.get("message") if isinstance(error.body, dict) else None
        said = f": {_one_line(self._redact(str(said)))}" if said else ""
        if status == 401:  # the service quotes part of the key; its words are not repeated
            return "the service refused the API key (HTTP 401); set OPENAI_API_KEY to a valid key"
        if "insufficient_quota" in f"{error.code} {error.type}":
            return f"the account's quota is used up (HTTP {status}){said}; check plan and billing"
        return f"{self.version}: the service answered HTTP {status}{said}"


def _metered_http(openai: Any, *, reserve: Callable[[], None], refund: Callable[[], None]) -> Any:
    """The SDK's HTTP client, but each request, its retries included, is reserved before it leaves."""

    class MeteredHttp(openai.DefaultHttpxClient):  # type: ignore[misc]
        def send(self, request: Any, **options: Any) -> Any:
            reserve()
            try:
                response = super().send(request, **options)
            except Exception as error:
                if type(error).__name__ in _NOT_SENT:
                    refund()
                raise
            if not response.is_success:  # a refusal is free
                refund()
            return response

    return MeteredHttp(follow_redirects=False)  # the key goes to the base URL and nowhere else


def _client(openai: Any, url: SplitResult, **options: Any) -> Any:
    """The SDK's client of the service at ``url``: `AzureOpenAI` if that is an address of Azure's own API."""
    path = url.path.removesuffix("/embeddings").rstrip("/")  # the portal shows the whole address of a deployment
    query = parse_qs(url.query)
    host = url.hostname or ""
    # `/openai/v1` is Azure's newer API, which is OpenAI's own.
    on_azure = host.endswith(".azure.com") and not path.endswith("/openai/v1")
    if not (on_azure or "api-version" in query or "/openai/deployments/" in path):
        return openai.OpenAI(base_url=url.geturl(), **options)
    base_url = url._replace(path=path or "/openai", query="").geturl()
    return openai.AzureOpenAI(base_url=base_url, api_version=query.get("api-version", [_AZURE_VERSION])[0], **options)


def _faults(
    model: str,
    api_key: str,
    url: str,
    dimensions: int | None,
    usd_per_million_tokens: float | None,
    batch_size: int,
    timeout: float,
    max_retries: int,
) -> Iterator[str]:
    known = MODELS.get(model)
    if known is None and dimensions is None:
        yield (
            f"embedding model {model!r} is not one of {', '.join(MODELS)}{did_you_mean(model, MODELS)}; "
            "state the dimension of its vectors"
        )
    elif known and dimensions is not None and not known.shortens and dimensions != known.dimension:
        yield f"{model} cannot shorten its vectors, got dimensions={dimensions}; leave it out"
    elif dimensions is not None and not 1 <= dimensions <= (known.dimension if known else 1 << 16):
        yield f"dimensions of {model} must lie in 1 to {known.dimension if known else 1 << 16:,}, got {dimensions}"
    if not api_key.strip():
        yield "the OpenAI API key is empty; set the environment variable OPENAI_API_KEY"
    elif not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        # The HTTP library would refuse such a key too, and quote it in full.
        yield "the OpenAI API key holds a space, line break or non-ASCII character; copy it again"
    if not is_service_url(url):  # which is not repeated: one that holds user:password@ is a secret too
        yield "base_url must be http(s)://host/path without a user name"
    if usd_per_million_tokens is not None and not (
        math.isfinite(usd_per_million_tokens) and usd_per_million_tokens >= 0
    ):
        yield f"usd_per_million_tokens must be a finite number of at least 0, got {usd_per_million_tokens}"
    if not 1 <= batch_size <= MAX_REQUEST_TEXTS:
        yield f"batch_size must lie in 1 to {MAX_REQUEST_TEXTS:,}, got {batch_size}"
    if not (math.isfinite(timeout) and timeout > 0):
        yield f"timeout must be a positive number of seconds, got {timeout}"
    if max_retries < 0:
        yield f"max_retries must be at least 0, got {max_retries}"


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
