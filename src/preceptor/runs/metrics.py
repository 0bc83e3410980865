"""JSONL logs: one strict JSON object a line, one line a step, and no line twice after a resume.

Strict is JSON as the standard defines it: what cannot survive the trip is refused by name or marked, never changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from preceptor.errors import StorageError
from preceptor.runs.files import storage_errors, write_all


class JsonlLog:
    """An append-only log of rows that carry an integer ``step``.

    With ``one_row_per_step`` (metrics) steps strictly increase; without (decisions) a step may have many rows. A row is
    with the operating system when ``append`` returns, so a killed process loses none; ``sync`` puts all on the disk.
    Rows of an existing file count from the start: go on after them, or ``truncate_after`` a step first.
    """

    def __init__(self, path: Path, *, one_row_per_step: bool) -> None:
        self.path = path
        self.one_row_per_step = one_row_per_step
        self._descriptor: int | None = None
        self._size = 0  # bytes of whole rows
        self.num_rows = 0
        self.last_step = -1
        if path.exists():
            for line in _lines(path):
                self._count(line)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Adds ``rows``, all or none.

        Numbers that are not finite are written as ``null`` and named in the row's field ``nonfinite``. Raises
        ``StorageError`` when the disk refuses (the file is as before) and ``ValueError`` for a step out of order.
        """
        step = self.last_step
        # All rows are checked before any is written.
        for row in rows:
            if "step" not in row or row["step"] < step or (row["step"] == step and self.one_row_per_step):
                order = "strictly increasing" if self.one_row_per_step else "never decreasing"
                raise ValueError(f"{self.path.name}: step {row.get('step')} after step {step}; steps must be {order}")
            step = row["step"]
        # One write for all rows: with O_APPEND a kill leaves whole rows or a cut last one.
        data = "".join(row_json(row) + "\n" for row in rows).encode()
        with storage_errors(f"append to {self.path}", safe=f"its rows up to step {self.last_step} are intact"):
            descriptor = self._open()
            try:
                write_all(descriptor, data)
            except OSError:
                # What was written of the rows goes now if it can, else when the file is next opened.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, self._size)
                self._descriptor = None
                os.close(descriptor)
                raise
        self._size += len(data)
        self.num_rows += len(rows)
        self.last_step = step

    def sync(self) -> None:
        """Waits until every row is on the disk."""
        if self._descriptor is not None:
            with storage_errors(f"sync {self.path}"):
                os.fsync(self._descriptor)

    def truncate_after(self, step: int, *, num_rows: int | None = None) -> None:
        """Drops the rows of later steps, those past the first ``num_rows``, and a last line that was cut by a kill.

        ``num_rows``, when given, is what the log held at a checkpoint: it tells rows of ``step`` itself that were
        written after that checkpoint from those before. The cut is one ``ftruncate``: a kill leaves it done or not.
        """
        lines = _lines(self.path) if self.path.exists() else iter(())
        self._size, self.num_rows, self.last_step = 0, 0, -1
        for line in lines:
            if line.step > step or self.num_rows == num_rows:
                break
            self._count(line)
        with storage_errors(f"shorten {self.path}"):
            if self.path.exists():
                # The descriptor cuts to `_size` as it opens; a second cut is harmless.
                descriptor = self._open()
                os.ftruncate(descriptor, self._size)
                os.fsync(descriptor)

    def close(self) -> None:
        """Syncs and closes; the next ``append`` opens again."""
        if self._descriptor is not None:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def _count(self, line: _Line) -> None:
        self._size, self.num_rows, self.last_step = line.end, self.num_rows + 1, line.step

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            # Without this the first new row would be glued to a line that a kill cut short.
            os.ftruncate(self._descriptor, self._size)
        return self._descriptor


class _Line:
    """A parsed row, its step, and where in the file it ends, in bytes."""

    def __init__(self, row: dict[str, Any], end: int) -> None:
        self.row = row
        self.step = int(row["step"])
        self.end = end


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, one by one; a last line that a kill cut short is left out.

    Raises ``StorageError`` naming the line when another one is not a JSON object with a ``step``.
    """
    return (line.row for line in _lines(path))


def _lines(path: Path) -> Iterator[_Line]:
    with storage_errors(f"read {path}"), open(path, "rb") as file:
        end = 0
        for number, raw in enumerate(file, start=1):
            # Offsets in bytes, to which the file can be cut.
            end += len(raw)
            try:
                line = _Line(json.loads(raw), end)
            except (ValueError, KeyError, TypeError) as error:
                if not file.peek(1):
                    return  # the last line: cut short by a kill, or left by a power loss
                raise StorageError(f"{path} line {number} is damaged: {error}; restore the file from a copy") from error
            if not raw.endswith(b"\n"):
                return  # whole by chance, but its end was not written
            yield line


# ---- JSON as the standard defines it --------------------------------------------------------------------------------

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
