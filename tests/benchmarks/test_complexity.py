"""The complexity count: a small package whose every figure is known, and the checkout itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import complexity

PACKAGE = {
    "__init__.py": "",
    "cli.py": """
        from __future__ import annotations
        import sys
        from functools import reduce

        def main():
            from preceptor.loop import train
            assert sys.argv[1:3] == ["run", "reading"]
            return train()

        def never_called():
            # nor counted
            return 0
        """,
    "loop.py": """
        from functools import reduce
        from preceptor.objectives import policy

        class Config:  # a body that is executed, and no function
            size = 1

        def train():  # noqa: D103
            values = [value for value in range(3)]
            # reduce() calls step() from C, which leaves no frame of its own.
            return reduce(step, values, 0)

        def step(total, value):
            return policy.value_loss() if value == 1 else inner(value)

        def inner(value):
            return policy.policy_loss() * value
        """,
    "objectives/__init__.py": "",
    "objectives/policy.py": "def policy_loss():\n    return 0  # nats\n\ndef value_loss():\n    return 0\n",
    "unused.py": "from preceptor import other\n",
    "other.py": "def f():\n    import preceptor.unused\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in PACKAGE.items():
        path = tmp_path / "src" / "preceptor" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("\n        ", "\n").lstrip("\n"))
    return tmp_path


def test_a_run_of_a_small_package_is_counted(checkout: Path) -> None:
    trace = complexity.run_trace(checkout)
    assert trace.stack == ["main", "train", "step", "inner", "policy_loss"]  # the deepest loss, not the first
    assert trace.frames == 5
    assert trace.modules == 5  # preceptor, cli, loop, objectives, objectives.policy
    # main, train, step, inner and two losses; bodies of loop, objectives and policy, imported once main runs
    assert (trace.functions, trace.files) == (9, 4)


def test_a_run_that_fails_says_why(checkout: Path) -> None:
    (checkout / "src/preceptor/loop.py").write_text("def train():\n    raise SystemExit('no article')\n")
    with pytest.raises(RuntimeError, match="exit code 1:\nno article"):
        complexity.run_trace(checkout)
    (checkout / "src/preceptor/loop.py").write_text("def train():\n    return 0\n")
    with pytest.raises(RuntimeError, match="no function of preceptor"):
        complexity.run_trace(checkout)


def test_sources_are_counted(checkout: Path) -> None:
    source = complexity.measure_source(checkout)
    assert source.files == len(PACKAGE)
    # Comments: in cli 1, in loop 2 (`noqa` speaks to a tool), in policy 1.
    assert source.comments == round(100 * 4 / source.lines, 2)
    assert next(iter(source.longest)) == "loop.py"
    assert source.cycles == [["preceptor.other", "preceptor.unused"]]


def test_bars_are_a_third_below_and_judged(checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complexity.main(["--root", str(checkout), "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    judged = {bar["name"]: (bar["bar"], bar["holds"]) for bar in figures["bars"]}
    assert judged == {
        "modules loaded": (79, True),
        "functions executed": (354, True),
        "frames from main to the loss": (7, True),
        "comments per 100 lines": (4.0, True),
        "import cycles": (0, False),
    }
    shown = capsys.readouterr().out
    assert "NOT met" in shown
    assert "preceptor.other <> preceptor.unused" in shown


@pytest.mark.slow  # a whole smoke run under a profiler
def test_the_checkout_itself() -> None:
    trace = complexity.run_trace(complexity.ROOT)
    assert trace.stack[0] == "main"
    assert trace.stack[-1].endswith("_loss")
    assert trace.modules >= trace.files / 2 > 10
