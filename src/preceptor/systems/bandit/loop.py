"""The bandit system: a language model plays bandits by choosing words; does what it learns transfer to other prompts?

1. A small GPT learns by cross-entropy to answer a prompt with one of the words that it names (``pretraining.py``); a
   model that is given is taken as it is.
2. Before the first reward its choice among the words is checked for balance (``evaluate.py``).
3. REINFORCE moves the weights by what the chosen words pay, the prompts of each bandit in turn. With ``mode: history``
   past rewards stand in the context instead, and the weights are fixed within an episode (``history.py``).
4. Words of different bandits are put into one prompt: what transfers, and what explains it (``evaluate.py``).
5. Bandit algorithms without a language model play the same draws (``baselines.py``).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preceptor.config import to_dict
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import draw
from preceptor.objectives.advantages import reward_to_go
from preceptor.runs.device import peak_memory_mib
from preceptor.runs.export import MODEL, save_model
from preceptor.runs.random import derived_seed
from preceptor.systems.bandit import evaluate, history, in_context, unseen
from preceptor.systems.bandit.config import BanditConfig
from preceptor.systems.bandit.environment import sample_tables
from preceptor.systems.bandit.policy import Context, Decision, decide
from preceptor.systems.bandit.pretraining import (
    dropout_from,
    next_token_loss,
    sliding_windows,
    token_stream,
    validation_loss,
)
from preceptor.systems.bandit.result import result
from preceptor.systems.bandit.rewards import LossMetrics, policy_gradient_loss
from preceptor.systems.bandit.setup import Setup, prepare, prepare_in_context
from preceptor.systems.bandit.state import InContextState, State

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

PROGRESS_COLUMNS = {"loss": "loss", "reward": "reward", "kl": "KL", "best_word": "P(best)", "entropy": "entropy"}


def train(config: BanditConfig, run: Run, services: Services) -> dict[str, Any]:
    """Pretrains, learns from rewards and evaluates inside ``run``; gives what ``result.json`` says.

    The model before the first reward is saved as ``pretrained``, the trained one as ``model`` in the run's folder.
    """
    if config.mode == "in-context":
        return train_in_context(config, run)
    setup = prepare(config, run, services)
    if draws_dropout(setup):
        run.world.refuse("dropout (a mask is drawn for a whole batch; set `model.dropout` 0)")
    state = State(setup)
    run.restore(state)
    last_step = config.pretraining.steps + num_updates(setup)
    run.show_progress(last_step, PROGRESS_COLUMNS)

    if state.initial_model is None:
        pretrain(setup, state)
        # The checkpoint of the last pretraining step lies before this transition, which a resume from there repeats.
        state.begin_rewards()
        if run.writes:
            save_model(setup.lm.model, setup.lm.tokenizer, run.path / "pretrained")
    run.notice(evaluate.balance_notice(setup, state))

    if config.mode == "history":
        for n in run.loop(last_step, state):
            run.log(n, history_step(setup, state, n))
        records, charts = history.evaluate(setup, state)
    else:
        run.notice(f"acting and scoring are one forward pass with dropout {'on' if config.update.dropout else 'off'}")
        for n in run.loop(last_step, state):
            run.log(n, step(setup, state, n))
        records, charts = evaluate.evaluate(setup, state)
    if run.writes:
        save_model(setup.lm.model, setup.lm.tokenizer, run.path / MODEL)
    return result(records, config=to_dict(config), seeds=[config.seed]) | {"charts": charts}


def train_in_context(config: BanditConfig, run: Run) -> dict[str, Any]:
    """The same for mode ``in-context``: learns to explore sampled bandits and is judged on unseen ones."""
    setup = prepare_in_context(config, run)
    state = InContextState(setup)
    in_context.learn(setup, state)
    records, episode = unseen.evaluate(setup, state)
    if run.writes:
        save_model(setup.lm.model, setup.lm.tokenizer, run.path / MODEL)
    return result(records, config=to_dict(config), seeds=[config.seed]) | {"episode": episode}


def num_updates(setup: Setup) -> int:
    """REINFORCE updates of the whole run."""
    if setup.config.mode == "history":
        return setup.config.history.steps
    return setup.config.update.epochs * steps_per_epoch(setup)


def steps_per_epoch(setup: Setup) -> int:
    """Updates that act once on every training prompt of every bandit (mode: prompt)."""
    batch_size = setup.config.update.batch_size
    return sum(math.ceil(len(contexts) / (batch_size or len(contexts))) for contexts in setup.contexts.values())


def pretrain(setup: Setup, state: State) -> None:
    """Cross-entropy on a corpus in which every answer to a prompt is equally frequent."""
    options, run, lm = setup.config.pretraining, setup.run, setup.lm
    lines = history.corpus_lines(setup) if setup.config.mode == "history" else setup.training_lines
    order = torch.Generator().manual_seed(derived_seed(setup.config.seed, "corpus"))
    stream = token_stream(lm, lines, generator=order)
    for n in run.loop(options.steps, state):
        began = time.perf_counter()
        tokens = sliding_windows(
            stream, batch_size=options.batch_size, window=options.window, generator=run.streams["windows"]
        )
        mine = tokens[run.world.shard(len(tokens))]
        loss = None
        if len(mine):
            with dropout_from(lm, run.streams["dropout"]):
                loss = next_token_loss(lm, mine) * (len(mine) / len(tokens))  # rows are of one length
        row: dict[str, Any] = {"phase": "pretraining"}
        row |= run.world.sums({"loss": 0.0 if loss is None else loss.item()})
        row["gradient_norm"] = state.descend(loss, n, clip_norm=options.clip_norm)
        if setup.validation_lines and (n % options.validate_every == 0 or n == options.steps):
            row["validation_loss"] = validation_loss(lm, setup.validation_lines)
        row |= {"tokens": n * tokens.numel(), "seconds": time.perf_counter() - began}
        run.log(n, row)


def step(setup: Setup, state: State, n: int) -> dict[str, Any]:
    """REINFORCE on one batch of prompts of one bandit (mode: prompt); gives step ``n``'s metrics."""
    began = time.perf_counter()
    run, lm = setup.run, setup.lm
    if not state.queue:
        state.queue = epoch_batches(setup, run.streams["prompts"])
    bandit_number, indices = state.queue.pop()
    bandit = setup.bandits[bandit_number]
    contexts = [setup.contexts[bandit.name][index] for index in indices]

    # 1. Act. Acting and scoring are one pass, so a word's log-probability is that of the distribution it was drawn
    # from, dropout included.
    rows = run.world.shard(len(contexts))
    with dropout_from(lm, run.streams["dropout"] if setup.config.update.dropout else None):
        decision = decide(lm, contexts[rows]) if contexts[rows] else no_decision(lm, len(bandit.words))
    log_probs, p_candidates = run.world.gather(  # [batch, arms], [batch]
        len(contexts), decision.log_probs.detach(), decision.p_candidates
    )
    actions = draw(log_probs, run.streams["actions"])  # [batch]

    # 2. Get paid: each pull of a bandit has a row of its own in the bandit's table.
    first_pull = state.num_pulls[bandit.name]
    table = setup.tables[bandit.name][first_pull : first_pull + len(indices)]  # [batch, arms]
    rewards = table.gather(1, actions.cpu()[:, None])[:, 0]  # [batch]

    # 3. Learn.
    advantages = state.baseline.advantages(rewards, bandit.name).to(lm.device)
    loss, gradient_norm = reinforce(
        setup, state, n, contexts[rows], decision.log_probs, actions[rows], advantages[rows], num_choices=len(actions)
    )

    state.count(bandit, actions.cpu(), rewards)
    probabilities = log_probs.double().exp().cpu()
    p_best = float(probabilities[:, bandit.best].mean())
    prompts = [setup.training_prompts(bandit.name)[index] for index in indices]
    run.record(
        {
            "step": n,
            "arm": "learned",
            "bandit": bandit.name,
            "pull": first_pull + number,
            "prompt": prompt.text,
            "words": list(prompt.words),
            "probabilities": probabilities[number].tolist(),
            "word": prompt.words[action],
            "reward": reward,
        }
        for number, (prompt, action, reward) in enumerate(zip(prompts, actions.tolist(), rewards.tolist(), strict=True))
    )
    num_pulls = sum(state.num_pulls.values())
    return {
        "phase": "rewards",
        "bandit": bandit.name,
        "loss": loss.loss,
        "reward": float(rewards.mean()),
        "mean_reward": {**state.mean_rewards(), "all": sum(state.reward_sum.values()) / num_pulls},
        "best_word": p_best,
        "best_word_of": {bandit.name: p_best},
        "regret": {bandit.name: state.regret[bandit.name][-1]},
        "entropy": loss.entropy / math.log(len(bandit.words)),
        "kl": loss.kl,
        "named_mass": float(p_candidates.mean()),
        "gradient_norm": gradient_norm,
        "skipped_steps": state.guard.num_skipped,
        "pulls": num_pulls,
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(lm.device),
        "epoch": (n - setup.config.pretraining.steps - 1) // steps_per_epoch(setup) + 1,
    }


def epoch_batches(setup: Setup, generator: torch.Generator) -> list[tuple[int, list[int]]]:
    """Every training prompt once, as (number of the bandit, indices of its prompts), the first batch last.

    A batch is of one bandit, and the bandits take turns.
    """
    batches: list[list[tuple[int, list[int]]]] = []
    for number, contexts in enumerate(setup.contexts.values()):
        order = torch.randperm(len(contexts), generator=generator).tolist()
        size = setup.config.update.batch_size or len(order)
        batches.append([(number, order[first : first + size]) for first in range(0, len(order), size)])
    in_turn = [batch for round_ in itertools.zip_longest(*batches) for batch in round_ if batch is not None]
    return in_turn[::-1]


def history_step(setup: Setup, state: State, n: int) -> dict[str, Any]:
    """REINFORCE on a batch of episodes of one bandit, in turn (mode: history); gives step ``n``'s metrics."""
    began = time.perf_counter()
    options, run, lm = setup.config.history, setup.run, setup.lm
    bandit = setup.bandits[(n - 1) % len(setup.bandits)]

    # 1. Act. A dropout mask would have to be the same in every round of an episode and in its scoring, so this mode
    # acts without dropout.
    tables = sample_tables(
        bandit, num_episodes=options.batch_size, num_rounds=options.rounds, generator=run.streams["environment"]
    )
    training = setup.training_prompts(bandit.name)
    indices = torch.randint(len(training), (options.batch_size,), generator=run.streams["prompts"])
    prompts = [training[index] for index in indices]
    words = setup.vocabulary.options(bandit.words)
    episodes = history.play(lm, prompts, words, tables, run.streams["actions"], world=run.world)

    # 2. Credit: a choice is followed by the rewards of its own and of later rounds.
    every_round = torch.ones_like(episodes.rewards, dtype=torch.bool)
    returns = reward_to_go(episodes.rewards, every_round, discount=options.discount)  # [episodes, rounds]
    # The baseline compares each round with the same round of other episodes, since returns shrink as rounds run out.
    advantages = torch.stack([state.baseline.advantages(column, bandit.name) for column in returns.T], dim=1)

    # 3. Learn. One pass over the finished texts scores every choice again, with gradient.
    rows = run.world.shard(options.batch_size)
    contexts = episodes.contexts[rows]
    decision = decide(lm, contexts) if contexts else no_decision(lm, len(bandit.words))  # [episodes * rounds, arms]
    actions = episodes.actions[rows].flatten()  # [episodes * rounds], in the same order
    loss, gradient_norm = reinforce(
        setup,
        state,
        n,
        contexts,
        decision.log_probs,
        actions.to(lm.device),
        advantages[rows].flatten().to(lm.device),
        num_choices=episodes.actions.numel(),
    )

    rescored = decision.log_probs.detach().cpu().gather(1, actions[:, None])[:, 0]
    differences = (rescored - episodes.log_probs[rows].flatten()).abs()
    first_pull = state.num_pulls[bandit.name]
    state.num_pulls[bandit.name] += episodes.actions.numel()
    run.record(
        {
            "step": n,
            "arm": "learned",
            "bandit": bandit.name,
            "pull": first_pull + number * options.rounds,
            "prompt": prompts[number].text,
            "words": [bandit.words[arm] for arm in episodes.actions[number].tolist()],
            "rewards": episodes.rewards[number].tolist(),
            "log_probs": episodes.log_probs[number].tolist(),
        }
        for number in range(options.batch_size)
    )
    reward, optimal_share = float(episodes.rewards.mean()), float(episodes.is_optimal.double().mean())
    return {
        "phase": "rewards",
        "bandit": bandit.name,
        "loss": loss.loss,
        "reward": reward,
        "mean_reward": {bandit.name: reward},
        "best_word": optimal_share,
        "best_word_of": {bandit.name: optimal_share},
        "regret": {bandit.name: float(episodes.regret.sum(1).mean())},
        "entropy": loss.entropy / math.log(len(bandit.words)),
        "kl": loss.kl,
        # The KV cache and the packed pass must agree on every choice but for rounding.
        "log_ratio_maximum": run.world.maximum(float(differences.max()) if len(differences) else 0.0),
        "gradient_norm": gradient_norm,
        "skipped_steps": state.guard.num_skipped,
        "pulls": sum(state.num_pulls.values()),
        "seconds": time.perf_counter() - began,
        "peak_memory_mib": peak_memory_mib(lm.device),
    }


def reinforce(
    setup: Setup,
    state: State,
    n: int,
    contexts: Sequence[Context],
    log_probs: Float[Tensor, "choices options"],
    actions: Int[Tensor, " choices"],
    advantages: Float[Tensor, " choices"],
    *,
    num_choices: int,
) -> tuple[LossMetrics, float]:
    """One gradient step on ``num_choices`` choices, of which this process has those of ``contexts``.

    Gives the loss of all of them and the gradient's norm before clipping.
    """
    update, world = setup.config.update, setup.run.world
    needs_reference = bool(update.kl_coefficient) and state.initial_model is not None
    if len(actions) == 0:
        parts = {"loss": 0.0, "entropy": 0.0} | ({"kl": 0.0} if needs_reference else {})
        return loss_metrics(world.sums(parts)), state.descend(None, n, clip_norm=update.clip_norm)
    reference_log_probs = None
    if needs_reference and state.initial_model is not None:
        with torch.no_grad():
            reference_log_probs = decide(state.initial_model, contexts).log_probs
    loss, metrics = policy_gradient_loss(
        log_probs,
        actions,
        advantages,
        entropy_coefficient=update.entropy_coefficient,
        kl_coefficient=update.kl_coefficient,
        reference_log_probs=reference_log_probs,
    )
    share = len(actions) / num_choices  # the loss is a mean over the choices of all processes
    parts = {"loss": metrics.loss, "entropy": metrics.entropy} | ({} if metrics.kl is None else {"kl": metrics.kl})
    means = world.sums({name: share * value for name, value in parts.items()})
    return loss_metrics(means), state.descend(loss * share, n, clip_norm=update.clip_norm)


def loss_metrics(means: Mapping[str, float]) -> LossMetrics:
    """From the means by name."""
    return LossMetrics(means["loss"], means["entropy"], means.get("kl"))


def no_decision(lm: LanguageModel, num_options: int) -> Decision:
    """The policy at no choice: of a process without rows."""
    return Decision(torch.zeros(0, num_options, device=lm.device), torch.zeros(0, device=lm.device))


def draws_dropout(setup: Setup) -> bool:
    """Whether some phase of the run computes with dropout."""
    dropouts = [module for module in setup.lm.model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    return bool(dropouts) and (setup.config.pretraining.steps > 0 or setup.config.update.dropout)
