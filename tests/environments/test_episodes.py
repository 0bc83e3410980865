"""Episodes: what a text stands for, how they end, and that a batch of them is paid as a run pays it."""

from __future__ import annotations

from pathlib import Path

import pytest

from preceptor.environments import load_task
from preceptor.environments.episodes import Episode, finish, is_over, play
from preceptor.errors import ConfigError
from tests.environments.recorded import QUICK, READING, STUDY, read_pairs, recorded

ROUNDS = {"in_context.rounds": 4, "in_context.first_rounds": 4, "in_context.num_arms": 3}


def finished(episode: Episode, choices: list[int]) -> Episode:
    for choice in choices:
        episode.take(choice)
    assert is_over(episode)
    return episode


def test_a_batch_of_readings_is_paid_as_a_run_paid_it(tmp_path: Path) -> None:
    decisions = recorded(tmp_path / "run", "reading", settings={**QUICK, "episode.batch_size": 5})
    decisions = [row for row in decisions if row["episode"] < 15]
    assert len(decisions) == 15
    task = load_task("reading", overrides=READING)
    for step in (1, 2, 3):
        rows = [row for row in decisions if row["step"] == step and row["episode"] < 15]
        rewards = task.rewards([finished(task.episode(0), read_pairs(row)) for row in rows])
        assert rewards == [row["reward"] for row in rows]


def test_a_text_reads_the_nearest_key_that_is_left() -> None:
    episode = load_task("reading", overrides=READING).episode(0)
    keys = load_task("reading", overrides=READING).articles[0].pairs.keys  # type: ignore[attr-defined]
    for index in (2, 0, 3):
        assert episode.meaning(keys[index]) == index
        assert episode.take(index).strip() == episode.values[index]  # type: ignore[attr-defined]
    assert episode.meaning(keys[2]) == 1, "only this one is left"
    assert episode.meaning("  ") is None


def test_a_completion_is_played_by_its_lines_and_finished_in_order() -> None:
    task = load_task("reading", overrides=READING)
    keys = task.articles[0].pairs.keys  # type: ignore[attr-defined]
    assert play(task, 0, f"{keys[3]}\n\n{keys[1]}").choices == [3, 1, 0, 2]
    assert play(task, 0, "").choices == [0, 1, 2, 3]
    assert play(task, 0, "\n".join(keys[::-1]) + "\nand more\nof it").choices == [3, 2, 1, 0]


def test_study_answers_a_question_and_seeds_with_a_sentence() -> None:
    both = {**STUDY, "study.mode": "both"}
    asked, seeded = (load_task("study", overrides=both, mode=mode) for mode in ("asked", "seed"))
    case = seeded.cases[0]  # type: ignore[attr-defined]
    assert seeded.episode(0).prompt == case.pairs([0])[0].value + "\n"
    case = asked.cases[0]  # type: ignore[attr-defined]
    assert asked.episode(0).prompt == case.pairs(case.targets)[0].key + "\n"
    candidate = case.pool.candidates[5]
    assert asked.episode(0).meaning(candidate.key) == 5


def test_a_bandit_is_named_pulled_and_paid() -> None:
    task = load_task("bandit", overrides=ROUNDS)
    episode = task.episode(11)
    words = episode.prompt.split()[1::2]
    assert len(set(words)) == 3
    assert episode.meaning(f"I take {words[2]}, not {words[0]}") == 2
    assert episode.meaning("none") is None
    played = play(task, 11, f"{words[2]} {words[2]} and {words[1]}")
    assert played.choices == [2, 2, 1, 0], "three words, and the first arm for the rest"
    again = task.episode(11)
    digits = [again.take(choice) for choice in played.choices]
    assert task.rewards([played]) == [float(sum(map(int, digits)))], "Bernoulli rewards are written as they are"
    assert [task.episode(seed).prompt for seed in (11, 12)] != [episode.prompt, episode.prompt]


def test_refusals() -> None:
    task = load_task("reading", overrides=READING)
    episode = task.episode(0)
    with pytest.raises(ConfigError, match="an episode is paid when it is over: 0 of 4 choices were made"):
        task.rewards([episode])
    finish(episode)
    with pytest.raises(ConfigError, match="the episode is over after 4 choices"):
        episode.take(0)
    with pytest.raises(ConfigError, match=r"unknown task 'readin' \(did you mean 'reading'\?\)"):
        load_task("readin")
    with pytest.raises(ConfigError, match=r"needs `episode[.]pool` one"):
        load_task("reading", preset="study-smoke")
    with pytest.raises(ConfigError, match=r"needs `episode[.]pool` mixed"):
        load_task("study", preset="smoke")
    with pytest.raises(ConfigError, match=r"needs `data[.]eval_articles`"):
        load_task("reading", split="held_out")
    with pytest.raises(ConfigError, match="`mode` is asked or seed"):
        load_task("reading", mode="asked")
