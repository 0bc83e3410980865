"""``report.html``: one file that holds all it shows, asks nobody for anything and runs no text of an article.

Every text goes through Jinja's escaping or through :func:`embedded_json`; the content security policy admits the one
style sheet and the one script of this package, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.errors import StorageError
from preceptor.report.arms import COUNTS, LEARNED, Arms, title_case
from preceptor.report.comparison import contrasts, durations, group_labels
from preceptor.report.curves import other_lines, panels, series_panel
from preceptor.report.decisions import decisions_section
from preceptor.report.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LineChart,
    arm_chart,
    clipped,
    interval_text,
    line_chart,
    number,
    unique_name,
)
from preceptor.report.matrix import ShadedTable, shaded_table
from preceptor.report.run_folder import RunFolder, is_finite, read_run
from preceptor.report.sections import (
    GENERAL_LINES,
    Episodes,
    Lines,
    Matrix,
    Passages,
    Section,
    Series,
    Squares,
    Table,
    declared_figures,
)
from preceptor.report.squares import SquareChart, square_chart

if TYPE_CHECKING:
    from markupsafe import Markup

MAXIMUM_BYTES = 5_000_000
PLOT = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
"""Of a curve panel: its size, and where in it the axes are."""


Sections = Callable[[RunFolder], list[Section]]
"""What a system shows of a run."""


@dataclass(frozen=True)
class DrawnSection:
    """A section as the template takes it, its figures by kind."""

    title: str
    lead: str
    anchor: str
    charts: list[LineChart] = field(default_factory=list)
    squares: list[SquareChart] = field(default_factory=list)
    matrices: list[ShadedTable] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    passages: list[Passages] = field(default_factory=list)
    episodes: Episodes | None = None
    more: list[LineChart] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def build_report(run_dir: Path, sections: Sections | None = None) -> Path:
    """Write ``run_dir / "report.html"`` from the files of the run folder and return its path.

    ``sections`` are what the run's system shows; without them the page has curves and decisions. What the run folder
    lacks is left out and the page says so. Raises :class:`DataError` for a malformed file and :class:`StorageError`
    when the page cannot be written; an older page is replaced only by a complete one.
    """
    run_dir = Path(run_dir)
    # A lone surrogate or a NUL would make the file invalid UTF-8 or HTML; model output can hold either.
    page = (
        render(read_run(run_dir), sections).replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", errors="replace")
    )
    target = run_dir / "report.html"
    # Written beside the target and renamed: a reader sees the old page or the new one, never half of one.
    temporary = target.with_suffix(".html.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{target} could not be written: {error.strerror or error}.") from error
    return target


def drawn_sections(run: RunFolder, sections: Sections | None = None) -> list[DrawnSection]:
    """Every section of a run's page: the figures that its result declares, then the system's sections.

    The last section with curves also shows every other column of numbers, folded, and says which curves have no data.
    """
    declared = declared_figures((run.result or {}).get("charts", []))
    own = (
        [Section("Over the seeds" if run.comparison else "What happened", declared, lead=_lead(run))]
        if declared
        else []
    )
    if run.comparison is None:
        # A comparison has many runs behind it, so it shows what their results declare and no single run's curves.
        own += sections(run) if sections else [Section("Training", GENERAL_LINES), *decisions_section(run)]
    # Columns that any section draws are not drawn again among "the others".
    lines = [figure for section in own for figure in section.figures if isinstance(figure, Lines)]
    taken: set[str] = set()
    names: set[str] = set()
    drawn = [_drawn(section, number, run, taken, names) for number, section in enumerate(own)]
    with_curves = [d for d, s in zip(drawn, own, strict=True) if any(isinstance(f, Lines) for f in s.figures)]
    # Whatever nobody named: a column added to metrics.jsonl appears on the page without any change here.
    others = panels(run.metrics, other_lines(run.metrics, lines))[0]
    if with_curves:
        with_curves[-1].more.extend(line_chart(panel, unique_name(panel.title, names)) for panel in others)
    return [section for section in drawn if _has_content(section)]


def _drawn(section: Section, place: int, run: RunFolder, taken: set[str], names: set[str]) -> DrawnSection:
    drawn = DrawnSection(section.title, section.lead, f"section-{place}")
    for figure in section.figures:
        match figure:
            case Lines():
                # A column that an earlier figure draws is not drawn twice.
                if taken.isdisjoint(figure.columns):
                    found, left_out = panels(run.metrics, [figure])
                    drawn.charts.extend(line_chart(panel, unique_name(panel.title, names)) for panel in found)
                    drawn.left_out.extend(left_out)
                    taken |= set(figure.columns)
            case Series():
                if (panel := series_panel(figure)) is not None:
                    drawn.charts.append(line_chart(panel, unique_name(panel.title, names)))
            case Squares():
                drawn.squares.append(square_chart(figure))
            case Matrix():
                drawn.matrices.append(shaded_table(figure))
            case Table():
                drawn.tables.append(figure)
            case Passages():
                drawn.passages.append(figure)
            case Episodes():
                drawn = replace(drawn, episodes=figure)  # frozen, hence a copy
    return drawn


def _has_content(section: DrawnSection) -> bool:
    figures = (section.charts, section.squares, section.matrices, section.tables, section.passages, section.more)
    return any(figures) or section.episodes is not None or bool(section.left_out)


def _lead(run: RunFolder) -> str:
    if not run.comparison:
        return ""
    return (
        "Lines are means over the runs, each smoothed over a twentieth of its length; bands go from the lowest run to "
        "the highest."
    )


def render(run: RunFolder, sections: Sections | None = None) -> str:
    """The page of a run as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    # Read as text and inlined; their hashes go into the policy, so the bytes must be exactly these.
    style, script = (
        files("preceptor.report").joinpath("templates", name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    environment = Environment(
        loader=PackageLoader("preceptor.report", "templates"),
        # Escaping is on for everything; StrictUndefined makes a misspelt name an error instead of an empty cell.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number_or_word, "title_case": title_case, "shade": shade}
    environment.filters |= {"clipped": clipped, "breadth": breadth}
    result = run.result or {}
    drawn = drawn_sections(run, sections)
    charts = [chart for section in drawn for chart in (*section.charts, *section.more)]
    # At most one section has episodes (see `Episodes`).
    viewed = next((section.episodes for section in drawn if section.episodes is not None), Episodes([], 0, {}))
    arms = Arms.of(run.result)
    drawn_metrics = [metric for metric in arms.metrics if metric not in COUNTS]
    # Held-out metrics carry a prefix; without it they belong to the same entry of the system's table.
    short = [metric for metric in drawn_metrics if arms.base_name(metric) in arms.table] or drawn_metrics
    # An unfinished run has no result yet, only a manifest.
    run_config = result.get("config") or run.manifest.get("config") or {}
    labels = group_labels(run.comparison or {})
    return environment.get_template("report.html.j2").render(
        policy=content_security_policy(style, script),
        style=Markup(style),  # this and the script are files of the package
        script=Markup(script),
        title=run.path.resolve().name,
        result=result,
        about=list(about(run)),
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
        sections=drawn,
        first=first_episode(viewed),
        facts=list(flattened({key: value for key, value in run.manifest.items() if key != "config"})),
        config=run.config or as_lines(run_config),
        plot=PLOT,
        data=embedded_json(
            {
                "plot": PLOT,
                "charts": {chart.name: chart.data for chart in charts},
                "episodes": viewed.episodes,
                "articles": viewed.articles,
                "first": viewed.episodes.index(first_episode(viewed)) if viewed.episodes else 0,
            }
        ),
    )


def embedded_json(value: object) -> Markup:
    r"""JSON that is safe inside ``<script type="application/json">``: nothing in it can close or open an element.

    >>> print(embedded_json("</script><!--"))
    "\u003c/script\u003e\u003c!--"
    """
    from markupsafe import Markup

    # "</script>", "<!--" and the line separators are the only texts that could end the element or the script; escaped
    # as \uXXXX they are still the same JSON.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def content_security_policy(style: str, script: str) -> str:
    """The policy that admits exactly this style sheet and this script."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        # Each hash stands for the inlined text itself, so injected script would not run even if escaping failed.
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def about(run: RunFolder) -> Iterator[str]:
    """What a run is about, for the line above its name: preset, model, article, name and tags where they say more."""
    config = (run.result or {}).get("config") or run.manifest.get("config") or {}
    if preset := run.manifest.get("preset"):
        yield f"preset {preset}"
    model = config.get("model")
    if isinstance(model, Mapping) and model.get("name"):
        yield f"model {clipped(model['name'], 80)}"
    data = config.get("data")
    if isinstance(data, Mapping) and "article" in data and run.comparison is None:
        titles = [str(article.get("title") or name) for name, article in run.articles.items()]
        yield clipped(", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else ""), 120)
    name = run.manifest.get("name")
    if name and name != run.path.resolve().name:
        yield clipped(name, 80)
    yield from (f"#{clipped(tag, 40)}" for tag in run.manifest.get("tags") or [])


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


def first_episode(viewed: Episodes) -> dict[str, Any]:
    """The episode that the page opens with: the last one of the learned policy, or of the first method there is."""
    learned = [episode for episode in viewed.episodes if episode["arm"] == LEARNED]
    return dict((learned or [*viewed.episodes] or [{}])[-1])


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text) rows.

    >>> list(flattened({"code": {"is_dirty": False}, "streams": ["a", "b"], "extensions": [{"step": 7}]}))
    [('code: is dirty', 'no'), ('streams', 'a, b'), ('extensions', '[{"step": 7}]')]
    """
    for key, entry in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(entry, Mapping):
            yield from flattened(entry, f"{name}: ")
        elif isinstance(entry, list) and all(isinstance(part, str | int | float) for part in entry):
            yield name, clipped(", ".join(title_case(str(part)) for part in entry) or "none", 500)
        elif entry is None or isinstance(entry, bool):
            yield name, {None: "unknown", True: "yes", False: "no"}[entry]
        else:
            text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
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

    >>> breadth("learning_progress+ppo"), breadth("x" * 24), breadth("x" * 25), breadth("word " * 20)
    ('', '', 'long', 'wide')
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
