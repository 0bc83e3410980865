"""What the page shows of a bandit run: what each word pays, and how its probability moved under every prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.report.decisions import decisions_section
from preceptor.report.drawing import number
from preceptor.report.run_folder import RunFolder, is_finite, read_rows
from preceptor.report.sections import GENERAL_LINES, Lines, Matrix, Section, Series, Table

NUM_PARTS = 8
MAXIMUM_PROMPTS = 40
"""Of one bandit."""
MAXIMUM_MATRICES = 12

Pulls = list[tuple[str, list[float]]]
"""(prompt, probability of each word)."""


LINES = (
    Lines("Reward", "reward per pull", {"reward": "reward"}, split_by="bandit"),
    *(lines for lines in GENERAL_LINES if lines.title != "Reward"),
)

IN_CONTEXT_LINES = (
    Lines("Regret of a training episode", "expected reward forgone", {"regret": "regret"}),
    Lines("Rounds of an episode", "rounds", {"rounds": "rounds"}),
    Lines("Entropy of the choice", "share of uniform's", {"entropy": "entropy"}, limits=(0.0, 1.0)),
    Lines("Explained variance of the value head", "share", {"explained_variance": "value head"}),
    Lines("Warm start", "share", {"difficulty": "difficulty", "agreement": "agreement with the better mean"}),
    *(lines for lines in GENERAL_LINES if lines.title in ("Gradient norm", "Peak memory")),
)
"""Curves of the mode ``in-context``."""

SHOWN_PLAYERS = ("learned", "warm_start", "optimal", "thompson", "ucb1_tuned", "greedy", "uniform", "untrained")
"""Players whose curves are drawn."""


def sections(run: RunFolder) -> list[Section]:
    """What each word pays, the probabilities under each prompt, the curves and the decisions."""
    found = []
    config = (run.result or {}).get("config") or run.manifest.get("config") or {}
    if config.get("mode") == "in-context":
        return in_context_sections(run)
    if payments := _payments(config):
        found.append(Section("What each word pays", [payments]))
    if run.decisions is not None and (matrices := prompt_matrices(run.decisions)):
        found.append(Section("Prompt by prompt", matrices))
    return [*found, Section("Training", LINES), *decisions_section(run)]


def in_context_sections(run: RunFolder) -> list[Section]:
    """Regret and choice of the best arm by round on unseen bandits, one episode step by step, and the training."""
    result = run.result or {}
    found = []
    if regret := result.get("regret"):
        lead = "Unseen bandits, the same for every player; the bands are 95 % intervals over seeds and bandits."
        found.append(Section("Exploring bandits never seen", [_regret_curves(regret), _best_arm_curves(result)], lead))
    if episode := result.get("episode"):
        found.append(Section("An episode, step by step", [episode_table(episode)]))
    return [*found, Section("Training", IN_CONTEXT_LINES)]


def _regret_curves(regret: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Series:
    players = [player for player in SHOWN_PLAYERS if player in regret]
    rounds = list(regret[players[0]])
    return Series(
        "Regret so far",
        "expected reward forgone",
        "round",
        [float(round_) for round_ in rounds],
        {player: [regret[player][round_]["mean"] for round_ in rounds] for player in players},
        {player: [[regret[player][round_][end] for round_ in rounds] for end in ("low", "high")] for player in players},
    )


def _best_arm_curves(result: Mapping[str, Any]) -> Series:
    methods = result["arms"]
    rounds = sorted(int(name.removeprefix("best_at_")) for name in methods["learned"] if name.startswith("best_at_"))
    # Of the optimal player only some priors are known: it may have been judged on other bandits than these.
    players = [player for player in SHOWN_PLAYERS if f"best_at_{rounds[0]}" in methods.get(player, {})]
    return Series(
        "Choices of the best arm",
        "share of bandits",
        "round",
        [float(round_) for round_ in rounds],
        {player: [methods[player][f"best_at_{round_}"]["mean"] for round_ in rounds] for player in players},
    )


def episode_table(episode: Mapping[str, Any]) -> Table:
    """Each round of an episode: what was chosen and paid, the policy, the belief, and the optimal player's choice."""
    arms, beliefs, optimal = episode["arms"], episode.get("beliefs"), episode.get("optimal")
    columns = ["round", "chosen", "paid", f"P({arms[0]})"]
    columns += [f"belief that {arms[0]} is best"] if beliefs else []
    columns += ["optimal player"] if optimal else []
    rows = []
    for t, (action, reward) in enumerate(zip(episode["actions"], episode["rewards"], strict=True)):
        row = [str(t + 1), arms[action], f"{reward:.3g}", f"{episode['probabilities'][t][0]:.2f}"]
        row += [f"{beliefs[t][0]:.2f}"] if beliefs else []
        row += [arms[optimal[t]] if optimal[t] < len(arms) else "either"] if optimal else []
        rows.append(row)
    means = ", ".join(f"{arm} {mean:.2f}" for arm, mean in zip(arms, episode["means"], strict=True))
    return Table(
        "", columns, rows, f"Expected rewards: {means}. Belief and optimal choice follow from the rounds above."
    )


def _payments(config: Mapping[str, Any]) -> Table | None:
    """The bandits of a configuration: each word with the mean of its reward and how it is drawn."""
    rows = []
    for bandit in config.get("bandits") or []:
        words, kind = bandit.get("words") or [], str(bandit.get("kind", ""))
        base = float(bandit.get("base_reward", 1.0))
        pays = (bandit.get("success") if kind == "bernoulli" else bandit.get("mean")) or []
        for word, value in zip(words, pays, strict=False):
            drawn = (
                f"{number(base)} with probability {number(value)}, else 0"
                if kind == "bernoulli"
                else f"normal, standard deviation {number(base * float(bandit.get('deviation', 0.0)))}"
            )
            rows.append([" / ".join(map(str, words)), str(word), number(base * float(value)), drawn])
    return Table("", ["bandit", "word", "expected reward", "drawn"], rows) if rows else None


def prompt_matrices(decisions: Path) -> list[Matrix]:
    """A table for each bandit and word: prompts by eighths of the pulls. Nothing where the rows are no such pulls.

    Of two words the first stands for both.

    Raises:
        DataError: a malformed row, naming its line.
    """
    bandits: dict[tuple[str, tuple[str, ...]], Pulls] = {}
    for _, row in read_rows(decisions):
        if is_pull(row):
            key = (str(row.get("bandit", "")), tuple(map(str, row["words"])))
            bandits.setdefault(key, []).append((str(row["prompt"]), row["probabilities"]))
    tables = []
    for (bandit, words), pulls in bandits.items():
        prompts = sorted({prompt for prompt, _ in pulls})[:MAXIMUM_PROMPTS]
        for index, word in enumerate(words[:1] if len(words) == 2 else words):
            values = [[_mean(part, prompt, index) for part in _parts_of(pulls)] for prompt in prompts]
            tables.append(
                Matrix(
                    f"Probability of '{word}' under each prompt, {bandit}",
                    f"mean over each of {NUM_PARTS} equal parts of the pulls, in their order",
                    rows=prompts,
                    columns=[f"part {k + 1}" for k in range(NUM_PARTS)],
                    values=values,
                    low=0.0,
                    high=1.0,
                )
            )
    return tables[:MAXIMUM_MATRICES]


def is_pull(row: Mapping[str, Any]) -> bool:
    """Whether a row of ``decisions.jsonl`` is a pull with the probability of every word."""
    words, probabilities = row.get("words"), row.get("probabilities")
    return (
        isinstance(row.get("prompt"), str)
        and isinstance(words, list)
        and isinstance(probabilities, list)
        and len(words) == len(probabilities) > 0
        and all(is_finite(probability) for probability in probabilities)
    )


def _parts_of(pulls: Pulls) -> list[Pulls]:
    ends = [round(k * len(pulls) / NUM_PARTS) for k in range(NUM_PARTS + 1)]
    return [pulls[begin:end] for begin, end in pairwise(ends)]


def _mean(pulls: Pulls, prompt: str, index: int) -> float:
    """Of a word under a prompt; not a number where the prompt was not drawn."""
    found = [probabilities[index] for drawn, probabilities in pulls if drawn == prompt]
    return sum(found) / len(found) if found else math.nan
