"""Answers to items: prompts drawn by the weights, answers sampled from the policy, and whether each is right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.lm.generators.base import Generator, end_token
from preceptor.lm.model import LanguageModel
from preceptor.runs.world import ALONE, World
from preceptor.systems.curriculum.policy import Prompt, Rollouts, generate_rollouts, rollout_sampling
from preceptor.systems.curriculum.tasks.sources import Item, Source


@dataclass(frozen=True)
class Answers:
    """Answers to items, ``group_size`` adjacent ones to each.

    Attributes:
        sources: index of the source of each group.
        items: of each group.
        rollouts: the answers, each cut at its own longest length.
        right: True = the verifier accepted it and it ended in time; one per answer.
    """

    sources: list[int]
    items: list[Item]
    rollouts: Rollouts
    right: Bool[Tensor, " batch"]

    @property
    def num_tokens(self) -> int:
        """Answer tokens that were sampled."""
        return int(self.rollouts.mask.sum())

    def success(self, group_size: int) -> Float[Tensor, " groups"]:
        """Fraction of each group's answers that are right."""
        return self.right.float().view(-1, group_size).mean(1)


def longest_answer(lm: LanguageModel, source: Source, item: Item) -> int:
    """Tokens that an answer to ``item`` may have, its end token included."""
    return source.max_tokens or len(lm.encode(item.answer)) + 1


def draw_sources(
    costs: Sequence[float], weights: Float[Tensor, " choices"], *, budget: float, chooser: random.Random
) -> list[int]:
    """Sources until their nominal cost reaches ``budget``; a weight is the chance of a draw, whatever it costs.

    >>> draw_sources([2.0, 3.0], torch.tensor([1.0, 0.0]), budget=5.0, chooser=random.Random(0))
    [0, 0, 0]
    """
    drawn: list[int] = []
    cost = 0.0
    while cost < budget:
        source = chooser.choices(range(len(costs)), weights=weights.tolist())[0]
        drawn.append(source)
        cost += costs[source]
    return drawn


@torch.no_grad()
def sample_answers(
    lm: LanguageModel,
    sources: Sequence[Source],
    drawn: Sequence[int],
    *,
    group_size: int,
    temperature: float,
    chooser: random.Random,
    generator: torch.Generator,
    engine: Generator | None = None,
    world: World = ALONE,
) -> Answers:
    """``group_size`` answers to a fresh item of each source in ``drawn``.

    Args:
        lm: the policy.
        sources: all of them.
        drawn: indices of the sources, one per group.
        group_size: answers of a group.
        temperature: of sampling.
        chooser: of the items, and of coins.
        generator: of the answers.
        engine: writes them; None is the policy's own decoder.
        world: processes that share the items; each gets all answers.
    """
    items = [sources[index].draw(chooser) for index in drawn]
    longest = [longest_answer(lm, sources[index], item) for index, item in zip(drawn, items, strict=True)]
    prompts = [
        Prompt(sources[index].name, (lm.begin_token, *lm.encode(item.prompt)), tuple(lm.encode(item.answer)))
        for index, item in zip(drawn, items, strict=True)
    ]

    def sampled(rows: slice) -> list[Tensor]:
        own = generate_rollouts(
            lm,
            prompts[rows],
            group_size=group_size,
            num_tokens=max(longest),
            sampling=rollout_sampling(lm, temperature),
            generator=world.stream(generator, rows, len(prompts), each=group_size),
            engine=engine,
        )
        # A row of what is gathered is a prompt, so that a group stays in one process.
        tensors = (own.tokens, own.mask, own.log_probs, own.entropy)
        return [each.unflatten(0, (-1, group_size)) for each in tensors]

    tokens, mask, log_probs, entropy = (each.flatten(0, 1) for each in world.gathered(len(prompts), sampled))
    rollouts = Rollouts(
        prompts=tuple(prompt for prompt in prompts for _ in range(group_size)),
        tokens=tokens,
        mask=mask,
        log_probs=log_probs,
        entropy=entropy,
    )
    # Rows are sampled to the longest answer of the batch; an easy item's answer counts only as far as it may go.
    allowed = torch.tensor(longest).repeat_interleave(group_size)[:, None]  # [batch, 1]
    in_time = torch.arange(rollouts.num_tokens) < allowed
    rollouts = replace(rollouts, mask=rollouts.mask & in_time.to(rollouts.mask.device))
    right = []
    for row in range(len(rollouts)):
        group = row // group_size
        if sources[drawn[group]].random_reward:
            right.append(chooser.random() < 0.5)
            continue
        answer = rollouts.continuation(row)
        ended = bool(answer) and answer[-1] == end_token(lm)
        right.append(ended and items[group].check(lm.decode(answer[:-1])))
    return Answers(list(drawn), items, rollouts, torch.tensor(right))
