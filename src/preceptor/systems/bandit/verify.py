"""Pays the recorded words again, without the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preceptor.errors import DataError
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.random import RandomStreams
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.environment import BanditFamily, sample_tables
from preceptor.systems.bandit.in_context import sampled_tables, shown_tables
from preceptor.systems.bandit.setup import build_bandit, reward_tables
from preceptor.systems.base import Replayed, Services


def verify(config: BanditConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Each recorded reward of the run in ``folder`` beside what its bandit pays for the recorded word.

    Raises:
        DataError: ``decisions.jsonl`` is missing or malformed.
    """
    rows = read_jsonl(folder / "decisions.jsonl")
    replayed = {"prompt": _prompt_rewards, "history": _history_rewards, "in-context": _in_context_rewards}
    return replayed[config.mode](config, rows)


def _prompt_rewards(config: BanditConfig, rows: Iterator[dict[str, Any]]) -> Iterator[Replayed]:
    tables = reward_tables(config)
    for row in rows:
        where = f"step {row['step']}, {row['bandit']}, pull {row['pull']}"
        reward = tables[row["bandit"]][row["pull"], _arm(row["words"], row["word"], where)]
        yield Replayed(where, row["reward"], float(reward))


def _history_rewards(config: BanditConfig, rows: Iterator[dict[str, Any]]) -> Iterator[Replayed]:
    # Training drew one batch of tables a step from this stream, and nothing else, so it can be drawn again in order.
    environment = RandomStreams(config.seed, ["environment"])["environment"]
    bandits = {bandit.name: bandit for bandit in map(build_bandit, config.bandits)}
    step, episode, tables = None, 0, None
    for row in rows:
        bandit = bandits[row["bandit"]]
        if row["step"] != step:
            step, episode = row["step"], 0
            tables = sample_tables(
                bandit,
                num_episodes=config.history.batch_size,
                num_rounds=config.history.rounds,
                generator=environment,
            )
        assert tables is not None
        for round_, (word, reward) in enumerate(zip(row["words"], row["rewards"], strict=True)):
            where = f"step {step}, episode {episode}, round {round_ + 1}"
            yield Replayed(where, reward, float(tables.rewards[episode, round_, _arm(bandit.words, word, where)]))
        episode += 1


def _in_context_rewards(config: BanditConfig, rows: Iterator[dict[str, Any]]) -> Iterator[Replayed]:
    options = config.in_context
    family = BanditFamily(options.num_arms, options.kind, options.prior)
    step, tables = None, None
    for row in rows:
        if row["step"] != step:
            step = row["step"]
            tables = sampled_tables(
                config, family, step, num_episodes=options.batch_size, num_rounds=len(row["actions"])
            )
        assert tables is not None
        paid = shown_tables(config, tables).rewards[row["episode"]]  # [rounds, arms]
        for round_, (arm, reward) in enumerate(zip(row["actions"], row["rewards"], strict=True)):
            where = f"step {step}, episode {row['episode']}, round {round_ + 1}"
            if not 0 <= arm < options.num_arms:
                raise DataError(f"decisions.jsonl, {where}: there is no arm {arm}; the last is {options.num_arms - 1}")
            yield Replayed(where, reward, float(paid[round_, arm]))


def _arm(words: Sequence[str], word: str, where: str) -> int:
    if word not in words:
        raise DataError(f"decisions.jsonl, {where}: '{word}' is none of the words {', '.join(words)}")
    return words.index(word)
