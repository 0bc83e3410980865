from __future__ import annotations

import pytest
import torch

from preceptor.config import load_config
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.setup import build_prompts, reward_tables

KINDS = {
    "bernoulli": "[{words: [bean, chickpea], base_reward: 10, success: [0.75, 0.25]}]",
    "gaussian": "[{words: [red, green, blue], kind: gaussian, mean: [0, 1, 2]}]",
}


def config(kind: str, epochs: int) -> BanditConfig:
    templates = "prompts.templates=['Pick {options}:', '{options}? I take']"
    loaded: BanditConfig = load_config(
        BanditConfig, overrides=[f"bandits={KINDS[kind]}", f"update.epochs={epochs}", templates]
    )
    return loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50])
def test_a_longer_run_begins_with_the_rewards_of_a_shorter_one(kind: str, epochs: int) -> None:
    (name, short), *_ = reward_tables(config(kind, epochs)).items()
    long = reward_tables(config(kind, epochs + 5))[name]
    prompts = build_prompts(config(kind, epochs))[name]
    assert len(short) == epochs * sum(not prompt.held_out for prompt in prompts)
    assert len(long) > len(short)
    assert torch.equal(long[: len(short)], short)
