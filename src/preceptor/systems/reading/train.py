"""The reading system: a language model learns what to read next.

Each update (numbers as in the method's text):

1. The context of every episode of the batch is empty but for the prompt.
2. The policy writes a query, its vector's inner products with the remaining keys give a softmax, a pair is drawn,
   and its value is read, until the budget is spent (``episode.py``).
3. The frozen reader says how likely the values were in that order (``reader.py``): the reward, normalised.
4. A filter decides which trajectories teach, and each of their steps gets an advantage (``credit.py``).
5. Policy gradient over query tokens and selections with KL to the old model, one optimiser step (``update.py``).
6. Metrics and the teacher's decisions are recorded.

At the end every control is measured beside the learned policy, on training and on held-out articles (``evaluate.py``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.config import to_dict
from preceptor.objectives.filters import above_standard_deviations, best_fraction, everything
from preceptor.objectives.selection import relative_selection_entropy
from preceptor.objectives.statistics import RunningMoments
from preceptor.run.device import peak_memory_mib
from preceptor.run.guard import guarded_step
from preceptor.run.random import derived_seed
from preceptor.systems.reading.classroom import Classroom, prepare
from preceptor.systems.reading.config import ReadingConfig, UpdateOptions
from preceptor.systems.reading.credit import judge, step_advantages
from preceptor.systems.reading.decisions import decision_rows
from preceptor.systems.reading.episode import run_episodes
from preceptor.systems.reading.evaluate import GapMeter, evaluate_article
from preceptor.systems.reading.learner import Learner
from preceptor.systems.reading.policy import Policy, Trajectories
from preceptor.systems.reading.result import reading_result
from preceptor.systems.reading.update import Coefficients, accumulate_gradient

if TYPE_CHECKING:
    from preceptor.run.folder import Run
    from preceptor.systems.base import Services

STREAMS = (
    "article",
    "query",
    "selection",
    "reference",
    "shuffle",
    "calibration_query",
    "calibration_selection",
    "evaluation_query",
    "evaluation_selection",
    "evaluation_orders",
)
PROGRESS_COLUMNS = {
    "reward": "reward",
    "query_kl": "KL",
    "selection_entropy": "selection entropy",
    "passed_fraction": "passed",
    "gap_closed_train": "gap closed",
    "tokens_per_second": "tokens/s",
}


def train(config: ReadingConfig, run: Run, services: Services) -> dict[str, Any]:
    """Train the policy of ``config`` inside ``run`` and measure it beside its controls; gives ``result.json``.

    Args:
        config: the whole configuration.
        run: folder, streams and checkpoints; streams are :data:`STREAMS`.
        services: cache folder and keys.
    """
    classroom = prepare(config, run, cache_dir=services.cache_dir, openai_api_key=services.openai_api_key)
    return learn(config, run, classroom)


def learn(config: ReadingConfig, run: Run, classroom: Classroom) -> dict[str, Any]:
    """The loop and the final measurement; ``classroom`` may hold any reader."""
    update = config.update
    learner = Learner(classroom.policy, classroom.untrained.lm, update)
    start = 0
    if (checkpoint := run.restore()) is not None:
        start = checkpoint.step
        learner.load(checkpoint)
    run.show_progress(update.steps, PROGRESS_COLUMNS)
    meter = GapMeter(classroom, config, seed=derived_seed(config.seed, "gap meter"))
    for step in range(start + 1, update.steps + 1):
        row = _one_update(config, run, classroom, learner, step)
        learner.refresh_old_model(step)
        every = config.evaluation.every
        if every and (step % every == 0 or step == update.steps):
            row["gap_closed_train"] = meter.measure(_evaluation_generators(run))
        run.log(step, row)
        for text in learner.collapse.watch(step, row):
            run.notice(text)
        if run.due(step) or run.stop_requested or step == update.steps:
            learner.save(run, step)
        if run.stop_requested:
            run.stop(step)
    return _measure(config, run, classroom, learner)


def _measure(config: ReadingConfig, run: Run, classroom: Classroom, learner: Learner) -> dict[str, Any]:
    """Every arm on training articles (at most ``evaluation.max_train_articles``) and on all held-out ones."""
    records: list[dict[str, Any]] = []
    first_episode = learner.num_episodes
    names = (*classroom.train[: config.evaluation.max_train_articles], *classroom.held_out)
    for number, name in enumerate(names, start=1):
        run.notice(f"measuring every arm on '{name}' ({number} of {len(names)})")
        evaluation = evaluate_article(
            classroom,
            config,
            name,
            learned_calls=learner.num_scored_values,
            generators=_evaluation_generators(run),
            first_episode=first_episode,
        )
        first_episode += len(evaluation.decisions)
        records += evaluation.records
        run.record(evaluation.decisions)
        if run.stop_requested:
            run.stop(config.update.steps)
    return reading_result(records, config=to_dict(config), seeds=[config.seed])


def _evaluation_generators(run: Run) -> dict[str, torch.Generator]:
    return {name: run.streams[f"evaluation_{name}"] for name in ("query", "selection", "orders")}


# ---- one update -----------------------------------------------------------------------------------------------------


def _one_update(
    config: ReadingConfig,
    run: Run,
    classroom: Classroom,
    learner: Learner,
    step: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    policy, update = classroom.policy, config.update

    # 1, 2. A batch of episodes of one article.
    name = learner.next_article(classroom.train, run.streams["article"])
    material, keys = classroom.materials[name], classroom.keys[name]
    needs_reference = config.reward.normalisation == "untrained_query"
    trajectories = run_episodes(
        policy,
        material,
        keys,
        num_episodes=config.episode.batch_size,
        budget=config.episode.budget or material.reading.num_pairs,
        query_tokens=config.episode.query_tokens,
        generators={name: run.streams[name] for name in ("query", "selection", "reference")},
        reference=classroom.untrained if needs_reference else None,
    )

    # 3. What the reader makes of it, in the reward's context and in the other one.
    judged = judge(
        trajectories,
        reader=classroom.reader,
        untrained_reader=classroom.untrained_reader,
        kind=config.reward.kind,
        context=config.reward.context,
        normalisation=config.reward.normalisation,
    )
    rewards = judged.normalised
    step_rewards = rewards.step_rewards
    if config.reward.pair_baseline and config.reward.kind == "values" and config.reward.credit == "following":
        step_rewards = learner.pair_baseline.subtract(name, trajectories.order, judged.scored, rewards)
    if config.shuffle_rewards:
        shuffled = torch.randperm(len(trajectories), generator=run.streams["shuffle"])
        step_rewards, rewards = step_rewards[shuffled], rewards.at(shuffled)
    learner.num_scored_values += trajectories.order.numel()

    # 4. Who teaches, and what each step is credited with.
    usable = rewards.total.isfinite() & step_rewards.isfinite().all(1)
    learner.num_rewards_excluded += int((~usable).sum())
    passed = usable & _filter(rewards.total, update, learner.moments)
    learner.moments.update(rewards.total)
    advantages = step_advantages(
        step_rewards,
        usable=usable,
        credit=config.reward.credit,
        advantage=update.advantage,
        moments=learner.moments,
    )

    # 5. One step of the optimiser, unless nothing passed or something is not finite.
    measured = accumulate_gradient(
        policy,
        trajectories,
        keys,
        advantages=advantages,
        passed=passed,
        reference=learner.old_lm,
        coefficients=Coefficients(
            query=update.query_coefficient,
            selection=update.selection_coefficient,
            value_kl=update.value_kl_coefficient,
            query_kl=update.query_kl_coefficient,
            query_entropy=update.query_entropy_coefficient,
            selection_entropy=update.selection_entropy_coefficient,
        ),
        micro_batch_size=update.micro_batch_size or config.episode.batch_size,
    )
    gradient_norm = _apply(learner, run, step, clip_norm=update.clip_norm, passed=passed, usable=usable)

    # 6. What happened.
    seconds = time.perf_counter() - began
    if step % config.record_every == 0:
        run.record(
            decision_rows(
                trajectories,
                judged.scored,
                lm=policy.lm,
                step=step,
                arm="learned",
                first_episode=learner.num_episodes,
                temperature=policy.temperature,
                rewards=judged.raw.total,
                normalised_rewards=rewards.total,
                passed=passed,
                reference=judged.reference,
            )
        )
    learner.num_episodes += len(trajectories)
    num_tokens = trajectories.queries.numel() + sum(
        len(material.values[pair]) for pair in trajectories.order.flatten().tolist()
    )
    return {
        "article": name,
        "reward": _finite_mean(judged.raw.total),
        "normalised_reward": _finite_mean(rewards.total),
        "reward_values_context": _finite_mean(judged.values_context.total),
        "reward_queries_context": _finite_mean(judged.queries_context.total),
        "reward_by_position": [_finite_mean(column) for column in judged.raw.position_means.T],
        "passed_fraction": float(passed.double().mean()),
        "rewards_excluded": learner.num_rewards_excluded,
        "policy_loss": measured.policy_loss,
        "value_kl": measured.value_kl,
        "query_kl": measured.query_kl,
        "kl": measured.query_kl if measured.value_kl is None else measured.value_kl,
        "gradient_norm": gradient_norm,
        "query_entropy": measured.query_entropy,
        "query_entropy_maximum": _maximum_query_entropy(policy),
        "selection_entropy": _selection_entropy(trajectories),
        "skipped_steps": learner.guard.num_skipped,
        "episodes": learner.num_episodes,
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(policy.lm.device),
    }


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


def _apply(
    learner: Learner,
    run: Run,
    step: int,
    *,
    clip_norm: float,
    passed: Bool[Tensor, " batch"],
    usable: Bool[Tensor, " batch"],
) -> float:
    """The optimiser's step, and the gradient's norm before clipping; skipped, and said, if numbers are not finite."""
    if not usable.any():
        run.notice(learner.guard.skip(step, "every reward of the batch is NaN or infinite"))
        return float("nan")
    if not passed.any():
        return 0.0
    return guarded_step(
        learner.guard, learner.optimiser, learner.parameters, step=step, clip_norm=clip_norm, notice=run.notice
    )


def _finite_mean(values: Tensor) -> float:
    return float(values[values.isfinite()].double().mean())


def _maximum_query_entropy(policy: Policy) -> float:
    sampling = policy.sampling
    num_choices = policy.lm.vocab_size - len(sampling.suppressed)
    return float(torch.tensor(float(min(sampling.top_k or num_choices, num_choices))).log())


def _selection_entropy(trajectories: Trajectories) -> float:
    """Mean selection entropy over ln(remaining), over the steps that have a choice."""
    has_choice = trajectories.available_mask.sum(-1) > 1
    entropy = relative_selection_entropy(trajectories.selection_log_probs, trajectories.available_mask)
    return float(entropy[has_choice].double().mean())
