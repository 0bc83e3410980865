"""What came of a run, or of a comparison of runs, read from its folder."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.errors import ConfigError, DataError
from preceptor.runs.record import require_unchanged

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Passage:
    """A sentence pair of an article: its place there, the key it is found by, and the value that is read."""

    index: int
    key: str
    value: str


class Order(Mapping[str, Sequence[Passage]]):
    """Article → its passages in the most likely order of the learned policy; it prints as numbered sentences."""

    def __init__(self, passages: Mapping[str, Sequence[Passage]]) -> None:
        self._passages = dict(passages)

    def __getitem__(self, article: str) -> Sequence[Passage]:
        return self._passages[article]

    def __iter__(self) -> Iterator[str]:
        return iter(self._passages)

    def __len__(self) -> int:
        return len(self._passages)

    def __repr__(self) -> str:
        lines = []
        for article, passages in self._passages.items():
            lines.append(article)
            lines += [f"{place:3}. {passage.value}" for place, passage in enumerate(passages, start=1)]
        return "\n".join(lines)


class Result:
    """A finished run, or a comparison of finished runs.

    It prints as the table of methods with the verdict below it, and shows as HTML in a notebook.

    Attributes:
        folder: where it lies.
        data: what ``result.json`` says, whole.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads ``folder``.

        Raises:
            ConfigError: it holds no result: no run, or one that has not ended.
            StorageError: a file of the run has changed since it ended.
            DataError: its ``result.json`` is damaged.
        """
        self.folder = Path(folder)
        path = self.folder / "result.json"
        if not path.is_file():
            # Two reasons, two remedies.
            begun = (self.folder / "manifest.json").is_file()
            reason = f"has not ended; go on with: preceptor resume {self.folder}" if begun else "is no run folder"
            raise ConfigError(f"{self.folder} {reason}")
        require_unchanged(self.folder)
        try:
            data = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); restore it from a copy") from error
        if not isinstance(data, dict):
            raise DataError(f"{path} must hold an object, got {type(data).__name__}; restore it from a copy")
        self.data: dict[str, Any] = data

    @property
    def system(self) -> str:
        """The system's name."""
        return str(self.data.get("system", ""))

    @property
    def verdict(self) -> str:
        """What may be claimed, in words; its first sentence says what happened."""
        return str(self.data.get("verdict", ""))

    @property
    def headline(self) -> str:
        """The verdict's first sentence: what happened, in plain words."""
        # A point ends a sentence only before a capital letter: numbers have points too.
        found = re.match(r".*?\.(?= +[A-Z]|$)", self.verdict, re.DOTALL)
        return found[0] if found else self.verdict

    @property
    def records(self) -> list[dict[str, Any]]:
        """A row for each method, item, split and seed, with its metrics; the table is made of them."""
        return list(self.data.get("records", []))

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each method and metric: ``method``, ``metric``, ``mean``, ``low``, ``high``, ``unit``, ``n``.

        ``pandas.DataFrame(result.table)`` takes it as it is.
        """
        return [
            {"method": method, "metric": metric, **estimate}
            for method, metrics in self.data.get("arms", {}).items()
            for metric, estimate in metrics.items()
        ]

    @cached_property
    def order(self) -> Order:
        """Each article's passages in the most likely order of the learned policy (``reading``).

        Raises:
            ConfigError: the run is of another system, or of a version that did not write orders.
        """
        if "order" not in self.data:
            raise ConfigError(
                f"{self.folder} has no reading order; runs of `reading` of one article have one, this is "
                f"{'a study' if 'study' in self.data else self.system}"
            )
        # articles.json holds the texts; the order in result.json is indices into them.
        articles = json.loads((self.folder / "articles.json").read_bytes())
        return Order(
            {
                article: [
                    Passage(index, articles[article]["pairs"][index]["key"], articles[article]["pairs"][index]["value"])
                    for index in order
                ]
                for article, order in self.data["order"].items()
            }
        )

    def model(self) -> Any:
        """The trained model, loaded with Transformers (a PEFT model where the run trained an adapter)."""
        from preceptor.runs.export import MODEL, load_model

        require_unchanged(self.folder, models=True)
        return load_model(self.folder / MODEL)[0]

    def tokenizer(self) -> Any:
        """The trained model's tokenizer."""
        from preceptor.runs.export import MODEL, load_model

        return load_model(self.folder / MODEL)[1]

    @property
    def report(self) -> Path:
        """The page of the run, written if it is not there yet."""
        page = self.folder / "report.html"
        if not page.is_file():
            write_page(self.folder)
        return page

    def renderables(self, *, width: int = 80) -> Iterator[RenderableType]:
        """The tables for a terminal of ``width`` characters, for ``rich.print``."""
        comparison = self.folder / "comparison.json"
        if comparison.is_file():
            # Imported here: a script that reads numbers from a result should not load Rich or Jinja.
            from preceptor.comparison.table import comparison_tables

            yield from comparison_tables(json.loads(comparison.read_bytes()))
        elif "arms" in self.data:
            from preceptor.report.arms import Arms, arms_tables

            yield from arms_tables(Arms.of(self.data), title=f"{self.system}: every method", width=width)

    def __repr__(self) -> str:
        from rich.console import Console

        # Wider than most terminals, so that a notebook or a REPL wraps no table.
        console = Console(file=io.StringIO(), width=100, force_terminal=False)
        for table in self.renderables():
            console.print(table)
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        return f"{printed}\n{self.verdict}\n{self.folder}".strip()

    def _repr_html_(self) -> str:
        """The table of methods and the verdict, as a notebook shows them."""
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
            for row in self._table_rows()
        )
        header = "".join(f"<th>{name}</th>" for name in ("method", "metric", "mean", "95 % interval", "unit"))
        return (
            f"<p>{html.escape(self.verdict)}</p><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p><code>{html.escape(str(self.folder))}</code></p>"
        )

    def _table_rows(self) -> Iterator[tuple[Any, ...]]:
        # What the system shows by default; `table` itself has every metric.
        shown = set(self.data.get("table", []))
        for row in self.table:
            if shown and row["metric"] not in shown:
                continue
            interval = None if row.get("low") is None else f"{row['low']:.4g} to {row['high']:.4g}"
            method, metric = row["method"].replace("_", " "), row["metric"].replace("_", " ")
            yield method, metric, row.get("mean"), interval, row.get("unit")


def _cell(value: object) -> str:
    """What a table shows.

    >>> _cell(None), _cell(0.123456), _cell("nats")
    ('', '0.1235', 'nats')
    """
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_page(folder: Path) -> Path:
    """Writes ``report.html`` of the run or comparison in ``folder``, with what its system shows, and returns its path.

    Raises:
        DataError: a malformed file.
        StorageError: a file has changed since the run ended, or the page cannot be written; an older one is then
            untouched.
    """
    from preceptor.report.page import build_report

    require_unchanged(folder)
    from preceptor.systems import find_system, known_systems

    name = ""
    for record in ("result.json", "manifest.json"):
        if not name and (folder / record).is_file():
            with contextlib.suppress(ValueError, AttributeError):  # a damaged file is named when the page is made
                name = str(json.loads((folder / record).read_bytes()).get("system", ""))
    # A run of a package that is not installed here still has its curves and decisions.
    return build_report(folder, find_system(name).sections if name in known_systems() else None)
