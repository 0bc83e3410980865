"""The curriculum system: a language model learns from a mixture of datasets that follows what it can learn next.

Each step of a method:

1. Every K steps the frozen model becomes a copy of the policy. Every M steps it measures the difficulty of each
   dataset, and the rule moves the mixture's weights.
2. Rows of documents are drawn by those weights.
3. The policy continues the first tokens of documents drawn by the same weights. Rewards, the KL to a reference model
   and the value network give every token an advantage.
4. Cross-entropy on the documents and PPO on the continuations, in one loss, over epochs of minibatches (``update.py``).
5. Every few steps: losses and rewards on held-out data, samples, and the best model so far (``evaluate.py``).

A run trains one method after another (``baselines.py``): each from the same weights, with the same random numbers, for
the same number of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preceptor.config import to_dict
from preceptor.data.corpora.blocks import TokenBlocks, pad_blocks
from preceptor.errors import CheckpointError
from preceptor.objectives.kl import kl_k1, kl_k3
from preceptor.objectives.mixture import document_difficulty
from preceptor.objectives.mixture_rules import Difficulty
from preceptor.objectives.statistics import masked_mean
from preceptor.objectives.value import explained_variance
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.export import save_model
from preceptor.runs.random import derived_seed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.environment import (
    Gradient,
    aligned,
    document_losses,
    draw_prompts,
    gradient_alignment,
    loss_gradient,
)
from preceptor.systems.curriculum.evaluate import evaluate, measure
from preceptor.systems.curriculum.loss import Documents, Experience
from preceptor.systems.curriculum.policy import Rollouts, rollout_sampling
from preceptor.systems.curriculum.result import charts, outcome_records, result
from preceptor.systems.curriculum.rewards import Rewards, token_advantages
from preceptor.systems.curriculum.scored import scored_rollouts
from preceptor.systems.curriculum.setup import Setup, prepare
from preceptor.systems.curriculum.state import State, learning_rate_scale
from preceptor.systems.curriculum.update import UpdateResult, kl_reference_model, update
from preceptor.systems.curriculum.verify import groups_of_prompts, mixture_row, prompt_row, rollout_rows

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {
    "arm_number": "method",
    "validation_loss": "validation loss",
    "cross_entropy": "loss",
    "reward": "reward",
    "kl": "KL",
    "tokens_per_second": "tokens/s",
}


def train_on_datasets(config: CurriculumConfig, run: Run, services: Services) -> dict[str, Any]:
    """Trains every method of ``config`` inside ``run`` and compares them; gives ``result.json``.

    The best policy of the first method (by validation loss) and its last one are saved as the model folders
    ``best_model`` and ``model``.
    """
    setup = prepare(config, run, services)
    state = State(setup)
    run.restore(state)
    run.show_progress(sum(method.num_steps for method in setup.methods), PROGRESS_COLUMNS)
    for number, method in enumerate(setup.methods, start=1):
        last_step = setup.steps_before(method) + method.num_steps
        if run.step >= last_step:
            continue
        # A checkpoint at a method's last step is of that method; the next one begins here, after a resume as well.
        if run.step == setup.steps_before(method):
            begin_method(setup, state, number)
        elif state.method != method:
            raise CheckpointError(
                f"step {run.step} belongs to {method.name} and the checkpoint to {state.method.name}; "
                "resume with the `update.steps` that the run was started with"
            )
        for n in run.loop(last_step, state):
            row = step(setup, state, n)
            if (n - state.steps_before) % config.validation.every == 0 or n == last_step:
                row |= evaluate(setup, state, n)
                if row["validation_loss"] < state.best_loss:
                    state.best_loss = row["validation_loss"]
                    if number == 1 and run.writes:
                        save_model(setup.lm.model, setup.lm.tokenizer, run.path / "best_model")
            run.log(n, {"arm": method.name, "arm_number": number, "arm_step": n - state.steps_before, **row})
            if number == 1 and n == last_step and run.writes:
                save_model(setup.lm.model, setup.lm.tokenizer, run.path / "model")
    targets = {corpus.name: corpus.target for corpus in setup.judged}
    records = outcome_records(state.outcomes, targets=targets, seed=config.seed)
    drawn = charts(state.outcomes, targets, mixed=setup.dataset_names)
    return result(records, config=to_dict(config), seeds=[config.seed]) | {"charts": drawn}


def begin_method(setup: Setup, state: State, number: int) -> None:
    """Starts the method ``number`` (from 1): initial weights, the same random numbers, and metrics before training."""
    method = setup.methods[number - 1]
    state.begin(method)
    for name, generator in setup.run.streams.items():
        generator.manual_seed(derived_seed(setup.config.seed, name))
    measure(setup, state, 0)
    setup.run.notice(f"method {number} of {len(setup.methods)}: {method.name}")


def step(setup: Setup, state: State, n: int) -> dict[str, Any]:
    """Trains on one batch in the run's step ``n``; gives its metrics."""
    config, run, method = setup.config, setup.run, state.method
    started = time.perf_counter()
    method_step = n - state.steps_before
    row: dict[str, Any] = {}

    # 1. Difficulty, as measured by the frozen model, moves the mixture's weights.
    if method_step > 1 and (method_step - 1) % config.difficulty.refresh_every == 0:
        state.refresh_frozen_model()
    by_dataset = method.reads_gradients(config.difficulty)
    if method.measures_difficulty and not by_dataset and (method_step - 1) % config.difficulty.every == 0:
        measurement = measure_alignment if method.rule == "alignment" else measure_difficulty
        decision = measurement(setup, state, n)
        run.record([decision])
        # Metrics are named after the datasets; the decision has them as lists.
        row["difficulty"] = dict(zip(setup.dataset_names, decision["difficulty"]["mean"], strict=True))
        row["difficulty_variance"] = dict(zip(setup.dataset_names, decision["difficulty"]["variance"], strict=True))
        if decision["fell_back"]:
            run.notice(f"step {n}: the rule {method.rule} prefers no dataset; the mixture is uniform")
    row["weights"] = dict(zip(setup.dataset_names, state.mixture.weights.tolist(), strict=True))

    # 2. Documents drawn by the weights.
    documents = draw_documents(setup, state, num_tokens=method_step * config.update.batch_tokens)
    num_tokens = int(documents.token_mask.sum())

    # 3. Rollouts, their rewards and advantages.
    experience = None
    if method.policy_gradient:
        batch = sample_rollouts(setup, state)
        experience = batch.experience
        num_tokens += int(experience.rollouts.mask.sum())
        row |= batch.metrics
        if batch.num_excluded:
            run.notice(f"step {n}: {batch.num_excluded} rewards are NaN or infinite and are left out of the update")
        if state.prompt_mixture is not None:
            decision = follow_rewards(setup, state, n, batch.experience)
            run.record([decision])
            row["prompt_weights"] = dict(zip(setup.dataset_names, decision["weights"], strict=True))
        if method_step % config.record_every == 0:
            run.record(rollout_rows(batch.rollouts, batch.rewards, lm=setup.lm, step=n, method=method.name))

    # 4. One loss.
    state.set_learning_rate(learning_rate_scale(method_step, config.update, num_steps=method.num_steps))
    target_gradients = far_target_gradients(setup, state, method_step) if by_dataset else []
    updated = update(setup, state, documents, experience, by_dataset=by_dataset)
    if by_dataset:
        run.record([follow_gradients(setup, state, n, updated, target_gradients)])
    for text in (*setup.lm.take_notices(), *state.micro_batch.take_notices()):
        run.notice(f"step {n}: {text}")
    for reason in updated.nonfinite:
        run.notice(state.guard.skip(n, reason))
    row |= updated.metrics
    if state.kl is not None and experience is not None:  # moves β for the next step
        state.kl.update(row["kl"], num_samples=len(experience.rollouts))

    seconds = time.perf_counter() - started
    return row | {
        "tokens": state.outcome.counts["tokens"],
        "skipped_steps": state.guard.num_skipped,
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib(setup.lm.device),
    }


# ---- 1. difficulty --------------------------------------------------------------------------------------------------


def measure_difficulty(setup: Setup, state: State, n: int) -> dict[str, Any]:
    """Scores the sample with the frozen model and moves the mixture's weights; gives the decision's row.

    A method draws its sample once, unless ``difficulty.resample``, so that two measurements differ by what was learned
    and not by the draw. The sample is of documents that are never trained on: memorized rows would look like progress.
    """
    options = setup.config.difficulty
    if options.resample or not state.sample:
        generator = setup.run.streams["difficulty"]
        state.sample = [
            torch.randperm(len(corpus.difficulty), generator=generator)[: options.sample_size].tolist()
            for corpus in setup.corpora
        ]
    rows = [
        [corpus.difficulty[index].tolist() for index in indices]
        for corpus, indices in zip(setup.corpora, state.sample, strict=True)
    ]
    losses = document_losses(state.frozen_model, rows, world=setup.run.world)  # per dataset: [rows]
    count_rows(state, sum(map(len, rows)), backward=False)
    # The same rows as last time give the error of the *change*; at the first measurement there is no change yet.
    previous = None if options.resample else state.sample_losses or losses
    difficulty = document_difficulty(losses, previous=previous)
    state.sample_losses = losses
    return move_mixture(setup, state, n, difficulty)


def measure_alignment(setup: Setup, state: State, n: int) -> dict[str, Any]:
    """Takes gradients of a few rows of each dataset and moves the mixture's weights; gives the decision's row.

    The rows are fresh ones each time: of the datasets from what is trained on, of the targets from what is held out for
    difficulty. The policy itself is asked, since the optimizer's moments are its own.
    """
    num_rows, generator = setup.config.difficulty.alignment_rows, setup.run.streams["difficulty"]

    def drawn(blocks: TokenBlocks) -> list[list[int]]:
        indices = torch.randint(len(blocks), (num_rows,), generator=generator)
        return [blocks[index].tolist() for index in indices.tolist()]

    samples = [drawn(corpus.train) for corpus in setup.corpora]
    targets = [drawn(corpus.difficulty) for corpus in setup.judged if corpus.target]
    alignment, losses = gradient_alignment(setup.lm, samples, targets, optimizer=state.optimizer, world=setup.run.world)
    count_rows(state, num_rows * (len(samples) + len(targets)), backward=True)
    return move_mixture(setup, state, n, replace(document_difficulty(losses), alignment=alignment))


def far_target_gradients(setup: Setup, state: State, method_step: int) -> list[Gradient]:
    """Gradients of the targets that are not learned from, on a few rows of each, taken every M steps and kept."""
    if (method_step - 1) % setup.config.difficulty.every == 0:
        num_rows, generator = setup.config.difficulty.target_rows, setup.run.streams["difficulty"]
        state.target_gradients = []
        for corpus in setup.judged:
            if corpus.target and not corpus.learned_from:
                indices = torch.randint(len(corpus.difficulty), (num_rows,), generator=generator)
                rows = [corpus.difficulty[index].tolist() for index in indices.tolist()]
                state.target_gradients.append(list(loss_gradient(setup.lm, rows, world=setup.run.world)[1]))
                count_rows(state, num_rows, backward=True)
    return list(state.target_gradients)


def follow_gradients(
    setup: Setup, state: State, n: int, updated: UpdateResult, target_gradients: Sequence[Gradient]
) -> dict[str, Any]:
    """Moves the mixture's weights by the gradients of the batch just trained on; gives the decision's row.

    A target that is learned from stands for itself, so that what chance put into its gradient counts for it too.
    """
    datasets, gradients = list(updated.gradients), list(updated.gradients.values())
    targets = [*target_gradients, *(updated.gradients[k] for k in datasets if setup.corpora[k].target)]
    alignment = torch.full((len(setup.corpora),), math.nan, dtype=torch.float64)
    if targets:
        parameters = list(setup.lm.trainable_parameters().values())
        alignment[datasets] = aligned(gradients, targets, parameters=parameters, optimizer=state.optimizer)
    mean = updated.losses.nan_to_num(nan=float(updated.losses.nanmean()))
    zeros = torch.zeros_like(mean)
    return move_mixture(setup, state, n, Difficulty(mean, zeros, zeros, zeros, alignment=alignment))


def move_mixture(setup: Setup, state: State, n: int, difficulty: Difficulty) -> dict[str, Any]:
    """Lets the rule move the mixture's weights after a measurement; gives the decision's row."""
    tokens = state.tokens_since
    state.mixture.update(difficulty, tokens=tokens)
    state.outcome.mixtures.append(state.mixture.weights.tolist())
    state.tokens_since = torch.zeros_like(tokens)
    return mixture_row(difficulty, state.mixture, tokens, step=n, method=state.method.name, names=setup.dataset_names)


def count_rows(state: State, num_rows: int, *, backward: bool) -> None:
    """Counts rows that a model read, with what they cost: a forward pass, and two more where a gradient was taken."""
    counts = state.outcome.counts
    counts["model_calls"] += num_rows
    counts["forward_passes"] += num_rows * (3 if backward else 1)


# ---- 2. documents ---------------------------------------------------------------------------------------------------


def draw_documents(setup: Setup, state: State, *, num_tokens: int) -> Documents:
    """Rows of documents, until the method has been trained on ``num_tokens`` tokens since it began.

    The mixture's weights are fractions of *tokens*: a dataset of short rows is drawn more often for the same weight.
    Tokens are counted from the beginning of the method, so all methods see the same number, to within one row.
    """
    tokens_per_row = torch.tensor([corpus.train.num_tokens / len(corpus.train) for corpus in setup.corpora])
    state.sampler.weights = state.mixture.weights / tokens_per_row
    counts = state.outcome.counts
    rows, datasets = [], []
    while counts["tokens"] < num_tokens:
        dataset, row = state.sampler.draw()
        rows.append(setup.corpora[dataset].train[row])
        datasets.append(dataset)
        counts["tokens"] += len(rows[-1])
        state.tokens_since[dataset] += len(rows[-1])
    count_rows(state, len(rows), backward=True)
    batch = pad_blocks(rows, filler=state.lm.begin_token)  # [rows, longest row]
    return Documents(batch.tokens, batch.token_mask, torch.tensor(datasets))


# ---- 3. rollouts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts and their rewards; ``experience`` holds the same rollouts without those whose reward is not finite."""

    rollouts: Rollouts
    rewards: Rewards
    experience: Experience
    metrics: dict[str, Any]
    num_excluded: int


@torch.no_grad()
def sample_rollouts(setup: Setup, state: State) -> RolloutBatch:
    """Continuations of drawn prompts with all that the update needs: rewards, reference, values and advantages."""
    config, ppo, lm, streams = setup.config, setup.config.ppo, setup.lm, setup.run.streams
    prompts = draw_prompts(
        setup.corpora,
        (state.prompt_mixture or state.mixture).weights,
        num_prompts=ppo.prompts,
        prompt_tokens=ppo.prompt_tokens,
        continuation_tokens=ppo.continuation_tokens,
        generator=streams["prompt"],
    )
    if setup.engine is not None:
        setup.engine.refresh()
    scored = scored_rollouts(
        lm,
        prompts,
        group_size=ppo.group_size,
        num_tokens=ppo.continuation_tokens,
        sampling=rollout_sampling(lm, ppo.temperature),
        generator=streams["rollout"],
        terms=state.terms,
        reference_model=kl_reference_model(setup, state),
        value_network=state.value_network,
        bf16=config.update.bf16,
        # In few digits two ways to the same number part by more than a small policy step; PPO's ratio must begin at 1,
        # so both of its sides come from the scorer.
        rescore=config.update.bf16 or lm.dtype not in (torch.float32, torch.float64),
        engine=setup.engine,
        options=ppo,
        world=setup.run.world,
    )
    rollouts, rewards, values = scored.rollouts, scored.rewards, scored.values
    metrics: dict[str, Any] = dict(scored.metrics)
    reference_log_probs, finite = scored.reference_log_probs, rewards.finite_rows
    usable = rollouts.without(~finite.to(rollouts.mask.device))  # the rows stay, so groups keep their size
    mask = usable.mask

    token_rewards = rewards.tokens.to(lm.device)
    if ppo.kl_place == "reward_k1":
        token_rewards = token_rewards - state.kl_coefficient * kl_k1(rollouts.log_probs, reference_log_probs)
    advantages, returns = token_advantages(
        token_rewards,
        mask,
        kind=ppo.advantage,
        values=values,
        group_size=ppo.group_size,
        discount=ppo.discount,
        gae_lambda=ppo.gae_lambda,
        whiten_advantages=ppo.whiten_advantages,
    )
    counts = state.outcome.counts
    counts["rollout_tokens"] += int(mask.sum())
    # Sampled and scored by the reference (and, where another engine sampled, by the policy); then every epoch of the
    # update takes their gradient.
    counts["model_calls"] += len(rollouts)
    counts["forward_passes"] += len(rollouts) * (2 + (setup.engine is not None) + 3 * ppo.epochs)
    counts["rewards_excluded"] += int((~finite).sum())
    metrics |= {
        "reward": _mean(rewards.total[finite]),
        "reward_terms": {name: _mean(sums[finite]) for name, sums in rewards.terms.items()},
        "kl": float(masked_mean(kl_k3(rollouts.log_probs, reference_log_probs), mask)),
        "kl_coefficient": state.kl_coefficient,
        "entropy": float(masked_mean(rollouts.entropy, mask)),
        "continuation_tokens": float(mask.sum(1).double().mean()),
    }
    if values is not None and returns is not None:
        metrics["explained_variance"] = float(explained_variance(values, returns, mask))
    experience = Experience(usable, advantages, returns, values, reference_log_probs)
    return RolloutBatch(rollouts, rewards, experience, metrics, num_excluded=int((~finite).sum()))


def follow_rewards(setup: Setup, state: State, n: int, experience: Experience) -> dict[str, Any]:
    """Moves the weights of the prompts' datasets by what their continuations could teach; gives the decision's row.

    Every continuation stands for itself, with the mean absolute advantage of its tokens; those that are left out, whose
    reward is not finite, have none.
    """
    assert state.prompt_mixture is not None, "asked for by `ppo.prompt_rule`"
    mask = experience.rollouts.mask
    means = (experience.advantages.abs() * mask).sum(1) / mask.sum(1).clamp(min=1)  # [batch]
    rows = [
        (setup.dataset_names.index(prompt.dataset), mean)
        for prompt, mean, counted in zip(experience.rollouts.prompts, means.tolist(), mask.any(1).tolist(), strict=True)
        if counted
    ]
    groups = groups_of_prompts([dataset for dataset, _ in rows], [mean for _, mean in rows])
    state.prompt_mixture.update(groups, progress=(n - state.steps_before) / state.method.num_steps)
    return prompt_row(groups, state.prompt_mixture, step=n, method=state.method.name, names=setup.dataset_names)


def _mean(values: Tensor) -> float:
    """NaN, which the log writes as null, if there are none."""
    return float(values.double().mean()) if len(values) else math.nan
