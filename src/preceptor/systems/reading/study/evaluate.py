"""How well methods read pools of held-out articles: really read, and summed up for ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.evaluation.summary import Comparison, Gap, compare, gap_closed, summarise
from preceptor.evaluation.verdict import verdict
from preceptor.systems.reading.study.features import CaseBatch, channel_names
from preceptor.systems.reading.study.policy import PoolPolicy, read, topk_readings
from preceptor.systems.reading.study.pool import Mode

if TYPE_CHECKING:
    from preceptor.systems.reading.study.encoder import Encoder
    from preceptor.systems.reading.study.setup import Setup

UNIT = "nats/value token"
UNITS = {"asked_gain": UNIT, "seed_gain": UNIT, "scorings": "reader scorings"}
SEEDED = ("learned", "learned_greedy")
"""Methods that differ between seeds; all others are the same, and their records have no seed."""

SUBJECTS = {"asked": "learned, asked about an article,", "seed": "learned, given one sentence,"}
"""Of a verdict's first sentence, which speaks of the first mode alone."""

BEST_OF = (4, 8, 16)
COMPARED = ("untrained", "bm25", "cosine_bm25", "late_interaction", "query_likelihood")
"""Methods that the learned policy is compared with, as one family, where the run has them; sampled and greedy alike."""


def fixed_readings(
    batch: CaseBatch,
    untrained: PoolPolicy,
    *,
    channels: Sequence[str],
    budget: int,
    num_random: int,
    num_samples: int,
    generator: torch.Generator,
) -> dict[str, Int[Tensor, "case reading step"]]:
    """The readings of every method that learns nothing, by name.

    ``nearest`` reads on from what is likest to what it read last; ``topic`` knows the source and draws from it;
    ``oracle`` takes the candidates with the largest gains when read alone, a lower bound of the best reading.
    """
    num_cases, num_candidates = batch.gains.shape
    uniform = torch.rand(num_cases * num_random, num_candidates, generator=generator).argsort(-1)
    order = uniform.view(num_cases, num_random, num_candidates)
    # Those of the target first, each group in a random order.
    of_topic = torch.rand(num_cases, num_samples, num_candidates, generator=generator)
    of_topic = (of_topic + 2.0 * ~batch.on_target[:, None]).argsort(-1)
    with torch.no_grad():
        cosine = untrained.scores(batch)
        sampled = read(untrained, batch, budget=budget, num_readings=num_samples, generator=generator).picks
    # Channels are standardised already, so a plain sum weighs them alike.
    channel = {name: batch.query_channels[..., index] for index, name in enumerate(channels)} | {"cosine": cosine}
    scores = {name: channel[name] for name in channels}
    if "bm25" in channel:
        scores["cosine_bm25"] = cosine + channel["bm25"]
    if "late_interaction" in channel:
        scores["cosine_late_interaction"] = cosine + channel["late_interaction"]
    return {
        "random": order[..., :budget],
        "topic": of_topic[..., :budget],
        "untrained": sampled,
        **{name: topk_readings(each, budget) for name, each in scores.items()},
        "nearest": nearest_chain(cosine, batch.read_channels[..., 0], budget)[:, None],
        "oracle": topk_readings(batch.gains, budget),
    }


def nearest_chain(
    first: Float[Tensor, "case candidate"], likeness: Float[Tensor, "case candidate read"], budget: int
) -> Int[Tensor, "case step"]:
    """The candidate likest to the query, then always the one whose key is likest to the value read last."""
    picks = [first.argmax(-1)]
    available = torch.ones_like(first, dtype=torch.bool)
    while len(picks) < budget:
        available = available.scatter(1, picks[-1][:, None], False)
        likest = likeness.gather(2, picks[-1][:, None, None].expand(-1, likeness.shape[1], 1))[..., 0]
        picks.append(likest.masked_fill(~available, -torch.inf).argmax(-1))
    return torch.stack(picks, 1)


def evaluate(
    setup: Setup, policies: Mapping[Mode, PoolPolicy], *, encoder: Encoder | None, first_episode: int
) -> list[dict[str, Any]]:
    """Records of every method on every held-out article: its mean gain over that article's cases in each mode.

    With ``study.judged_by`` table a reading is worth the mean of its candidates read alone, as in training.

    ``nothing`` is 0 by definition: gains are over reading nothing. ``best_of_N`` reads N random readings and keeps the
    one after which the reader does best, which costs N scorings a case and looks at the answers. ``encoder`` gives the
    learned policy's vectors; None is the reader's own.
    """
    config, run, study = setup.config, setup.run, setup.config.study
    gains: dict[tuple[str, str], dict[str, list[float]]] = {}  # (method, article) → metric → gain of each case
    for mode, policy in policies.items():
        split, budget = setup.judge[mode], config.episode.budget
        # Not of the run's streams: what does not depend on the run's seed is the same under every seed.
        generator = torch.Generator().manual_seed(study.pool_seed)
        methods = fixed_readings(
            split.batch,
            setup.policy(mode),
            channels=channel_names(study.channels),
            budget=budget,
            num_random=study.num_random,
            num_samples=study.num_samples,
            generator=generator,
        )
        with torch.no_grad():
            learned = split.batch if encoder is None else encoder.encode(split.cases, split.batch)[0]
            for name, own, count in (
                ("learned", run.streams["evaluation_selection"], study.num_samples),
                ("learned_greedy", None, 1),
            ):
                methods[name] = read(policy, learned, budget=budget, num_readings=count, generator=own).picks
        for number, case in enumerate(split.cases):
            if number % 50 == 0:
                run.notice(f"judge, {mode}: reading case {number + 1} of {len(split.cases)} by every method")
            orders = [(name, picks) for name, each in methods.items() for picks in each[number].tolist()]
            readings = [picks for _, picks in orders]
            if study.judged_by == "reading":
                found = setup.scorer.reading_gains(case, readings).tolist()
            else:
                found = split.batch.gains[number][torch.tensor(readings)].mean(1).tolist()
            by_method: dict[str, list[float]] = {"nothing": [0.0]}
            for (name, _), gain in zip(orders, found, strict=True):
                by_method.setdefault(name, []).append(gain)
            for count in BEST_OF:
                if count <= study.num_random:
                    by_method[f"best_of_{count}"] = [max(by_method["random"][:count])]
            for name, each in by_method.items():
                cell = gains.setdefault((name, case.article), {})
                cell.setdefault(f"{mode}_gain", []).append(sum(each) / len(each))
            run.record(
                {
                    "step": config.update.steps,
                    "episode": first_episode + number,
                    "arm": name,
                    "article": case.article,
                    "mode": mode,
                    "case": case.name,
                    "order": picks,
                    "reward": gain,
                    "really_read": study.judged_by == "reading",
                }
                for (name, picks), gain in zip(orders, found, strict=True)
                if name in ("learned_greedy", "bm25", "oracle")
            )
            run.stop_if_requested()
        first_episode += len(split.cases)
    return [
        {
            "arm": name,
            "item": article,
            "split": "held_out",
            "seed": config.seed if name in SEEDED else None,
            **{metric: sum(each) / len(each) for metric, each in cell.items()},
            "scorings": float(_num_scorings(name, config.data.num_pairs * (1 + study.num_distractors))),
        }
        for (name, article), cell in gains.items()
    ]


def _num_scorings(method: str, num_candidates: int) -> int:
    """How often the reader must be asked about a new case before the method can choose."""
    if method.startswith("best_of_"):
        return int(method.removeprefix("best_of_"))
    return num_candidates if method == "oracle" else 0


# ---- result.json -----------------------------------------------------------------------------------------------------


def result(records: Sequence[Mapping[str, Any]], *, config: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """The result of one run, or of several: every method's gain and share of the gap, in each mode, held out.

    Args:
        records: of every method, article and seed (:func:`evaluate`).
        config: the resolved configuration.
        seeds: of the runs.
    """
    modes = [mode for mode in ("asked", "seed") if any(f"{mode}_gain" in record for record in records)]
    names = list(dict.fromkeys(str(record["arm"]) for record in records))
    arms = summarise(records, units=UNITS, split="held_out")
    study: dict[str, dict[str, Any]] = {}
    comparisons: list[Comparison] = []
    gaps: dict[str, Gap] = {}
    for mode in modes:
        metric = f"{mode}_gain"
        study[mode] = {}
        for name in names:
            gap = gap_closed(records, metric=metric, learned=name, upper=("oracle",), optimum="", split="held_out")
            if name == "learned":
                gaps.setdefault("held_out", gap)
            study[mode][name] = {
                "share": {key: gap[key] for key in ("mean", "low", "high")},
                "gain": arms[name][metric],
                "scorings": int(arms[name]["scorings"]["mean"]),
            }
        for learned in SEEDED:
            for baseline in COMPARED:
                if baseline in names:
                    comparisons.append(
                        compare(records, metric=metric, arm=learned, baseline=baseline, unit=UNIT, split="held_out")
                    )
    return {
        "system": "reading",
        "status": "finished",
        "config": config,
        "seeds": list(seeds),
        "study": study,
        "arms": arms,
        "table": [f"{mode}_gain" for mode in modes] + ["scorings"],
        "oracles": [name for name in names if name == "oracle" or name.startswith("best_of_")],
        "baseline": "random",
        "comparisons": comparisons,
        "gap_closed": {
            "train": {"mean": None, "low": None, "high": None, "n": 0, "reason": "judged on held-out articles alone"},
            "held_out": gaps["held_out"],
        },
        "verdict": verdict(
            comparisons,
            subject=SUBJECTS[modes[0]] if modes else "",
            measured=[f"The share of the gap that follows is that of mode {modes[0]}."] if len(modes) > 1 else (),
            gaps=gaps,
            noun="article",
        ),
        "records": list(records),
    }
