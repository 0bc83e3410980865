"""``report.html``: one file that holds all it shows, asks nobody for anything and runs no text of an article.

Every text goes through Jinja's escaping or through :func:`embedded_json`; the content security policy admits the one
style sheet and the one script of this package, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.errors import StorageError
from preceptor.report.arms import COUNTS, LEARNED, Arms, title_case
from preceptor.report.charts import declared_charts, matrices, series_panels
from preceptor.report.comparison import contrasts, durations, group_labels
from preceptor.report.curves import other_charts, panels, reward_by_position, standard_charts
from preceptor.report.decisions import are_readings, decision_tables
from preceptor.report.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    arm_chart,
    interval_text,
    line_chart,
    number,
    position_chart,
)
from preceptor.report.edits import edit_maps
from preceptor.report.prompts import prompt_matrices
from preceptor.report.run_folder import RunFolder, is_finite, read_run
from preceptor.report.trajectories import Selection, clipped, select_episodes

if TYPE_CHECKING:
    from markupsafe import Markup

MAXIMUM_BYTES = 5_000_000
PLOT = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
"""Of a curve panel: its size, and where in it the axes are."""


def build_report(run_dir: Path) -> Path:
    """Write ``run_dir / "report.html"`` from the files of the run folder and return its path.

    What the run folder lacks is left out and the page says so. Raises :class:`DataError` for a malformed file and
    :class:`StorageError` when the page cannot be written; an older page is replaced only by a complete one.
    """
    run_dir = Path(run_dir)
    page = render(read_run(run_dir)).replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", errors="replace")
    target = run_dir / "report.html"
    temporary = target.with_suffix(".html.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{target} could not be written: {error.strerror or error}.") from error
    return target


def render(run: RunFolder) -> str:
    """The page of a run as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    style, script = (
        files("preceptor.report").joinpath("templates", name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    environment = Environment(
        loader=PackageLoader("preceptor.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number_or_word, "title_case": title_case, "shade": shade}
    environment.filters |= {"clipped": clipped, "breadth": breadth}
    result, system = run.result or {}, str((run.result or run.manifest).get("system", "reading"))
    figures = result.get("charts", [])
    declared, standard = declared_charts(figures), list(standard_charts(system))
    own = [line_chart(panel) for panel in (*panels(run.metrics, declared)[0], *series_panels(figures))]
    taken = {column for chart in declared for column, _ in chart.columns}
    standard = [chart for chart in standard if taken.isdisjoint(column for column, _ in chart.columns)]
    drawn, left_out = panels(run.metrics, standard)
    if (positions := reward_by_position(run.metrics)) is not None:
        drawn.append(position_chart(positions))
    charts = [line_chart(panel) for panel in drawn]
    others = panels(run.metrics, other_charts(run.metrics, [*declared, *standard]))[0]
    more = [line_chart(panel) for panel in others]
    arms = Arms.of(run.result)
    drawn_metrics = [metric for metric in arms.metrics if metric not in COUNTS]
    short = [metric for metric in drawn_metrics if arms.base_name(metric) in arms.table] or drawn_metrics
    readings = run.decisions is None or are_readings(run.decisions)
    selection = select_episodes(run.decisions, run.articles) if run.decisions and readings else Selection([], 0, {})
    decisions = None if readings else run.decisions
    run_config = result.get("config") or run.manifest.get("config") or {}
    maps, sizes = edit_maps(decisions, run_config) if decisions else ([], [])
    labels = group_labels(run.comparison or {})
    return environment.get_template("report.html.j2").render(
        policy=content_security_policy(style, script),
        style=Markup(style),  # this and the script are files of the package
        script=Markup(script),
        title=run.path.resolve().name,
        system=system,
        result=result,
        headline=list(headline(run)),
        comparison=run.comparison,
        contrasts=contrasts(run.comparison) if run.comparison else [],
        durations=durations(run.seconds, labels),
        arms=arms_rows(arms),
        metrics=[(title_case(metric), arms.unit(metric)) for metric in arms.metrics],
        arm_charts=[arm_chart(arms, metric) for metric in drawn_metrics if metric in short],
        more_arm_charts=[arm_chart(arms, metric) for metric in drawn_metrics if metric not in short],
        intervals=any(e["low"] is not None for metrics in arms.estimates.values() for e in metrics.values()),
        taught=[title_case(arm) for arm in arms.estimates if arm in arms.taught],
        baseline=title_case(arms.baseline) if arms.has_interval(arms.baseline) else None,
        oracles=[title_case(arm) for arm in arms.estimates if arm in arms.oracles],
        own_charts=own,
        matrices=[*matrices(figures), *sizes, *(prompt_matrices(decisions) if decisions else [])],
        edit_maps=maps,
        charts=charts,
        more_charts=more,
        left_out=left_out if system == "reading" and run.comparison is None else [],
        decisions=decision_tables(decisions) if decisions else [],
        viewer=run.comparison is None and (bool(selection.episodes) or system == "reading"),
        selection=selection,
        first=first_episode(selection),
        facts=list(flattened({key: value for key, value in run.manifest.items() if key != "config"})),
        config=run.config or as_lines(run_config),
        plot=PLOT,
        data=embedded_json(
            {
                "plot": PLOT,
                "charts": {chart.name: chart.data for chart in (*own, *charts, *more)},
                "episodes": selection.episodes,
                "articles": selection.articles,
                "first": selection.episodes.index(first_episode(selection)) if selection.episodes else 0,
            }
        ),
    )


def embedded_json(value: object) -> Markup:
    r"""JSON that is safe inside ``<script type="application/json">``: nothing in it can close or open an element.

    >>> print(embedded_json("</script><!--"))
    "\u003c/script\u003e\u003c!--"
    """
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def content_security_policy(style: str, script: str) -> str:
    """The policy that admits exactly this style sheet and this script."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def headline(run: RunFolder) -> Iterator[tuple[str, str, str]]:
    """The figures at the top of the page: (what, how much, between what)."""
    for split, gap in ((run.result or {}).get("gap_closed") or {}).items():
        what = f"gap closed, {title_case(split)}"
        if not is_finite(gap.get("mean")):
            yield what, "\N{EN DASH}", str(gap.get("reason") or "undefined")
            continue
        interval = "no interval"
        if gap.get("low") is not None:
            interval = f"{100 * gap['low']:.0f} to {100 * gap['high']:.0f} %".replace("-", "\N{MINUS SIGN}")
        against = f", to the {title_case(str(gap['oracle']))}" if gap.get("oracle") else ""
        yield what, f"{100 * gap['mean']:.0f} %".replace("-", "\N{MINUS SIGN}"), interval + against
    if run.comparison:
        compared = run.comparison.get("comparisons", [])
        claimed = sum(bool(c.get("claimed")) for c in compared)
        yield "differences that may be claimed", f"{claimed} of {len(compared)}", "of those compared below"
        yield "runs", f"{len(run.comparison.get('runs', [])):,}", ""
    if run.metrics:
        yield "steps", f"{len(run.metrics):,}", f"last: step {run.metrics[-1]['step']:,}"
    if seeds := (run.result or {}).get("seeds"):
        listed = ", ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)
        yield "seeds", str(len(seeds)) if isinstance(seeds, list) else "1", clipped(listed, 60)


def arms_rows(arms: Arms) -> list[tuple[str, list[str]]]:
    """The arms as rows of text for the table, best first in the first metric."""
    metrics = arms.metrics
    ranked = arms.ordered(metrics[0]) if metrics else []
    return [
        (title_case(arm), [_cell(arms.estimates[arm].get(metric), count=metric in COUNTS) for metric in metrics])
        for arm in [*ranked, *(arm for arm in arms.estimates if arm not in ranked)]
    ]


def first_episode(selection: Selection) -> dict[str, Any]:
    """The episode that the page opens with: the last one of the learned arm, or of the first arm there is."""
    learned = [episode for episode in selection.episodes if episode["arm"] == LEARNED]
    return (learned or selection.episodes or [{}])[-1]


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text) rows.

    >>> list(flattened({"code": {"is_dirty": False}, "streams": ["a", "b"], "trackers": []}))
    [('code: is dirty', 'no'), ('streams', 'a, b'), ('trackers', 'none')]
    """
    for key, entry in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(entry, Mapping):
            yield from flattened(entry, f"{name}: ")
        elif isinstance(entry, list) and all(isinstance(part, str | int | float) for part in entry):
            yield name, clipped(", ".join(title_case(str(part)) for part in entry) or "none", 500)
        else:
            words = {None: "unknown", True: "yes", False: "no"} if entry is None or isinstance(entry, bool) else {}
            text = words.get(entry) or (entry if isinstance(entry, str) else json.dumps(entry))
            yield name, clipped(text, 500)


def as_lines(value: Mapping[str, Any], indent: str = "") -> str:
    """A nested configuration as indented lines.

    >>> print(as_lines({"seed": 0, "update": {"steps": 4}}))
    seed: 0
    update:
      steps: 4
    """
    lines = []
    for key, entry in value.items():
        nested = as_lines(entry, indent + "  ") if isinstance(entry, Mapping) and entry else ""
        text = json.dumps(entry, ensure_ascii=False)
        lines.append(f"{indent}{key}:\n{nested}" if nested else f"{indent}{key}: {text}")
    return "\n".join(lines)


def breadth(text: str) -> str:
    """The class of a table's cell: ``long`` must break inside a word, ``wide`` wants room for its words.

    >>> breadth("learning_progress+ppo"), breadth("x" * 40), breadth("word " * 20)
    ('', 'long', 'wide')
    """
    return "long" if any(len(word) > 24 for word in text.split()) else "wide" if len(text) > 40 else ""


def shade(log_prob: float | None) -> int:
    """The colour step, 0 (certain) to 7 (7 nats or less likely, or not finite), of a token's log-probability."""
    return 7 if log_prob is None else min(7, max(0, int(-log_prob)))


def _number_or_word(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def _cell(estimate: Mapping[str, Any] | None, *, count: bool) -> str:
    if estimate is None:
        return "\N{EN DASH}"
    return f"{estimate['mean']:,.0f}" if count else interval_text(estimate)
