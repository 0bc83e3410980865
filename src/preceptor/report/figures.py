"""Figures for papers and READMEs: matplotlib figures of a run's curves and arms, saved as PNG and SVG.

Each function takes what the run folder holds and returns a ``Figure``, or raises :class:`DataError` where the columns
that it draws are absent. Colours are told apart by colour-blind readers and, by dash and marker, in greyscale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from preceptor.errors import DataError, StorageError
from preceptor.report.arms import Arms, title_case
from preceptor.report.curves import READING_CHARTS, Panel, panels, reward_by_position
from preceptor.report.run_folder import JsonObject, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, OCHRE, INK = "#0060a8", "#c2571a", "#8a939c", "#8a5a00", "#1c2024"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e9",
    "svg.fonttype": "none",
    "svg.hashsalt": "preceptor",
    "figure.constrained_layout.use": True,
}


def reward_figure(rows: Sequence[JsonObject]) -> Figure:
    """Raw and normalised reward over the steps, each with a band of one standard deviation."""
    return _curves_figure(rows, ("reward", "normalised_reward"))


def entropy_figure(rows: Sequence[JsonObject]) -> Figure:
    """Query entropy against its maximum, and selection entropy as a share of ln(remaining)."""
    return _curves_figure(rows, ("query_entropy", "selection_entropy"))


def kl_figure(rows: Sequence[JsonObject]) -> Figure:
    """KL to the reference on value tokens and on selections."""
    return _curves_figure(rows, ("kl", "selection_kl"))


def passed_figure(rows: Sequence[JsonObject]) -> Figure:
    """The share of episodes that pass the filter."""
    return _curves_figure(rows, ("passed_fraction",))


def position_figure(rows: Sequence[JsonObject]) -> Figure:
    """Mean reward at each position of the trajectory, first tenth of the steps against the last."""
    positions = reward_by_position(rows)
    if positions is None:
        raise DataError("no row has 'reward_by_position'; the figure is drawn from that column.")
    figure, (axes,) = _figure(1)
    for values, label, style, colour in zip(
        positions, ("first tenth of the steps", "last tenth"), ("--", "-"), (ORANGE, BLUE), strict=True
    ):
        axes.plot(range(1, len(values) + 1), values, style, color=colour, marker="o", markersize=3.5, label=label)
    _label(axes, title="Reward by position", x="position in the trajectory", y="nats per value token", legend=True)
    axes.locator_params(axis="x", integer=True)
    return figure


def arms_figure(arms: Arms, metric: str) -> Figure:
    """Every arm's mean and interval, best on top, with the baseline's band and the best oracle marked.

    Raises :class:`DataError` when no arm has ``metric``.
    """
    names = arms.ordered(metric)
    if not names:
        raise DataError(f"no arm has the metric {metric!r}.")
    figure, (axes,) = _figure(1, height=0.6 + 0.26 * len(names))
    baseline = arms.estimates.get(arms.baseline, {}).get(metric)
    if baseline and baseline["low"] is not None:
        label = f"{title_case(arms.baseline)}, interval"
        axes.axvspan(baseline["low"], baseline["high"], color=GREY, alpha=0.25, linewidth=0, label=label)
    if (oracle := arms.best_oracle(metric)) is not None:
        axes.axvline(oracle, color=OCHRE, linestyle=":", linewidth=1.3, label="best oracle")
    for y, name in enumerate(reversed(names)):
        estimate, kind = arms.estimates[name][metric], arms.kind(name)
        colour = {"learned": BLUE, "oracle": OCHRE}.get(kind, INK)
        if estimate["low"] is not None:
            axes.plot(
                [estimate["low"], estimate["high"]], [y, y], color=colour, linewidth=2.6 if kind == "learned" else 1.5
            )
        marker, face = ("D", "white") if kind == "oracle" else ("o", colour)
        size = 6 if kind == "learned" else 4.5
        axes.plot(estimate["mean"], y, marker, color=colour, markerfacecolor=face, markersize=size)
    axes.set_yticks(range(len(names)), [title_case(name) for name in reversed(names)])
    axes.grid(visible=False, axis="y")
    for tick, name in zip(axes.get_yticklabels(), reversed(names), strict=True):
        tick.set_fontweight("bold" if arms.kind(name) == "learned" else "normal")
        tick.set_fontstyle("italic" if arms.kind(name) == "oracle" else "normal")
    _label(axes, title=title_case(metric), x=arms.unit(metric), y="", legend=bool(axes.get_legend_handles_labels()[1]))
    return figure


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write ``figure`` to ``path`` as ``.png`` (200 dots per inch) and ``.svg``, the same bytes every time."""
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    from matplotlib import rc_context

    try:
        with rc_context(_STYLE):  # type: ignore[arg-type]
            figure.savefig(png, dpi=200)
            figure.savefig(svg, metadata={"Date": None})
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror or error}.") from error
    return png, svg


def write_figures(run_dir: Path, out_dir: Path) -> list[Path]:
    """Every figure that the run folder has data for, as PNG and SVG in ``out_dir``."""
    run = read_run(run_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, draw in (
        ("reward", reward_figure),
        ("entropy", entropy_figure),
        ("kl", kl_figure),
        ("passed", passed_figure),
        ("reward_by_position", position_figure),
    ):
        try:
            figure = draw(run.metrics)
        except DataError:  # its columns are absent
            continue
        written += save(figure, out_dir / name)
    arms = Arms.of(run.result)
    for metric in ("order_gain", "selection_gain", "progress_auc"):
        if arms.ordered(metric):
            written += save(arms_figure(arms, metric), out_dir / f"arms_{metric}")
    return written


def _curves_figure(rows: Sequence[JsonObject], names: tuple[str, ...]) -> Figure:
    wanted = [chart for chart in READING_CHARTS if chart.name in names]
    drawn = [panel for panel in panels(rows, READING_CHARTS)[0] if panel.chart in wanted]
    if not drawn:
        columns = ", ".join(column for chart in wanted for column, _ in chart.columns)
        raise DataError(f"no row has a finite value in {columns}; the figure is drawn from these columns.")
    figure, all_axes = _figure(len(drawn))
    for panel, axes in zip(drawn, all_axes, strict=True):
        _draw(panel, axes)
    return figure


def _draw(panel: Panel, axes: Axes) -> None:
    for curve, colour, style in zip(panel.curves, (BLUE, ORANGE), ("-", "--"), strict=False):
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(curve.steps, curve.values, style, color=colour, linewidth=1.6, label=curve.label)
    for bound in panel.bounds:
        axes.plot(bound.steps, bound.values, ":", color=INK, linewidth=1.1, label=bound.label)
    if panel.chart.limits:
        axes.set_ylim(*panel.chart.limits)
    legend = bool(panel.bounds) or len(panel.curves) > 1
    _label(axes, title=panel.chart.title, x="step", y=panel.chart.unit, legend=legend)


def _label(axes: Axes, *, title: str, x: str, y: str, legend: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend(frameon=False)


def _figure(num_panels: int, *, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot: nothing global is touched and none has to be closed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.4 * num_panels if num_panels > 1 else 5.2, height))
        FigureCanvasAgg(figure)
        return figure, [figure.add_subplot(1, num_panels, k + 1) for k in range(num_panels)]
