"""The reading system: a language model learns what to read next.

Each update (numbers as in :func:`step`):

1. A batch of episodes begins with the prompt of one article.
2. The policy writes a query, its vector's inner products with the remaining keys give a softmax, a pair is drawn,
   and its value is read, until the budget is spent (``environment.py``).
3. The frozen reader says how likely the values were in that order: the reward, normalised (``rewards.py``).
4. A filter keeps some trajectories, and each of their steps gets an advantage (``rewards.py``).
5. Policy gradient over query tokens and selections with a KL to the reference model, one optimizer step (``loss.py``).
6. Metrics and the policy's decisions are recorded.

At the end every baseline is measured beside the learned policy, on training and held-out articles (``evaluate.py``).
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.config import to_dict
from preceptor.objectives.filters import above_standard_deviations, best_fraction, everything
from preceptor.objectives.selection import relative_selection_entropy
from preceptor.objectives.statistics import RunningMoments
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.export import MODEL, save_model
from preceptor.runs.guard import guarded_step
from preceptor.runs.random import derived_seed
from preceptor.systems.reading.config import ReadingConfig, UpdateOptions
from preceptor.systems.reading.environment import Trajectories, run_episodes
from preceptor.systems.reading.evaluate import GapMeter, decision_rows, evaluate_article, greedy_order, result
from preceptor.systems.reading.loss import Coefficients, accumulate_gradient
from preceptor.systems.reading.policy import Policy, save_selection
from preceptor.systems.reading.rewards import batch_rewards, step_advantages
from preceptor.systems.reading.setup import Setup, prepare
from preceptor.systems.reading.state import State

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {
    "reward": "reward",
    "query_kl": "KL",
    "selection_entropy": "selection entropy",
    "passed_fraction": "passed",
    "gap_closed_train": "gap closed",
    "tokens_per_second": "tokens/s",
}


def train(config: ReadingConfig, run: Run, services: Services, *, setup: Setup | None = None) -> dict[str, Any]:
    """Train the policy of ``config`` inside ``run`` and measure it beside its baselines; gives ``result.json``.

    Args:
        config: the whole configuration.
        run: folder, random streams and checkpoints.
        services: cache folder and keys.
        setup: use this one, for example with a reader of your own; None prepares what ``config`` describes.
    """
    if config.episode.pool == "mixed":
        # Imported here: the two tasks share the command and nothing of the loop.
        from preceptor.systems.reading.study.loop import train as train_study

        return train_study(config, run, services)
    setup = setup or prepare(config, run, services)
    state = State(setup.policy, setup.initial_policy.lm, config.update)
    meter = GapMeter(setup, seed=derived_seed(config.seed, "gap meter"))
    # The meter draws its random orders from a seed of its own, so that measuring on the way changes nothing.
    num_steps, every = config.update.steps, config.evaluation.every
    for number in run.loop(num_steps, state, columns=PROGRESS_COLUMNS):
        row = step(setup, state, number)
        # A snapshot is refreshed before the checkpoint of this step, which holds it.
        state.refresh_reference_model(number)
        if every and (number % every == 0 or number == num_steps):
            row["gap_closed_train"] = meter.measure(setup.generators("evaluation_"))
        run.log(number, row)
        notices = (*setup.policy.lm.take_notices(), *state.micro_batch.take_notices())
        for warning in (*notices, *state.collapse.warnings(number, row)):
            run.notice(warning)
    records = evaluate(setup, state)
    weights = None
    if run.world.shares_weights:
        from preceptor.runs.sharding import whole_weights

        weights = whole_weights(setup.policy.lm.model)
    if run.writes:
        save_model(setup.policy.lm.model, setup.policy.lm.tokenizer, run.path / MODEL, weights=weights)
        save_selection(run.path / MODEL, setup.policy, setup.keys, config.selection)
    # The order that the policy would read each article in if nothing were left to chance.
    return {
        **result(records, config=to_dict(config), seeds=[config.seed]),
        "order": {name: greedy_order(setup, name) for name in setup.articles},
    }


def step(setup: Setup, state: State, number: int) -> dict[str, Any]:
    """Update ``number`` of the policy; gives its metrics."""
    began = time.perf_counter()
    config, run, policy = setup.config, setup.run, setup.policy
    update, reward = config.update, config.reward

    # 1, 2. A batch of episodes of one article.
    name = state.next_article(setup.train, run.streams["article"])
    article, keys = setup.articles[name], setup.keys[name]
    trajectories = run_episodes(
        policy,
        article,
        keys,
        num_episodes=config.episode.batch_size,
        budget=config.episode.budget or article.num_pairs,
        query_tokens=config.episode.query_tokens,
        generators=run.streams,
        initial_policy=setup.initial_policy if reward.normalisation == "untrained_query" else None,
        world=run.world,
    )

    # 3. The reader's scores, in the reward's context and in the other one.
    batch = batch_rewards(
        trajectories,
        reader=setup.reader,
        initial_reader=setup.initial_reader,
        kind=reward.kind,
        context=reward.context,
        normalisation=reward.normalisation,
        world=run.world,
    )
    rewards = batch.normalised
    step_rewards = rewards.step_rewards  # batch step
    if reward.pair_baseline and reward.kind == "values" and reward.credit == "following":
        step_rewards = state.pair_baseline.subtract(name, trajectories.order, batch.scores, rewards)
    if config.shuffle_rewards:
        # The control in which rewards say nothing about the episodes that earned them.
        shuffled = torch.randperm(len(trajectories), generator=run.streams["shuffle"])
        step_rewards, rewards = step_rewards[shuffled], rewards.at(shuffled)
    state.num_scored_values += trajectories.order.numel()

    # 4. Trajectories that the filter keeps, and the advantage of each step.
    # A reward that is NaN or infinite is left out and counted; it never reaches a mean.
    usable_mask = rewards.total.isfinite() & step_rewards.isfinite().all(1)
    state.num_rewards_excluded += int((~usable_mask).sum())
    kept_mask = usable_mask & _filter(rewards.total, update, state.moments)
    state.moments.update(rewards.total)  # after the filter: a batch is not measured against itself
    advantages = step_advantages(
        step_rewards,
        usable_mask=usable_mask,
        credit=reward.credit,
        advantage=update.advantage,
        article=name,
        baseline=state.return_baseline,
    )

    # 5. The gradient of the loss, and one step of the optimizer.
    accumulate = partial(
        accumulate_gradient,
        policy,
        trajectories,
        keys,
        advantages=advantages,
        kept_mask=kept_mask,
        reference_model=state.reference_model,
        coefficients=Coefficients(
            query=update.query_coefficient,
            selection=update.selection_coefficient,
            value_kl=update.value_kl_coefficient,
            query_kl=update.query_kl_coefficient,
            query_entropy=update.query_entropy_coefficient,
            selection_entropy=update.selection_entropy_coefficient,
        ),
        world=run.world,
    )
    with state.micro_batch.first_trial(run.world.most_rows(int(kept_mask.sum()))) as trial:
        metrics = accumulate(micro_batch_size=trial.size)
    if trial.ran_out:
        metrics = state.micro_batch.search(trial.size, accumulate, state.parameters.values())
    state.micro_batch.agree(run.world)
    gradient_norm = optimizer_step(setup, state, number, kept_mask=kept_mask, usable_mask=usable_mask)

    # 6. Decisions and metrics.
    seconds = time.perf_counter() - began
    if number % config.record_every == 0:
        run.record(
            decision_rows(
                policy,
                trajectories,
                batch.scores,
                batch.raw.total,
                step=number,
                methods=["learned"] * len(trajectories),
                first_episode=state.num_episodes,
                normalised_rewards=rewards.total,
                kept_mask=kept_mask,
                reference_scores=batch.reference_scores,
            )
        )
    state.num_episodes += len(trajectories)
    num_value_tokens = sum(len(article.turns[pair]) for pair in trajectories.order.flatten().tolist())
    return {
        "article": name,
        "reward": _finite_mean(batch.raw.total),
        "normalised_reward": _finite_mean(rewards.total),
        "reward_values_context": _finite_mean(batch.values_context.total),
        "reward_queries_context": _finite_mean(batch.queries_context.total),
        "reward_by_position": [_finite_mean(column) for column in batch.raw.position_means.T],
        "passed_fraction": float(kept_mask.double().mean()),
        "rewards_excluded": state.num_rewards_excluded,
        "policy_loss": metrics.policy_loss,
        "value_kl": metrics.value_kl,
        "query_kl": metrics.query_kl,
        "kl": metrics.query_kl if metrics.value_kl is None else metrics.value_kl,
        "gradient_norm": gradient_norm,
        "query_entropy": metrics.query_entropy,
        "query_entropy_maximum": _maximum_query_entropy(policy),
        "selection_entropy": _selection_entropy(trajectories),
        "skipped_steps": state.guard.num_skipped,
        **({"micro_batch_size": state.micro_batch.found} if state.micro_batch.found else {}),
        "episodes": state.num_episodes,
        "tokens_per_second": (trajectories.queries.numel() + num_value_tokens) / seconds,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(policy.lm.device),
    }


def optimizer_step(
    setup: Setup, state: State, number: int, *, kept_mask: Bool[Tensor, " batch"], usable_mask: Bool[Tensor, " batch"]
) -> float:
    """One step of the optimizer; gives the gradient's norm before clipping.

    The step is skipped, with a notice, if no reward or not every gradient is finite (the norm is then NaN), and left
    out if the filter kept nothing (0).
    """
    # Nothing was accumulated in either case below, so there is no gradient to clear.
    if not usable_mask.any():
        setup.run.notice(state.guard.skip(number, "every reward of the batch is NaN or infinite"))
        return float("nan")
    if not kept_mask.any():
        return 0.0
    return guarded_step(
        state.guard,
        state.optimizer,
        state.parameters,
        step=number,
        clip_norm=setup.config.update.clip_norm,
        notice=setup.run.notice,
    )


def evaluate(setup: Setup, state: State) -> list[dict[str, Any]]:
    """Records of every method on training articles (at most ``evaluation.max_train_articles``) and held-out ones."""
    run, first_episode = setup.run, state.num_episodes
    records: list[dict[str, Any]] = []
    names = (*setup.train[: setup.config.evaluation.max_train_articles], *setup.held_out)
    for index, name in enumerate(names, start=1):
        run.notice(f"evaluating every method on '{name}' ({index} of {len(names)})")
        evaluation = evaluate_article(
            setup,
            name,
            learned_calls=state.num_scored_values,
            generators=setup.generators("evaluation_"),
            first_episode=first_episode,
        )
        # Numbered on from the training episodes; a resumed run measures again from here and writes the same rows.
        first_episode += len(evaluation.decisions)
        records += evaluation.records
        run.record(evaluation.decisions)
        run.stop_if_requested()
    return records


def _filter(rewards: Float[Tensor, " batch"], update: UpdateOptions, moments: RunningMoments) -> Bool[Tensor, " batch"]:
    if update.reward_filter == "standard_deviations":
        return above_standard_deviations(
            rewards,
            moments=moments,
            num_standard_deviations=update.filter_standard_deviations,
            num_warm_up=update.filter_warm_up,
        )
    if update.reward_filter == "best_fraction":
        return best_fraction(rewards, fraction=update.filter_fraction)
    return everything(rewards)


def _finite_mean(values: Tensor) -> float:
    return float(values[values.isfinite()].double().mean())


def _maximum_query_entropy(policy: Policy) -> float:
    """ln of the number of tokens that can be drawn, nats."""
    sampling = policy.sampling
    num_choices = policy.lm.vocab_size - len(sampling.suppressed)
    return float(torch.tensor(float(min(sampling.top_k or num_choices, num_choices))).log())


def _selection_entropy(trajectories: Trajectories) -> float:
    """Mean selection entropy over ln(remaining), over the steps that have a choice."""
    has_choice = trajectories.available_mask.sum(-1) > 1  # batch step
    entropy = relative_selection_entropy(trajectories.selection_log_probs, trajectories.available_mask)
    return float(entropy[has_choice].double().mean())
