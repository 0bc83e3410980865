"""The episode benchmark at tiny sizes: both ways agree, each does the work it is said to do, and faults are seen."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import episode, measurement, record
from preceptor.errors import ConfigError, NumericError
from preceptor.lm.embedding import HiddenStates
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.reading.articles import bundled_article
from preceptor.systems.reading.policy import Policy

SIZES = episode.Sizes(episodes=3, pairs=4, query_tokens=5, value_tokens=8)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers; its wide weights keep two logits from tying within rounding."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe_tokenizer([bundled_article().text], vocab_size=400, context_length=128)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def case(model_folder: Path) -> episode.Case:
    return episode.prepare(str(model_folder), SIZES, seed=0)


@contextmanager
def counted_tokens(case: episode.Case) -> Iterator[list[int]]:
    """Tokens of each pass through the decoder, holes included."""
    counts: list[int] = []
    module = case.policy.lm.model.get_input_embeddings()
    hook = module.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def test_the_rows_of_the_batch_differ_in_length(case: episode.Case) -> None:
    """Else the benchmark would not meet the holes of a batch, and its orders would not tell episodes apart."""
    assert len({len(value) for value in case.article.values}) > 1
    assert len({tuple(order) for order in case.orders}) > 1
    assert all(sorted(order) == list(range(SIZES.pairs)) for order in case.orders)


def test_both_ways_say_the_same(case: episode.Case) -> None:
    differences = episode.largest_differences(case)

    assert set(differences) == {"query_log_probs", "selection_log_probs"}
    # Not exactly equal: two computations were compared, not one with itself.
    assert all(0 < difference <= 1e-4 for difference in differences.values())
    assert torch.unique(episode.ours(case).queries).numel() > 5


def test_the_naive_way_encodes_its_context_anew_and_ours_never(case: episode.Case) -> None:
    with counted_tokens(case) as naive_counts:
        episode.naive(case)
    with counted_tokens(case) as our_counts:
        episode.ours(case)

    # Naive: of a context of n tokens, generate() reads n + q - 1 (its last token is drawn, not read) and the vector's
    # pass n + q.
    expected = 0
    for order in case.orders:
        context = len(case.article.prompt)
        for pair in order:
            expected += (context + SIZES.query_tokens - 1) + (context + SIZES.query_tokens)
            context += SIZES.query_tokens + len(case.article.values[pair])
    assert sum(naive_counts) == expected

    # Ours: the prompt, each query token and, between queries, the widest value, once a row; the last value is not read.
    widest = [max(len(case.article.values[order[step]]) for order in case.orders) for step in range(SIZES.pairs - 1)]
    per_row = len(case.article.prompt) + SIZES.pairs * SIZES.query_tokens + sum(widest)
    assert sum(our_counts) == SIZES.episodes * per_row
    assert len(our_counts) == 1 + SIZES.pairs * SIZES.query_tokens + SIZES.pairs - 1


def test_a_wrong_token_in_the_context_is_seen(case: episode.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    first = case.orders[0][0]
    values = list(case.article.values)
    values[first] = (values[first][0] + 1, *values[first][1:])
    misread = replace(case, article=replace(case.article, values=tuple(values)))
    run = episode.ours
    monkeypatch.setattr(episode, "ours", lambda _, **options: run(misread, **options))

    with pytest.raises(NumericError, match="greedy query tokens differ"):
        episode.largest_differences(case)


def test_vectors_of_another_layer_are_seen(case: episode.Case) -> None:
    lm = case.policy.lm
    policy = Policy(
        lm, sampling=case.policy.sampling, embedding=HiddenStates(lm, layer=-1), temperature=case.policy.temperature
    )

    with pytest.raises(NumericError, match="selection_log_probs differ by"):
        episode.largest_differences(replace(case, policy=policy))


def test_query_log_probs_that_differ_are_seen(case: episode.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found = episode.naive_query_log_probs
    monkeypatch.setattr(episode, "naive_query_log_probs", lambda *given, **named: found(*given, **named) + 2e-4)

    with pytest.raises(NumericError, match="query_log_probs differ by"):
        episode.largest_differences(case)


def test_the_ways_take_turns_and_the_median_is_reported() -> None:
    turns: list[str] = []
    spreads = measurement.alternate({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)

    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert set(spreads) == {"a", "b"}
    assert set(spreads["a"]) == {"wall", "cpu"}
    assert measurement.Spread.of([5.0, 1.0, 2.0]) == measurement.Spread(median=2.0, minimum=1.0, maximum=5.0)


def test_a_measurement_prints_a_table_and_is_recorded_once(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkout(tmp_path)
    monkeypatch.setattr(record, "require_own_package", lambda _: None)  # the package is not in this small checkout

    assert episode.main(arguments(model_folder), root=root) == 0

    printed = capsys.readouterr().out
    assert "ours / naive" in printed
    assert "Recorded in benchmarks/history.jsonl" in printed
    (line,) = (root / record.HISTORY).read_text().splitlines()
    row = json.loads(line)
    assert row["commit"] == git(root, "rev-parse", "HEAD")
    assert row["dirty"] is False
    assert row["sizes"] == {"episodes": 3, "pairs": 4, "query_tokens": 5, "value_tokens": 8}
    assert row["model"] == model_folder.name  # no path of this machine
    assert str(model_folder.parent) not in line
    for clock in ("wall", "cpu"):
        ours, naive = (row["seconds"][way][clock] for way in ("ours", "naive"))
        assert row["ratio"][clock] == pytest.approx(ours["median"] / naive["median"])
        assert 0 < ours["minimum"] <= ours["median"] <= ours["maximum"]

    (root / "code.py").write_text("changed\n")
    assert episode.main(arguments(model_folder), root=root) == 2
    assert "uncommitted" in capsys.readouterr().err
    assert episode.main([*arguments(model_folder), "--allow-dirty"], root=root) == 0
    assert "Not recorded" in capsys.readouterr().out
    assert len((root / record.HISTORY).read_text().splitlines()) == 1


def test_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "require_own_package", lambda _: None)

    assert episode.main(arguments(tmp_path / "absent"), root=checkout(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "absent does not exist" in line


def test_own_lines_of_the_history_do_not_make_a_checkout_dirty(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    clean = record.revision(root)
    assert not clean.dirty
    assert clean.commit == git(root, "rev-parse", "HEAD")

    record.append({"ratio": 0.2}, clean, root=root)
    record.append({"ratio": 0.3}, clean, root=root)

    assert record.revision(root) == clean
    rows = [json.loads(line) for line in (root / record.HISTORY).read_text().splitlines()]
    assert rows == [{"ratio": ratio, "commit": clean.commit, "dirty": False} for ratio in (0.2, 0.3)]


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_a_dirty_checkout_is_never_recorded(tmp_path: Path, name: str) -> None:
    root = checkout(tmp_path)
    clean = record.revision(root)
    (root / name).write_text("changed\n")
    dirty = record.revision(root)

    with pytest.raises(ConfigError, match=f"1 uncommitted changes, the first is .*{name}.*--allow-dirty"):
        record.append({}, dirty, root=root)
    with pytest.raises(ConfigError, match="changed during the measurement"):
        record.append({}, clean, root=root)
    assert not (root / record.HISTORY).exists()


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a git checkout with a commit"):
        record.revision(tmp_path)
    with pytest.raises(ConfigError, match="not from this checkout"):
        record.require_own_package(tmp_path)
    record.require_own_package(record.ROOT)


def arguments(model: Path) -> list[str]:
    given = {"model": model, "episodes": 3, "pairs": 4, "query-tokens": 5, "value-tokens": 8, "rounds": 1}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def checkout(folder: Path) -> Path:
    """A clean git checkout of one commit."""
    root = folder / "checkout"
    (root / "benchmarks").mkdir(parents=True)
    (root / "code.py").write_text("code\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", "code")
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
