"""The surgeon's edits as a map, read back from its paths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from preceptor.report.matrix import shaded_table
from preceptor.report.run_folder import read_run
from preceptor.report.sections import Matrix, Squares
from preceptor.report.squares import CELL, LEFT, MAXIMUM_ACTIONS, TOP, square_chart
from preceptor.systems.surgery.report import action_names, edit_figures, sections

CONFIG: dict[str, Any] = {
    "edit": {"kind": "head_scale", "roles": ["output", "query"], "layers": [3]},
    "student": {"num_heads": 2},
}


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "decisions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def squares(path: str) -> list[tuple[float, float, float]]:
    """(centre x, centre y, side) of every square of a path."""
    found = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path)
    return [(float(x) + float(side) / 2, float(y) + float(side) / 2, float(side)) for x, y, side in found]


def test_numbers_are_squares_in_their_column_and_row(tmp_path: Path) -> None:
    row = {"arm": "learned", "edit": 1, "action": [1.0, -0.25, 0.0, 0.5], "reward": 0.125, "committed": True}
    diagram, matrix = edit_figures(written(tmp_path, [row]), CONFIG)
    assert isinstance(diagram, Squares)
    assert isinstance(matrix, Matrix)
    assert diagram.title == "learned: 1 of 1 committed"
    drawn, sizes = square_chart(diagram), shaded_table(matrix)
    assert [label.label for label in drawn.labels] == [
        "layer 3 query head 1",
        "head 2",
        "layer 3 output head 1",
        "head 2",
    ]
    (first, last), (second, zero) = squares(drawn.above), squares(drawn.below)
    x = LEFT + CELL / 2
    assert [(square[0], square[1]) for square in (first, second, last)] == [
        (pytest.approx(x, abs=0.1), pytest.approx(TOP + CELL * (line + 0.5), abs=0.1)) for line in (0, 1, 3)
    ]
    # The area is the size: a quarter has half the side.
    assert second[2] == pytest.approx(first[2] / 2)
    assert zero[2] == 0
    assert [(column.text, column.marked) for column in drawn.columns] == [("edit 1, reward 0.125, committed", True)]
    assert sizes.columns == ["layer 3 query", "layer 3 output"]
    assert [cell.text for cell in sizes.rows[0][1]] == ["0.625", "0.250"]


def test_of_many_edits_the_committed_ones_are_drawn(tmp_path: Path) -> None:
    rows = [{"arm": "a", "edit": k, "action": [0.5], "reward": 0.0, "committed": k % 100 == 50} for k in range(1_000)]
    diagram, _ = edit_figures(written(tmp_path, rows), {})
    assert isinstance(diagram, Squares)
    drawn = square_chart(diagram)
    assert len(drawn.columns) == MAXIMUM_ACTIONS
    assert drawn.width > drawn.columns[-1].x + CELL  # nothing is cut off
    assert sum(column.marked for column in drawn.columns) == 10
    assert diagram.title == "a: 10 of 1000 committed"
    assert drawn.note == f"{MAXIMUM_ACTIONS} are drawn, evenly spaced, marked ones by preference"


def test_numbers_that_fit_no_layout_are_numbered() -> None:
    assert action_names(3, CONFIG) == [("number 1", ""), ("number 2", ""), ("number 3", "")]
    assert action_names(2, {}) == [("number 1", ""), ("number 2", "")]
    low_rank = {"edit": {"kind": "low_rank", "roles": ["value"], "layers": [], "rank": 2}}
    assert [part for _, part in action_names(4, low_rank)] == ["1, 1", "1, 2", "2, 1", "2, 2"]


def test_other_decisions_have_no_map(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"arm": "a", "action": "left", "committed": True}, {"action": [1.0]}, {"x": 1}]
    assert edit_figures(written(tmp_path, rows), CONFIG) == []


def test_the_names_are_those_of_the_surgeons_own_targets() -> None:
    """The order that the page assumes is the order in which an action is cut up."""
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    from preceptor.lm.edit_targets import attention_targets
    from preceptor.systems.surgery.trial import Edit

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    targets = attention_targets(model, roles=("value", "output", "query"))
    edit = Edit("singular_values", targets, rank=3)
    config = {"edit": {"kind": "singular_values", "roles": ["value", "output", "query"], "layers": [], "rank": 3}}
    names = list(dict.fromkeys(group for group, _ in action_names(edit.action_dim, config)))
    assert len(names) == len(targets)
    for name, target in zip(names, targets, strict=True):
        _, layer, role = name.split()
        assert f".h.{layer}." in target.name
        assert role == target.role


@pytest.mark.parametrize("where", ["result", "manifest"])
def test_a_surgeon_of_many_models_has_a_page_of_its_own_finished_or_not(where: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    config = {"training": "amortised"}
    result = {"system": "surgery", "arms": {}, "config": config if where == "result" else {}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "manifest.json").write_text(json.dumps({"system": "surgery", "config": config}))
    if where == "result":
        (tmp_path / "manifest.json").write_text(json.dumps({"system": "surgery"}))
    titles = [section.title for section in sections(read_run(tmp_path))]
    (tmp_path / "result.json").write_text(json.dumps({**result, "config": {"training": "one"}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"system": "surgery"}))
    assert titles != [section.title for section in sections(read_run(tmp_path))]
