"""Episodes of ``decisions.jsonl`` as the page shows them: step by step, what was asked, drawn, read and earned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import DataError
from preceptor.report.arms import LEARNED
from preceptor.report.curves import evenly_spaced
from preceptor.report.run_folder import JsonObject, is_finite, parse_row, read_rows

MAXIMUM_EPISODES = 150
MAXIMUM_BYTES = 3_000_000
"""Of the episodes as JSON; with the rest of the page it stays below 5 MB."""
MAXIMUM_CHARACTERS = 2_000
"""Of one text; an article may hold a line of a megabyte."""


@dataclass(frozen=True)
class Selection:
    """The episodes chosen for the page, how many the run has, and the texts that they read."""

    episodes: list[JsonObject]
    num_episodes: int
    articles: dict[str, JsonObject]


def select_episodes(decisions: Path, articles: Mapping[str, JsonObject]) -> Selection:
    """Episodes of every arm and article within the page's budget, the learned arm first.

    Of each arm on each article the last episode is taken, then, while room is left, the first and some in between.
    Raises :class:`DataError` for a malformed row, naming its line.
    """
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    count = 0
    for count, (offset, row) in enumerate(read_rows(decisions), start=1):
        group = (str(row.get("arm", "")), str(row.get("article", "")))
        places.setdefault(group, []).append((offset, count))
    rounds = [list(_spread(found)) for _, found in sorted(places.items(), key=lambda item: item[0][0] != LEARNED)]
    queue = [group[k] for k in range(max(map(len, rounds), default=0)) for group in rounds if k < len(group)]
    chosen: list[tuple[int, JsonObject]] = []
    used: dict[str, JsonObject] = {}
    size = 0
    with decisions.open("rb") as file:
        for offset, number in queue[:MAXIMUM_EPISODES]:
            file.seek(offset)
            where = f"{decisions}:{number}"
            episode = episode_view(parse_row(file.readline(), where=where), articles, where=where)
            article = episode["article"]
            texts = {} if article in used else {article: article_view(articles, article)}
            size += len(json.dumps([episode, texts]))
            if chosen and size > MAXIMUM_BYTES:
                break
            chosen.append((number, episode))
            used |= texts
    chosen.sort(key=lambda entry: (entry[1]["arm"] != LEARNED, entry[1]["arm"], entry[1]["article"], entry[0]))
    return Selection([episode for _, episode in chosen], count, used)


def article_view(articles: Mapping[str, JsonObject], name: str) -> JsonObject:
    """The title and the (key, value) texts of an article; no pairs where the run has no ``articles.json``."""
    article = articles.get(name, {"pairs": []})
    return {
        "title": clipped(article.get("title") or name, 200),
        "pairs": [[clipped(pair["key"], 300), clipped(pair["value"])] for pair in article["pairs"]],
    }


def episode_view(row: JsonObject, articles: Mapping[str, JsonObject], *, where: str) -> JsonObject:
    """One row of ``decisions.jsonl`` as steps.

    The values are those of ``reader_spans``, in the order in which they were read; the k-th query of ``policy_spans``
    belongs to the k-th value. A step earns the mean log-probability of its value's tokens, less that of the reference
    where the row has one.
    """
    policy = _spans(row, "policy_spans", where)
    reader = _spans(row, "reader_spans", where)
    texts = row.get("texts") or [None] * len(policy)
    if len(texts) != len(policy):
        raise DataError(
            f"{where}: 'texts' must have an entry for each of {len(policy)} policy_spans, got {len(texts)}."
        )
    queries = [(span, text) for span, text in zip(policy, texts, strict=True) if span["kind"] == "query"]
    spoken = {span["pair"]: text for span, text in zip(policy, texts, strict=True) if span["kind"] == "value"}
    values = [span for span in reader if span["kind"] == "value"]
    if queries and len(queries) != len(values):
        raise DataError(
            f"{where}: {len(queries)} queries for {len(values)} values; each value is read after its query."
        )
    article = str(row.get("article", ""))
    pairs = articles[article]["pairs"] if article in articles else []
    probabilities = [_checked(p, "selection_probabilities", where) for p in row.get("selection_probabilities") or []]
    steps = []
    for position, span in enumerate(values):
        pair = span["pair"]
        text = pairs[pair]["value"] if 0 <= pair < len(pairs) else spoken.get(pair)
        log_probs = _numbers(span, "log_probs", where)
        reference = _mean(_numbers(span, "reference_log_probs", where))
        mean = _mean(log_probs)
        query = None
        if queries:
            query_span, query_text = queries[position]
            query = {
                "text": clipped(query_text or ""),
                "log_probs": _numbers(query_span, "sampled_log_probs", where),
            }
        steps.append(
            {
                "pair": pair,
                "query": query,
                "probabilities": probabilities[position] if position < len(probabilities) else [],
                "value": {"text": clipped(text or ""), "log_probs": log_probs},
                "mean": mean,
                "reference": reference,
                "earned": None if mean is None else round(mean - (reference or 0.0), 4),
            }
        )
    probes = [_mean(_numbers(span, "log_probs", where)) for span in reader if span["kind"] == "probe"]
    return {
        **{key: row.get(key) for key in ("episode", "step", "passed")},
        **{key: _rounded(row.get(key)) for key in ("reward", "normalised_reward", "temperature")},
        "arm": str(row.get("arm", "")),
        "article": article,
        "steps": steps,
        "probes": _mean(probes),
    }


def clipped(text: object, maximum: int = MAXIMUM_CHARACTERS) -> str:
    """A text cut to ``maximum`` characters, an ellipsis saying so."""
    string = str(text)
    return string if len(string) <= maximum else string[: maximum - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _spread(found: Sequence[Any]) -> Sequence[Any]:
    """At most five of ``found``: the last, the first, the middle, the quarters."""
    indices = evenly_spaced(len(found), 5)
    by_interest = [*indices[-1:], *indices[:1], *indices[2:3], *indices[1:]]
    return [found[index] for index in dict.fromkeys(by_interest)]


def _spans(row: JsonObject, name: str, where: str) -> list[JsonObject]:
    spans = row.get(name, [])
    if not isinstance(spans, list) or not all(isinstance(s, dict) and "kind" in s for s in spans):
        raise DataError(f"{where}: '{name}' must be a list of spans, each with a 'kind'.")
    for span in spans:
        if span["kind"] == "value" and not isinstance(span.get("pair"), int):
            raise DataError(f"{where}: a value span of '{name}' must have a whole number as its 'pair'.")
    return spans


def _numbers(span: JsonObject, name: str, where: str) -> list[float | None]:
    return _checked(span.get(name) or [], name, where)


def _checked(numbers: object, name: str, where: str) -> list[float | None]:
    """The numbers rounded for the page, ``None`` for those that are not finite: a bad number is shown, not hidden."""
    if not isinstance(numbers, list) or not all(isinstance(number, int | float) for number in numbers):
        raise DataError(f"{where}: '{name}' must be a list of numbers.")
    return [_rounded(number) for number in numbers]


def _rounded(number: object) -> float | None:
    return round(number, 4) if is_finite(number) else None


def _mean(numbers: Sequence[float | None]) -> float | None:
    """The mean, or ``None`` where there is no number or one is not finite."""
    finite = [number for number in numbers if number is not None]
    return round(sum(finite) / len(finite), 4) if finite and len(finite) == len(numbers) else None
