from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import DataError
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.loop import train
from preceptor.systems.surgery.verify import verify
from tests.systems.surgery.small import small_config, write_text
from tests.systems.surgery.test_loop import SERVICES, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurgeryConfig]:
    folder = tmp_path_factory.mktemp("surgery")
    config = small_config(write_text(folder), "controls.objectives=[]")
    with start(config, folder / "run") as run:
        train(config, run, SERVICES)
    return folder / "run", config


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "decisions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_reward_is_earned_again(finished: tuple[Path, SurgeryConfig]) -> None:
    folder, config = finished
    replayed = list(verify(config, folder, SERVICES))
    assert len(replayed) == 2 * len(decisions(folder)) == 2 * (5 * 6 + 3)
    assert any(row["committed"] for row in decisions(folder))
    assert all(row.recorded == row.recomputed for row in replayed)


@pytest.mark.parametrize("fault", ["action", "committed"])
def test_a_changed_decision_is_found(finished: tuple[Path, SurgeryConfig], tmp_path: Path, fault: str) -> None:
    folder, config = finished
    rows = decisions(folder)
    place = next(index for index, row in enumerate(rows) if row["committed"] and row["edit"] < 5)
    if fault == "action":
        rows[place]["action"][0] = -rows[place]["action"][0]
    else:
        rows[place]["committed"] = False
    (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    assert any(row.recorded != row.recomputed for row in verify(config, tmp_path, SERVICES))


def test_decisions_that_break_off_are_named(finished: tuple[Path, SurgeryConfig], tmp_path: Path) -> None:
    folder, config = finished
    lines = (folder / "decisions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "decisions.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(DataError, match="no row for learned, edit 5"):
        list(verify(config, tmp_path, SERVICES))
