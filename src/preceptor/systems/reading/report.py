"""What the page shows of a reading run: the article in the learned order, the curves, and episodes step by step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.errors import DataError
from preceptor.report.arms import LEARNED
from preceptor.report.curves import evenly_spaced
from preceptor.report.decisions import decisions_section
from preceptor.report.drawing import clipped
from preceptor.report.run_folder import JsonObject, RunFolder, is_finite, parse_row, read_rows
from preceptor.report.sections import GENERAL_LINES, Episodes, Figure, Lines, Passages, Section, Series

MAXIMUM_EPISODES = 150
MAXIMUM_BYTES = 3_000_000
"""Of the episodes as JSON; with the rest of the page it stays below 5 MB."""
MAXIMUM_ORDERS = 20
"""Articles whose order is written out."""

LINES = (
    Lines("Reward", "nats per value token", {"reward": "reward"}),
    Lines("Normalised reward", "nats per value token", {"normalised_reward": "normalised"}),
    Lines("Gap closed, training", "share", {"gap_closed_train": "gap closed"}),
    Lines(
        "Query entropy",
        "nats per token",
        {"query_entropy": "query entropy"},
        maximum=("query_entropy_maximum", "maximum"),
    ),
    Lines("Selection entropy", "share of ln(remaining)", {"selection_entropy": "selection entropy"}, limits=(0.0, 1.0)),
    Lines("KL on value tokens", "nats per token", {"kl": "KL"}),
    Lines("Selection KL", "nats per step", {"selection_kl": "selection KL"}),
    Lines("Kept by the filter", "share", {"passed_fraction": "kept"}, limits=(0.0, 1.0)),
    *GENERAL_LINES[2:],
)


def sections(run: RunFolder) -> list[Section]:
    """The learned order first, then episodes to step through, then the curves."""
    if (run.result or {}).get("study") or (run.path / "pools.json").is_file():
        from preceptor.systems.reading.study.report import sections as study_sections

        return study_sections(run)
    found = []
    if orders := _orders(run):
        found.append(Section("The article in the learned order", orders))
    if run.decisions is not None and _are_readings(run.decisions):
        selection = select_episodes(run.decisions, run.articles)
        lead = (
            f"{len(selection.episodes)} of {selection.num_episodes:,} recorded episodes. Each square is a token: the "
            "stronger its colour, the less likely it was."
        )
        found.append(Section("A reading, step by step", [selection], lead=lead))
    else:
        found += decisions_section(run)
    curves: list[Figure] = [*LINES]
    if (positions := reward_by_position(run.metrics)) is not None:
        curves.append(positions)
    return [*found, Section("Training", curves)]


def _orders(run: RunFolder) -> list[Passages]:
    """The most likely order of each article that the result names."""
    orders = (run.result or {}).get("order") or {}
    if not isinstance(orders, dict):
        raise DataError(f"{run.path / 'result.json'}: 'order' must map an article to a list, got {orders!r:.80}.")
    found = []
    for name, order in list(orders.items())[:MAXIMUM_ORDERS]:
        article = article_view(run.articles, name)
        pairs = article["pairs"]
        rows = [(index, *pairs[index]) for index in order if isinstance(index, int) and 0 <= index < len(pairs)]
        found.append(Passages(article["title"], rows, note="Places in the article stand on the left."))
    return found


def reward_by_position(rows: Sequence[JsonObject], *, share: float = 0.1) -> Series | None:
    """Mean reward at each position of the trajectory over the first and over the last ``share`` of the steps.

    A position that some steps lack is averaged over those that have it. ``None`` where the column is absent.
    """
    lists = [row["reward_by_position"] for row in rows if isinstance(row.get("reward_by_position"), list)]
    if not lists:
        return None
    count = max(1, int(len(lists) * share))
    lines = {
        "last tenth of the steps": _mean_by_position(lists[-count:]),
        "first tenth": _mean_by_position(lists[:count]),
    }
    places = range(1, max(map(len, lines.values())) + 1)
    return Series("Reward by position", "nats per value token", "position", places, lines)


def _mean_by_position(lists: Sequence[list[Any]]) -> list[float]:
    columns = [[row[k] for row in lists if k < len(row) and is_finite(row[k])] for k in range(max(map(len, lists)))]
    return [sum(column) / len(column) for column in columns if column]


def _are_readings(decisions: Path) -> bool:
    """Whether the rows are episodes that can be stepped through; rows of older versions may not be."""
    return any("reader_spans" in row for _, row in itertools.islice(read_rows(decisions), 1))


def select_episodes(decisions: Path, articles: Mapping[str, JsonObject]) -> Episodes:
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
    return Episodes([episode for _, episode in chosen], count, used)


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
