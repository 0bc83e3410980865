from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from preceptor.report.decisions import MAXIMUM_CELL, MAXIMUM_ROWS, are_readings, decision_tables
from preceptor.report.page import build_report


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_are_spread_over_the_run_and_cells_are_text(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": k, "word": "<b>rice</b>", "p": [0.25, 0.75], "reward": 0.123456, "nested": {"a": 1}}
        for k in range(500)
    ]
    rows[-1]["word"] = "x" * 10_000
    (table,) = decision_tables(written(tmp_path / "decisions.jsonl", rows))
    assert table.columns == ["step", "word", "p", "reward", "nested"]
    assert table.num_rows == 500
    assert len(table.rows) == MAXIMUM_ROWS
    assert table.rows[0] == ["0", "<b>rice</b>", "0.25, 0.75", "0.1235", "a 1"]
    assert len(table.rows[-1][1]) == MAXIMUM_CELL


def test_every_kind_of_row_has_a_table_without_the_others_columns_and_without_token_ids(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"kind": "mixture", "arm": "a_b", "weights": [0.5, 0.5], "none": None}] * 3
    rows += [{"kind": "sample", "arm": "a_b", "prompt_token_ids": [1, 2], "text": "hello", "done": True}] * 400
    mixture, sample = decision_tables(written(tmp_path / "decisions.jsonl", rows))
    assert (mixture.kind, mixture.columns, mixture.rows[0]) == ("mixture", ["arm", "weights"], ["a b", "0.5, 0.5"])
    assert (sample.kind, sample.columns, sample.rows[0]) == (
        "sample",
        ["arm", "text", "done"],
        ["a b", "hello", "yes"],
    )
    assert (len(sample.rows), sample.num_rows) == (MAXIMUM_ROWS // 2, 400)


def test_a_reading_is_told_from_other_decisions(build_run: Callable[..., Path], tmp_path: Path) -> None:
    assert are_readings(build_run(tmp_path / "run", num_steps=2) / "decisions.jsonl")
    assert not are_readings(written(tmp_path / "decisions.jsonl", [{"step": 1, "word": "rice"}]))
    assert not are_readings(written(tmp_path / "empty.jsonl", []))


def test_the_page_of_another_system_has_a_table_instead_of_a_viewer(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", [{"step": k, "loss": 1.0 / k, "weights": {"a": 0.5}} for k in range(1, 5)])
    written(tmp_path / "decisions.jsonl", [{"step": 1, "word": "<script>alert(1)</script>"}])
    charts = [{"kind": "lines", "title": "Weights of <i>", "unit": "share", "columns": {"weights.a": "a"}}]
    (tmp_path / "result.json").write_text(json.dumps({"system": "bandit", "arms": {}, "charts": charts}))
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "What was decided" in page
    assert "A reading, step by step" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Weights of &lt;i&gt;" in page
    assert "Left out" not in page
    assert 'aria-label="loss by step;' in page  # a column that no chart asks for is still there
