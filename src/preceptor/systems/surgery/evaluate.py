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
from preceptor.evaluation.verdict import MINIMUM_SEEDS, Conclusion, verdict
from preceptor.objectives.kl import entropy
from preceptor.runs.world import ALONE, World
from preceptor.systems.surgery import repaired
from preceptor.systems.surgery.config import EDITING_ARMS
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

SUBJECT = "the surgeon"
"""Who the verdict opens with."""

LOWER_IS_BETTER = ("repetition", "plateau_step")

RIVALS = ("no_edit", "shuffled", "evolution", "random", "best_of_n", "gradient")
DECIDING = ("evolution", "shuffled")
"""Baselines that SAC must beat before the verdict says that the surgeon helps."""

PRETRAINED_PAIRS = [("pretrained", "no_edit"), ("pretrained", "learned"), ("joint_pretrained", "training")]
"""What is compared where a surgeon that was trained before takes part."""

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
                for arm in (*EDITING_ARMS, "joint", "pretrained", "joint_pretrained")
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
def score_text(
    model: PreTrainedModel, tokens: Int[Tensor, " token"], *, block_size: int, world: World = ALONE
) -> TextScore:
    """How well ``model`` predicts the running text ``tokens``, read in consecutive blocks of ``block_size``.

    Every token but the first of the text is predicted once, from what precedes it in its block, as nanoGPT does it; a
    last, shorter block is read too. The processes of ``world`` share the blocks.
    """
    inputs, targets = tokens[:-1], tokens[1:]
    num_in_blocks = len(inputs) // block_size * block_size
    nats, hits, entropies = 0.0, 0.0, 0.0
    # All whole blocks as rows of one matrix, then the rest of the text as a matrix of one shorter row.
    for start, end in ((0, num_in_blocks), (num_in_blocks, len(inputs))):
        if start == end:
            continue
        # A text shorter than a block is one row of its own length.
        length = block_size if start == 0 and num_in_blocks else end - start
        blocks, next_tokens = (part[start:end].view(-1, length) for part in (inputs, targets))  # [block, length]
        own = world.shard(len(blocks))
        blocks, next_tokens = blocks[own], next_tokens[own]
        for first in range(0, len(blocks), BLOCKS_PER_PASS):
            logits = next_token_logits(model, blocks[first : first + BLOCKS_PER_PASS])  # [block, length, vocab]
            target = next_tokens[first : first + BLOCKS_PER_PASS]
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            nats += float(losses.double().sum())  # float32 sums of a long text would lose digits
            hits += int((logits.argmax(-1) == target).sum())
            entropies += float(entropy(logits).double().sum())
    sums = world.sums({"nats": nats, "hits": hits, "entropies": entropies})
    nats, hits, entropies = sums["nats"], sums["hits"], sums["entropies"]
    return TextScore(nats / len(inputs), hits / len(inputs), entropies / len(inputs))


def evaluate(state: State) -> dict[str, Any]:
    """The record of the method whose phase has ended: its student on the whole held-out text, and what it has cost."""
    setup, student, phase = state.setup, state.student, state.phase
    # On the whole held-out text, not on windows: this number is compared across methods and seeds.
    score = score_text(
        student.model,
        setup.corpus.held_out.to(setup.device),
        block_size=setup.config.student.block_size,
        world=setup.world,
    )
    examiner = setup.held_out_examiner
    # The same prompts and noise for every method, since this stream is made anew each time.
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
        # An objective that uses the reference model is charged for that model's training too.
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
    # One model holds all lower orders, so the ladder is counted once.
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
    if config.get("training") == "amortised":
        return repaired.result(records, config=config, seeds=seeds)
    unique = list({(r["arm"], r["item"], r["split"], r["seed"]): r for r in records}.values())
    arms = {record["arm"] for record in unique}
    pairs = [("learned", rival) for rival in RIVALS] + [("joint", "training")] + PRETRAINED_PAIRS
    comparisons = [
        compare(unique, metric=metric, arm=arm, baseline=baseline, unit=UNITS[metric], split="held_out")
        for arm, baseline in pairs
        if {arm, baseline} <= arms
        for metric in ("quality", "log_prob")
    ]
    gaps = _gaps(unique, arms)
    conclusions = _conclusions(unique, comparisons)
    measured = [*_student_sentences(unique), *_gap_sentences(gaps)]
    subject = SUBJECT if "learned" in arms else ""
    return {
        "system": "surgery",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "arms": summarise(unique, units=UNITS, split="held_out"),
        "table": list(TABLE),
        "baseline": "no_edit",
        "lower_is_better": [*LOWER_IS_BETTER],
        "comparisons": comparisons,
        "gap_to_other_objectives": gaps,
        "subject": subject,
        "conclusions": conclusions,
        "measured": measured,
        "verdict": verdict(
            comparisons[:1],
            lower_is_better=LOWER_IS_BETTER,
            conclusions=conclusions,
            measured=measured,
            subject=subject,
        ),
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


def _student_sentences(records: Sequence[Mapping[str, Any]]) -> list[str]:
    students = [record for record in records if record["arm"] == "no_edit"]
    if not students:
        return []
    nats = -sum(record["log_prob"] for record in students) / len(students)
    accuracy = sum(record["accuracy"] for record in students) / len(students)
    return [
        f"By reinforcement alone the student reaches {nats:.3f} nats per held-out token and {100 * accuracy:.1f} % "
        "accuracy."
    ]


def _conclusions(records: Sequence[Mapping[str, Any]], comparisons: Sequence[Comparison]) -> list[Conclusion]:
    """Which rungs of the n-gram ladder the student passes, whether the surgeon helps, and joint learning."""
    rungs = [record["arm"] for record in records if record["seed"] is None and record["arm"] != "no_edit"]
    conclusions = [
        Conclusion(
            comparisons=[
                compare(records, metric=metric, arm="no_edit", baseline=rung, unit=UNITS[metric], split="held_out")
                for metric in ("log_prob", "accuracy")
            ],
            claimed=f"The student passes the {rung} in nats and accuracy.",
            otherwise="",
        )
        for rung in rungs
        if any(record["arm"] == "no_edit" for record in records)
    ]
    deciding = [c for c in comparisons if c["metric"] == "quality" and c["baseline"] in DECIDING]
    if len(deciding) == len(DECIDING):
        measured = " and ".join(f"{c['baseline']} {c['mean']:+.3g}{_interval(c)}" for c in deciding)
        num_seeds = min(c["num_seeds"] for c in deciding)
        unclaimed = (
            f"That the surgeon helps cannot be claimed: SAC's held-out quality less that of {measured}, "
            "and it would have to be above both."
        )
        if num_seeds < MINIMUM_SEEDS:
            unclaimed = (
                f"Whether the surgeon helps cannot be said from {num_seeds} seed{'' if num_seeds == 1 else 's'} "
                f"(at least {MINIMUM_SEEDS}); SAC's held-out quality less that of {measured}."
            )
        helps = f"The surgeon helps: SAC's held-out quality is above that of {measured}."
        conclusions.append(Conclusion(comparisons=deciding, claimed=helps, otherwise=unclaimed))
    for c in comparisons:
        if c["arm"] in ("joint", "joint_pretrained") and c["metric"] == "log_prob":
            who = "surgery" if c["arm"] == "joint" else "the pretrained surgeon"
            # A loss is claimed as a gain of the other arm.
            arms = (c["arm"], c["baseline"]) if c["mean"] > 0 else (c["baseline"], c["arm"])
            tested = compare(
                records, metric="log_prob", arm=arms[0], baseline=arms[1], unit=c["unit"], split="held_out"
            )
            figures = f"{c['mean']:+.3g} nats per token{_interval(c)} from the same training without"
            conclusions.append(
                Conclusion(
                    comparisons=[tested],
                    claimed=f"Learning with {who} is {figures}.",
                    otherwise=f"Learning with {who} is measured at {figures}; no difference can be claimed.",
                )
            )
    return conclusions


def _gap_sentences(gaps: Mapping[str, Mapping[str, Gap]]) -> list[str]:
    sentences = []
    for objective, gap in gaps.items():
        shares = [gap[f"log_prob_at_equal_{what}"]["mean"] for what in ("tokens", "flops")]
        if all(share is not None for share in shares):
            tokens, flops = (f"{100 * share:.0f} %" for share in shares if share is not None)
            same = f"{tokens} at equal tokens and {flops} at equal FLOPs"
            sentences.append(f"Of the way in nats from the unigram to {objective.replace('_', ' ')} that is {same}.")
    return sentences


def _interval(comparison: Comparison) -> str:
    low, high = comparison["low"], comparison["high"]
    return "" if low is None or high is None else f" ({low:+.3g} to {high:+.3g})"
