"""``preceptor compare``: the runs of a sweep, and what is refused before any of them starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.cli.compare import _cells, _names, _seeds
from preceptor.errors import ConfigError
from preceptor.systems import find_system

SYSTEM = find_system("reading")


def test_every_run_of_a_sweep_has_its_seed_and_one_thread() -> None:
    """To catch: a run without --threads 1, whose sums would depend on how many cores there are."""
    inputs = {flag: [] for flag in SYSTEM.inputs}
    flag = next(iter(inputs))
    cells = _cells(
        SYSTEM, {flag: ["a/x.txt", "b/x.txt"]}, seeds=[0, 3], preset="smoke", passed=["--set", "save_every=7"]
    )
    assert [cell.name for cell in cells] == ["seed0-x", "seed3-x", "seed0-x~2", "seed3-x~2"]
    for cell, seed in zip(cells, [0, 3, 0, 3], strict=True):
        words = list(cell.arguments)
        assert words[0] == "reading"
        for option, value in (("--seed", str(seed)), ("--threads", "1"), ("--preset", "smoke")):
            assert words.count(option) == 1
            assert words[words.index(option) + 1] == value
        assert (cell.config["seed"], cell.config["save_every"]) == (seed, 7)


@pytest.mark.parametrize("passed", [["--threads", "2"], ["--seed=4"], ["--preset", "paper"], ["--out", "x"]])
def test_what_is_the_sweeps_cannot_be_passed_on(passed: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot stand after --"):
        _cells(SYSTEM, {}, seeds=[0], preset="smoke", passed=passed)


def test_seeds_are_numbers_and_ranges() -> None:
    assert _seeds(["0-3", "7,9", "2"]) == [0, 1, 2, 3, 7, 9]
    assert _names(" a, b ,,") == ["a", "b"]
    for words in (["3-1"], ["x"], ["0-99999"], []):
        with pytest.raises(ConfigError):
            _seeds(words)


def test_a_key_is_set_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before -- it is the same as after it."""
    words = ["compare", "bandit", "--preset", "smoke", "--seeds", "0-1", "--print", "--out", str(tmp_path / "all")]
    printed = []
    for setting in (["--set", "update.epochs=7"], ["--", "--set=update.epochs=7"]):
        assert main([*words, *setting]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].count("--set=update.epochs=7") == 2
    assert main([*words, "--set", "update.epoch=7"]) == 2
    assert "update.epochs" in capsys.readouterr().err
