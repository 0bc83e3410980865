"""What an embeddings service sends back, read with distrust: bytes in, valid vectors and named faults out.

The SDK passes on whatever came: an answer with an item missing or twice, of another dimension, with NaN.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Sequence

import numpy as np

from preceptor.data.embedders.paid_cache import Vector

UNIT_NORM_TOLERANCE = 1e-2  # wide: only to tell a vector of this model from zeros or another model's raw output


def read_answer(
    body: bytes, keys: Sequence[bytes], *, dimension: int, is_unit_norm: bool = True
) -> tuple[dict[bytes, Vector], int | None, list[str]]:
    """The valid vectors of an answer by key, the tokens billed (None if it does not say), and every fault.

    Items are placed by their ``index``, whatever their
    order; a faulty one spoils no other. A vector counts if it is base64 float32 or a list of numbers, has ``dimension``
    finite components and unit norm, or is scaled to it where the model's own is another.
    """
    try:
        answer = json.loads(body)
        items = answer["data"]
        if not isinstance(items, list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, None, [f"not the JSON of a list of embeddings, or cut short ({len(body):,} bytes)"]
    usage = answer.get("usage")
    num_tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    # Booleans are integers in Python, hence `type`; 2^32 tokens is more than any request may hold.
    if type(num_tokens) is not int or not 0 <= num_tokens < 1 << 32:
        num_tokens = None

    vectors: dict[bytes, Vector] = {}
    faults: list[str] = []
    seen: set[int] = set()
    # Every item on its own: what arrived well has been paid for and is kept.
    for item in items:
        index = item.get("index") if isinstance(item, dict) else None
        # A negative index would be a valid one in Python.
        if type(index) is not int or not 0 <= index < len(keys):
            faults.append(f"an item has index {index!r:.40}, allowed are 0 to {len(keys) - 1}")
            continue
        if index in seen:  # which of the two is right cannot be known
            faults.append(f"index {index} comes twice")
            vectors.pop(keys[index], None)
            continue
        seen.add(index)
        vector = _decode(item.get("embedding"))
        # In float64, since the squares of a float32 vector may overflow.
        norm = 0.0 if vector is None else float(np.linalg.norm(vector.astype(np.float64)))
        if vector is None:
            faults.append(f"the vector of index {index} is neither base64 float32 nor a list of numbers")
        elif vector.shape != (dimension,):
            faults.append(f"the vector of index {index} has {vector.size:,} components, expected {dimension:,}")
        elif not math.isfinite(norm):
            faults.append(f"the vector of index {index} holds NaN or infinity")
        elif norm == 0 or (is_unit_norm and abs(norm - 1) > UNIT_NORM_TOLERANCE):
            faults.append(f"the vector of index {index} has norm {norm:.4g}, expected 1")
        else:
            vectors[keys[index]] = vector if is_unit_norm else (vector / norm).astype(np.float32)
    # Missing ones last, so that a wrong index is reported as well as its absence.
    if len(seen) < len(keys):
        first = min(set(range(len(keys))) - seen)
        faults.append(f"{len(keys) - len(seen)} of {len(keys)} vectors are missing, the first is index {first}")
    return vectors, num_tokens, faults


def _decode(embedding: object) -> Vector | None:
    try:
        if isinstance(embedding, str):
            # "<f4": the service sends little-endian, whatever this machine is.
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4").astype(np.float32)
        if isinstance(embedding, list) and all(type(number) in (int, float) for number in embedding):
            with np.errstate(over="ignore"):  # beyond float32 becomes infinity, which is refused by name
                return np.asarray(embedding, dtype=np.float64).astype(np.float32)
    except (ValueError, OverflowError, binascii.Error):
        pass
    return None
