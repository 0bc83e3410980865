"""``python -m benchmarks.report``: the table of docs/benchmarks.md, from history.jsonl and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.growth import attention_dominates_from, draw, fit

PAGE, FIGURE = "docs/benchmarks.md", "docs/figures/growth.svg"
BEGIN, END = "<!-- table: python -m benchmarks.report -->", "<!-- end of the table -->"


def newest(lines: list[str]) -> list[dict[str, Any]]:
    """The last row of each benchmark, case, device and number of threads that has a case, in the order of the file."""
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        if "case" in row:
            key = row["benchmark"], row["case"], row["device"], row["threads"]
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for every row and every peer our time, theirs, the ratio with its bar, and who is faster."""
    columns = (
        "benchmark",
        "case",
        "ours",
        "peer",
        "ours takes",
        "peer takes",
        "ratio",
        "of limit",
        "bar",
        "memory",
        "run",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        bars = {(bar["way"], bar["against"]): bar for bar in row["bars"]}
        for pair, speed_up in row["speed_up"].items():
            way, peer = pair.split(" over ", maxsplit=1)
            if peer.startswith("ours") or ("no gradient" in way) != ("no gradient" in peer):
                continue
            ratio, bar = speed_up["wall"], bars.get((way, peer))
            cells = (
                row["benchmark"],
                row["case"],
                way,
                peer,
                _seconds(row, way),
                _seconds(row, peer),
                f"{ratio:.2f}" + ("" if ratio >= 1 else " (the peer is faster)"),
                _share(row, way, peer),
                _bar(bar),
                _memory(row, way, peer),
                f"{row['threads']}, {row['commit'][:7]}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth(rows: list[dict[str, Any]], root: Path) -> str:
    """A sentence and a figure on the newest growth row: the fit, and where attention takes over."""
    found = [row for row in rows if row["benchmark"] == "growth"]
    if not found:
        return ""
    row = found[-1]
    pairs = [int(units) for units in row["units"].values()]
    seconds = [row["seconds"][way]["wall"]["median"] for way in row["units"]]
    a, b = fit(pairs, seconds)
    draw(pairs, seconds, root / FIGURE)
    points = ", ".join(f"{n}: {s:.2f} s" for n, s in zip(pairs, seconds, strict=True))
    return (
        f"Cost against pairs ({row['case']}; {row['threads']} threads, {row['commit'][:7]}): {points}. "
        f"Fit: {a:.4f}·n + {b:.6f}·n² seconds; the quadratic part, attention, is as large as the linear one from "
        f"{attention_dominates_from(a, b):,.0f} pairs on.\n\n"
        f"![Seconds against pairs with the fit]({Path(FIGURE).relative_to('docs')})"
    )


def _seconds(row: Mapping[str, Any], way: str) -> str:
    spread, units = row["seconds"][way]["wall"], row["units"].get(way, 1)
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms")) if spread["median"] / units * s >= 1), (1e6, "µs"))
    median, low, high = (spread[key] / units * scale for key in ("median", "minimum", "maximum"))
    generation = row["seconds"][way].get("generation")
    part = "" if generation is None else f", {generation['median'] / spread['median']:.0%} of it generation"
    return f"{median:.3g} {unit} ({low:.3g}–{high:.3g}){part}"


def _bar(bar: Mapping[str, Any] | None) -> str:
    if bar is None:
        return ""
    parts = []
    if bar["at_least"] is not None:
        parts.append(f"≥ {bar['at_least']:.2g}")
    if bar["memory_at_most"] is not None:
        parts.append(f"memory ≤ {bar['memory_at_most']:.0%}")
    if bar["seconds_at_most"] is not None:
        parts.append(f"≤ {bar['seconds_at_most']:g} s")
    if bar.get("limit_at_least") is not None:  # rows of before have none
        parts.append(f"limit ≥ {bar['limit_at_least']:.0%}")
    return f"{', '.join(parts)}: {'met' if bar['holds'] else '**not met**'}"


def _share(row: Mapping[str, Any], way: str, peer: str) -> str:
    """What of the measured bandwidth or arithmetic ours and the peer reach."""
    shares = row["share_of_limit"]
    return f"{shares[way]:.0%}, {shares[peer]:.0%}" if way in shares and peer in shares else ""


def _memory(row: Mapping[str, Any], way: str, peer: str) -> str:
    memory = row["extra_memory_mib"]
    return f"{memory[way]:.0f} of {memory[peer]:.0f} MiB" if way in memory and peer in memory else ""


def write(root: Path) -> Path:
    """Put the table between its marks in the page; returns the page."""
    rows = newest((root / record.HISTORY).read_text(encoding="utf-8").splitlines())
    page = root / PAGE
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    parts = [
        part for part in (table([row for row in rows if row["benchmark"] != "growth"]), growth(rows, root)) if part
    ]
    page.write_text(f"{before}{BEGIN}\n\n{chr(10).join([parts[0], '', *parts[1:]])}\n\n{END}{after}", encoding="utf-8")
    return page


if __name__ == "__main__":
    print(write(record.ROOT).relative_to(record.ROOT))
    sys.exit(0)
