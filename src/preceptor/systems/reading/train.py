"""The reading system: a language model learns what to read next.

Each update (numbers as in the method's text):

1. The context of every episode of the batch is empty but for the prompt.
2. The policy writes a query, its vector's inner products with the remaining keys give a softmax, a pair is drawn,
   and its value is read, until the budget is spent (``episode.py``).
3. The frozen reader says how likely the values were in that order (``reader.py``): the reward, normalised as configured.
4. A filter decides which trajectories teach, and each of their steps gets an advantage (``credit.py``).
5. Policy gradient over query tokens and selections with KL to the old model, one optimiser step (``update.py``).
6. Metrics and the teacher's decisions are recorded.

At the end every control is measured beside the learned policy, on training and on held-out articles (``evaluate.py``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from preceptor.config import to_dict
from preceptor.errors import CheckpointError
from preceptor.lm.language_model import LanguageModel
from preceptor.objectives.filters import above_standard_deviations, best_fraction, everything
from preceptor.objectives.selection import relative_selection_entropy
from preceptor.objectives.statistics import RunningMoments
from preceptor.run.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from preceptor.run.device import peak_memory_mib
from preceptor.run.guard import NonFiniteGuard, first_nonfinite
from preceptor.run.random import derived_seed
from preceptor.systems.reading.classroom import Classroom, prepare
from preceptor.systems.reading.collapse import CollapseWatch
from preceptor.systems.reading.config import ReadingConfig, UpdateOptions
from preceptor.systems.reading.credit import PairBaseline, Rewards, judge, step_advantages
from preceptor.systems.reading.decisions import decision_rows
from preceptor.systems.reading.episode import run_episodes
from preceptor.systems.reading.evaluate import GapMeter, evaluate_article
from preceptor.systems.reading.policy import Policy, Trajectories
from preceptor.systems.reading.result import reading_result
from preceptor.systems.reading.update import Coefficients, accumulate_gradient, trainable

if TYPE_CHECKING:
    from preceptor.run.folder import Run

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


@dataclass
class Progress:
    """What changes beside the weights; all of it is in a checkpoint."""

    moments: RunningMoments
    pair_baseline: PairBaseline
    guard: NonFiniteGuard
    collapse: CollapseWatch
    queue: list[int]
    num_episodes: int = 0
    num_scored_values: int = 0
    num_rewards_excluded: int = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "moments": self.moments.state_dict(),
            "pair_baseline": self.pair_baseline.state_dict(),
            "guard": self.guard.state_dict(),
            "collapse": self.collapse.state_dict(),
            "queue": self.queue,
            "counts": [self.num_episodes, self.num_scored_values, self.num_rewards_excluded],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.moments.load_state_dict(state["moments"])
        self.pair_baseline.load_state_dict(state["pair_baseline"])
        self.guard.load_state_dict(state["guard"])
        self.collapse.load_state_dict(state["collapse"])
        self.queue = list(state["queue"])
        self.num_episodes, self.num_scored_values, self.num_rewards_excluded = state["counts"]


def train(
    config: ReadingConfig, run: Run, *, cache_dir: Path, openai_api_key: str | None = None
) -> dict[str, Any]:
    """Train the policy of ``config`` inside ``run`` and measure it beside its controls; gives ``result.json``.

    Args:
        config: the whole configuration.
        run: folder, streams and checkpoints; streams are :data:`STREAMS`.
        cache_dir: downloads and bought embeddings.
        openai_api_key: for the openai embedder.
    """
    classroom = prepare(config, run, cache_dir=cache_dir, openai_api_key=openai_api_key)
    return learn(config, run, classroom)


def learn(config: ReadingConfig, run: Run, classroom: Classroom) -> dict[str, Any]:
    """The loop and the final measurement; ``classroom`` may hold any reader."""
    policy, update = classroom.policy, config.update
    parameters = dict(trainable(policy))
    optimiser = build_optimiser(policy, update)
    snapshot = classroom.untrained.lm if update.kl_reference == "untrained" else policy.lm.frozen_copy()
    progress = Progress(RunningMoments(), PairBaseline(), NonFiniteGuard(), CollapseWatch(), [])
    start = 0
    if (checkpoint := run.restore()) is not None:
        start = checkpoint.step
        _load(checkpoint, parameters, optimiser, snapshot, progress, update)
    run.show_progress(update.steps, PROGRESS_COLUMNS)
    meter = GapMeter(classroom, config, seed=derived_seed(config.seed, "gap meter"))
    for step in range(start + 1, update.steps + 1):
        row = _one_update(config, run, classroom, parameters, optimiser, snapshot, progress, step)
        if update.kl_reference == "snapshot" and step % update.snapshot_every == 0:
            snapshot.model.load_state_dict(policy.lm.model.state_dict())
        every = config.evaluation.every
        if every and (step % every == 0 or step == update.steps):
            row["gap_closed_train"] = meter.measure(_evaluation_generators(run))
        run.log(step, row)
        for text in progress.collapse.watch(step, row):
            run.notice(text)
        if run.due(step) or run.stop_requested or step == update.steps:
            _save(run, step, parameters, optimiser, snapshot, progress, update)
        if run.stop_requested:
            run.stop(step)
    return _measure(config, run, classroom, progress)


def _measure(config: ReadingConfig, run: Run, classroom: Classroom, progress: Progress) -> dict[str, Any]:
    """Every arm on training articles (at most ``evaluation.max_train_articles``) and on all held-out ones."""
    records: list[dict[str, Any]] = []
    first_episode = progress.num_episodes
    names = (*classroom.train[: config.evaluation.max_train_articles], *classroom.held_out)
    for number, name in enumerate(names, start=1):
        run.notice(f"measuring every arm on '{name}' ({number} of {len(names)})")
        evaluation = evaluate_article(
            classroom,
            config,
            name,
            learned_calls=progress.num_scored_values,
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
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    snapshot: LanguageModel,
    progress: Progress,
    step: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    policy, update = classroom.policy, config.update

    # 1, 2. A batch of episodes of one article.
    name = _next_article(classroom.train, run.streams["article"], progress)
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
        step_rewards = progress.pair_baseline.subtract(name, trajectories.order, judged.scored, rewards)
    if config.shuffle_rewards:
        shuffled = torch.randperm(len(trajectories), generator=run.streams["shuffle"])
        step_rewards, rewards = step_rewards[shuffled], rewards.at(shuffled)
    progress.num_scored_values += trajectories.order.numel()

    # 4. Who teaches, and what each step is credited with.
    usable = rewards.total.isfinite() & step_rewards.isfinite().all(1)
    progress.num_rewards_excluded += int((~usable).sum())
    passed = usable & _filter(rewards.total, update, progress.moments)
    progress.moments.update(rewards.total)
    advantages = step_advantages(
        step_rewards,
        usable=usable,
        credit=config.reward.credit,
        advantage=update.advantage,
        moments=progress.moments,
    )

    # 5. One step of the optimiser, unless nothing passed or something is not finite.
    uses_kl = bool(update.value_kl_coefficient or update.query_kl_coefficient)
    measured = accumulate_gradient(
        policy,
        trajectories,
        keys,
        advantages=advantages,
        passed=passed,
        reference=snapshot if uses_kl else None,
        coefficients=Coefficients(
            query=update.query_coefficient,
            selection=update.selection_coefficient,
            value_kl=update.value_kl_coefficient,
            query_kl=update.query_kl_coefficient,
            query_entropy=update.query_entropy_coefficient,
        ),
        micro_batch_size=update.micro_batch_size or config.episode.batch_size,
    )
    gradient_norm = _apply(parameters, optimiser, update.clip_norm, passed, run, progress, step)

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
                first_episode=progress.num_episodes,
                temperature=policy.temperature,
                rewards=judged.raw.total,
                normalised_rewards=rewards.total,
                passed=passed,
                reference=judged.reference,
            )
        )
    progress.num_episodes += len(trajectories)
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
        "rewards_excluded": progress.num_rewards_excluded,
        "policy_loss": measured.policy_loss,
        "value_kl": measured.value_kl,
        "query_kl": measured.query_kl,
        "kl": measured.value_kl,
        "gradient_norm": gradient_norm,
        "query_entropy": measured.query_entropy,
        "query_entropy_maximum": _maximum_query_entropy(policy),
        "selection_entropy": _selection_entropy(trajectories),
        "skipped_steps": progress.guard.num_skipped,
        "episodes": progress.num_episodes,
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
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    clip_norm: float,
    passed: Bool[Tensor, " batch"],
    run: Run,
    progress: Progress,
    step: int,
) -> float:
    """The optimiser's step and the gradient's norm before clipping; skipped, and said, if a gradient is not finite."""
    if not passed.any():
        return 0.0
    if (what := first_nonfinite((f"gradient of {name}", parameter.grad) for name, parameter in parameters.items())) is not None:
        optimiser.zero_grad(set_to_none=True)
        run.notice(progress.guard.skip(step, what))
        return float("nan")
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), clip_norm))
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    progress.guard.ok()
    return norm


def _next_article(names: tuple[str, ...], generator: torch.Generator, progress: Progress) -> str:
    """Every article once in random order, then again."""
    if len(names) == 1:
        return names[0]
    if not progress.queue:
        progress.queue = torch.randperm(len(names), generator=generator).tolist()
    return names[progress.queue.pop()]


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


# ---- state ----------------------------------------------------------------------------------------------------------


def build_optimiser(policy: Policy, update: UpdateOptions) -> torch.optim.Optimizer:
    """Adam over the language model's trainable parameters and the projection, each with its own learning rate."""
    groups = [{"params": list(policy.lm.trainable_parameters().values()), "lr": update.learning_rate}]
    if policy.projection is not None:
        groups.append({"params": list(policy.projection.parameters()), "lr": update.projection_learning_rate})
    if update.optimiser == "adamw":
        return torch.optim.AdamW(groups, weight_decay=update.weight_decay)
    return torch.optim.Adam(groups)


def _save(
    run: Run,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    snapshot: LanguageModel,
    progress: Progress,
    update: UpdateOptions,
) -> None:
    optimiser_state, optimiser_settings = optimizer_tensors(optimiser)
    tensors = {
        "policy": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimiser": optimiser_state,
    }
    if update.kl_reference == "snapshot":
        tensors["snapshot"] = dict(snapshot.model.named_parameters())
    run.save(step, tensors, {"optimiser": optimiser_settings, "progress": progress.state_dict()})


def _load(
    checkpoint: Checkpoint,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    snapshot: LanguageModel,
    progress: Progress,
    update: UpdateOptions,
) -> None:
    _copy(checkpoint.tensors["policy"], parameters)
    load_optimizer(optimiser, checkpoint.tensors["optimiser"], checkpoint.state["optimiser"])
    if update.kl_reference == "snapshot":
        _copy(checkpoint.tensors["snapshot"], dict(snapshot.model.named_parameters()))
    progress.load_state_dict(checkpoint.state["progress"])


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    if saved.keys() != live.keys():
        different = sorted(saved.keys() ^ live.keys())[0]
        raise CheckpointError(f"the checkpoint's parameters are not this model's ('{different}'); resume with the same model")
    for name, tensor in live.items():
        tensor.copy_(saved[name])
