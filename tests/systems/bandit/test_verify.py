from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.cli import main
from preceptor.config import from_dict
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.verify import verify
from preceptor.systems.base import Services
from tests.systems.bandit.test_loop import HISTORY, run


@pytest.mark.parametrize("settings", [(), HISTORY], ids=["prompt", "history"])
def test_recorded_words_are_paid_again_and_a_changed_one_is_found(tmp_path: Path, settings: tuple[str, ...]) -> None:
    folder, services = tmp_path / "run", Services(cache_dir=tmp_path)
    assert run(folder, *settings) == 0
    config = from_dict(BanditConfig, json.loads((folder / "manifest.json").read_text())["config"])
    replayed = list(verify(config, folder, services))
    assert len(replayed) == (5 * 4 * 3 if settings else 36)
    assert all(entry.recorded == entry.recomputed for entry in replayed)
    assert main(["replay", str(folder)]) == 0
    path = folder / "decisions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    if settings:
        row["rewards"][0] += 1.0
    else:
        row["reward"] += 1.0
    path.write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n", encoding="utf-8")
    assert sum(entry.recorded != entry.recomputed for entry in verify(config, folder, services)) == 1
    assert main(["replay", str(folder)]) == 7
