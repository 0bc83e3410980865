from __future__ import annotations

import json
from pathlib import Path

from preceptor.report.decisions import MAXIMUM_CELL, MAXIMUM_ROWS, decision_tables
from preceptor.result import write_page


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
    assert table.note == f"{MAXIMUM_ROWS} of 500 recorded decisions, evenly spaced over the run."
    assert len(table.rows) == MAXIMUM_ROWS
    assert table.rows[0] == ["0", "<b>rice</b>", "0.25, 0.75", "0.1235", "a 1"]
    assert len(table.rows[-1][1]) == MAXIMUM_CELL


def test_every_kind_of_row_has_a_table_without_the_others_columns_and_without_token_ids(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"kind": "mixture", "arm": "a_b", "weights": [0.5, 0.5], "none": None}] * 3
    rows += [{"kind": "sample", "arm": "a_b", "prompt_token_ids": [1, 2], "text": "hello", "done": True}] * 400
    mixture, sample = decision_tables(written(tmp_path / "decisions.jsonl", rows))
    assert (mixture.title, mixture.columns, mixture.rows[0]) == ("mixture", ["arm", "weights"], ["a b", "0.5, 0.5"])
    assert (sample.title, sample.columns, sample.rows[0]) == (
        "sample",
        ["arm", "text", "done"],
        ["a b", "hello", "yes"],
    )
    assert mixture.note == "All 3 recorded rows."
    assert sample.note == f"{MAXIMUM_ROWS // 2} of 400 recorded rows, evenly spaced over the run."


def test_the_page_of_another_system_has_a_table_instead_of_a_viewer(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl", [{"step": k, "loss": 1.0 / k, "weights": {"a": 0.5}} for k in range(1, 5)])
    written(tmp_path / "decisions.jsonl", [{"step": 1, "word": "<script>alert(1)</script>"}])
    charts = [{"kind": "lines", "title": "Weights of <i>", "unit": "share", "columns": {"weights.a": "a"}}]
    (tmp_path / "result.json").write_text(json.dumps({"system": "bandit", "arms": {}, "charts": charts}))
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "What was decided" in page
    assert "A reading, step by step" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Weights of &lt;i&gt;" in page
    assert "Left out, since metrics.jsonl has no such column: Reward" in page
    assert 'aria-label="loss by step;' in page  # a column that no chart asks for is still there
