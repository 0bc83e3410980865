"""The bandit system: a language model that decides by words, and what it carries from one context to another.

1. A small GPT learns by cross-entropy to answer a prompt with one of the words that it names (``language.py``); or a
   given model is taken as it is.
2. Its distribution over the words is measured: near one half each, little mass elsewhere (``crossing.py``).
3. REINFORCE moves the weights by what the words pay, the prompts of every bandit in turn (``learner.py``); or, with
   ``mode: history``, past rewards stand in the context and the weights rest while acting (``history.py``).
4. Words of different bandits are put into one prompt: what crosses, and what explains it (``crossing.py``).
5. Bandit algorithms without a language model play the same draws (``references.py``).
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from preceptor.config import to_dict
from preceptor.lm.load import save_language_model
from preceptor.lm.sampling import draw
from preceptor.run.device import peak_memory_mib
from preceptor.run.random import derived_seed
from preceptor.systems.bandit import history
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.laboratory import Laboratory, prepare
from preceptor.systems.bandit.language import (
    dropout_from,
    next_token_loss,
    sliding_windows,
    token_stream,
    validation_loss,
)
from preceptor.systems.bandit.learner import Learner, policy_gradient
from preceptor.systems.bandit.measure import measure, validation_notice
from preceptor.systems.bandit.policy import decide
from preceptor.systems.bandit.result import bandit_result

if TYPE_CHECKING:
    from preceptor.run.folder import Run
    from preceptor.systems.base import Services

STREAMS = ("windows", "dropout", "prompts", "actions", "bandits", "environment", "references")
PROGRESS_COLUMNS = {"loss": "loss", "reward": "reward", "kl": "KL", "best_word": "P(best)", "entropy": "entropy"}


def train(config: BanditConfig, run: Run, services: Services) -> dict[str, Any]:
    """Pre-train, validate, learn from rewards, cross the contexts, compare; gives ``result.json``.

    The model before the first reward is saved as ``run.path / "pretrained"``, for other runs to start from.

    Args:
        config: the whole configuration.
        run: folder, streams and checkpoints; streams are :data:`STREAMS`.
    """
    laboratory = prepare(config, device=run.device)
    learner = Learner(laboratory.lm, config.update, [bandit.name for bandit in laboratory.bandits])
    pretraining, update = config.pretraining, config.update
    start, rewards_begun = 0, False
    if (checkpoint := run.restore()) is not None:
        start = checkpoint.step
        rewards_begun = start >= pretraining.steps
        phase = update if rewards_begun else pretraining
        learner.start(learning_rate=phase.learning_rate, weight_decay=phase.weight_decay)
        learner.load(checkpoint)
    run.show_progress(pretraining.steps + _num_updates(config, laboratory), PROGRESS_COLUMNS)
    if not rewards_begun:
        _pretrain(config, run, laboratory, learner, start)
        start = pretraining.steps
    run.notice(validation_notice(laboratory, learner))
    if config.mode == "history":
        history.learn(config, run, laboratory, learner, start)
        records, charts = history.measure(config, run, laboratory, learner)
    else:
        dropout = "on" if update.dropout else "off"
        run.notice(f"acting and scoring are one forward pass with dropout {dropout}")
        _learn(config, run, laboratory, learner, start)
        records, charts = measure(config, run, laboratory, learner)
    return bandit_result(records, config=to_dict(config), seeds=[config.seed]) | {"charts": charts}


def _num_updates(config: BanditConfig, laboratory: Laboratory) -> int:
    return (
        config.history.steps
        if config.mode == "history"
        else config.update.epochs * _steps_per_epoch(config, laboratory)
    )


def _steps_per_epoch(config: BanditConfig, laboratory: Laboratory) -> int:
    sizes = [(len(contexts), config.update.batch_size or len(contexts)) for contexts in laboratory.contexts.values()]
    return sum(math.ceil(num_prompts / batch_size) for num_prompts, batch_size in sizes)


# ---- pretraining -----------------------------------------------------------------------------------------------------


def _pretrain(config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner, start: int) -> None:
    """Cross-entropy on the balanced corpus, from step ``start``; then the learner is handed to REINFORCE."""
    options, lm = config.pretraining, laboratory.lm
    if start == 0:
        learner.start(learning_rate=options.learning_rate, weight_decay=options.weight_decay)
    lines = history.lines(config, laboratory) if config.mode == "history" else laboratory.training_lines
    order = torch.Generator().manual_seed(derived_seed(config.seed, "corpus"))
    stream = token_stream(lm, lines, generator=order)
    for step in range(start + 1, options.steps + 1):
        began = time.perf_counter()
        tokens = sliding_windows(
            stream, batch_size=options.batch_size, window=options.window, generator=run.streams["windows"]
        )
        with dropout_from(lm, run.streams["dropout"]):
            loss = next_token_loss(lm, tokens)
        row: dict[str, Any] = {"phase": "pretraining", "loss": loss.item()}
        row["gradient_norm"] = learner.apply(loss, run, step, clip_norm=options.clip_norm)
        if laboratory.validation_lines and (step % options.validate_every == 0 or step == options.steps):
            row["validation_loss"] = validation_loss(lm, laboratory.validation_lines)
        row |= {"tokens": step * tokens.numel(), "seconds": time.perf_counter() - began}
        run.log(step, row)
        if step == options.steps:
            break
        if run.due(step) or run.stop_requested:
            learner.save(run, step)
        if run.stop_requested:
            run.stop(step)
    learner.pretrained = lm.frozen_copy()
    learner.start(learning_rate=config.update.learning_rate, weight_decay=config.update.weight_decay)
    save_language_model(lm, run.path / "pretrained")
    if options.steps:
        learner.save(run, options.steps)
        if run.stop_requested:
            run.stop(options.steps)


# ---- REINFORCE -------------------------------------------------------------------------------------------------------


def _learn(config: BanditConfig, run: Run, laboratory: Laboratory, learner: Learner, start: int) -> None:
    """One update for every batch of prompts of one bandit, the bandits in turn."""
    steps_per_epoch = _steps_per_epoch(config, laboratory)
    last = config.pretraining.steps + _num_updates(config, laboratory)
    for step in range(start + 1, last + 1):
        if not learner.queue:
            learner.queue = _epoch(config, laboratory, run.streams["prompts"])
        number, prompts = learner.queue.pop()
        row = _one_update(
            config, run, laboratory, learner, step, bandit=laboratory.bandits[number].name, prompts=prompts
        )
        row["epoch"] = (step - config.pretraining.steps - 1) // steps_per_epoch + 1
        run.log(step, row)
        if run.due(step) or run.stop_requested or step == last:
            learner.save(run, step)
        if run.stop_requested:
            run.stop(step)


def _epoch(config: BanditConfig, laboratory: Laboratory, generator: torch.Generator) -> list[tuple[int, list[int]]]:
    """Every prompt once, in batches of one bandit, the bandits in turn; the first batch stands last."""
    batches: list[list[tuple[int, list[int]]]] = []
    for number, contexts in enumerate(laboratory.contexts.values()):
        order = torch.randperm(len(contexts), generator=generator).tolist()
        size = config.update.batch_size or len(order)
        batches.append([(number, order[first : first + size]) for first in range(0, len(order), size)])
    in_turn = [batch for round_ in itertools.zip_longest(*batches) for batch in round_ if batch is not None]
    return in_turn[::-1]


def _one_update(
    config: BanditConfig,
    run: Run,
    laboratory: Laboratory,
    learner: Learner,
    step: int,
    *,
    bandit: str,
    prompts: list[int],
) -> dict[str, Any]:
    began = time.perf_counter()
    update, lm = config.update, laboratory.lm
    contexts = [laboratory.contexts[bandit][index] for index in prompts]
    reference = None
    if update.kl_coefficient and learner.pretrained is not None:
        with torch.no_grad():
            reference = decide(learner.pretrained, contexts).log_probs

    # Acting and scoring are one pass, so the drawn word's log-probability is that of the distribution it came from.
    with dropout_from(lm, run.streams["dropout"] if update.dropout else None):
        decision = decide(lm, contexts)
    actions = draw(decision.log_probs, run.streams["actions"])
    first = learner.num_pulls[bandit]
    table = laboratory.tables[bandit][first : first + len(prompts)]
    rewards = table.gather(1, actions.cpu()[:, None])[:, 0]
    advantages = learner.baseline.advantages(rewards, bandit).to(lm.device)
    loss, measured = policy_gradient(
        decision.log_probs,
        actions,
        advantages,
        entropy_coefficient=update.entropy_coefficient,
        kl_coefficient=update.kl_coefficient,
        reference=reference,
    )
    gradient_norm = learner.apply(loss, run, step, clip_norm=update.clip_norm)

    played = next(other for other in laboratory.bandits if other.name == bandit)
    learner.count(played, actions.cpu(), rewards)
    probabilities = decision.log_probs.detach().double().exp().cpu()
    of_prompts = [laboratory.training_prompts(bandit)[index] for index in prompts]
    run.record(
        {
            "step": step,
            "arm": "learned",
            "bandit": bandit,
            "pull": first + number,
            "prompt": prompt.text,
            "words": list(prompt.words),
            "probabilities": probabilities[number].tolist(),
            "word": prompt.words[action],
            "reward": reward,
        }
        for number, (prompt, action, reward) in enumerate(
            zip(of_prompts, actions.tolist(), rewards.tolist(), strict=True)
        )
    )
    pulls = sum(learner.num_pulls.values())
    return {
        "phase": "rewards",
        "bandit": bandit,
        "loss": measured.loss,
        "reward": float(rewards.mean()),
        "mean_reward": {**learner.mean_rewards(), "all": sum(learner.reward_sum.values()) / pulls},
        "best_word": float(probabilities[:, played.best].mean()),
        "best_word_of": {bandit: float(probabilities[:, played.best].mean())},
        "regret": {bandit: learner.regret[bandit][-1]},
        "entropy": measured.entropy / math.log(len(played.words)),
        "kl": measured.kl,
        "named_mass": float(decision.mass.mean()),
        "gradient_norm": gradient_norm,
        "skipped_steps": learner.guard.num_skipped,
        "pulls": pulls,
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(lm.device),
    }
