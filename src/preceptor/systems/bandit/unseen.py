"""Mode ``in-context``, judged: every player on the same bandits that nobody has seen, and what the model does there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.runs.random import derived_seed
from preceptor.systems.bandit import baselines
from preceptor.systems.bandit.bayes import MAX_HORIZON, best_arm_probabilities, optimal_player
from preceptor.systems.bandit.environment import BanditFamily, EpisodeTables
from preceptor.systems.bandit.episodes import Layout, play, score
from preceptor.systems.bandit.in_context import statistics_before
from preceptor.systems.bandit.setup import InContextSetup
from preceptor.systems.bandit.state import InContextState

Records = list[dict[str, Any]]
Players = Iterator[tuple[str, str, Int[Tensor, "bandits rounds"]]]
"""Player, split and what it pulled."""

NUM_BLOCKS = 20
"""The unseen bandits are judged in blocks, over which intervals are taken, as over seeds."""

ROUNDS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)
"""Rounds after which the regret so far is kept, besides the last."""

BATCH_SIZE = 500
LONG_BANDITS = 400
"""Unseen bandits at a multiple of the horizon; they cost its square."""

OTHER_PRIORS = ("uniform", "low", "three_in_four", "close")
"""Of Bernoulli bandits."""

TUNED = 0.3
"""c in mean + c √(ln t / n) that does best on two Bernoulli arms with uniform means and 100 rounds; UCB1 has √2."""

UNITS = {
    "regret": "reward",
    "suffix_failure": "share of bandits",
    "greediness": "share of rounds",
    "optimal_share": "share of rounds",
    "reward": "reward/round",
    "regret_second": "reward",
    "regret_alone": "reward",
    "carried_place": "share of bandits",
}
"""Unit of each metric; the others are regrets or, named ``best_at_ROUND``, shares of bandits."""


def unit_of(metric: str) -> str:
    """The unit of any metric of these records."""
    return UNITS.get(metric, "share of bandits" if metric.startswith("best_at_") else "reward")


def regret_of(
    actions: Int[Tensor, "bandits rounds"], expected: Float[Tensor, "bandits arms"]
) -> Float[Tensor, "bandits rounds"]:
    """Expected reward that each choice forgoes."""
    return expected.amax(1, keepdim=True) - expected.gather(1, actions)


def kept_rounds(num_rounds: int) -> list[int]:
    """Rounds after which the regret is kept, the last among them."""
    return [*(round_ for round_ in ROUNDS if round_ < num_rounds), num_rounds]


def evaluate(setup: InContextSetup, state: InContextState) -> tuple[Records, dict[str, Any]]:
    """Records of every player on blocks of unseen bandits, and one episode to be looked at."""
    options, family = setup.config.in_context, setup.family
    tables = unseen_tables(family, options.evaluation_bandits, options.rounds)
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}

    def add(player: str, split: str, metrics: list[dict[str, float]]) -> None:
        blocks = cells.setdefault((player, split), [{} for _ in range(NUM_BLOCKS)])
        for block, measured in zip(blocks, metrics, strict=True):
            block.update(measured)

    # 1. The bandits of training's prior, at its horizon.
    for player, split, actions in _model_players(setup, state, tables):
        add(player, split, full_metrics(actions, tables))
    for player, split, actions in _baseline_players(setup, family, tables, "own"):
        add(player, split, full_metrics(actions, tables))

    # 2. Other priors, of which training knew nothing.
    others = OTHER_PRIORS if family.kind == "bernoulli" else ()
    for prior in others:
        if prior == family.prior:
            continue
        other = BanditFamily(family.num_arms, family.kind, prior)
        others_tables = unseen_tables(other, options.evaluation_bandits, options.rounds)
        _add_regret(setup, other, others_tables, f"regret_{prior}", add)

    # 3. Longer horizons than any in training.
    for multiple in options.horizons:
        if multiple > 1:
            long_tables = unseen_tables(
                family, min(LONG_BANDITS, options.evaluation_bandits), multiple * options.rounds
            )
            _add_regret(setup, family, long_tables, f"regret_{multiple}x", add)

    # 4. Two bandits in one context.
    if not setup.layout.joint:
        add("learned", "train", carry_over(setup, tables))

    records = [
        {"arm": player, "item": f"bandits {number}", "split": split, "seed": setup.config.seed, **metrics}
        for (player, split), blocks in cells.items()
        for number, metrics in enumerate(blocks)
    ]
    return records, episode_to_show(setup, tables)


def unseen_tables(family: BanditFamily, num_bandits: int, num_rounds: int) -> EpisodeTables:
    """The same bandits and rewards for every seed and player."""
    generator = torch.Generator().manual_seed(derived_seed(0, f"unseen {family} {num_rounds}"))
    return family.sample(num_bandits, num_rounds, generator)


def play_unseen(
    setup: InContextSetup, lm: LanguageModel, layout: Layout, tables: EpisodeTables, *, name: str
) -> Int[Tensor, "bandits rounds"]:
    """What ``lm`` pulls; ``name`` says which random numbers it draws from."""
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, f"evaluation {name}"))
    num_rounds = tables.rewards.shape[1]
    size = max(1, BATCH_SIZE * setup.config.in_context.rounds // num_rounds)  # the KV cache stays as large
    chunks = []
    for first in range(0, len(tables.expected), size):
        setup.run.stop_if_requested()
        part = EpisodeTables(tables.rewards[first : first + size], tables.expected[first : first + size])
        options = layout.deal(len(part.expected), setup.family.num_arms, generator)
        chunks.append(
            play(lm, layout, part, options, kind=setup.family.kind, generator=generator, world=setup.run.world).actions
        )
    return torch.cat(chunks)


def _model_players(setup: InContextSetup, state: InContextState, tables: EpisodeTables) -> Players:
    """The model as it is, before, and with words that were kept from it."""
    yield "learned", "train", play_unseen(setup, setup.lm, setup.layout, tables, name="learned")
    if setup.held_out_layout is not None:
        actions = play_unseen(setup, setup.lm, setup.held_out_layout, tables, name="held out")
        yield "learned", "held_out", actions
    if state.warm_model is not None:
        yield "warm_start", "train", play_unseen(setup, state.warm_model, setup.layout, tables, name="warm start")
    yield "untrained", "train", play_unseen(setup, setup.initial_model, setup.layout, tables, name="untrained")


def _baseline_players(setup: InContextSetup, family: BanditFamily, tables: EpisodeTables, name: str) -> Players:
    """The algorithms without a model; ``thompson`` and ``optimal`` know the prior."""
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, f"baselines {name}"))
    rewards, num_rounds = tables.rewards, tables.rewards.shape[1]
    yield "thompson", "train", baselines.thompson_for(family, rewards, generator=generator)
    yield "greedy", "train", baselines.greedy(rewards, generator=generator)
    yield "epsilon_greedy", "train", baselines.epsilon_greedy(rewards, generator=generator)
    yield "ucb1", "train", baselines.ucb1(rewards, generator=generator)
    yield "ucb1_tuned", "train", baselines.ucb1(rewards, generator=generator, width=TUNED**2)
    yield "uniform", "train", baselines.uniform(rewards, generator=generator)
    is_solvable = family.num_arms == 2 and family.kind == "bernoulli" and num_rounds <= MAX_HORIZON
    if is_solvable and family.beta is not None:
        a, b = family.beta
        yield "optimal", "train", optimal_player(num_rounds, a, b).play(rewards, generator=generator)


def _add_regret(
    setup: InContextSetup,
    family: BanditFamily,
    tables: EpisodeTables,
    metric: str,
    add: Callable[[str, str, list[dict[str, float]]], None],
) -> None:
    """The regret of the learned model and of the baselines under another prior or horizon."""
    learned = ("learned", "train", play_unseen(setup, setup.lm, setup.layout, tables, name=metric))
    for player, split, actions in (learned, *_baseline_players(setup, family, tables, metric)):
        total = regret_of(actions, tables.expected).sum(1)
        add(player, split, [{metric: float(part.mean())} for part in total.tensor_split(NUM_BLOCKS)])


def full_metrics(actions: Int[Tensor, "bandits rounds"], tables: EpisodeTables) -> list[dict[str, float]]:
    """Everything measured at the horizon of training, for each block of bandits."""
    num_rounds = actions.shape[1]
    regret = regret_of(actions, tables.expected).cumsum(1)  # [bandits, rounds]
    is_best = actions == tables.expected.argmax(1, keepdim=True)  # [bandits, rounds]
    rewards = tables.rewards.gather(2, actions[..., None])[..., 0]
    greedy, counted = is_greedy(actions, rewards, tables.rewards.shape[2])
    blocks = []
    for rows in torch.arange(len(actions)).tensor_split(NUM_BLOCKS):
        metrics = {
            "regret": float(regret[rows, -1].mean()),
            # The best arm is never drawn again in the second half (Krishnamurthy et al. 2024, arXiv 2403.15371).
            "suffix_failure": float((~is_best[rows, num_rounds // 2 :].any(1)).double().mean()),
            "greediness": float(greedy[rows].double().sum() / counted[rows].sum().clamp(min=1)),
            "optimal_share": float(is_best[rows].double().mean()),
            "reward": float(rewards[rows].mean()),
        }
        for round_ in kept_rounds(num_rounds):
            metrics[f"regret_at_{round_}"] = float(regret[rows, round_ - 1].mean())
            metrics[f"best_at_{round_}"] = float(is_best[rows, round_ - 1].double().mean())
        blocks.append(metrics)
    return blocks


def is_greedy(
    actions: Int[Tensor, "bandits rounds"], rewards: Float[Tensor, "bandits rounds"], num_arms: int
) -> tuple[Tensor, Tensor]:
    """Whether each choice was the arm of the best mean so far, and whether it counts.

    Rounds count once every arm has been tried and one of them is strictly the best so far.

    >>> actions, rewards = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    >>> [flags.tolist() for flags in is_greedy(actions, rewards, 2)]
    [[[False, False, True, False]], [[False, False, True, True]]]
    """
    sums, counts = statistics_before(actions, rewards, num_arms)
    means = sums / counts.clamp(min=1)  # [bandits, rounds, arms]
    top = means.topk(2, dim=-1)
    counted = (counts > 0).all(-1) & (top.values[..., 0] > top.values[..., 1])
    return counted & (actions == top.indices[..., 0]), counted


def carry_over(setup: InContextSetup, tables: EpisodeTables) -> list[dict[str, float]]:
    """Two bandits of other words in one context: does the first change what the model does in the second?

    ``regret_second`` is the regret in the second bandit and ``regret_alone`` in the same bandit without the first.
    ``carried_place``: share of first choices in the second that stand where the first one's better arm stood.
    """
    layout, family = setup.layout, setup.family
    num_rounds = min(20, setup.config.in_context.rounds // 2)
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, "evaluation of two bandits"))
    num_bandits = min(BATCH_SIZE, len(tables.expected) // 2)
    first, second = (
        EpisodeTables(tables.rewards[rows, :num_rounds], tables.expected[rows])
        for rows in (slice(0, num_bandits), slice(num_bandits, 2 * num_bandits))
    )
    arms = family.num_arms
    words = layout.deal(num_bandits, min(2 * arms, len(layout.words)), generator)  # [bandits, both bandits' arms]
    earlier = play(
        setup.lm, layout, first, words[:, :arms], kind=family.kind, generator=generator, world=setup.run.world
    )
    after = play(
        setup.lm,
        layout,
        second,
        words[:, -arms:],
        kind=family.kind,
        generator=generator,
        earlier=earlier,
        world=setup.run.world,
    ).actions
    alone = play(
        setup.lm, layout, second, words[:, -arms:], kind=family.kind, generator=generator, world=setup.run.world
    ).actions
    carried = after[:, 0] == first.expected.argmax(1)
    measured = torch.stack(
        [
            regret_of(after, second.expected).sum(1),
            regret_of(alone, second.expected).sum(1),
            carried.double(),
        ]
    )  # [metrics, bandits]
    names = ("regret_second", "regret_alone", "carried_place")
    return [dict(zip(names, part.mean(1).tolist(), strict=True)) for part in measured.tensor_split(NUM_BLOCKS, dim=1)]


def episode_to_show(setup: InContextSetup, tables: EpisodeTables) -> dict[str, Any]:
    """One episode step by step, beside what a player who knows the prior would have believed and done."""
    generator = torch.Generator().manual_seed(derived_seed(setup.config.seed, "evaluation of one episode"))
    one = EpisodeTables(tables.rewards[:1], tables.expected[:1])
    options = setup.layout.deal(1, setup.family.num_arms, generator)
    batch = play(setup.lm, setup.layout, one, options, kind=setup.family.kind, generator=generator)
    with torch.no_grad():
        probabilities = score(setup.lm, setup.layout, batch).log_probs[0].exp()  # [rounds, arms]
    shown: dict[str, Any] = {
        "arms": [setup.lm.decode([token]).strip() for token in options[0].tolist()],
        "means": one.expected[0].tolist(),
        "actions": batch.actions[0].tolist(),
        "rewards": batch.rewards[0].tolist(),
        "probabilities": probabilities.tolist(),
    }
    if setup.family.beta is not None:
        a, b = setup.family.beta
        sums, counts = statistics_before(batch.actions, batch.rewards, setup.family.num_arms)
        shown["beliefs"] = best_arm_probabilities(sums[0], counts[0] - sums[0], a=a, b=b).tolist()
        num_rounds = batch.actions.shape[1]
        if setup.family.num_arms == 2 and num_rounds <= MAX_HORIZON:
            failures = counts[0] - sums[0]
            player = optimal_player(num_rounds, a, b)
            shown["optimal"] = [
                int(player.decisions[t][int(sums[0, t, 0]), int(failures[t, 0]), int(sums[0, t, 1])])
                for t in range(num_rounds)
            ]
    return shown
