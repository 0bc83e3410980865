"""The curriculum system: a language model learns from a mixture of datasets that follows what it can learn next.

Each step of an arm:

1. Every K steps the frozen model becomes the policy; every M steps it measures the difficulty of each dataset, and the
   mixture's weights move (``difficulty.py``, ``objectives/mixture.py``).
2. Rows of documents are drawn by those weights.
3. The policy goes on from the first tokens of documents drawn by the same weights; the reward terms, the KL to a
   reference and the value network say what each token is credited with (``step.py``).
4. Cross-entropy on the documents and PPO on the continuations, in one loss, over epochs of minibatches (``update.py``).
5. Now and then: losses and rewards on what is held out, test prompts, the best model so far (``validation.py``).

A run is one arm after another (``arms.py``), each from the same weights and the same streams, for the same steps.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from preceptor.config import to_dict
from preceptor.run.device import peak_memory_mib
from preceptor.run.random import derived_seed
from preceptor.systems.curriculum.arms import plan_arms
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.decisions import rollout_rows, sample_rows
from preceptor.systems.curriculum.learner import Learner, learning_rate_scale
from preceptor.systems.curriculum.measures import arm_records
from preceptor.systems.curriculum.model_folder import save_model
from preceptor.systems.curriculum.result import charts, curriculum_result
from preceptor.systems.curriculum.setting import Setting, prepare
from preceptor.systems.curriculum.step import draw_documents, improve, kl_reference, measure_difficulty, write_rollouts
from preceptor.systems.curriculum.texts import TEST_PROMPTS
from preceptor.systems.curriculum.validation import held_out_rewards, macro_mean, validation_losses, write_samples

if TYPE_CHECKING:
    from preceptor.run.folder import Run
    from preceptor.systems.base import Services

STREAMS = ("difficulty", "prompt", "rollout", "minibatch")
PROGRESS_COLUMNS = {
    "arm_number": "arm",
    "validation_loss": "validation loss",
    "cross_entropy": "loss",
    "reward": "reward",
    "kl": "KL",
    "tokens_per_second": "tokens/s",
}


def train(config: CurriculumConfig, run: Run, services: Services) -> dict[str, Any]:
    """Train every arm of ``config`` inside ``run`` and compare them; gives ``result.json``.

    The best and the last policy of the first arm are saved as model folders, ``best_model`` and ``model``.
    """
    setting = prepare(config, run)
    arms = plan_arms(config)
    finished: dict[str, dict[str, Any]] = {}
    start = 0
    checkpoint = run.restore()
    if checkpoint is not None:
        start, finished = checkpoint.step, dict(checkpoint.state["finished"])
    steps = config.update.steps
    run.show_progress(len(arms) * steps, PROGRESS_COLUMNS)
    for number, arm in enumerate(arms):
        first = number * steps  # of the run's steps, those before this arm
        if start >= first + steps:
            continue
        learner = Learner(arm, config, setting.lm, initial=setting.initial, corpora=setting.corpora)
        if checkpoint is not None and start > first:
            learner.load(checkpoint)
        else:
            _begin_arm(config, run, setting, learner, number=number, num_arms=len(arms))
        for step in range(max(start - first, 0) + 1, steps + 1):
            row = _one_step(config, run, setting, learner, step=step, first=first)
            if step % config.validation.every == 0 or step == steps:
                row |= _validate(config, run, setting, learner, step=step, first=first, keep=number == 0)
            run.log(first + step, {"arm": arm.name, "arm_number": number + 1, "arm_step": step, **row})
            if step == steps:
                finished[arm.name] = learner.achieved()
                if number == 0:
                    save_model(setting.lm, run.path / "model")
            if run.due(first + step) or run.stop_requested or step == steps:
                run.save(first + step, learner.tensors(), {"learner": learner.state(), "finished": finished})
            if run.stop_requested:
                run.stop(first + step)
    targets = {corpus.name: corpus.target for corpus in setting.corpora}
    records = arm_records(finished, targets=targets, seed=config.seed)
    return curriculum_result(records, config=to_dict(config), seeds=[config.seed]) | {
        "charts": charts(finished, targets)
    }


def _begin_arm(
    config: CurriculumConfig, run: Run, setting: Setting, learner: Learner, *, number: int, num_arms: int
) -> None:
    """Every arm draws the same random numbers, and its curves begin before its first step."""
    for name in STREAMS:
        run.streams[name].manual_seed(derived_seed(config.seed, name))
    learner.curve.append((0, dict(setting.first_losses)))
    if learner.arm.writes:
        learner.rewards.append(_rewards(config, setting, step=0))
    run.notice(f"arm {number + 1} of {num_arms}: {learner.arm.name}")


def _one_step(
    config: CurriculumConfig, run: Run, setting: Setting, learner: Learner, *, step: int, first: int
) -> dict[str, Any]:
    began = time.perf_counter()
    names = [corpus.name for corpus in setting.corpora]
    row: dict[str, Any] = {}

    # 1. What the frozen model finds hard, and where the weights go.
    if step > 1 and (step - 1) % config.difficulty.refresh_every == 0:
        learner.refresh_frozen()
    if learner.arm.measures and (step - 1) % config.difficulty.every == 0:
        measured = measure_difficulty(
            learner, setting.corpora, config.difficulty, generator=run.streams["difficulty"], step=first + step
        )
        run.record([measured])
        row["difficulty"] = dict(zip(names, measured["difficulty"]["mean"], strict=True))
        row["difficulty_variance"] = dict(zip(names, measured["difficulty"]["variance"], strict=True))
        if measured["fell_back"]:
            run.notice(f"step {first + step}: the rule {learner.arm.rule} prefers no dataset; the mixture is uniform")
    row["weights"] = dict(zip(names, learner.mixture.weights.tolist(), strict=True))

    # 2. Documents by those weights.
    documents = draw_documents(learner, setting.corpora, num_tokens=step * config.update.batch_tokens)

    # 3. Continuations, and what they are credited with.
    experience = None
    if learner.arm.writes:
        written = write_rollouts(learner, setting, config, generators=run.streams)
        experience = written.experience
        row |= written.metrics
        if written.num_excluded:
            run.notice(f"step {first + step}: {written.num_excluded} rewards are NaN or infinite and teach nothing")
        if step % config.record_every == 0:
            run.record(
                rollout_rows(written.rollouts, written.rewards, lm=setting.lm, step=first + step, arm=learner.arm.name)
            )

    # 4. One loss.
    learner.set_learning_rate(learning_rate_scale(step, config.update))
    improved = improve(
        learner,
        documents,
        experience,
        config=config,
        reference=kl_reference(learner, setting, config.ppo),
        generator=run.streams["minibatch"],
    )
    for what in improved.nonfinite:
        run.notice(learner.guard.skip(first + step, what))
    row |= improved.metrics
    if learner.kl is not None and experience is not None:
        learner.kl.update(row["kl"], num_samples=len(experience.rollouts))
    row["tokens"] = learner.counts["tokens"]
    row["skipped_steps"] = learner.guard.num_skipped
    seconds = time.perf_counter() - began
    num_tokens = int(documents.token_mask.sum()) + (0 if experience is None else int(experience.rollouts.mask.sum()))
    row |= {"tokens_per_second": num_tokens / seconds, "seconds": seconds}
    return row | {"peak_memory_mib": peak_memory_mib(setting.lm.device)}


# ---- 5. on the way --------------------------------------------------------------------------------------------------


def _validate(
    config: CurriculumConfig, run: Run, setting: Setting, learner: Learner, *, step: int, first: int, keep: bool
) -> dict[str, Any]:
    """Losses, rewards and samples after ``step``; ``keep`` saves the policy where it is the best so far."""
    losses = validation_losses(setting.lm, setting.corpora, num_rows=config.validation.rows)
    learner.curve.append((step, losses))
    macro = macro_mean(losses, setting.corpora)
    if macro < learner.best_loss:
        learner.best_loss = macro
        if keep:
            save_model(setting.lm, run.path / "best_model")
    row: dict[str, Any] = {"validation_loss": macro, "validation_losses": losses}
    if learner.arm.writes:
        learner.rewards.append(_rewards(config, setting, step=step))
        row["held_out"] = {name: value for name, value in learner.rewards[-1].items() if name != "step"}
    prompts = config.validation.prompts or TEST_PROMPTS
    seed = derived_seed(config.seed, "samples")
    texts = write_samples(setting.lm, prompts, num_tokens=config.validation.prompt_tokens, seed=seed)
    run.record(sample_rows(prompts[: len(texts)], texts, step=first + step, arm=learner.arm.name))
    return row


def _rewards(config: CurriculumConfig, setting: Setting, *, step: int) -> dict[str, float]:
    """What held-out prompts earn now."""
    earned = held_out_rewards(
        setting.lm,
        setting.prompts,
        setting.held_out_terms,
        reference=setting.reference,
        num_tokens=config.ppo.continuation_tokens,
        temperature=config.ppo.temperature,
        seed=derived_seed(config.seed, "held-out rollouts"),
    )
    return {"step": float(step), "reward": earned.reward, "kl": earned.kl, **earned.terms}
