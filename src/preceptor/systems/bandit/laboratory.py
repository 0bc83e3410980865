"""What an experiment needs before the first step: model, words, bandits, prompts, and what every pull would pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.run.random import derived_seed
from preceptor.systems.bandit.config import BanditConfig, BanditOptions
from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.language import build_language_model
from preceptor.systems.bandit.policy import Context, Vocabulary
from preceptor.systems.bandit.prompts import Prompt, corpus, literal_prompts, prompts_for, training_word_sets


@dataclass(frozen=True)
class Laboratory:
    """Everything that stays as it is while the model learns (but for the weights of ``lm``).

    Attributes:
        lm: the model that decides.
        vocabulary: its words in tokens.
        bandits: what is played.
        prompts: of every bandit by name: those to train on, and those held out.
        contexts: of every bandit by name: its training prompts in tokens.
        training_lines, validation_lines: the corpus, by templates seen and held out.
        tables: of every bandit by name: what each word pays at each pull.
    """

    lm: LanguageModel
    vocabulary: Vocabulary
    bandits: tuple[Bandit, ...]
    prompts: dict[str, list[Prompt]]
    contexts: dict[str, list[Context]]
    training_lines: list[str]
    validation_lines: list[str]
    tables: dict[str, Float[Tensor, "pulls arms"]]

    def training_prompts(self, name: str) -> list[Prompt]:
        """The prompts of bandit ``name`` that REINFORCE acts on."""
        return [prompt for prompt in self.prompts[name] if not prompt.held_out]


def prepare(config: BanditConfig, *, device: torch.device) -> Laboratory:
    """The laboratory of ``config``.

    Raises:
        ConfigError: words that cannot be told apart, or prompts that do not fit the model's context.
        ModelError: there is no such model or tokenizer.
    """
    lm = build_language_model(config.model, device=device)
    bandits = tuple(as_bandit(options) for options in config.bandits)
    vocabulary = Vocabulary(lm, (word for bandit in bandits for word in bandit.words))
    prompts = prompts_of(config)
    training, validation = _lines(bandits, prompts, config)
    contexts = {
        name: [vocabulary.context(lm, prompt) for prompt in of_bandit if not prompt.held_out]
        for name, of_bandit in prompts.items()
    }
    longest = max(
        len(context.tokens) + max(map(len, options))
        for of_bandit in contexts.values()
        for context in of_bandit
        for _, options in context.choices
    )
    if longest > lm.context_length:
        raise ConfigError(
            f"the longest prompt takes {longest} tokens with its answer and the context of {lm.name} holds "
            f"{lm.context_length}; shorten `prompts.templates`"
        )
    return Laboratory(
        lm=lm,
        vocabulary=vocabulary,
        bandits=bandits,
        prompts=prompts,
        contexts=contexts,
        training_lines=training,
        validation_lines=validation,
        tables=reward_tables(config),
    )


def prompts_of(config: BanditConfig) -> dict[str, list[Prompt]]:
    """The prompts of every bandit by name: those to train on, then those held out."""
    found = {}
    for options in config.bandits:
        if options.prompts:
            seen = literal_prompts(options.words, options.prompts)
        else:
            seen = prompts_for(options.words, config.prompts.templates)
        found[options.label] = seen + prompts_for(options.words, config.prompts.held_out, held_out=True)
    return found


def reward_tables(config: BanditConfig) -> dict[str, Float[Tensor, "pulls arms"]]:
    """What every word of every bandit pays at every pull: a function of the configuration and its seed alone."""
    tables = {}
    for name, prompts in prompts_of(config).items():
        bandit = next(as_bandit(options) for options in config.bandits if options.label == name)
        num_pulls = config.update.epochs * sum(not prompt.held_out for prompt in prompts)
        generator = torch.Generator().manual_seed(derived_seed(config.seed, f"rewards of {name}"))
        tables[name] = bandit.rewards(num_pulls, generator)
    return tables


def as_bandit(options: BanditOptions) -> Bandit:
    """The bandit that the configuration describes."""
    pays = options.success if options.kind == "bernoulli" else options.mean
    return Bandit(options.label, options.words, options.kind, options.base_reward, pays, options.deviation)


def _lines(
    bandits: Sequence[Bandit], prompts: dict[str, list[Prompt]], config: BanditConfig
) -> tuple[list[str], list[str]]:
    """Training and validation lines of the corpus."""
    own = [prompt for bandit in bandits for prompt in prompts[bandit.name]]
    others = [
        prompt
        for words in training_word_sets(bandits, pairs=config.pretraining.pairs)[len(bandits) :]
        for held_out, templates in ((False, config.prompts.templates), (True, config.prompts.held_out))
        for prompt in prompts_for(words, templates, held_out=held_out)
    ]
    split: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in own + others:
        split[prompt.held_out].append(prompt)
    return corpus(split[0]), corpus(split[1])
