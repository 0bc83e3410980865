"""Mode ``in-context``: a language model learns to explore bandits that it has never seen.

Every episode is a bandit of its own, sampled from a prior; past actions and rewards stand in the context, so whatever
the model knows of a bandit it found out in that episode. What is learned is how to explore.

1. Warm start (optional): cross-entropy to labels of the best arm on histories of other players, from nearly certain
   rewards and few rounds to the prior and all rounds as the labels are met, and then to Thompson sampling's choices.
2. The model plays a batch of bandits on one KV cache (``episodes.py``).
3. PPO with a value head, or REINFORCE against the batch's other episodes, on what each choice forgoes.
4. Everyone plays the same unseen bandits (``unseen.py``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from preceptor.objectives.advantages import gae, leave_one_out, reward_to_go
from preceptor.objectives.kl import entropy
from preceptor.objectives.policy_gradient import ppo_clip_loss, reinforce_loss
from preceptor.objectives.statistics import whiten
from preceptor.objectives.value import explained_variance, value_loss
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.random import derived_seed
from preceptor.systems.bandit import baselines, episodes
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.environment import BanditFamily, EpisodeTables
from preceptor.systems.bandit.episodes import Batch, Scored, play, score, written
from preceptor.systems.bandit.setup import InContextSetup
from preceptor.systems.bandit.state import VALUE_SCALE, InContextState

PROGRESS_COLUMNS = {"loss": "loss", "regret": "regret", "rounds": "rounds", "entropy": "entropy"}

NUM_RECORDED = 4
"""Episodes of a batch that go into ``decisions.jsonl``."""

FIRST_SHARPNESS = 30.0
"""Factor of the log-odds of a Bernoulli mean at the start of the warm start: 0.53 becomes 0.97."""

AGREEMENT = 0.8
"""The warm start becomes harder while the model's favorite is the better one by the rewards so far this often."""

WORD_SHARE = 0.25
"""Share of a model's dimensions that tells words apart (`in_context.fresh_words`)."""

MAX_TOKENS = 8192
"""Tokens of a warm-start batch of short episodes, about."""


def learn(setup: InContextSetup, state: InContextState) -> None:
    """The warm start and the updates on rewards that are still to do."""
    options, run = setup.config.in_context, setup.run
    run.restore(state)
    last_step = options.warm_steps + options.steps
    run.show_progress(last_step, PROGRESS_COLUMNS)
    for n in run.loop(options.warm_steps, state):
        run.log(n, warm_step(setup, state, n))
    if options.warm_steps and state.warm_model is None:
        # The checkpoint of the last warm step lies before this transition, which a resume from there repeats.
        state.begin_rewards()
    for n in run.loop(last_step, state):
        run.log(n, step(setup, state, n))


def sampled_tables(
    config: BanditConfig, family: BanditFamily, n: int, *, num_episodes: int, num_rounds: int, sharpness: float = 1.0
) -> EpisodeTables:
    """The bandits of step ``n``: a function of the seed and these numbers alone."""
    generator = torch.Generator().manual_seed(derived_seed(config.seed, f"bandits of step {n}"))
    return family.sample(num_episodes, num_rounds, generator, sharpness=sharpness)


def shown_tables(config: BanditConfig, tables: EpisodeTables) -> EpisodeTables:
    """What episodes pay: their own bandit's rewards or, as a control, those of the next bandit of the batch."""
    if not config.in_context.shuffle_rewards:
        return tables
    return EpisodeTables(rewards=tables.rewards.roll(1, 0), expected=tables.expected)


@torch.no_grad()
def draw_words(setup: InContextSetup, n: int) -> None:
    """Gives all words new random vectors for update ``n``: a function of the seed and ``n`` alone.

    A word then is nothing but a vector unlike the others, so a model can only learn to recognise it again, and words
    that no update has dealt are as good as those that it has. The vectors lie in the first :data:`WORD_SHARE` of the
    dimensions: a choice needs both options, the last word and what was paid beside each other in one state.
    """
    if not len(setup.fresh_tokens):
        return
    vectors = setup.token_vectors  # also the output's
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, f"words of step {n}"))
    width = vectors.shape[1]
    dimensions = max(1, round(WORD_SHARE * width))
    drawn = torch.zeros(len(setup.fresh_tokens), width)
    drawn[:, :dimensions] = torch.randn(len(drawn), dimensions, generator=generator)
    # All of one length, that of other tokens' vectors, so that no word is louder than another.
    length = episodes.initial_deviation(width) * math.sqrt(width)
    vectors[setup.fresh_tokens] = (length * F.normalize(drawn, dim=1)).to(vectors)


def warm_step(setup: InContextSetup, state: InContextState, n: int) -> dict[str, Any]:
    """One supervised update on histories that others played; gives step ``n``'s metrics."""
    began = time.perf_counter()
    options, run, family = setup.config.in_context, setup.run, setup.family
    draw_words(setup, n)
    # 1. Bandits as hard as the model can bear: from nearly certain rewards and 4 rounds to the prior and all rounds.
    difficulty = state.difficulty
    sharpness = FIRST_SHARPNESS ** (1 - difficulty)
    num_rounds = round(min(4, options.rounds) * (options.rounds / min(4, options.rounds)) ** difficulty)
    num_episodes = max(64, min(2 * options.batch_size, MAX_TOKENS // num_rounds))
    tables = sampled_tables(
        setup.config, family, n, num_episodes=num_episodes, num_rounds=num_rounds, sharpness=sharpness
    )
    shown = shown_tables(setup.config, tables)

    # 2. Half of them are played by Thompson sampling, half at random.
    teacher = run.streams["references"]
    half = num_episodes // 2
    actions = torch.cat(
        [
            baselines.thompson_for(family, shown.rewards[:half], generator=teacher),
            baselines.uniform(shown.rewards[half:], generator=teacher),
        ]
    )
    dealt = setup.layout.deal(num_episodes, family.num_arms, run.streams["prompts"])
    batch = written(setup.layout, shown, dealt, actions, kind=family.kind)
    state.num_teacher_pulls += actions.numel()

    # 3. Labels: the best arm or, once the bandits are the prior's, what Thompson sampling would choose.
    sums, counts = statistics_before(actions, batch.rewards, family.num_arms)
    if options.warm_start == "thompson" and difficulty >= 1.0:
        # Eight draws of every posterior make a label whose noise is an eighth of one draw's.
        draws = baselines.posterior_draws(
            family, sums.expand(8, *sums.shape), counts.expand(8, *counts.shape), teacher
        )  # [8, episodes, rounds, arms]
        labels = F.one_hot(draws.argmax(-1), family.num_arms).float().mean(0)
        state.num_teacher_pulls += 8 * actions.numel()
    else:
        best = F.one_hot(tables.expected.argmax(1), family.num_arms).float()  # [episodes, arms]
        labels = best[:, None].expand(-1, num_rounds, -1)

    # 4. Cross-entropy of the choice, and of the reward tokens, for which a word must be bound to what it paid.
    world = run.world
    rows = world.shard(num_episodes)  # at least 64 episodes, so there are some
    share = (rows.stop - rows.start) / num_episodes
    scored = score(setup.lm, setup.layout, batch.rows(torch.arange(rows.start, rows.stop)))
    cross_entropy = -(labels[rows].to(scored.log_probs.device) * scored.log_probs).sum(-1).mean() * share
    loss = cross_entropy
    reward_loss = None
    if scored.reward_log_probs is not None:
        reward_loss = -scored.reward_log_probs.mean() * share
        loss = loss + reward_loss
    progress = (n - 1) / options.warm_steps
    learning_rate = options.warm_learning_rate * min(1.0, n / 20) * (1 - 0.7 * progress)
    gradient_norm = state.descend(loss, n, learning_rate=learning_rate)

    # 5. Harder, if the favorite is mostly the arm of the better posterior mean (where they differ).
    means = (sums + 1) / (counts + 2)
    top_two = means.topk(2, dim=-1).values
    differ = top_two[..., 0] - top_two[..., 1] > 1e-6
    (favorites,) = world.gather(num_episodes, scored.log_probs.detach().cpu().argmax(-1))
    agrees = favorites == means.argmax(-1)
    agreement = float(agrees[differ].double().mean()) if bool(differ.any()) else 0.0
    state.agreement = 0.8 * state.agreement + 0.2 * agreement
    if state.agreement > AGREEMENT:
        state.difficulty = min(1.0, state.difficulty + options.warm_pace)
    parts = world.sums({"loss": cross_entropy.item()} | ({} if reward_loss is None else {"reward": reward_loss.item()}))
    return {
        "phase": "warm start",
        "loss": parts["loss"],
        "reward_token_loss": parts.get("reward"),
        "rounds": num_rounds,
        "difficulty": difficulty,
        "agreement": agreement,
        "gradient_norm": gradient_norm,
        "learning_rate": learning_rate,
        "teacher_pulls": state.num_teacher_pulls,
        "skipped_steps": state.guard.num_skipped,
        "seconds": time.perf_counter() - began,
    }


def statistics_before(
    actions: Int[Tensor, "episodes rounds"], rewards: Float[Tensor, "episodes rounds"], num_arms: int
) -> tuple[Float[Tensor, "episodes rounds arms"], Float[Tensor, "episodes rounds arms"]]:
    """Sum and number of the rewards of each arm before each round.

    >>> sums, counts = statistics_before(torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 0.0, 1.0]]), 2)
    >>> sums[0].tolist(), counts[0].tolist()
    ([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    """
    chosen = F.one_hot(actions, num_arms).to(rewards.dtype)  # [episodes, rounds, arms]
    paid = chosen * rewards[..., None]
    return paid.cumsum(1) - paid, chosen.cumsum(1) - chosen


def num_rounds_at(setup: InContextSetup, progress: float) -> int:
    """Rounds of an episode after this share of the steps on rewards."""
    options = setup.config.in_context
    if progress >= options.ramp:
        return options.rounds
    return round(options.first_rounds + (options.rounds - options.first_rounds) * progress / options.ramp)


def step(setup: InContextSetup, state: InContextState, n: int) -> dict[str, Any]:
    """Plays a batch of unseen bandits and learns from what the choices forwent; gives step ``n``'s metrics."""
    began = time.perf_counter()
    options, run, family = setup.config.in_context, setup.run, setup.family
    progress = (n - 1 - options.warm_steps) / options.steps
    num_rounds = num_rounds_at(setup, progress)
    num_episodes = options.batch_size
    draw_words(setup, n)

    # 1. Play.
    tables = sampled_tables(setup.config, family, n, num_episodes=num_episodes, num_rounds=num_rounds)
    dealt = setup.layout.deal(num_episodes, family.num_arms, run.streams["prompts"])
    batch = play(
        setup.lm,
        setup.layout,
        shown_tables(setup.config, tables),
        dealt,
        kind=family.kind,
        generator=run.streams["actions"],
        world=run.world,
    )
    state.num_pulls += batch.actions.numel()

    # 2. Credit. The reward is minus the regret: the mean of the arm, not its draw, less that of the best.
    rewards = -batch.regret.float() / VALUE_SCALE  # [episodes, rounds]
    every_round = torch.ones_like(rewards, dtype=torch.bool)
    if options.algorithm == "ppo":
        with torch.no_grad():
            (values,) = run.world.gathered(num_episodes, lambda rows: (values_of(setup, state, batch, rows),))
        advantages = gae(rewards, values, mask=every_round, discount=options.discount, gae_lambda=options.gae_lambda)
        returns = advantages + values
        explained = float(explained_variance(values, returns, every_round))
    else:
        returns = reward_to_go(rewards, every_round, discount=options.discount)
        advantages = leave_one_out(returns)  # against the same round of the batch's other episodes
        explained = None
    advantages = whiten(advantages, every_round)

    # 3. Learn.
    entropy_coefficient = options.entropy_coefficient * max(0.0, 1 - progress / 0.8)
    learning_rate = options.learning_rate * min(1.0, (n - options.warm_steps) / 10) * (1 - progress) ** 0.7
    losses, entropies, norms = [], [], []
    for rows in minibatches(setup, num_episodes):
        mine = rows[run.world.shard(len(rows))]
        loss, parts = None, {"loss": 0.0, "entropy": 0.0}
        if len(mine):
            share = len(mine) / len(rows)  # every mean is over the rounds of all rows
            part = batch.rows(mine)
            scored = score(setup.lm, setup.layout, part)
            mean_entropy = entropy(scored.log_probs).mean()
            loss = policy_loss(setup, part, scored, advantages[mine]) - entropy_coefficient * mean_entropy
            if options.algorithm == "ppo":
                loss = loss + value_loss(state.values(scored).cpu(), returns[mine], mask=every_round[mine])
            if scored.reward_log_probs is not None:
                loss = loss - options.reward_coefficient * scored.reward_log_probs.mean()
            loss = loss * share
            parts = {"loss": loss.item(), "entropy": share * mean_entropy.item()}
        parts = run.world.sums(parts)
        losses.append(parts["loss"])
        entropies.append(parts["entropy"])
        norms.append(state.descend(loss, n, learning_rate=learning_rate))

    run.record(
        {
            "step": n,
            "arm": "learned",
            "episode": number,
            "actions": batch.actions[number].tolist(),
            "rewards": batch.rewards[number].tolist(),
            "log_probs": batch.log_probs[number].tolist() if batch.log_probs is not None else None,
        }
        for number in range(min(NUM_RECORDED, num_episodes))
    )
    return {
        "phase": "rewards",
        "loss": sum(losses) / len(losses),
        "rounds": num_rounds,
        "regret": float(batch.regret.sum(1).mean()),
        "reward": float(batch.rewards.mean()),
        "entropy": sum(entropies) / len(entropies) / math.log(family.num_arms),
        "explained_variance": explained,
        "gradient_norm": sum(norms) / len(norms),
        "learning_rate": learning_rate,
        "pulls": state.num_pulls,
        "skipped_steps": state.guard.num_skipped,
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(setup.lm.device),
    }


def values_of(
    setup: InContextSetup, state: InContextState, batch: Batch, rows: slice
) -> Float[Tensor, "episodes rounds"]:
    """What the value head expects from each round of some episodes on."""
    part = batch if rows == slice(0, len(batch.actions)) else batch.rows(torch.arange(rows.start, rows.stop))
    return state.values(score(setup.lm, setup.layout, part)).cpu()


def minibatches(setup: InContextSetup, num_episodes: int) -> Iterator[Int[Tensor, " rows"]]:
    """Rows of each update on a batch; REINFORCE passes over it once."""
    options = setup.config.in_context
    for _ in range(options.epochs if options.algorithm == "ppo" else 1):
        order = torch.randperm(num_episodes, generator=setup.run.streams["windows"])
        yield from order.chunk(options.minibatches)


def policy_loss(
    setup: InContextSetup, batch: Batch, scored: Scored, advantages: Float[Tensor, "episodes rounds"]
) -> Float[Tensor, ""]:
    """PPO's clipped loss or REINFORCE's, a mean over all rounds."""
    options = setup.config.in_context
    chosen = scored.log_probs.cpu().gather(2, batch.actions[..., None])[..., 0]  # [episodes, rounds]
    every_round = torch.ones_like(chosen, dtype=torch.bool)
    if options.algorithm == "reinforce":
        return reinforce_loss(chosen, advantages, mask=every_round, aggregation="token_mean")
    assert batch.log_probs is not None
    return ppo_clip_loss(
        chosen,
        batch.log_probs,
        advantages,
        mask=every_round,
        clip_epsilon_low=options.clip_epsilon,
        clip_epsilon_high=options.clip_epsilon,
    )
