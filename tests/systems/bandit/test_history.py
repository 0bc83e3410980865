from __future__ import annotations

import torch

from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.environment import Bandit, EpisodeTables, sample_tables
from preceptor.systems.bandit.history import Episodes, play, round_text
from preceptor.systems.bandit.policy import Vocabulary, decide
from preceptor.systems.bandit.prompts import prompts_for

BANDIT = Bandit("b", ("green", "brown"), "bernoulli", 10.0, (0.75, 0.25))


def episodes(lm: LanguageModel, *, count: int = 6, rounds: int = 4, seed: int = 0) -> tuple[Episodes, EpisodeTables]:
    tables = sample_tables(BANDIT, num_episodes=count, num_rounds=rounds, generator=torch.Generator().manual_seed(seed))
    prompts = prompts_for(BANDIT.words, ["Pick {options}:", "{options}?", "Take {options}, say"])[:count]
    options = Vocabulary(lm, BANDIT.words).options(BANDIT.words)
    return play(lm, prompts, options, tables, torch.Generator().manual_seed(seed)), tables


def test_acting_on_the_cache_is_scoring_the_text(lm: LanguageModel) -> None:
    played, _ = episodes(lm)
    decision = decide(lm, played.contexts)
    chosen = decision.log_probs.gather(1, played.actions.flatten()[:, None])[:, 0]
    torch.testing.assert_close(chosen.detach(), played.log_probs.flatten(), atol=1e-5, rtol=0)
    assert played.log_probs.exp().min() < 0.95  # something was chosen that need not have been


def test_the_text_says_what_was_chosen_and_round_text(lm: LanguageModel) -> None:
    played, tables = episodes(lm)
    for number, context in enumerate(played.contexts):
        text = lm.decode(context.tokens)
        expected = "".join(
            round_text(BANDIT.words[arm], float(tables.rewards[number, at, arm]))
            for at, arm in enumerate(played.actions[number].tolist())
        )
        assert text.endswith(expected)
        assert len(context.choices) == 4
    assert torch.equal(played.rewards, tables.rewards.gather(2, played.actions[..., None])[..., 0])


def test_regret_by_hand() -> None:
    played = Episodes(
        contexts=[],
        actions=torch.tensor([[0, 1], [1, 1]]),
        rewards=torch.zeros(2, 2),
        log_probs=torch.zeros(2, 2),
        expected=torch.tensor([[7.5, 2.5], [2.5, 7.5]]),
    )
    assert played.regret.tolist() == [[0.0, 5.0], [0.0, 0.0]]
    assert played.is_optimal.tolist() == [[True, False], [True, True]]


def test_how_a_reward_is_written() -> None:
    assert round_text("rice", 10.0) == " rice 10."
    assert round_text("rice", 0.0) == " rice 0."
    assert round_text("rice", 1.26) == " rice 1.3."
    assert round_text("rice", -0.04) == " rice -0."
