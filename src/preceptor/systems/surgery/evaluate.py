"""What the student is worth: its loss on a text, the record of a method, and ``result.json`` with its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from preceptor.evaluation.summary import Comparison, Gap, compare, gap_closed, summarise
from preceptor.evaluation.verdict import MINIMUM_SEEDS, claimable
from preceptor.objectives.kl import entropy
from preceptor.systems.surgery.reference_lm import NGram
from preceptor.systems.surgery.rewards import next_token_logits
from preceptor.systems.surgery.setup import Setup
from preceptor.systems.surgery.state import State

BLOCKS_PER_PASS = 128
"""Blocks of text that a student reads at a time."""

UNITS = {
    "log_prob": "nats/token",
    "accuracy": "share",
    "quality": "reward",
    "referee_log_prob": "nats/token",
    "repetition": "share of 4-grams",
    "distinct": "share of pairs",
    "committed": "edits",
    "plateau_step": "updates",
    "model_calls": "examinations",
    "tokens": "tokens",
    "gflops": "10^9 operations",
}
"""Metrics of a method and their units, all on held-out text; ``docs/systems/surgery.md`` defines each."""

TABLE = ("log_prob", "accuracy", "quality", "committed", "model_calls", "tokens", "gflops")
"""Metrics in the terminal's table; the page shows all."""

RIVALS = ("no_edit", "shuffled", "evolution", "random", "best_of_n", "gradient")
DECIDING = ("evolution", "shuffled")
"""Baselines that SAC must beat before the verdict says that the surgeon helps."""

CHARTS: list[dict[str, Any]] = [
    {
        "kind": "lines",
        "title": "Bootstrapping: held-out text",
        "unit": "nats per token",
        "columns": {
            "no_edit.held_out_cross_entropy": "the objective",
            "cross_entropy.held_out_cross_entropy": "cross-entropy",
        },
    },
    {
        "kind": "lines",
        "title": "Bootstrapping: held-out accuracy",
        "unit": "share",
        "columns": {
            "no_edit.held_out_accuracy": "the objective",
            "cross_entropy.held_out_accuracy": "cross-entropy",
        },
    },
    {
        "kind": "lines",
        "title": "Bootstrapping: policy entropy",
        "unit": "nats per token",
        "columns": {"no_edit.entropy": "entropy", "no_edit.entropy_maximum": "maximum"},
    },
    *(
        {
            "kind": "lines",
            "title": title,
            "unit": unit,
            "columns": {
                f"{arm}.{metric}": arm.replace("_", " ")
                for arm in ("learned", "shuffled", "evolution", "random", "best_of_n", "joint")
            },
        }
        for title, unit, metric in (
            ("Surgery: reward of each edit", "reward", "reward"),
            ("Surgery: quality of the student", "reward", "quality"),
            ("Surgery: share of edits committed", "share", "committed_share"),
        )
    ),
    {
        "kind": "lines",
        "title": "Surgeon: action norm",
        "unit": "Euclidean norm",
        "columns": {"learned.action_norm": "SAC", "learned.action_norm_maximum": "maximum"},
    },
    {
        "kind": "lines",
        "title": "Surgeon: policy entropy",
        "unit": "nats",
        "columns": {
            "learned.surgeon_entropy": "SAC",
            "learned.surgeon_entropy_maximum": "maximum",
            "learned.surgeon_entropy_target": "target",
        },
    },
    {
        "kind": "lines",
        "title": "Joint learning and the same training without surgery",
        "unit": "nats per token",
        "columns": {
            "joint.held_out_cross_entropy": "joint",
            "training.held_out_cross_entropy": "training",
        },
    },
]
"""Figures of the three phases, drawn from ``metrics.jsonl``."""


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, means over its tokens: nats, fraction of right guesses, nats."""

    cross_entropy: float
    accuracy: float
    entropy: float


@torch.no_grad()
def score_text(model: PreTrainedModel, tokens: Int[Tensor, " token"], *, block_size: int) -> TextScore:
    """How well ``model`` predicts the running text ``tokens``, read in consecutive blocks of ``block_size``.

    Every token but the first of the text is predicted once, from what precedes it in its block, as nanoGPT does it; a
    last, shorter block is read too.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    num_in_blocks = len(inputs) // block_size * block_size
    nats, hits, entropies = 0.0, 0, 0.0
    # All whole blocks as rows of one matrix, then the rest of the text as a matrix of one shorter row.
    for start, end in ((0, num_in_blocks), (num_in_blocks, len(inputs))):
        if start == end:
            continue
        length = block_size if start == 0 and num_in_blocks else end - start
        blocks, next_tokens = (part[start:end].view(-1, length) for part in (inputs, targets))  # [block, length]
        for first in range(0, len(blocks), BLOCKS_PER_PASS):
            logits = next_token_logits(model, blocks[first : first + BLOCKS_PER_PASS])  # [block, length, vocab]
            target = next_tokens[first : first + BLOCKS_PER_PASS]
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            nats += float(losses.double().sum())  # float32 sums of a long text would lose digits
            hits += int((logits.argmax(-1) == target).sum())
            entropies += float(entropy(logits).double().sum())
    return TextScore(nats / len(inputs), hits / len(inputs), entropies / len(inputs))


def evaluate(state: State) -> dict[str, Any]:
    """The record of the method whose phase has ended: its student on the whole held-out text, and what it has cost."""
    setup, student, phase = state.setup, state.student, state.phase
    score = score_text(
        student.model, setup.corpus.held_out.to(setup.device), block_size=setup.config.student.block_size
    )
    examiner = setup.held_out_examiner
    quality = examiner.examine(student.model, examiner.draw(setup.generator("judgement")))
    record: dict[str, Any] = {
        "arm": phase.method,
        "item": setup.corpus.name,
        "split": "held_out",
        "seed": setup.config.seed,
        "log_prob": -score.cross_entropy,
        "accuracy": score.accuracy,
        "quality": quality.total,
        "referee_log_prob": quality.referee_log_prob,
        "repetition": quality.repetition,
        "distinct": quality.distinct,
        "model_calls": student.costs.evaluations,
        "tokens": student.costs.tokens,
        "gflops": (student.costs.flops + state.reference_flops(phase.objective)) / 1e9,
    }
    if phase.surgeon is not None:
        record["committed"] = state.num_committed
    if phase.method == "no_edit" and state.plateau.step is not None:
        record["plateau_step"] = state.plateau.step
    return record


def ladder_records(setup: Setup) -> list[dict[str, Any]]:
    """A record for each n-gram of the ladder, fitted on the training text; the same under every seed."""
    order, corpus = setup.config.evaluation.ladder_order, setup.corpus
    ngram = NGram(corpus.train, order=order, vocab_size=corpus.vocab_size)
    names = {1: "unigram", 2: "bigram", 3: "trigram"}
    records = []
    for n in range(1, order + 1):
        cross_entropy, accuracy = ngram.score(corpus.held_out, order=n)
        records.append(
            {
                "arm": names.get(n, f"{n}-gram"),
                "item": corpus.name,
                "split": "held_out",
                "seed": None,
                "log_prob": -cross_entropy,
                "accuracy": accuracy,
                "tokens": len(corpus.train),
            }
        )
    return records


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """``result.json`` of one run, or of several over the same methods, from their records.

    Args:
        records: of every method and seed; those of the n-gram ladder may be repeated, once a run.
        config: the resolved configuration.
        seeds: of the runs.
    """
    unique = list({(r["arm"], r["item"], r["split"], r["seed"]): r for r in records}.values())
    arms = {record["arm"] for record in unique}
    pairs = [("learned", rival) for rival in RIVALS] + [("joint", "training")]
    comparisons = [
        compare(unique, metric=metric, arm=arm, baseline=baseline, unit=UNITS[metric], split="held_out")
        for arm, baseline in pairs
        if {arm, baseline} <= arms
        for metric in ("quality", "log_prob")
    ]
    gaps = _gaps(unique, arms)
    return {
        "system": "surgery",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": summarise(unique, units=UNITS, split="held_out"),
        "table": list(TABLE),
        "baseline": "no_edit",
        "lower_is_better": ["repetition", "plateau_step"],
        "comparisons": comparisons,
        "gap_to_other_objectives": gaps,
        "verdict": " ".join([*_ladder_sentences(unique), *_gap_sentences(gaps), *_surgeon_sentences(comparisons)]),
        "charts": CHARTS,
        "records": unique,
    }


def _gaps(records: Sequence[Mapping[str, Any]], arms: set[str]) -> dict[str, dict[str, Gap]]:
    """The fraction of the gap from the unigram to each other objective that bootstrapping closes, at each budget."""
    gaps: dict[str, dict[str, Gap]] = {}
    for objective in ("cross_entropy", "distil", "avatarl", "expected", "sampled"):
        if objective not in arms:
            continue
        # Where the costs are the same, the run at equal tokens is the one at equal FLOPs.
        equal_flops = f"{objective}_equal_flops" if f"{objective}_equal_flops" in arms else objective
        gaps[objective] = {
            f"{metric}_at_equal_{what}": gap_closed(
                records,
                metric=metric,
                learned="no_edit",
                lower="unigram",
                upper=(upper,),
                optimum=upper,
                split="held_out",
            )
            for what, upper in (("tokens", objective), ("flops", equal_flops))
            for metric in ("log_prob", "accuracy")
        }
    return gaps


def _ladder_sentences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    students = [record for record in records if record["arm"] == "no_edit"]
    rungs = [record for record in records if record["seed"] is None and record["arm"] != "no_edit"]
    if not students:
        return []
    nats = -sum(record["log_prob"] for record in students) / len(students)
    accuracy = sum(record["accuracy"] for record in students) / len(students)
    passed = [rung["arm"] for rung in rungs if -rung["log_prob"] > nats and rung["accuracy"] < accuracy]
    beyond = f"passes the {_listed(passed)} in both" if passed else "passes no rung of the n-gram ladder in both"
    return [
        f"By reinforcement alone the student comes to {nats:.3f} nats per held-out token and {100 * accuracy:.1f} % "
        f"accuracy, and {beyond}."
    ]


def _gap_sentences(gaps: Mapping[str, Mapping[str, Gap]]) -> list[str]:
    sentences = []
    for objective, gap in gaps.items():
        shares = [gap[f"log_prob_at_equal_{what}"]["mean"] for what in ("tokens", "flops")]
        if all(share is not None for share in shares):
            tokens, flops = (f"{100 * share:.0f} %" for share in shares if share is not None)
            same = f"{tokens} at equal tokens and {flops} at equal FLOPs"
            sentences.append(f"Of the way in nats from the unigram to {objective.replace('_', ' ')} that is {same}.")
    return sentences


def _surgeon_sentences(comparisons: Sequence[Comparison]) -> list[str]:
    deciding = [c for c in comparisons if c["metric"] == "quality" and c["baseline"] in DECIDING]
    sentences = []
    if len(deciding) == len(DECIDING):
        measured = " and ".join(f"{c['baseline']} {c['mean']:+.3g}{_interval(c)}" for c in deciding)
        num_seeds = min(c["num_seeds"] for c in deciding)
        if num_seeds < MINIMUM_SEEDS:
            sentences.append(
                f"Whether the surgeon helps cannot be said from {num_seeds} seed{'' if num_seeds == 1 else 's'} "
                f"(at least {MINIMUM_SEEDS}); SAC's held-out quality less that of {measured}."
            )
        elif all(claimable(c) and c["mean"] > 0 for c in deciding):
            sentences.append(f"The surgeon helps: SAC's held-out quality is above that of {measured}.")
        else:
            sentences.append(
                f"That the surgeon helps cannot be claimed: SAC's held-out quality less that of {measured}, "
                "and it would have to be above both."
            )
    for c in comparisons:
        if c["arm"] == "joint" and c["metric"] == "log_prob":
            claim = "" if claimable(c) else "; no difference can be claimed"
            sentences.append(
                f"Learning with surgery is {c['mean']:+.3g} nats per token{_interval(c)} from the same training "
                f"without{claim}."
            )
    return sentences


def _interval(comparison: Comparison) -> str:
    low, high = comparison["low"], comparison["high"]
    return "" if low is None or high is None else f" ({low:+.3g} to {high:+.3g})"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
