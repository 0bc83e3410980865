"""Episodes of bandits in a language model's context: how they are written, played on a KV cache, and scored again.

With ``text: words`` an episode names its options and then alternates the chosen word and its reward, one token each.
With ``text: tokens`` a round is one token that stands for an arm and its reward together, and nothing is named. All
rows of a batch have the same length, so every pass is a plain rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preceptor.errors import ConfigError
from preceptor.lm.decode import Decoder
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import draw
from preceptor.runs.world import ALONE, World
from preceptor.systems.bandit.config import OPTIONS, BanditConfig
from preceptor.systems.bandit.environment import EpisodeTables

NUM_LEVELS = {"bernoulli": 2, "gaussian": 10}
"""Rewards are written as one digit: 0 or 1, or the bin of a Gaussian reward, half a standard deviation wide."""

BEGIN, UNKNOWN = "<begin>", "<unknown>"


def reward_levels(rewards: Float[Tensor, "*shape"], kind: str) -> Int[Tensor, "*shape"]:
    """The digit that each reward is written as.

    >>> reward_levels(torch.tensor([-9.0, -0.1, 0.0, 0.6, 9.0]), "gaussian")
    tensor([0, 4, 5, 6, 9])
    """
    if kind == "bernoulli":
        return rewards.long()
    return (2 * rewards + 5).floor().clamp(0, 9).long()


def build_tokenizer(words: Sequence[str], *, context_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for a model from random weights: one token for each word and each digit."""
    entries = [BEGIN, UNKNOWN, *"0123456789", *words]
    tokenizer = Tokenizer(models.WordLevel({entry: token for token, entry in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BEGIN, unk_token=UNKNOWN, model_max_length=context_length
    )


@dataclass(frozen=True)
class Layout:
    """The tokens that episodes are made of.

    Attributes:
        begin: tokens before the options, the one that begins a text among them.
        markers: the token before each option, which says what place it has.
        end: tokens between the options and the first choice.
        words: one token for each word that can be dealt; without words, for each arm.
        levels: one token for each level of reward; with ``joint``, [arm, level] of them.
        joint: whether a round is one token for arm and reward together, and no option is named.
    """

    begin: tuple[int, ...]
    markers: tuple[int, ...]
    end: tuple[int, ...]
    words: Int[Tensor, " words"]
    levels: Int[Tensor, "*arms levels"]
    joint: bool

    def deal(self, num_episodes: int, num_arms: int, generator: torch.Generator) -> Int[Tensor, "episodes arms"]:
        """The token of each arm in each episode: words drawn afresh without replacement, in random order."""
        if self.joint:
            return self.words[:num_arms].expand(num_episodes, -1)
        keys = torch.rand(num_episodes, len(self.words), generator=generator)
        return self.words[keys.topk(num_arms, dim=1).indices]

    def prompt(self, options: Int[Tensor, "episodes arms"]) -> Int[Tensor, "episodes time"]:
        """The tokens before the first choice."""
        num_episodes, num_arms = options.shape
        begin, markers, end = (
            torch.tensor(tokens, dtype=torch.long).expand(num_episodes, -1)
            for tokens in (self.begin, self.markers[:num_arms], self.end)
        )
        if self.joint:
            return torch.cat([begin, end], dim=1)
        named = torch.stack([markers, options], dim=2).flatten(1)  # marker, option, marker, option, ...
        return torch.cat([begin, named, end], dim=1)

    def rounds(
        self,
        options: Int[Tensor, "episodes arms"],
        actions: Int[Tensor, "episodes rounds"],
        levels: Int[Tensor, "episodes rounds"],
    ) -> Int[Tensor, "episodes rounds tokens"]:
        """The tokens of each round: one or two."""
        if self.joint:
            return self.levels[actions, levels][..., None]
        return torch.stack([options.gather(1, actions), self.levels[levels]], dim=-1)


def initial_deviation(width: int) -> float:
    """Standard deviation of random weights, about 1/√width.

    The usual 0.02 is for wide models; here attention would hardly tell tokens apart.
    """
    return 0.8 / math.sqrt(width)


def build_language_model(config: BanditConfig, *, device: torch.device) -> LanguageModel:
    """The named model, or a small decoder with rotary positions, random weights and a token for each word."""
    options = config.model
    if options.name:
        return load_language_model(options.name, device=device)
    tokenizer = build_tokenizer(vocabulary(config), context_length=options.context_length)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.num_layers,
            num_attention_heads=options.num_heads,
            num_key_value_heads=options.num_heads,
            max_position_embeddings=options.context_length,
            tie_word_embeddings=True,
            initializer_range=initial_deviation(options.width),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
        )
    )
    # Small logits: before the first update every arm is about as likely as the others.
    nn.init.constant_(model.model.norm.weight, 0.1)
    nn.Module.to(model, device)
    return LanguageModel(model, tokenizer, name=f"decoder {options.num_layers} x {options.width}")


def vocabulary(config: BanditConfig) -> list[str]:
    """The words of a tokenizer made for the run; without words, arms and rounds stand for themselves."""
    options = config.in_context
    if options.text == "words":
        return [*options.words, *options.held_out_words, *options.template.replace(OPTIONS, " ").split()]
    arms = [f"arm{arm}" for arm in "ABCDE"[: options.num_arms]]
    return arms + [f"{arm}={'abcdefghij'[level]}" for arm in arms for level in range(NUM_LEVELS[options.kind])]


def build_layout(lm: LanguageModel, config: BanditConfig, words: tuple[str, ...]) -> Layout:
    """The tokens of episodes with these words; raises ``ConfigError`` for words that are not one token."""
    options = config.in_context
    num_levels = NUM_LEVELS[options.kind]
    if options.text == "tokens":
        if config.model.name:
            raise ConfigError(
                "`in_context.text` tokens is for a model from random weights; a model with a name plays with words"
            )
        names = vocabulary(config)
        tokens = torch.tensor([lm.encode(name)[0] for name in names])
        arms, rounds = tokens[: options.num_arms], tokens[options.num_arms :]
        return Layout((lm.begin_token,), (), (), arms, rounds.view(-1, num_levels), joint=True)
    faults, tokens_of = [], {}
    for text in (*(f" {word}" for word in words), *map(str, range(num_levels))):
        tokens_of[text] = lm.encode(text)
        if len(tokens_of[text]) != 1:
            faults.append(
                f"'{text.strip()}' is {len(tokens_of[text])} tokens in the tokenizer of {lm.name}, and an episode in "
                "the context takes words and rewards of one token each; use other `in_context.words`"
            )
    if faults:
        raise ConfigError(*faults[:10])
    begin, end = (lm.encode(part) if part else [] for part in options.template.split(OPTIONS))
    return Layout(
        begin=(lm.begin_token, *begin),
        markers=tuple(lm.encode(f" {place + 1}")[-1] for place in range(options.num_arms)),
        end=tuple(end),
        words=torch.tensor([tokens_of[f" {word}"][0] for word in words]),
        levels=torch.tensor([tokens_of[str(level)][0] for level in range(num_levels)]),
        joint=False,
    )


@dataclass(frozen=True)
class Batch:
    """Finished episodes.

    Attributes:
        tokens: prompt and rounds.
        options: the token of each arm.
        actions: the arms chosen.
        rewards: what they paid.
        levels: the rewards as they stand in the text.
        log_probs: of each choice when it was made, in nats; None of episodes that the model did not play.
        expected: expected reward of each arm.
        prompt_length: tokens before the first choice.
    """

    tokens: Int[Tensor, "episodes time"]
    options: Int[Tensor, "episodes arms"]
    actions: Int[Tensor, "episodes rounds"]
    rewards: Float[Tensor, "episodes rounds"]
    levels: Int[Tensor, "episodes rounds"]
    log_probs: Float[Tensor, "episodes rounds"] | None
    expected: Float[Tensor, "episodes arms"]
    prompt_length: int

    @property
    def regret(self) -> Float[Tensor, "episodes rounds"]:
        """Expected reward that each choice forgoes."""
        return self.expected.amax(1, keepdim=True) - self.expected.gather(1, self.actions)

    def rows(self, rows: Int[Tensor, " rows"]) -> Batch:
        """Some of the episodes."""
        return replace(
            self,
            **{
                name: getattr(self, name)[rows]
                for name in ("tokens", "options", "actions", "rewards", "levels", "expected")
            },
            log_probs=None if self.log_probs is None else self.log_probs[rows],
        )


def written(
    layout: Layout,
    tables: EpisodeTables,
    options: Int[Tensor, "episodes arms"],
    actions: Int[Tensor, "episodes rounds"],
    *,
    kind: str,
    log_probs: Float[Tensor, "episodes rounds"] | None = None,
) -> Batch:
    """Episodes of given choices; a model need not have made them."""
    rewards = tables.rewards.gather(2, actions[..., None])[..., 0]  # [episodes, rounds]
    levels = reward_levels(rewards, kind)
    prompt = layout.prompt(options)
    rounds = layout.rounds(options, actions, levels).flatten(1)
    return Batch(
        tokens=torch.cat([prompt, rounds], dim=1),
        options=options,
        actions=actions,
        rewards=rewards,
        levels=levels,
        log_probs=log_probs,
        expected=tables.expected,
        prompt_length=prompt.shape[1],
    )


@torch.no_grad()
def play(
    lm: LanguageModel,
    layout: Layout,
    tables: EpisodeTables,
    options: Int[Tensor, "episodes arms"],
    *,
    kind: str,
    generator: torch.Generator,
    earlier: Batch | None = None,
    world: World = ALONE,
) -> Batch:
    """One episode for each bandit of ``tables``, all on one KV cache; weights rest.

    Args:
        lm: the model that plays.
        layout: how episodes are written.
        tables: what every arm pays in every round.
        options: the token of each arm.
        kind: of the rewards.
        generator: of the choices.
        earlier: finished episodes that stand before these in the same contexts; what is returned does not hold them.
        world: the processes that share the episodes: each plays its own and gets all of them.
    """
    num_rounds = tables.rewards.shape[1]
    prompt = layout.prompt(options)
    if earlier is not None:
        prompt = torch.cat([earlier.tokens, prompt[:, 1:]], dim=1)  # a text begins once

    def rounds(rows: slice) -> tuple[Tensor, Tensor]:
        own, paid_by = options[rows], tables.rewards[rows]
        stream = world.stream(generator, rows, len(options))
        decoder = Decoder(lm, batch_size=len(own))
        decoder.append(prompt[rows].tolist())
        actions, log_probs = [], []
        for round_ in range(num_rounds):
            # A softmax over the options' tokens alone: [episodes, arms].
            policy = decoder.next_log_probs.cpu().gather(1, own).log_softmax(-1)
            arms = draw(policy, stream)  # [episodes]
            actions.append(arms)
            log_probs.append(policy.gather(1, arms[:, None])[:, 0])
            if round_ + 1 < num_rounds:  # nothing is chosen after the last round
                paid = paid_by[:, round_].gather(1, arms[:, None])  # [episodes, 1]
                new = layout.rounds(own, arms[:, None], reward_levels(paid, kind))[:, 0]  # [episodes, tokens]
                for column in new.T:  # token by token: the engine is fastest at one token per row
                    decoder.append(column[:, None].tolist())
        return torch.stack(actions, 1), torch.stack(log_probs, 1)

    actions, log_probs = world.gathered(len(options), rounds)
    return written(layout, tables, options, actions, kind=kind, log_probs=log_probs)


@dataclass(frozen=True)
class Scored:
    """What the model says of finished episodes, with gradient.

    Attributes:
        log_probs: of every arm before each round, in nats.
        states: what the last layer gives before each round, for the value head.
        reward_log_probs: of the reward token that came, among all levels, in nats; None where a round is one token.
    """

    log_probs: Float[Tensor, "episodes rounds arms"]
    states: Float[Tensor, "episodes rounds width"]
    reward_log_probs: Float[Tensor, "episodes rounds"] | None


def score(lm: LanguageModel, layout: Layout, batch: Batch) -> Scored:
    """One pass over whole episodes: the policy before each round, and the reward tokens' log-probabilities."""
    tokens = batch.tokens[:, :-1].to(lm.device)  # nothing follows the last reward
    stride = 1 if layout.joint else 2
    num_rounds = batch.actions.shape[1]
    first = batch.prompt_length - 1  # the last token of the prompt predicts the first choice
    keep = torch.zeros(tokens.shape, dtype=torch.bool, device=lm.device)
    keep[:, first:] = True
    output = lm.forward(tokens, keep=keep, capture=lm.layers[-1])
    logits = output.logits.view(len(tokens), -1, output.logits.shape[-1])  # [episodes, kept, vocab]
    assert output.captured is not None
    choices = logits[:, ::stride]  # [episodes, rounds, vocab]
    options = batch.options.to(lm.device)[:, None].expand(-1, num_rounds, -1)
    log_probs = choices.gather(2, options).log_softmax(-1)
    reward_log_probs = None
    if not layout.joint:
        # After the chosen word its reward comes: among the levels alone, [episodes, rounds, levels].
        of_levels = logits[:, 1::2][..., layout.levels.to(lm.device)].log_softmax(-1)
        reward_log_probs = of_levels.gather(2, batch.levels.to(lm.device)[..., None])[..., 0]
    return Scored(log_probs, output.captured[:, first::stride], reward_log_probs)
