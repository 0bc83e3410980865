"""RL on tasks with a verifier: a rule mixes their levels by what the policy can learn from now.

Before anything, a warm-up teaches the form of answers. Then each step of a rule:

1. Every few thousand answer tokens: the success rate of each level, on fresh items (not counted as cost).
2. Levels are drawn by the weights until their nominal tokens fill the step's budget, the same for all rules.
3. A group of answers to an item of each; the verifier says which are right.
4. GRPO (or what ``ppo`` says) on them, one optimizer step.
5. Success and advantages of the groups move the weights.

A run trains one rule after another, each from the same weights with the same random numbers, until its mean success
reaches ``tasks.stop_at`` or its tokens ``tasks.max_tokens``; the steps that are left of ``update.steps`` are skipped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from preceptor.config import to_dict
from preceptor.errors import CheckpointError
from preceptor.objectives.task_rules import Groups
from preceptor.runs.export import save_model
from preceptor.runs.guard import first_nonfinite
from preceptor.runs.random import derived_seed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.engines import build_engine, corrected
from preceptor.systems.curriculum.loss import Experience, accumulate_ppo
from preceptor.systems.curriculum.policy import build_policy, rollout_sampling
from preceptor.systems.curriculum.rewards import token_advantages
from preceptor.systems.curriculum.sums import Sums
from preceptor.systems.curriculum.tasks.result import mean_success, records_of, task_charts, task_result
from preceptor.systems.curriculum.tasks.rollouts import Answers, draw_sources, longest_answer, sample_answers
from preceptor.systems.curriculum.tasks.saved import TEACHER, load_teacher, save_teacher
from preceptor.systems.curriculum.tasks.sources import Source, build_sources
from preceptor.systems.curriculum.tasks.state import TaskSetup, TaskState, mixture_of

if TYPE_CHECKING:
    from preceptor.lm.generators.base import Generator
    from preceptor.lm.model import LanguageModel
    from preceptor.objectives.task_mixture import TaskMixture
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {"arm_number": "rule", "success": "success", "reward": "reward", "rollout_tokens": "tokens"}


def train_on_tasks(config: CurriculumConfig, run: Run, services: Services) -> dict[str, Any]:
    """Trains every rule of ``config`` inside ``run`` and compares them; gives ``result.json``.

    Raises:
        ConfigError: an unknown rule or setting.
        DataError: a task cannot be read.
    """
    setup = prepare_tasks(config, run, services)
    state = TaskState(setup)
    run.restore(state)
    steps = config.update.steps
    run.show_progress(len(setup.rules) * steps, PROGRESS_COLUMNS)
    for number, rule in enumerate(setup.rules, start=1):
        last_step = number * steps
        if run.step >= last_step:
            continue
        if run.step == last_step - steps:
            state.begin(rule)
            for name, generator in run.streams.items():
                generator.manual_seed(derived_seed(config.seed, name))
            run.notice(f"rule {number} of {len(setup.rules)}: {rule}")
        elif state.rule != rule:
            raise CheckpointError(f"step {run.step} belongs to {rule} and the checkpoint to {state.rule}")
        for n in run.loop(last_step, state):
            if not state.finished:
                row, decisions = task_step(setup, state, n, last=n == last_step)
                run.record(decisions)
                run.log(n, {"arm_number": number, **row})
            if number == 1 and n == last_step and run.writes:
                save_model(setup.lm.model, setup.lm.tokenizer, run.path / "model")
    records = records_of(state.outcomes, counted=setup.counted, seed=config.seed)
    names = [source.name for source in setup.sources]
    charts = task_charts(state.outcomes, names=names, counted=setup.counted)
    return task_result(records, config=to_dict(config), seeds=[config.seed]) | {"charts": charts}


def prepare_tasks(config: CurriculumConfig, run: Run, services: Services) -> TaskSetup:
    """Builds the policy and the sources, and warms the policy up."""
    rules = list(dict.fromkeys((config.tasks.rule, *config.tasks.controls)))
    if "learned" in rules and run.writes and not (run.path / TEACHER).is_dir():
        # A copy of its own: the run is resumed and replayed with this teacher, whatever becomes of the other folder.
        save_teacher(load_teacher(config.tasks.policy), run.path / TEACHER)
    run.world.barrier()
    for rule in rules:
        mixture_of(config, rule, folder=run.path)  # faults in settings are said before anything is trained
    lm = build_policy(config.model, device=run.device, seed=derived_seed(config.seed, "weights"))
    return task_setup(
        config,
        run,
        lm,
        rules=rules,
        make_mixture=partial(mixture_of, config, folder=run.path),
        engine=build_engine(config.ppo, lm, run, services),
    )


def task_setup(
    config: CurriculumConfig,
    run: Run,
    lm: LanguageModel,
    *,
    rules: Sequence[str],
    make_mixture: Callable[[str], TaskMixture],
    engine: Generator | None = None,
) -> TaskSetup:
    """The sources of ``config.tasks``, and ``lm`` warmed up on them."""
    sources = build_sources(config.tasks.tasks)
    chooser = random.Random(derived_seed(config.seed, "costs"))
    costs = [float(config.ppo.group_size * longest_answer(lm, source, source.draw(chooser))) for source in sources]
    warm_up(lm, sources, config)
    return TaskSetup(
        config=config,
        run=run,
        rules=rules,
        sources=sources,
        costs=costs,
        lm=lm,
        initial_weights={name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()},
        make_mixture=make_mixture,
        engine=engine,
    )


def warm_up(lm: LanguageModel, sources: list[Source], config: CurriculumConfig) -> None:
    """Cross-entropy on the first levels with right answers, on all levels with answers to *another* item of the level.

    The second half teaches the form of every level's answers (how long they are, that they end) and nothing of the
    skill. Without it the answers to level 2 are never right, and no rule learns anything.
    """
    options = config.tasks
    chooser = random.Random(derived_seed(config.seed, "warm-up"))
    shown = [source for source in sources if source.level <= options.warm_up_levels]
    optimizer = torch.optim.AdamW(lm.trainable_parameters().values(), lr=options.warm_up_learning_rate, weight_decay=0)
    for _ in range(options.warm_up_steps):
        texts = []
        for row in range(options.warm_up_rows):
            source = chooser.choice(shown if row % 2 else sources)
            item = source.draw(chooser)
            answer = item.answer if row % 2 else source.draw(chooser).answer
            texts.append((lm.encode(item.prompt), lm.encode(answer)))
        loss_on_answers(lm, texts).backward()
        nn.utils.clip_grad_norm_(lm.trainable_parameters().values(), config.update.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def loss_on_answers(lm: LanguageModel, texts: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens and their end, nats, given the prompts."""
    end = int(lm.tokenizer.eos_token_id)
    rows = [[lm.begin_token, *prompt, *answer, end] for prompt, answer in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [lm.begin_token] * (width - len(row)) for row in rows], device=lm.device)
    mask = torch.zeros(tokens.shape, dtype=torch.bool, device=lm.device)  # True = a token of an answer
    for place, ((prompt, _), row) in enumerate(zip(texts, rows, strict=True)):
        mask[place, len(prompt) + 1 : len(row)] = True
    return -lm.chosen_log_probs(tokens, keep=mask.roll(-1, dims=1), chosen=tokens[mask]).mean()


def task_step(
    setup: TaskSetup, state: TaskState, n: int, *, last: bool, held: torch.Tensor | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains on one batch of groups in the run's step ``n``; gives its metrics and decisions.

    Args:
        setup: of the run.
        state: of the rule in training.
        n: number of the step.
        last: whether it is the rule's last, before which success is measured in any case.
        held: weights that take the place of the rule's.
    """
    config, options, outcome = setup.config, setup.config.tasks, state.outcome
    started = time.perf_counter()
    counts = outcome.counts
    row: dict[str, Any] = {
        "arm": state.rule,
        "arm_step": counts["steps"] + 1,
    }

    # 1. Success by level.
    if counts["rollout_tokens"] >= min(state.next_validation, options.max_tokens) or last:
        row |= validate(setup, state)
        state.finished = row["success"] >= options.stop_at or counts["rollout_tokens"] >= options.max_tokens
    if state.mixture.rule.asks_for_success and counts["rollout_tokens"] >= state.next_oracle:
        rates, num_tokens = success_rates(setup, num_prompts=options.validation_prompts, seed=n)
        counts["rollout_tokens"] += num_tokens
        state.next_oracle = counts["rollout_tokens"] + options.oracle_every
        state.mixture.tell_success(torch.tensor(rates, dtype=torch.float64))

    # 2. and 3. Levels, items, answers; dynamic sampling draws until groups that teach fill the budget.
    weights = state.mixture.weights if held is None else held
    batches, useful, spent = [], 0.0, 0.0
    sums = Sums()
    if setup.engine is not None:
        setup.engine.refresh()
    while True:
        missing = options.tokens_per_step - (useful if state.mixture.rule.resamples else spent)
        drawn = draw_sources(setup.costs, weights, budget=missing, chooser=state.chooser)
        answers = sample_answers(
            setup.lm,
            setup.sources,
            drawn,
            group_size=config.ppo.group_size,
            temperature=config.ppo.temperature,
            chooser=state.chooser,
            generator=setup.run.streams["rollout"],
            engine=setup.engine,
            world=setup.run.world,
        )
        if setup.engine is not None:
            answers = audited(setup, setup.engine, answers, sums)
        batches.append(answers)
        success = answers.success(config.ppo.group_size)
        teaches = (success > 0) & (success < 1)
        counts["rollout_tokens"] += answers.num_tokens
        counts["groups"] += len(drawn)
        counts["groups_that_teach"] += int(teaches.sum())
        for source in drawn:
            outcome.drawn[source] += setup.costs[source]
        spent += sum(setup.costs[source] for source in drawn)
        useful += sum(setup.costs[source] for source, kept in zip(drawn, teaches.tolist(), strict=True) if kept)
        # Six budgets at most, where hardly any group teaches.
        if (
            not state.mixture.rule.resamples
            or useful >= 0.95 * options.tokens_per_step
            or spent >= 6 * options.tokens_per_step
        ):
            break

    # 4. and 5. One optimizer step on every batch, and the rule.
    progress = counts["steps"] / config.update.steps
    accumulate, world = partial(accumulate_gradient, setup, batches, sums), setup.run.world
    with state.micro_batch.first_trial(max(world.most_rows(len(answers.rollouts)) for answers in batches)) as trial:
        given = accumulate(micro_batch_size=trial.size)
    if trial.ran_out:
        given = state.micro_batch.search(trial.size, accumulate, setup.lm.trainable_parameters().values())
    state.micro_batch.agree(world)
    if state.micro_batch.found:
        row["micro_batch_size"] = state.micro_batch.found
    for text in (*setup.lm.take_notices(), *state.micro_batch.take_notices()):
        setup.run.notice(f"step {n}: {text}")
    sums, decisions = given.sums, []
    for answers, advantages in zip(batches, given.advantages, strict=True):
        size = config.ppo.group_size
        groups = Groups(
            sources=torch.tensor(answers.sources),
            success=answers.success(size).double(),
            advantage=advantages.abs().view(-1, size).mean(1).double(),
            size=size,
        )
        state.mixture.update(groups, progress=progress)
        decisions.append(group_row(groups, state, step=n, progress=progress))
    named = [(name, parameter) for name, parameter in setup.lm.trainable_parameters().items()]
    setup.run.world.sum_gradients(parameter for _, parameter in named)
    if (reason := first_nonfinite((f"gradient of {name}", p.grad) for name, p in named)) is None:
        norm = nn.utils.clip_grad_norm_([parameter for _, parameter in named], config.update.clip_norm)
        row["gradient_norm"] = float(norm)
        state.optimizer.step()
        state.guard.ok()
    else:
        setup.run.notice(state.guard.skip(n, reason))
    state.optimizer.zero_grad(set_to_none=True)
    counts["steps"] += 1
    right = torch.cat([answers.right for answers in batches]).double()
    names = [source.name for source in setup.sources]
    metrics = row | {
        "reward": float(right.mean()),
        "rollout_tokens": counts["rollout_tokens"],
        "groups_that_teach": counts["groups_that_teach"] / counts["groups"],
        "weights": dict(zip(names, weights.tolist(), strict=True)),
        **sums.shared(setup.run.world).means(),
        "seconds": time.perf_counter() - started,
    }
    return metrics, decisions


def audited(setup: TaskSetup, engine: Generator, answers: Answers, sums: Sums) -> Answers:
    """The answers of another engine, ready to be learned from; its audit is added to ``sums``."""
    sampling = rollout_sampling(setup.lm, setup.config.ppo.temperature)
    rollouts, metrics = corrected(
        answers.rollouts, setup.lm, sampling=sampling, engine=engine, options=setup.config.ppo
    )
    for name, value in metrics.items():
        sums.add(name, value, answers.num_tokens)
    return replace(answers, rollouts=rollouts)


class Given(NamedTuple):
    """What the answers of a step gave beside their gradient: its metrics, and the advantage of each batch's answers."""

    sums: Sums
    advantages: list[torch.Tensor]


def accumulate_gradient(setup: TaskSetup, batches: Sequence[Answers], sums: Sums, *, micro_batch_size: int) -> Given:
    """Adds the policy gradient of ``batches``, a mean over all answers; changes nothing else, so it can be tried again.

    Nothing in it waits for another process, which may have had the memory that this one lacks.
    """
    config, sums = setup.config, sums.copy()
    total, by_batch = sum(len(answers.rollouts) for answers in batches), []
    for answers in batches:
        mask, share = answers.rollouts.mask, len(answers.rollouts) / total
        # The reward stands at the last token that counts: [batch, token].
        last = mask.long().cumsum(1).argmax(1)
        rewards = torch.zeros(mask.shape).index_put((torch.arange(len(mask)), last.cpu()), answers.right.float())
        advantages, _ = token_advantages(
            rewards.to(mask.device), mask, kind=config.ppo.advantage, group_size=config.ppo.group_size
        )
        nothing = torch.zeros(mask.shape).to(mask.device)  # no KL to a reference
        accumulate_ppo(
            setup.lm,
            Experience(answers.rollouts, share * advantages, None, None, nothing),
            sampling=rollout_sampling(setup.lm, config.ppo.temperature),
            options=config.ppo,
            kl_coefficient=0.0,
            value_network=None,
            reference_model=setup.lm,
            micro_batch_size=micro_batch_size,
            bf16=config.update.bf16,
            sums=sums,
            world=setup.run.world,
        )
        by_batch.append(advantages[:, 0].cpu())  # the same at every token, and the first always counts
    return Given(sums, by_batch)


def validate(setup: TaskSetup, state: TaskState) -> dict[str, Any]:
    """Success by level now, added to the outcome; gives metrics."""
    outcome, options = state.outcome, setup.config.tasks
    tokens = outcome.counts["rollout_tokens"]
    rates, _ = success_rates(setup, num_prompts=options.validation_prompts, seed=len(outcome.curve))
    outcome.curve.append((tokens, rates))
    outcome.weights.append((tokens, state.mixture.weights.tolist()))
    state.next_validation = tokens + options.validate_every
    names = [source.name for source in setup.sources]
    return {
        "success": mean_success(rates, setup.counted),
        "success_by_level": dict(zip(names, rates, strict=True)),
    }


def success_rates(setup: TaskSetup, *, num_prompts: int, seed: int) -> tuple[list[float], int]:
    """The success rate of every source on fresh items, and the answer tokens that it took.

    Args:
        setup: of the run.
        num_prompts: of each source, with one answer each.
        seed: of items and answers.
    """
    drawn = [index for index in range(len(setup.sources)) for _ in range(num_prompts)]
    answers = sample_answers(
        setup.lm,
        setup.sources,
        drawn,
        group_size=1,
        temperature=setup.config.ppo.temperature,
        chooser=random.Random(derived_seed(setup.config.seed, f"validation items {seed}")),
        generator=torch.Generator().manual_seed(derived_seed(setup.config.seed, f"validation answers {seed}")),
        world=setup.run.world,
    )
    return answers.right.double().view(len(setup.sources), num_prompts).mean(1).tolist(), answers.num_tokens


def group_row(groups: Groups, state: TaskState, *, step: int, progress: float) -> dict[str, Any]:
    """A row of ``decisions.jsonl``: what the rule saw and the weights that it made of it."""
    return {
        "step": step,
        "arm": state.rule,
        "kind": "groups",
        "sources": groups.sources.tolist(),
        "success": groups.success.tolist(),
        "advantage": groups.advantage.tolist(),
        "group_size": groups.size,
        "progress": progress,
        "weights": state.mixture.weights.tolist(),
    }
