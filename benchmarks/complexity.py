"""``python -m benchmarks.complexity``: how much code a reader has to follow, counted on a smoke run of ``reading``.

The run happens in a fresh process under a profiler. ``--root`` measures another checkout, one of an older commit say.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

# Nothing of Preceptor may be imported here: the measured process imports this module too, and its modules are counted.
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RUN = ("run", "reading", "--preset", "smoke", "--threads", "1", "--no-report")
LOSS_PACKAGE, LOSS = "preceptor.objectives.", "_loss"
"""Where losses are defined, and how their names end."""
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
PRAGMAS = ("# noqa", "# type:", "# pragma")
"""Comments that speak to a tool."""


@dataclass(frozen=True)
class Trace:
    """What one run of the command loads, executes and stacks up.

    Attributes:
        modules: Preceptor's modules that are loaded when the run ends.
        lines: of their files.
        functions: functions and module bodies executed from ``main`` on. A comprehension belongs to its function.
        files: files that these are in.
        frames: Preceptor's own frames from ``main`` to the deepest loss, both counted.
        stack: their names, ``main`` first.
    """

    modules: int
    lines: int
    functions: int
    files: int
    frames: int
    stack: list[str]


@dataclass(frozen=True)
class Source:
    """What the source files look like, run or not.

    Attributes:
        files: Python files.
        lines: of them, empty ones too.
        comments: lines with a comment, per 100 lines. Docstrings, and comments that speak to a tool, do not count.
        longest: the five longest files and their lines.
        cycles: groups of modules that import each other, by whatever import: at the top, in a function, or for types.
    """

    files: int
    lines: int
    comments: float
    longest: dict[str, int]
    cycles: list[list[str]]


@dataclass(frozen=True)
class Bar:
    """A measured value, what it was before the redesign, and what it has to be."""

    name: str
    value: float
    before: float
    bar: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the value is on the right side of the bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def bars(trace: Trace, source: Source) -> list[Bar]:
    """A third below what was measured before the redesign, at least 4 comments in 100 lines, no cycle."""
    return [
        Bar("modules loaded", trace.modules, 119, 119 * 2 // 3),
        Bar("functions executed", trace.functions, 532, 532 * 2 // 3),
        Bar("frames from main to the loss", trace.frames, 11, 11 * 2 // 3),
        Bar("comments per 100 lines", source.comments, 1.02, 4.0, at_least=True),
        Bar("import cycles", len(source.cycles), 2, 0),
    ]


def run_trace(root: Path) -> Trace:
    """The trace of :data:`RUN` with the sources of the checkout at ``root``, in a fresh process and an empty folder.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "trace.json"
        code = f"from benchmarks.complexity import record; record({str(output)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode:
            raise RuntimeError(f"the run failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return Trace(**json.loads(output.read_text()))


def record(output: str) -> None:
    """Run the command in this process and write its :class:`Trace` to ``output``; exits as the command does."""
    from preceptor.cli import main

    package = str(Path(sys.modules["preceptor"].__file__ or "").parent) + os.sep
    executed: set[CodeType] = set()
    stack: list[str] = []

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(package):
            return
        executed.add(frame.f_code)
        if frame.f_code.co_name.endswith(LOSS) and frame.f_globals["__name__"].startswith(LOSS_PACKAGE):
            names = frames_from_main(frame, package)
            stack[:] = names if len(names) > len(stack) else stack

    arguments = [*RUN, "--out", "run"]
    sys.argv = ["preceptor", *arguments]
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    exit_code: int | str | None
    try:
        exit_code = main()
    except SystemExit as done:
        exit_code = done.code
    finally:
        sys.setprofile(None)
    if exit_code or not stack:
        sys.exit(exit_code or f"no function of {LOSS_PACKAGE}* that ends in {LOSS} was called")
    names = {(code.co_filename, code.co_qualname) for code in executed if is_counted(code)}
    loaded = [module for name, module in sys.modules.items() if name.partition(".")[0] == "preceptor"]
    trace = Trace(
        modules=len(loaded),
        lines=sum(len(Path(module.__file__ or "").read_text().splitlines()) for module in loaded),
        functions=len(names),
        files=len({file for file, _ in names}),
        frames=len(stack),
        stack=stack,
    )
    Path(output).write_text(json.dumps(asdict(trace)))


def is_counted(code: CodeType) -> bool:
    """Whether ``code`` is a function or a module's body: no comprehension (Python 3.12 inlines them), no class body."""
    is_function = bool(code.co_flags & 0x1)  # CO_OPTIMIZED: has fast locals, which a class body has not
    return code.co_name == "<module>" or (is_function and code.co_name not in COMPREHENSIONS)


def frames_from_main(frame: FrameType | None, package: str) -> list[str]:
    """Names of the functions under ``package`` from the outermost ``main`` down to ``frame``."""
    names: list[str] = []
    while frame is not None:
        # Frames of a command-line or progress library are left out: nobody reads them to understand the loss.
        if frame.f_code.co_filename.startswith(package) and frame.f_code.co_name != "<module>":
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1][names[::-1].index("main") :]


def measure_source(root: Path) -> Source:
    """Length, comments and import cycles of every file in ``src/preceptor`` of the checkout at ``root``."""
    package = root / "src" / "preceptor"
    paths = sorted(package.rglob("*.py"))
    lengths = {str(path.relative_to(package)): len(path.read_text().splitlines()) for path in paths}
    comments = sum(num_comment_lines(path) for path in paths)
    longest = sorted(lengths, key=lambda name: -lengths[name])[:5]
    return Source(
        files=len(paths),
        lines=sum(lengths.values()),
        comments=round(100 * comments / sum(lengths.values()), 2),
        longest={name: lengths[name] for name in longest},
        cycles=cycles(import_graph(package)),
    )


def num_comment_lines(path: Path) -> int:
    """Lines with a comment for a reader, on its own or behind code."""
    with path.open("rb") as file:
        comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return sum(not comment.string.startswith(PRAGMAS) for comment in comments)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module name to the names of the modules that it imports, of those in ``package``."""
    trees: dict[str, ast.Module] = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        targets: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from a import b` is an import of the module a.b where there is one, else of a.
                dotted = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {target if target in trees else node.module for target in dotted}
        graph[name] = (targets & trees.keys()) - {name}
    return graph


def cycles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Groups of two and more nodes that all reach each other.

    >>> cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})
    [['b', 'c']]
    """
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached(graph: Mapping[str, Collection[str]], start: str) -> set[str]:
    found, waiting = set[str](), list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON where it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.complexity", description=__doc__, allow_abbrev=False)
    parser.add_argument("--root", metavar="DIR", type=Path, default=ROOT, help="the checkout to measure")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure here too")
    options = parser.parse_args(argv)
    trace, source = run_trace(options.root.resolve()), measure_source(options.root)
    judged = bars(trace, source)
    table = Table(title="A smoke run of reading, as its reader meets it", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("measured", "now", "before", "bar", ""):
        table.add_column(column, justify="left" if column in ("measured", "") else "right")
    for bar in judged:
        sign = "\N{GREATER-THAN OR EQUAL TO}" if bar.at_least else "\N{LESS-THAN OR EQUAL TO}"
        verdict = "met" if bar.holds else "NOT met"
        table.add_row(bar.name, f"{bar.value:g}", f"{bar.before:g}", f"{sign} {bar.bar:g}", verdict)
    console = Console()
    console.print(table)
    lines = [
        f"loaded: {trace.modules} modules with {trace.lines:,} lines; executed: {trace.functions} functions in "
        f"{trace.files} files",
        f"to the loss: {' > '.join(trace.stack)}",
        f"sources: {source.files} files with {source.lines:,} lines; the longest: "
        + ", ".join(f"{name} {length}" for name, length in source.longest.items()),
        *(f"import cycle: {' <> '.join(group)}" for group in source.cycles),
    ]
    console.print(*lines, sep="\n", markup=False, highlight=False)
    if options.json:
        verdicts = [{**asdict(bar), "holds": bar.holds} for bar in judged]
        figures = {"trace": asdict(trace), "source": asdict(source), "bars": verdicts}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
