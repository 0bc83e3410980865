"""A surgeon that was trained before, in the three phases beside the one that is trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preceptor.errors import ConfigError
from preceptor.report.run_folder import read_run
from preceptor.systems.surgery.evaluate import CHARTS
from preceptor.systems.surgery.loop import train
from preceptor.systems.surgery.report import sections
from preceptor.systems.surgery.verify import verify
from tests.systems.surgery.small import small_config, write_text
from tests.systems.surgery.test_loop import SERVICES, start
from tests.systems.surgery.test_repair import write_surgeon


def test_it_edits_and_learns_beside_the_other_and_is_replayed(tmp_path: Path) -> None:
    surgeon = write_surgeon(tmp_path / "surgeon", -1.0, feature="gradient_share")
    arms = (
        "controls.arms=[no_edit, learned, joint, shuffled, random, training]"  # the next agents see other states again
    )
    config = small_config(
        write_text(tmp_path), f"surgeon=pretrained:{surgeon}", arms, "controls.objectives=[]", "save_every=100"
    )
    with start(config, tmp_path / "run") as run:
        result = train(config, run, SERVICES)
        run.write_result(result)
    assert {"pretrained", "joint_pretrained", "shuffled", "random"} <= set(result["arms"])
    assert "Learning with the pretrained surgeon" in result["verdict"]
    pairs = {(c["arm"], c["baseline"]) for c in result["comparisons"]}
    assert {("pretrained", "no_edit"), ("pretrained", "learned"), ("joint_pretrained", "training")} <= pairs
    rows = [json.loads(line) for line in (tmp_path / "run" / "decisions.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["arm"] == "pretrained"]
    assert len(own) == config.phases.surgery_edits
    assert own[0]["sites"] == [["layer 0 output", "head 1"], ["layer 0 output", "head 2"]]
    assert own[0]["action"] != own[1]["action"], "it sees the same text again and again"
    assert all(row.recorded == row.recomputed for row in verify(config, tmp_path / "run", SERVICES))
    figures = sections(read_run(tmp_path / "run"))[0].figures
    titles = [figure.title for figure in figures if hasattr(figure, "title")]
    assert any(title.lower().startswith("pretrained:") for title in titles), titles
    assert any("pretrained.reward" in chart["columns"] for chart in CHARTS)


@pytest.mark.parametrize("name", ["pretrained", "pretrained:", "other"])
def test_a_bad_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained or pretrained:RUN"):
        small_config(write_text(tmp_path), f"surgeon={name}")
