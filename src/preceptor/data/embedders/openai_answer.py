"""What the embeddings service sends back, read with distrust: bytes in, valid vectors and named faults out."""

from __future__ import annotations

import base64
import binascii
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
import numpy.typing as npt

UNIT_NORM_TOLERANCE = 1e-2  # wide: only to tell a vector of this model from zeros or another model's raw output


@dataclass(frozen=True)
class Reply:
    """What came of one request: an HTTP answer, or ``status`` None and the ``fault`` of the connection."""

    status: int | None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    sent: bool = True  # False if the request cannot have reached the service

    @property
    def paid(self) -> bool:
        """Whether the service has begun to deliver, and so has billed."""
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True)
class Answer:
    """What a paid answer holds: the valid vectors by key, the tokens billed (None if it does not say), every fault."""

    vectors: dict[bytes, npt.NDArray[np.float32]]
    num_tokens: int | None
    faults: list[str]


def read_answer(body: bytes, keys: Sequence[bytes], *, dimension: int) -> Answer:
    """The vectors in an answer's JSON by key, its token count, and every fault; a faulty item spoils no other.

    Items are placed by their ``index``, whatever their order. A vector counts if it is base64 float32 or a list of
    numbers, has ``dimension`` finite components and unit norm.
    """
    try:
        answer = json.loads(body)
        items = answer["data"]
        if not isinstance(items, list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        return Answer({}, None, [f"not the JSON of a list of embeddings, or cut short ({len(body):,} bytes)"])
    usage = answer.get("usage")
    num_tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if type(num_tokens) is not int or num_tokens < 0:
        num_tokens = None

    vectors: dict[bytes, npt.NDArray[np.float32]] = {}
    faults: list[str] = []
    seen: set[int] = set()
    for item in items:
        index = item.get("index") if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < len(keys):
            faults.append(f"an item has index {index!r:.40}, allowed are 0 to {len(keys) - 1}")
            continue
        if index in seen:  # which of the two is right cannot be known
            faults.append(f"index {index} comes twice")
            vectors.pop(keys[index], None)
            continue
        seen.add(index)
        vector = _decode(item.get("embedding"))
        if vector is None:
            faults.append(f"the vector of index {index} is neither base64 float32 nor a list of numbers")
        elif vector.shape != (dimension,):
            faults.append(f"the vector of index {index} has {vector.size:,} components, expected {dimension:,}")
        elif not np.isfinite(vector).all():
            faults.append(f"the vector of index {index} holds NaN or infinity")
        elif abs(float(np.linalg.norm(vector.astype(np.float64))) - 1) > UNIT_NORM_TOLERANCE:
            faults.append(f"the vector of index {index} has norm {np.linalg.norm(vector):.4g}, expected 1")
        else:
            vectors[keys[index]] = vector
    if len(seen) < len(keys):
        first = min(set(range(len(keys))) - seen)
        faults.append(f"{len(keys) - len(seen)} of {len(keys)} vectors are missing, the first is index {first}")
    return Answer(vectors, num_tokens, faults)


def _decode(embedding: object) -> npt.NDArray[np.float32] | None:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4").astype(np.float32)
        if isinstance(embedding, list) and all(type(number) in (int, float) for number in embedding):
            with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused by name
                return np.asarray(embedding, dtype=np.float64).astype(np.float32)
    except (ValueError, OverflowError, binascii.Error):
        pass
    return None


def service_error(body: bytes) -> tuple[str, str]:
    """Code and message of an error answer, empty where it is not the API's JSON (a proxy's page)."""
    try:
        error: Any = json.loads(body)["error"]
        return f"{error.get('code')} {error.get('type')}", str(error.get("message") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the service asks to wait (RFC 9110 section 10.2.3: seconds or a date); 0 if it does not ask."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
