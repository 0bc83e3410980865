"""``python -m benchmarks [NAME …]``: measures, prints, and records what a clean checkout gives."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.measurement import measure
from preceptor.errors import ConfigError, PreceptorError, did_you_mean

BENCHMARKS = {
    "log-probs": "log_probs",
    "kernels": "kernels",
    "decode": "decode",
    "episodes": "episodes",
    "update": "update",
    "grpo": "grpo",
    "ppo": "ppo",
    "parts": "parts",
    "start-up": "startup",
    "growth": "growth",
    "gpu": "gpu",
    "scale": "scale",
    "passes": "passes",
}
"""Name, and the module that holds ``comparisons``."""


def table(row: Mapping[str, Any]) -> Table:
    """The row for a terminal."""
    differences = ", ".join(
        f"{name} differ by at most {value:.1e}" for name, value in row["largest_difference"].items()
    )
    found = Table(
        title=f"{row['benchmark']} | {row['case']} | {row['threads']} thread(s)",
        caption=f"median (min-max) of {row['rounds']} rounds; load average {row['load_average']:.1f}; {differences}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    # What a way says of its own seconds, such as how many are generation.
    parts = sorted({clock for clocks in row["seconds"].values() for clock in clocks} - {"wall", "cpu"})
    columns = ("way", "wall s", "CPU s", *(f"{part} s" for part in parts), "units/s", "MiB", "of limit")
    for column in columns:
        found.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for way, clocks in row["seconds"].items():
        cells = [f"{clocks[clock]['median']:.3g}" for clock in ("wall", "cpu")]
        cells[0] += f" ({clocks['wall']['minimum']:.3g}-{clocks['wall']['maximum']:.3g})"
        units, memory = row["units"].get(way), row["extra_memory_mib"].get(way)
        share = row["share_of_limit"].get(way)
        found.add_row(
            way,
            *cells,
            *(f"{clocks[part]['median']:.3g}" if part in clocks else "" for part in parts),
            _rate(units / clocks["wall"]["median"]) if units else "",
            f"{memory:.0f}" if memory is not None else "",
            f"{share:.0%}" if share is not None else "",
        )
    return found


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def verdicts(row: Mapping[str, Any]) -> list[str]:
    """One line for every bar."""
    lines = []
    for bar in row["bars"]:
        measured = row["speed_up"][f"{bar['way']} over {bar['against']}"]
        parts = []
        if bar["at_least"] is not None:
            parts.append(
                f"{measured['wall']:.2f}x in wall, {measured['cpu']:.2f}x in CPU time; bar {bar['at_least']:.2g}x"
            )
        if bar["memory_at_most"] is not None:
            share = row["extra_memory_mib"][bar["way"]] / row["extra_memory_mib"][bar["against"]]
            parts.append(f"{share:.0%} of the memory; bar {bar['memory_at_most']:.0%}")
        if bar["seconds_at_most"] is not None:
            parts.append(f"{row['seconds'][bar['way']]['wall']['median']:.2f} s; bar {bar['seconds_at_most']} s")
        if bar["limit_at_least"] is not None:
            parts.append(f"{row['share_of_limit'][bar['way']]:.0%} of the limit; bar {bar['limit_at_least']:.0%}")
        lines.append(
            f"{bar['way']} against {bar['against']}: {'; '.join(parts)}: {'met' if bar['holds'] else 'NOT met'}"
        )
    return lines


def main(argv: Sequence[str] | None = None, *, root: Path = record.ROOT) -> int:
    """Run the named benchmarks (all, without a name) in the checkout at ``root``; returns the exit code."""
    options = _parser().parse_args(argv)
    console = Console()
    console = Console(width=max(console.width, 110))  # a log keeps whole rows too
    try:
        for name in options.names:
            if name not in BENCHMARKS:
                raise ConfigError(
                    f"there is no benchmark '{name}'{did_you_mean(name, BENCHMARKS)}; {', '.join(BENCHMARKS)}"
                )
        record.require_own_package(root)
        measured = record.revision(root)
        if not options.allow_dirty:
            measured.require_clean()
        torch.set_num_threads(options.threads)
        for name in options.names or BENCHMARKS:
            module = importlib.import_module(f"benchmarks.{BENCHMARKS[name]}")
            for comparison in module.comparisons(quick=options.quick):
                row = measure(comparison, rounds=options.rounds, threads=options.threads)
                console.print(table(row))
                console.print(*verdicts(row), sep="\n")
                if not (measured.dirty or options.quick):
                    record.append(row, measured, root=root)
        if measured.dirty or options.quick:
            console.print("Not recorded: the checkout has uncommitted changes, or the sizes are --quick ones.")
    except PreceptorError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="Close what else is running: on a busy machine the wall times, and less so the ratios, are noise.",
        allow_abbrev=False,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"which: {', '.join(BENCHMARKS)} (default all)")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="times that each way is timed (default 3)")
    parser.add_argument(
        "--threads", metavar="N", type=int, default=1, help="threads of torch, for all ways (default 1)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; not recorded")
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted changes; they are not recorded")
    return parser


if __name__ == "__main__":
    sys.exit(main())
