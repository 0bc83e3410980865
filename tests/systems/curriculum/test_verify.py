"""Recorded decisions computed again: they agree, and a forged one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.config import from_dict
from preceptor.errors import DataError
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.kinds import verify
from tests.systems.curriculum.small import SERVICES, result_of


def test_recorded_decisions_are_reproduced(finished: Path) -> None:
    config = from_dict(CurriculumConfig, result_of(finished)["config"])
    replayed = list(verify(config, finished, SERVICES))
    assert len(replayed) > 100
    for entry in replayed:
        assert entry.recomputed == pytest.approx(entry.recorded, abs=1e-5), entry.where
    kinds = {entry.where.rpartition(", ")[2].split()[0] for entry in replayed}
    assert kinds == {"weight", "repetition", "log_likelihood", "reward"}


def test_a_forged_decision_is_found(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "decisions.jsonl").read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "rollout")
    row = json.loads(lines[index])
    row["token_ids"][1] = row["token_ids"][0]  # a repetition that was not rewarded as one
    forged = [*lines[:index], json.dumps(row), *lines[index + 1 :]]
    (tmp_path / "decisions.jsonl").write_text("\n".join(forged) + "\n")
    config = from_dict(CurriculumConfig, result_of(finished)["config"])
    wrong = [
        entry.where for entry in verify(config, tmp_path, SERVICES) if abs(entry.recomputed - entry.recorded) > 1e-4
    ]
    assert any("repetition" in where for where in wrong)


def test_a_decision_of_an_unknown_method_is_refused(finished: Path, tmp_path: Path) -> None:
    line = (finished / "decisions.jsonl").read_text().splitlines()[0]
    (tmp_path / "decisions.jsonl").write_text(json.dumps(json.loads(line) | {"arm": "other"}) + "\n")
    config = from_dict(CurriculumConfig, result_of(finished)["config"])
    with pytest.raises(DataError, match="has the method other, which is not in the configuration"):
        list(verify(config, tmp_path, SERVICES))
