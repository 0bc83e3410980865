"""JSON as the standard defines it: what cannot survive the trip is refused by name or marked, never quietly changed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"


def json_fault(value: object, name: str) -> str | None:
    """The first thing in ``value`` that would come back from JSON different from what it was, or ``None``.

    Tuples come back as lists and number keys as text; NaN and the infinities are not JSON at all.

    >>> json_fault({"window": (1, 2)}, "state")
    "state['window'] is a tuple"
    """
    if value is None or isinstance(value, bool | int | str):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} is {value}"
    if isinstance(value, list):
        return next(filter(None, (json_fault(item, f"{name}[{index}]") for index, item in enumerate(value))), None)
    if isinstance(value, dict):
        for key, item in value.items():
            fault = f"{name} has the key {key!r}" if not isinstance(key, str) else json_fault(item, f"{name}[{key!r}]")
            if fault:
                return fault
        return None
    return f"{name} is a {type(value).__name__}"


def row_json(row: Mapping[str, Any]) -> str:
    """One line of strict JSON for ``row``, in which numbers that are not finite are written as ``null`` and named.

    The added field ``nonfinite`` maps the place of each such number to what it was. Scalars of torch and NumPy are
    accepted; anything else that JSON does not know raises ``TypeError``.

    >>> row_json({"step": 3, "reward": float("nan"), "parts": [1.0, float("inf")]})
    '{"step": 3, "reward": null, "parts": [1.0, null], "nonfinite": {"reward": "nan", "parts.1": "inf"}}'
    """
    try:
        # Nearly every row is finite: the fast encoder decides, and only a row that it refuses is walked in Python.
        return json.dumps(row, allow_nan=False, default=_plain_scalar)
    except ValueError:
        nonfinite: dict[str, str] = {}
        finite = {key: _finite(value, key, nonfinite) for key, value in row.items()}
        return json.dumps(finite | {"nonfinite": nonfinite}, allow_nan=False)


def _plain_scalar(value: Any) -> bool | int | float:
    """The Python number inside a scalar of torch or NumPy."""
    if getattr(value, "ndim", None) == 0:
        number: bool | int | float = value.item()
        return number
    raise TypeError(f"a row may hold numbers, text, lists and mappings, got a {type(value).__name__}: {value!r:.80}")


def _finite(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    """``value`` with ``None`` for each number that is not finite, which is noted in ``nonfinite``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{index}", nonfinite) for index, item in enumerate(value)]
    number = value if isinstance(value, float) else _plain_scalar(value)
    if math.isfinite(number):
        return number
    nonfinite[name] = str(number)
    return None
