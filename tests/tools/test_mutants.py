from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tools.mutants import __main__ as mutants
from tools.mutants.__main__ import ROOT, Fault, main, read_faults, tried


def test_there_are_two_hundred_faults_over_all_packages() -> None:
    faults = read_faults()
    assert len(faults) >= 200
    assert len({fault.key for fault in faults}) == len(faults)
    packages = {path.name for path in (ROOT / "src" / "preceptor").iterdir() if (path / "__init__.py").is_file()}
    assert {Path(fault.file).parts[2] for fault in faults} >= packages
    planted = [fault.planted((ROOT / fault.file).read_text()) for fault in faults if (ROOT / fault.file).is_file()]
    # A line that was rewritten makes its fault stale; too many of them, and the list has to be renewed.
    applied = [source for source in planted if source is not None]
    assert len(applied) >= 200
    for source in applied:
        ast.parse(source)


def test_a_fault_is_planted_tried_and_taken_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, results = tmp_path / "root", tmp_path / "results.jsonl"
    (root / "src").mkdir(parents=True)
    (root / "tests").mkdir()
    source = "def double(x):\n    return 2 * x\n\n\ndef unused(x):\n    return x\n"
    (root / "src" / "twice.py").write_text(source)
    (root / "tests" / "test_twice.py").write_text(
        "from twice import double\n\ndef test_it():\n    assert double(3) == 6\n"
    )
    listed = [
        Fault("src/twice.py", "return 2 * x", "return 3 * x", ("tests",)),
        Fault("src/twice.py", "return x\n", "return -x\n", ("tests",)),
        Fault("src/twice.py", "return gone", "return 0", ("tests",)),
        Fault("src/twice.py", "return 2 * x", "return 4 * x", ("no_such_test.py",)),
    ]
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "read_faults", lambda: listed)
    assert main(["--results", str(results)]) == 1  # one of three was caught
    assert [tried(results)[fault.key] for fault in listed] == ["caught", "survived", "stale", "pytest ended with 4"]
    by = [json.loads(line)["by"] for line in results.read_text().splitlines()]
    assert by == ["tests/test_twice.py::test_it", "", "", ""]
    assert (root / "src" / "twice.py").read_text() == source
    lines = len(results.read_text().splitlines())
    assert main(["--results", str(results), "--only", "twice"]) == 1
    assert len(results.read_text().splitlines()) == lines + 2  # the stale one and the one that said nothing
