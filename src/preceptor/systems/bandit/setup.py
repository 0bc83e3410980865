"""What a run has before its first step: the model, words, bandits and prompts, and what every pull would pay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.runs.random import derived_seed
from preceptor.systems.bandit import episodes
from preceptor.systems.bandit.config import BanditConfig, BanditOptions
from preceptor.systems.bandit.environment import Bandit, BanditFamily
from preceptor.systems.bandit.episodes import Layout
from preceptor.systems.bandit.policy import Context, Vocabulary
from preceptor.systems.bandit.pretraining import build_language_model
from preceptor.systems.bandit.prompts import Prompt, corpus, literal_prompts, prompts_for, training_word_sets

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services


@dataclass(frozen=True)
class Setup:
    """Everything that stays the same during a run, except for the weights of ``lm``.

    Attributes:
        config: the whole configuration.
        run: folder, random streams and logs.
        lm: the model that decides; training moves its weights in place.
        vocabulary: the tokens of each word.
        bandits: the bandits to play.
        prompts: prompts of each bandit, by its name: those to train on, then those held out.
        contexts: tokenized training prompts of each bandit, by its name.
        training_lines, validation_lines: the pretraining corpus, from training and from held-out templates.
        tables: what each word pays at each pull, by the bandit's name (mode: prompt).
    """

    config: BanditConfig
    run: Run
    lm: LanguageModel
    vocabulary: Vocabulary
    bandits: tuple[Bandit, ...]
    prompts: dict[str, list[Prompt]]
    contexts: dict[str, list[Context]]
    training_lines: list[str]
    validation_lines: list[str]
    tables: dict[str, Float[Tensor, "pulls arms"]]

    def training_prompts(self, bandit: str) -> list[Prompt]:
        """The prompts of ``bandit`` that REINFORCE trains on."""
        return [prompt for prompt in self.prompts[bandit] if not prompt.held_out]


def prepare(config: BanditConfig, run: Run, services: Services) -> Setup:
    """The setup of ``run``; a model built from random weights draws them from torch's global generator.

    Raises:
        ConfigError: words whose tokens cannot be told apart, or prompts that do not fit into the model's context.
        ModelError: no such model or tokenizer.
    """
    lm = build_language_model(config.model, device=run.device)
    bandits = tuple(build_bandit(options) for options in config.bandits)
    vocabulary = Vocabulary(lm, (word for bandit in bandits for word in bandit.words))
    prompts = build_prompts(config)
    training_lines, validation_lines = _corpus_lines(config, bandits, prompts)
    contexts = {
        name: [vocabulary.context(lm, prompt) for prompt in of_bandit if not prompt.held_out]
        for name, of_bandit in prompts.items()
    }
    # The longest prompt with its longest answer.
    num_tokens = max(
        len(context.tokens) + max(map(len, options))
        for of_bandit in contexts.values()
        for context in of_bandit
        for _, options in context.choices
    )
    if num_tokens > lm.context_length:
        raise ConfigError(
            f"the longest prompt takes {num_tokens} tokens with its answer and the context of {lm.name} holds "
            f"{lm.context_length}; shorten `prompts.templates`"
        )
    return Setup(
        config=config,
        run=run,
        lm=lm,
        vocabulary=vocabulary,
        bandits=bandits,
        prompts=prompts,
        contexts=contexts,
        training_lines=training_lines,
        validation_lines=validation_lines,
        tables=reward_tables(config),
    )


def build_bandit(options: BanditOptions) -> Bandit:
    """The bandit that the configuration describes."""
    pays = options.success if options.kind == "bernoulli" else options.mean
    return Bandit(options.label, options.words, options.kind, options.base_reward, pays, options.deviation)


def build_prompts(config: BanditConfig) -> dict[str, list[Prompt]]:
    """The prompts of each bandit by name: those to train on, then those held out."""
    prompts = {}
    for options in config.bandits:
        if options.prompts:
            training = literal_prompts(options.words, options.prompts)
        else:
            training = prompts_for(options.words, config.prompts.templates)
        prompts[options.label] = training + prompts_for(options.words, config.prompts.held_out, held_out=True)
    return prompts


def reward_tables(config: BanditConfig) -> dict[str, Float[Tensor, "pulls arms"]]:
    """What each word of each bandit pays at each pull: a function of the configuration and its seed alone."""
    tables = {}
    prompts = build_prompts(config)
    for options in config.bandits:
        # Every epoch pulls once under every training prompt.
        num_pulls = config.update.epochs * sum(not prompt.held_out for prompt in prompts[options.label])
        # Named after the bandit, so that another bandit in the configuration changes no reward of this one.
        generator = torch.Generator().manual_seed(derived_seed(config.seed, f"rewards of {options.label}"))
        # torch draws normal numbers in blocks of 16 and the rest differently. Whole blocks make the table of a run
        # that goes on for more epochs begin with the table that it had.
        num_drawn = math.ceil(num_pulls / 16) * 16
        tables[options.label] = build_bandit(options).rewards(num_drawn, generator)[:num_pulls]
    return tables


@dataclass(frozen=True)
class InContextSetup:
    """The same for mode ``in-context``.

    Attributes:
        config: the whole configuration.
        run: folder, random streams and logs.
        lm: the model that plays; training moves its weights in place.
        layout, held_out_layout: how episodes are written, with the words of training and with those held out.
        fresh_tokens: the tokens whose vectors are drawn anew for every update, those of all words; none of a model that
            has learned its words before.
        family: the bandits that are sampled.
        initial_model: ``lm`` before any update, frozen.
    """

    config: BanditConfig
    run: Run
    lm: LanguageModel
    layout: Layout
    held_out_layout: Layout | None
    fresh_tokens: Int[Tensor, " words"]
    family: BanditFamily
    initial_model: LanguageModel

    @property
    def token_vectors(self) -> Float[Tensor, "vocab width"]:
        """The weight of the model's input embedding, a parameter."""
        embedding = self.lm.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight


def prepare_in_context(config: BanditConfig, run: Run) -> InContextSetup:
    """The setup of ``run``; a model built from random weights draws them from torch's global generator.

    Raises:
        ConfigError: a word or a reward is not one token, or the longest episode does not fit into the context.
        ModelError: no such model.
    """
    options = config.in_context
    lm = episodes.build_language_model(config, device=run.device)
    layout = episodes.build_layout(lm, config, options.words)
    per_round = 1 if layout.joint else 2
    num_tokens = layout.prompt(layout.words[None, : options.num_arms]).shape[1]
    num_tokens += per_round * options.rounds * max(options.horizons)
    if num_tokens > lm.context_length:
        raise ConfigError(
            f"the longest episode takes {num_tokens} tokens and the context of {lm.name} holds {lm.context_length}; "
            "lower `in_context.rounds` or `in_context.horizons`, or raise `model.context_length`"
        )
    held_out_layout = None if layout.joint else episodes.build_layout(lm, config, options.held_out_words)
    fresh = torch.empty(0, dtype=torch.long)
    if held_out_layout is not None and options.fresh_words and not config.model.name:
        fresh = torch.cat([layout.words, held_out_layout.words])
    return InContextSetup(
        config=config,
        run=run,
        lm=lm,
        layout=layout,
        held_out_layout=held_out_layout,
        fresh_tokens=fresh,
        family=BanditFamily(options.num_arms, options.kind, options.prior),
        initial_model=lm.frozen_copy(),
    )


def _corpus_lines(
    config: BanditConfig, bandits: tuple[Bandit, ...], prompts: dict[str, list[Prompt]]
) -> tuple[list[str], list[str]]:
    """Training and validation lines of the pretraining corpus."""
    own = [prompt for bandit in bandits for prompt in prompts[bandit.name]]
    # The bandits' own word sets come first and have their prompts already.
    crossed = [
        prompt
        for words in training_word_sets(bandits, pairs=config.pretraining.pairs)[len(bandits) :]
        for held_out, templates in ((False, config.prompts.templates), (True, config.prompts.held_out))
        for prompt in prompts_for(words, templates, held_out=held_out)
    ]
    training, validation = (
        [prompt for prompt in own + crossed if prompt.held_out == held_out] for held_out in (False, True)
    )
    return corpus(training), corpus(validation)
