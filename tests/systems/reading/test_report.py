from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import DataError
from preceptor.report.run_folder import read_run
from preceptor.systems.reading import report
from preceptor.systems.reading.report import episode_view, reward_by_position, select_episodes
from tests.report.conftest import write_run

ARTICLES = {"a": {"title": "A", "pairs": [{"key": "k0", "value": "v0"}, {"key": "k1", "value": "v1"}]}}


def row(**changes: Any) -> dict[str, Any]:
    return {
        "episode": 4,
        "step": 2,
        "arm": "learned",
        "article": "a",
        "policy_spans": [
            {"kind": "prompt", "start": 0, "end": 1},
            {"kind": "query", "start": 1, "end": 3, "pair": 1, "sampled_log_probs": [-1.0, -2.0]},
            {"kind": "value", "start": 3, "end": 5, "pair": 1},
            {"kind": "query", "start": 5, "end": 7, "pair": 0, "sampled_log_probs": [-3.0, -4.0]},
            {"kind": "value", "start": 7, "end": 9, "pair": 0},
        ],
        "texts": ["prompt", "first query", "v1", "second query", "v0"],
        "reader_spans": [
            {"kind": "value", "pair": 1, "log_probs": [-1.0, -2.0], "reference_log_probs": [-2.0, -2.5]},
            {"kind": "value", "pair": 0, "log_probs": [-4.0, -2.0], "reference_log_probs": [-2.0, -2.0]},
            {"kind": "probe", "log_probs": [-5.0, -6.0]},
        ],
        "selection_probabilities": [[0.25, 0.75], [1.0, 0.0]],
        "temperature": 1.0,
        "reward": -2.25,
        "normalised_reward": -0.125,
        "passed": True,
        **changes,
    }


def test_an_episode_becomes_steps_in_reading_order() -> None:
    view = episode_view(row(), ARTICLES, where="here")
    first, second = view["steps"]
    assert (first["pair"], first["query"], first["value"]["text"]) == (
        1,
        {"text": "first query", "log_probs": [-1.0, -2.0]},
        "v1",
    )
    assert (first["mean"], first["reference"], first["earned"]) == (-1.5, -2.25, 0.75)
    assert (second["query"]["text"], second["probabilities"], second["earned"]) == ("second query", [1.0, 0.0], -1.0)
    assert (view["reward"], view["passed"], view["probes"]) == (-2.25, True, -5.5)


def test_an_arm_without_queries_or_reference_still_has_steps() -> None:
    spans = [{"kind": "value", "pair": 0, "log_probs": [-1.0]}]
    view = episode_view(
        row(policy_spans=[], texts=[], reader_spans=spans, selection_probabilities=[]), ARTICLES, where="here"
    )
    assert view["steps"] == [
        {
            "pair": 0,
            "query": None,
            "probabilities": [],
            "value": {"text": "v0", "log_probs": [-1.0]},
            "mean": -1.0,
            "reference": None,
            "earned": -1.0,
        }
    ]


def test_without_articles_the_value_text_is_the_decoded_span() -> None:
    assert episode_view(row(), {}, where="here")["steps"][1]["value"]["text"] == "v0"


def test_a_number_that_is_not_finite_is_kept_as_such() -> None:
    spans = [{"kind": "value", "pair": k, "log_probs": [-1.0, float("nan")]} for k in (1, 0)]
    view = episode_view(row(reader_spans=spans, reward=float("nan")), ARTICLES, where="here")
    assert view["reward"] is None
    assert view["steps"][0]["value"]["log_probs"] == [-1.0, None]
    assert view["steps"][0]["earned"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["prompt"]}, "'texts' must have an entry for each of 5 policy_spans, got 1"),
        ({"reader_spans": []}, "2 queries for 0 values"),
        ({"reader_spans": {}}, "'reader_spans' must be a list of spans"),
        ({"reader_spans": [{"kind": "value", "log_probs": []}]}, "whole number as its 'pair'"),
        ({"selection_probabilities": [["much"]]}, "'selection_probabilities' must be a list of numbers"),
    ],
)
def test_malformed_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"here: .*{message}"):
        episode_view(row(**changes), ARTICLES, where="here")


def test_selection_shows_every_arm_and_article_learned_first(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", num_steps=20, num_episodes=64))
    assert run.decisions is not None
    selection = select_episodes(run.decisions, run.articles)
    groups = [(episode["arm"], episode["article"]) for episode in selection.episodes]
    assert set(groups) == {(arm, a) for arm in ("learned", "untrained", "document") for a in ("lighthouse", "hostile")}
    assert groups[0][0] == "learned"
    assert selection.num_episodes == 64
    numbers = [e["episode"] for e in selection.episodes if (e["arm"], e["article"]) == ("learned", "lighthouse")]
    # Of the sixteen 0, 1, 8, 9, 16, 17, ..., 56, 57 those at 0, 3.75, 7.5, 11.25 and 15, rounded, in the file's order.
    assert numbers == [0, 16, 32, 41, 57]


def test_selection_keeps_to_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run", num_steps=20))
    assert run.decisions is not None
    monkeypatch.setattr(report, "MAXIMUM_BYTES", 30_000)
    selection = select_episodes(run.decisions, run.articles)
    assert 1 <= len(selection.episodes) < 19
    assert len(json.dumps([selection.episodes, selection.articles])) <= 31_000


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_steps=5) / "decisions.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[6] = lines[6][:100]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"decisions.jsonl:7: not a line of JSON"):
        select_episodes(path, {})


def test_reward_by_position_compares_first_and_last_tenth() -> None:
    rows = [{"step": k, "reward_by_position": [float(k), 10.0 * k]} for k in range(20)]
    rows[0]["reward_by_position"] = [0.0]  # a shorter trajectory
    series = reward_by_position(rows)
    assert series is not None
    assert series.lines == {"last tenth of the steps": [18.5, 185.0], "first tenth": [0.5, 10.0]}
    assert reward_by_position([{"step": 1}]) is None


def test_the_likeliest_order_of_an_article_is_shown_as_passages(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=2)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "order": {"lighthouse": [2, 0, 99]}}))
    (shown,) = report._orders(read_run(folder))
    article = json.loads((folder / "articles.json").read_text())["lighthouse"]
    pairs = [(pair["key"], pair["value"]) for pair in article["pairs"]]
    assert shown.title == article["title"]
    assert [tuple(row) for row in shown.rows] == [(2, *pairs[2]), (0, *pairs[0])]
    (folder / "result.json").write_text(json.dumps({**result, "order": None}))
    assert report._orders(read_run(folder)) == []
