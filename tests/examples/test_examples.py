"""Examples run, and are short; so does the notebook, cell by cell."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN_ELSEWHERE = {"mixture_torch.py", "mixture_trainer.py", "mixture_trl.py", "verifiers_reading.py"}


WHOLE_METHODS = {"reading_loop.py": 190}
"""Lines that an example may have which is a whole method in one file; the others show one thing."""


def test_every_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < WHOLE_METHODS.get(path.name, 60), path.name


@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - RUN_ELSEWHERE))
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def test_the_words_are_learned(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "bandit_words.py"), run_name="__main__")
    probabilities = [float(line.split("P(tea) ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
    assert probabilities[-1] > probabilities[0]


def test_the_notebook_runs_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept in the repository"
            exec("".join(cell["source"]), names)
    assert isinstance(names["result"], dict)
