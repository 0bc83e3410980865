"""Episodes in tokens: what is written, what the model may see, and that playing and scoring agree."""

from __future__ import annotations

import pytest
import torch

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.config import BanditConfig, InContextOptions, ModelOptions
from preceptor.systems.bandit.environment import BanditFamily, EpisodeTables
from preceptor.systems.bandit.episodes import (
    Layout,
    build_language_model,
    build_layout,
    play,
    reward_levels,
    score,
    written,
)

SMALL = ModelOptions(width=16, num_layers=2, num_heads=2, dropout=0.0, context_length=128)
WORDS = ("bal", "ber", "din", "dor", "gan")


def config(**options: object) -> BanditConfig:
    settings = {"words": WORDS, "held_out_words": ("kal", "ken", "kin"), "rounds": 6, "first_rounds": 2} | options
    return BanditConfig(mode="in-context", model=SMALL, in_context=InContextOptions(**settings))  # type: ignore[arg-type]


def model_and_layout(config: BanditConfig) -> tuple[LanguageModel, Layout]:
    torch.manual_seed(0)
    lm = build_language_model(config, device=torch.device("cpu"))
    # Larger logits than those of a fresh model, so that choices differ visibly from uniform ones.
    torch.nn.init.ones_(lm.model.base_model.norm.weight)  # type: ignore[arg-type]
    return lm, build_layout(lm, config, config.in_context.words)


def test_an_episode_of_words_in_text() -> None:
    chosen = config(text="words")
    lm, layout = model_and_layout(chosen)
    options = layout.words[torch.tensor([[3, 0]])]
    tables = EpisodeTables(
        rewards=torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]), expected=torch.tensor([[0.6, 0.5]])
    )
    batch = written(layout, tables, options, torch.tensor([[0, 1, 1]]), kind="bernoulli")
    assert lm.decode(batch.tokens[0].tolist()) == "<begin> 1 dor 2 bal dor 1 bal 1 bal 0"
    assert batch.rewards.tolist() == [[1.0, 1.0, 0.0]]
    assert batch.regret[0].tolist() == pytest.approx([0.0, 0.1, 0.1])


def test_an_episode_of_bare_tokens_in_text() -> None:
    lm, layout = model_and_layout(config(text="tokens", num_arms=3))
    tables = BanditFamily(3).sample(1, 2, torch.Generator().manual_seed(0))
    batch = written(layout, tables, layout.deal(1, 3, torch.Generator()), torch.tensor([[2, 0]]), kind="bernoulli")
    paid = ["ab"[int(tables.rewards[0, 0, 2])], "ab"[int(tables.rewards[0, 1, 0])]]
    assert lm.decode(batch.tokens[0].tolist()) == f"<begin> armC={paid[0]} armA={paid[1]}"


def test_words_are_dealt_afresh_and_no_place_or_word_is_special() -> None:
    _, layout = model_and_layout(config(text="words"))
    dealt = layout.deal(5000, 2, torch.Generator().manual_seed(0))
    assert (dealt[:, 0] != dealt[:, 1]).all()
    for place in (0, 1):
        shares = torch.stack([(dealt[:, place] == word).double().mean() for word in layout.words])
        # Five words, each a fifth of 5,000 deals: four standard errors of a share.
        assert (shares - 0.2).abs().max() < 4 * (0.2 * 0.8 / 5000) ** 0.5


@pytest.mark.parametrize("options", [{"text": "words"}, {"text": "tokens"}, {"text": "words", "num_arms": 3}])
def test_playing_on_the_cache_is_scoring_the_text(options: dict[str, object]) -> None:
    chosen = config(**options)
    lm, layout = model_and_layout(chosen)
    family = BanditFamily(chosen.in_context.num_arms)
    tables = family.sample(8, 6, torch.Generator().manual_seed(1))
    dealt = layout.deal(8, family.num_arms, torch.Generator().manual_seed(2))
    batch = play(lm, layout, tables, dealt, kind="bernoulli", generator=torch.Generator().manual_seed(3))
    scored = score(lm, layout, batch)
    again = scored.log_probs.gather(2, batch.actions[..., None])[..., 0].detach()
    assert batch.log_probs is not None
    torch.testing.assert_close(again, batch.log_probs, atol=1e-5, rtol=0)
    assert scored.states.shape == (8, 6, 16)
    assert batch.log_probs.exp().std() > 0.01, "the choices are not all alike"


def test_a_choice_depends_on_what_was_paid_before_it_and_on_nothing_later() -> None:
    lm, layout = model_and_layout(config(text="words"))
    tables = BanditFamily().sample(1, 6, torch.Generator().manual_seed(1))
    dealt = layout.deal(1, 2, torch.Generator().manual_seed(2))
    actions = torch.tensor([[0, 1, 0, 1, 0, 1]])
    plain = score(lm, layout, written(layout, tables, dealt, actions, kind="bernoulli")).log_probs
    flipped_rewards = tables.rewards.clone()
    flipped_rewards[0, 2] = 1 - flipped_rewards[0, 2]  # the rewards of the third round
    flipped = EpisodeTables(flipped_rewards, tables.expected)
    other = score(lm, layout, written(layout, flipped, dealt, actions, kind="bernoulli")).log_probs
    torch.testing.assert_close(plain[:, :3], other[:, :3], atol=1e-6, rtol=0)
    assert ((plain - other)[:, 3:].abs() > 1e-5).any(-1).all()


def test_an_earlier_bandit_in_the_context_changes_the_choices() -> None:
    lm, layout = model_and_layout(config(text="words"))
    tables = BanditFamily().sample(64, 3, torch.Generator().manual_seed(1))
    dealt = layout.deal(64, 4, torch.Generator().manual_seed(2))
    first = play(lm, layout, tables, dealt[:, :2], kind="bernoulli", generator=torch.Generator().manual_seed(0))
    plays = [
        play(
            lm, layout, tables, dealt[:, 2:], kind="bernoulli", generator=torch.Generator().manual_seed(0), earlier=one
        )
        for one in (None, first)
    ]
    assert not torch.equal(plays[0].log_probs, plays[1].log_probs)  # type: ignore[arg-type]
    assert torch.equal(plays[0].tokens[:, :5], plays[1].tokens[:, :5]), "only the new bandit is given back"


def test_gaussian_rewards_are_binned_by_half_a_deviation() -> None:
    rewards = torch.tensor([-2.6, -2.4, -0.1, 0.1, 2.4, 2.6])
    assert reward_levels(rewards, "gaussian").tolist() == [0, 0, 4, 5, 9, 9]
    assert reward_levels(torch.tensor([0.0, 1.0]), "bernoulli").tolist() == [0, 1]


def test_a_word_of_several_tokens_is_refused_by_name(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"'green' is . tokens in the tokenizer of tiny"):
        build_layout(lm, config(text="words", words=("red", "green")), ("red", "green"))


def test_bare_tokens_need_a_model_of_their_own(lm: LanguageModel) -> None:
    named = BanditConfig(mode="in-context", model=ModelOptions(name="starter"), in_context=InContextOptions())
    with pytest.raises(ConfigError, match=r"`in_context\.text` tokens is for a model from random weights"):
        build_layout(lm, named, ())
