from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preceptor.report.matrix import shaded_table
from preceptor.systems.bandit.report import NUM_PARTS, _payments, prompt_matrices


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "decisions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pull(k: int, prompt: str, *probabilities: float) -> dict[str, Any]:
    words = ["bean", "rice", "corn"][: len(probabilities)]
    return {"bandit": "b", "pull": k, "prompt": prompt, "words": words, "probabilities": list(probabilities)}


def test_each_prompt_has_a_row_and_each_part_of_the_pulls_a_column(tmp_path: Path) -> None:
    rows = [pull(k, "p" if k % 2 else "q", k / 100, 1 - k / 100) for k in range(16)]
    (found,) = prompt_matrices(written(tmp_path, rows))
    matrix = shaded_table(found)
    assert matrix.title == "Probability of 'bean' under each prompt, b"
    assert len(matrix.columns) == NUM_PARTS
    assert [name for name, _ in matrix.rows] == ["p", "q"]
    assert [cell.text for cell in matrix.rows[0][1]][:2] == ["0.010", "0.030"]
    assert [cell.text for cell in matrix.rows[1][1]][-1] == "0.140"


def test_three_words_have_three_tables_and_a_prompt_that_was_not_drawn_has_a_gap(tmp_path: Path) -> None:
    rows = [pull(k, "p" if k < 8 else "q", 0.2, 0.3, 0.5) for k in range(16)]
    tables = [shaded_table(matrix) for matrix in prompt_matrices(written(tmp_path, rows))]
    assert len(tables) == 3
    assert [cell.text for cell in tables[2].rows[0][1]] == ["0.500"] * 4 + ["\N{EN DASH}"] * 4


def test_what_each_word_pays_is_told() -> None:
    beans = {"words": ["bean", "chickpea"], "kind": "bernoulli", "base_reward": 10.0, "success": [0.75, 0.25]}
    colours = {"words": ["red"], "kind": "gaussian", "base_reward": 2.0, "mean": [1.5], "deviation": 0.5}
    table = _payments({"bandits": [beans, colours]})
    assert table is not None
    assert table.rows == [
        ["bean / chickpea", "bean", "7.5", "10 with probability 0.75, else 0"],
        ["bean / chickpea", "chickpea", "2.5", "10 with probability 0.25, else 0"],
        ["red", "red", "3", "normal, standard deviation 1"],
    ]
    assert _payments({}) is None


def test_rows_without_probabilities_have_no_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "words": ["a"], "log_probs": [-1.0]}, {"step": 1}]
    assert prompt_matrices(written(tmp_path, rows)) == []
