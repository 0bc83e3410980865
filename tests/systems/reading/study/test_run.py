"""Whole studies with a tiny model: what they write, that they resume exactly, and that readings can be verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preceptor.cli import main
from preceptor.data.articles.pairs import Pair
from preceptor.errors import ConfigError, DataError, ModelError, PreceptorError
from preceptor.result import write_page
from preceptor.runs.export import export_model
from preceptor.runs.folder import Run
from preceptor.systems import find_system
from preceptor.systems.base import Services, configuration
from preceptor.systems.reading.study.choose import Reader, folder_pairs
from preceptor.systems.reading.study.pool import NUM_HELD_OUT
from preceptor.systems.reading.study.verify import named_case, read_pools
from preceptor.systems.reading.verify import verify
from tests.systems.reading.study.small import SUBJECTS, text

SETTINGS = (
    "episode.budget=3", "data.num_pairs=3", "study.num_train_pools=2", "study.num_eval_pools=2", "update.steps=4",
    "study.real_steps=1", "study.num_random=4", "study.cases_per_update=4", "study.num_readings=3", "save_every=2",
    "record_every=1", "study.num_distractors=1",
)  # fmt: skip
TIMING = {"seconds"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three articles to learn from, and three to be judged on."""
    root = tmp_path_factory.mktemp("articles")
    for number, subject in enumerate(SUBJECTS):
        folder = root / ("learn" if number < 3 else "judge")
        folder.mkdir(exist_ok=True)
        (folder / f"{subject}.txt").write_text(text(subject))
    return root / "learn", root / "judge"


@pytest.fixture
def words(tiny_folder: Path, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PRECEPTOR_CACHE_DIR", str(tmp_path / "cache"))
    learn, judge = map(str, folders)
    settings = [word for setting in (*SETTINGS, f"model.name={tiny_folder}") for word in ("--set", setting)]
    named = ["--train-articles", learn, "--eval-articles", judge]
    return ["run", "reading", "--preset", "study", *named, "--threads", "1", "--no-report", *settings]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_study_from_end_to_end(words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*words, "--out", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text())

    # Both modes, every method, on held-out articles alone.
    assert set(result["study"]) == {"asked", "seed"}
    expected = {
        "learned", "learned_greedy", "untrained", "random", "nothing", "bm25", "cosine", "tfidf", "late_interaction",
        "cosine_bm25", "cosine_late_interaction", "nearest", "topic", "oracle", "best_of_4",
    }  # fmt: skip
    for methods in result["study"].values():
        assert set(methods) == expected
        assert methods["nothing"]["gain"]["mean"] == 0.0
        assert methods["learned"]["gain"]["unit"] == "nats/value token"
        assert (methods["learned"]["scorings"], methods["best_of_4"]["scorings"]) == (0, 4)
    assert {record["item"] for record in result["records"]} == set(SUBJECTS[3:])
    assert {record["seed"] for record in result["records"]} == {None, 0}

    # What is said of one mode names it.
    assert result["verdict"].startswith("Learned, asked about an article, ")
    assert "The share of the gap that follows is that of mode asked. Share closed" in result["verdict"]

    # A share of the gap is 0 for random readings and 1 for the oracle (whose gap a random model need not have).
    shares = {name: methods["share"]["mean"] for name, methods in result["study"]["asked"].items()}
    assert (shares["random"], shares["oracle"]) == (0.0, pytest.approx(1.0))

    # Every recorded reading is worth the same when it is read again.
    system = find_system("reading")
    config = configuration(system, file=folder / "config.yaml")
    replayed = list(verify(config, folder, Services(cache_dir=tmp_path / "elsewhere")))
    assert len(replayed) > 40
    for each in replayed:
        assert each.recomputed == pytest.approx(each.recorded, abs=1e-5), each.where

    # The last update alone was really read; the held-out cases all were.
    decisions = rows(folder / "decisions.jsonl")
    assert {row["step"] for row in decisions if row["arm"] == "learned" and row["really_read"]} == {4}
    assert {row["step"] for row in decisions if row["arm"] == "learned"} == {1, 2, 3, 4}
    assert all(row["really_read"] for row in decisions if row["arm"] == "oracle")

    # A decision that names what is not there is refused.
    recorded = (folder / "decisions.jsonl").read_bytes()
    (folder / "decisions.jsonl").write_text(json.dumps({**decisions[0], "order": [99]}) + "\n")
    with pytest.raises(DataError, match="not all in the pool"):
        list(verify(config, folder, Services(cache_dir=tmp_path)))
    (folder / "decisions.jsonl").write_bytes(recorded)  # a sealed run that was changed has no page
    page = write_page(folder).read_text()
    assert "Asked about an article" in page
    assert "One sentence of an article read" in page


def test_a_policy_is_used_on_a_folder(
    words: list[str], folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, judge = tmp_path / "run", folders[1]
    assert main([*words, "--out", str(run)]) == 0
    capsys.readouterr()
    named = ["study", "--pool", str(judge), "--policy", str(run), "--ask", "Which salt of place 3 is old?"]
    assert main([*named, "--budget", "2", "--out", str(tmp_path / "context.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1.", "2.", "context:"]
    context = (tmp_path / "context.txt").read_text()
    pairs, titles = folder_pairs(judge)
    assert len(pairs) == len(titles) == 3 * 9

    # The same from Python, on candidates in another order: places change, texts and probabilities do not.
    chosen = Reader(run).choose("Which salt of place 3 is old?", pairs, budget=2)
    assert context == "\n".join(each.text for each in chosen) + "\n\nWhich salt of place 3 is old?\n"
    turned = Reader(run).choose("Which salt of place 3 is old?", pairs[::-1], budget=2)
    assert [each.text for each in turned] == [each.text for each in chosen]
    assert [each.probability for each in turned] == pytest.approx([each.probability for each in chosen], abs=1e-5)
    assert all(0 < each.probability <= 1 for each in chosen)
    assert [pairs[each.index].key for each in chosen] == [each.key for each in chosen]

    # A large pool is cut to what shares words with the question.
    many = [Pair(i, f"Line {i} says nothing at all of it.", "Nor does this one.") for i in range(90)]
    many[80] = Pair(80, "Some salt of place three is very old.", "It is white.")
    assert max(each.index for each in Reader(run).choose("Is the salt old?", many, budget=64)) == 80

    assert main([*named, "--budget", "99"]) == 2
    assert "the budget must lie in 1..27 (the pool), got 99" in capsys.readouterr().err
    assert main(["study", "--pool", str(judge), "--policy", str(judge), "--ask", "x"]) == 2
    assert "holds no policy of a study" in capsys.readouterr().err
    (run / "study.safetensors").write_bytes(b"damaged")
    assert main(named) == 2
    assert "cannot be loaded" in capsys.readouterr().err


WEIGHTS = ("study.model_steps=3", "study.channels=[bm25,written_query]")


@pytest.mark.parametrize("further", [(), WEIGHTS, (*WEIGHTS, "model.adapter_rank=2")])
def test_a_stopped_study_goes_on_exactly(
    further: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*words, *(word for setting in further for word in ("--set", setting))]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    save = Run.save

    def save_and_break(self: Run, state: Any) -> Path:
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Run, "save", save_and_break)
        assert main([*words, "--out", str(tmp_path / "stopped")]) == 130
    assert len(rows(tmp_path / "stopped" / "metrics.jsonl")) == 2
    assert main(["resume", str(tmp_path / "stopped"), "--no-report"]) == 0
    for name in ("metrics.jsonl", "decisions.jsonl"):
        whole, stopped = (rows(tmp_path / each / name) for each in ("whole", "stopped"))
        assert [{k: v for k, v in row.items() if k not in TIMING} for row in whole] == [
            {k: v for k, v in row.items() if k not in TIMING} for row in stopped
        ]
    records = [json.loads((tmp_path / each / "result.json").read_text())["records"] for each in ("whole", "stopped")]
    assert records[0] == records[1]
    models = [sorted((tmp_path / each / "model").glob("*.safetensors")) for each in ("whole", "stopped")]
    assert len(models[0]) == len(models[1]) == bool(further)
    assert [path.read_bytes() for path in models[0]] == [path.read_bytes() for path in models[1]]


@pytest.mark.parametrize("adapter", [0, 2])
def test_a_model_that_learned_is_used(
    adapter: int, words: list[str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = [*WEIGHTS, f"model.adapter_rank={adapter}", "update.learning_rate=0.01"]
    words = [*words, *(word for setting in settings for word in ("--set", setting))]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    rows_ = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row.get("model_gradient_norm", 0) > 0 for row in rows_] == [False, True, True, True]
    pairs, _ = folder_pairs(folders[1])
    question = "Which salt of place 3 is old?"
    chosen = Reader(tmp_path / "run").choose(question, pairs, budget=2)
    # Without its weights the policy chooses with other probabilities.
    reader = Reader(tmp_path / "run")
    reader._encoder = None
    other = reader.choose(question, pairs, budget=2)
    assert abs(chosen[0].probability - other[0].probability) > 1e-6

    # A damaged file, or none.
    (weights,) = (tmp_path / "run" / "model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="restore it from a copy"):
        Reader(tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="holds no model"):
        Reader(tmp_path / "run")
    with pytest.raises(PreceptorError, match="model/"):  # and not that a run of this kind trains none
        export_model(tmp_path / "run", tmp_path / "exported")


def test_an_extended_study_has_a_page(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*words, "--out", str(run)]) == 0
    assert main(["resume", str(run), "--set", "update.steps=6"]) == 0
    assert "extensions" in (run / "report.html").read_text()
    assert main(["resume", str(run), "--set", "update.steps=6", "--no-report"]) == 2


def test_a_replay_in_bfloat16_says_why_numbers_part(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--set", "model.dtype=bfloat16", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    # A row alone and in a batch differ in bfloat16, which tolerance 0 does not allow.
    assert main(["replay", str(tmp_path / "run"), "--tolerance", "0"]) == 7
    assert "the run's model is in bfloat16, which rounds to three digits; see --tolerance" in capsys.readouterr().out


def test_a_study_that_was_stopped_has_no_policy_yet(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", stop)
    assert main([*words, "--out", str(tmp_path / "run")]) == 130
    with pytest.raises(ConfigError, match="has not ended; go on with it: preceptor resume"):
        Reader(tmp_path / "run")


def test_a_learning_rate_of_zero_is_the_untrained_policy(words: list[str], tmp_path: Path) -> None:
    still = [
        "--set",
        "study.learning_rate=0",
        "--set",
        "update.projection_learning_rate=0",
        "--set",
        "study.mode=asked",
    ]
    assert main([*words, *still, "--out", str(tmp_path / "run")]) == 0
    methods = json.loads((tmp_path / "run" / "result.json").read_text())["study"]["asked"]
    assert methods["learned_greedy"]["gain"]["mean"] == methods["cosine"]["gain"]["mean"]
    # What was learned does not depend on the scorer's memory: pools of a seed are read back by name.
    pools = read_pools(tmp_path / "run" / "pools.json")
    case = named_case(rows(tmp_path / "run" / "decisions.jsonl")[0]["case"], pools)
    assert len(case.pool.candidates) == 6
    assert len(case.pool.held_out[case.target]) == NUM_HELD_OUT


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("episode.budget=7", "`episode.budget` must lie in 1..6"),
        ("data.num_pairs=1", "at least 2, got 1"),
        ("study.real_steps=9", "at most `update.steps`"),
        ("study.model_steps=9", "at most `update.steps`"),
        ("study.channels=[bm25,bm25]", "`study.channels` must be different"),
        ("data.article=mine.txt", "`data.article` is one (mine.txt)"),
        ("model.adapter_rank=2", "set that to 1 or more"),
        ("model.quantization=4bit", "4bit is not available in a study"),
        ("data.eval_articles=''", "give both"),
        ("reward.reader=policy", "`reward.reader` policy is not available in a study"),
        ("selection.embedder=sentence_transformers", "must be one of hidden_states, attention"),
        ("data.num_pairs=8", "too short for a pool"),
    ],
)
def test_what_does_not_fit_is_said(
    setting: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if setting.startswith("data.eval"):
        words = [word for word in words if word != "--eval-articles"]
        words.remove(next(word for word in words if word.endswith("judge")))
        setting = "study.num_random=4"
    assert main([*words, "--set", setting, "--out", str(tmp_path / "run")]) in (1, 2)
    assert message in capsys.readouterr().err


def test_the_same_text_on_both_sides_is_refused(
    words: list[str], folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn, judge = map(str, folders)
    same = [learn if word == judge else word for word in words]
    assert main([*same, "--out", str(tmp_path / "run")]) in (1, 2)
    assert "both learned from and judged on" in capsys.readouterr().err
