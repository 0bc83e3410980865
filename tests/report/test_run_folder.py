from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preceptor.errors import DataError
from preceptor.report.run_folder import read_rows, read_run


def test_a_run_is_read_whole(build_run: Callable[..., Path], tmp_path: Path) -> None:
    run = read_run(build_run(tmp_path / "run", num_steps=7))
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6, 7]
    assert run.result is not None
    assert run.result["arms"]["learned"]["order_gain"]["n"] == 25
    assert set(run.articles) == {"lighthouse", "hostile"}
    assert run.decisions is not None
    assert run.config is not None


def test_offsets_point_at_lines(build_run: Callable[..., Path], tmp_path: Path) -> None:
    path = build_run(tmp_path / "run", num_steps=5) / "decisions.jsonl"
    content = path.read_bytes()
    rows = list(read_rows(path))
    assert len(rows) == 20
    for offset, row in rows:
        assert json.loads(content[offset:].split(b"\n", 1)[0]) == row


def test_what_is_absent_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run = read_run(tmp_path)
    assert (run.result, run.config, run.decisions, run.articles, run.manifest) == (None, None, None, {}, {})


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        read_run(tmp_path / "nowhere")


def estimate(number: int, replacement: str) -> str:
    """A result of one arm with one metric (mean 1, low 0, high 2) in which ``number`` was replaced."""
    text = '{"mean": 1, "low": 0, "high": 2, "unit": "nats", "n": 3}'.replace(str(number), replacement)
    return f'{{"arms": {{"a": {{"m": {text}}}}}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2', r"metrics.jsonl:2: not a line of JSON"),
        ("metrics.jsonl", '{"step": 1}\n\n{"step": 2}\n', r"metrics.jsonl:2: not a line of JSON"),
        ("metrics.jsonl", "[1]\n", "expected a JSON object, got list"),
        ("metrics.jsonl", '{"reward": 1.0}\n', r"metrics.jsonl:1: 'step' must be a whole number, got None"),
        ("metrics.jsonl", '{"step": true}\n', "'step' must be a whole number"),
        ("metrics.jsonl", b"\xff\xfe{}\n", r"metrics.jsonl:1: not a line of JSON"),
        ("result.json", '{"arms": []}', "'arms' must be an object"),
        ("result.json", '{"arms": {"learned": {"reward": 1.0}}}', "arms.learned.reward must have mean, low"),
        ("result.json", '{"arms": {"learned": 3}}', "arms.learned. must have mean"),
        ("result.json", estimate(1, "null"), "arms.a.m.mean must be a number"),
        ("result.json", estimate(2, "null"), "both be numbers or both be null"),
        ("result.json", estimate(2, "NaN"), "arms.a.m.high must be a number"),
        ("result.json", '{"gap_closed": [1]}', "'gap_closed' must map a split"),
        ("result.json", '{"gap_closed": {"train": {"mean": "much"}}}', "gap_closed.train must have numbers"),
        ("articles.json", '{"x": {"title": "X"}}', "article 'x' must have 'pairs'"),
        ("articles.json", '{"x": {"pairs": [{"key": "k"}]}}', "article 'x' must have 'pairs'"),
        ("config.yaml", b"\xff", "config.yaml: not UTF-8"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)
