"""Reading a run folder back: what is absent is left out, what is malformed is an error that names file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from preceptor.errors import DataError

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The small files of a run, read whole; ``decisions.jsonl`` can be large and is only pointed at."""

    path: Path
    config: str | None
    manifest: JsonObject
    result: JsonObject | None
    metrics: list[JsonObject]
    articles: dict[str, JsonObject]
    decisions: Path | None
    comparison: JsonObject | None = None
    """``comparison.json``, where the folder is of a comparison rather than of a run."""
    seconds: JsonObject | None = None


def read_run(run_dir: Path) -> RunFolder:
    """The contents of ``run_dir``.

    Raises :class:`DataError` when the folder does not exist, has neither ``metrics.jsonl`` nor ``result.json``,
    or holds a malformed file.
    """
    metrics, result, decisions = (run_dir / name for name in ("metrics.jsonl", "result.json", "decisions.jsonl"))
    if not metrics.is_file() and not result.is_file():
        raise DataError(f"{run_dir} is not a run folder: it has neither metrics.jsonl nor result.json.")
    config = run_dir / "config.yaml"
    # Rows are read whole: a metrics file is small. decisions.jsonl may be gigabytes and is only pointed at.
    rows = [row for _, row in read_rows(metrics)] if metrics.is_file() else []
    for number, row in enumerate(rows, start=1):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError(f"{metrics}:{number}: 'step' must be a whole number, got {step!r}.")
    return RunFolder(
        path=run_dir,
        config=_read_text(config) if config.is_file() else None,
        manifest=_read_object(run_dir / "manifest.json") or {},
        result=_read_result(result),
        metrics=rows,
        articles=_read_articles(run_dir / "articles.json"),
        decisions=decisions if decisions.is_file() else None,
        comparison=_read_object(run_dir / "comparison.json"),
        seconds=_read_object(run_dir / "seconds.json"),
    )


def read_rows(path: Path) -> Iterator[tuple[int, JsonObject]]:
    """The byte offset and the object of every line of a JSONL file; an empty line or a non-object is an error."""
    offset = 0
    # Offsets in bytes, hence binary mode; text mode translates and cannot seek.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield offset, parse_row(line, where=f"{path}:{number}")
            offset += len(line)


def parse_row(line: bytes, *, where: str) -> JsonObject:
    """The JSON object on one line; ``where`` names the place in the error."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row


def _read_object(path: Path) -> JsonObject | None:
    return parse_row(_read_text(path).encode(), where=str(path)) if path.is_file() else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}).") from error


def _read_result(path: Path) -> JsonObject | None:
    result = _read_object(path)
    if result is None:
        return None
    arms = result.get("arms", {})
    if not isinstance(arms, dict):
        raise DataError(f"{path}: 'arms' must be an object, got {type(arms).__name__}.")
    # The page computes with these numbers, so they are checked here, where the file can be named.
    for arm, metrics in arms.items():
        for metric, estimate in metrics.items() if isinstance(metrics, dict) else [("", None)]:
            if not isinstance(estimate, dict) or {"mean", "low", "high", "unit", "n"} - estimate.keys():
                raise DataError(f"{path}: arms.{arm}.{metric} must have mean, low, high, unit and n, got {estimate!r}.")
            for key in ("mean", "low", "high"):
                if not (is_finite(estimate[key]) or (estimate[key] is None and key != "mean")):
                    raise DataError(f"{path}: arms.{arm}.{metric}.{key} must be a number, got {estimate[key]!r}.")
            # Half an interval is none.
            if (estimate["low"] is None) != (estimate["high"] is None):
                raise DataError(f"{path}: arms.{arm}.{metric}: low and high must both be numbers or both be null.")
    gaps = result.get("gap_closed") or {}
    if not isinstance(gaps, dict) or not all(isinstance(gap, dict) for gap in gaps.values()):
        raise DataError(f"{path}: 'gap_closed' must map a split to an object, got {gaps!r}.")
    for split, gap in gaps.items():
        if not all(gap.get(key) is None or is_finite(gap[key]) for key in ("mean", "low", "high")):
            raise DataError(
                f"{path}: gap_closed.{split} must have numbers or nulls as mean, low and high, got {gap!r}."
            )
    return result


def _read_articles(path: Path) -> dict[str, JsonObject]:
    articles = _read_object(path) or {}
    for name, article in articles.items():
        pairs = article.get("pairs") if isinstance(article, dict) else None
        if not isinstance(pairs, list) or not all(isinstance(p, dict) and {"key", "value"} <= p.keys() for p in pairs):
            raise DataError(f"{path}: article {name!r} must have 'pairs', a list of objects with 'key' and 'value'.")
    return articles


def is_finite(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number and not a truth value."""
    # bool is a kind of int in Python, and True would be drawn as 1.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
