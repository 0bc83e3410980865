"""Small pools of our own, and a planted world in which the best reading is known."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import normalize

from preceptor.data.articles.pairs import Pair
from preceptor.runs.world import ALONE
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.encoder import Encoder
from preceptor.systems.reading.study.features import CaseBatch
from preceptor.systems.reading.study.policy import PoolPolicy, calibrate
from preceptor.systems.reading.study.pool import Case, Pool, StudyArticle

SUBJECTS = ("bees", "tides", "glass", "chess", "salt", "moss")


def article(subject: str, num_pairs: int = 9) -> StudyArticle:
    """An article whose sentences all name its subject."""
    return StudyArticle(
        subject,
        tuple(
            Pair(i, f"The {subject} of place {i} are many and old.", f"A book on {subject} has {i + 2} long pages.")
            for i in range(num_pairs)
        ),
    )


def text(subject: str, num_pairs: int = 9) -> str:
    """The same as a file holds it."""
    return "\n\n".join(f"{pair.key} {pair.value}" for pair in article(subject, num_pairs).pairs)


def pool() -> Pool:
    """Four candidates of two articles, three pairs held out of each."""
    bees, tides = article("bees"), article("tides")
    return Pool(
        name="small",
        articles=("bees", "tides"),
        sources=(1, 0, 0, 1),
        candidates=(tides.pairs[0], bees.pairs[0], bees.pairs[1], tides.pairs[1]),
        held_out=(bees.pairs[2:5], tides.pairs[2:5]),
    )


def planted_cases(count: int, *, seed: int, num_candidates: int = 12, dimension: int = 8) -> CaseBatch:
    """Cases in which a third of the candidates is on the target, worth 1 each, and the others are worth 0.

    The cosine, from which the policy starts, says nothing; the second channel is 3 on the target but for noise of half
    a unit, between candidates it says nothing. The best reading of four candidates is worth 1, a random one a third.
    """
    generator = torch.Generator().manual_seed(seed)
    on_target = torch.rand(count, num_candidates, generator=generator).argsort(-1) < num_candidates // 3
    queries = torch.randn(count, dimension, generator=generator)
    keys = torch.randn(count, num_candidates, dimension, generator=generator)
    noise = 0.5 * torch.randn(count, num_candidates, generator=generator)
    unit = normalize(keys, dim=-1)
    key_channels = torch.stack([unit @ unit.mT, torch.zeros(count, num_candidates, num_candidates)], -1)
    return CaseBatch(
        queries=queries,
        keys=keys,
        query_channels=torch.stack([torch.zeros_like(noise), 3.0 * on_target + noise - 1.0], -1),
        key_channels=key_channels,
        read_channels=torch.zeros_like(key_channels),
        gains=on_target.float(),
        on_target=on_target,
    )


def planted_setup(
    batch: CaseBatch, *, seed: int, cases: Sequence[Case] | None = None, encoder: Encoder | None = None, **changes: Any
) -> Any:
    """As much of a setup as an update needs: for the planted world, or for ``cases``, whose tensors ``batch`` has."""
    study = {"learning_rate": 0.03, "cases_per_update": 8, "num_rounds": 1, **changes.pop("study", {})}
    config = ReadingConfig.model_validate(
        {
            "episode": {"pool": "mixed", "budget": 4},
            "data": {"num_pairs": 4},
            "study": study,
            "update": {"steps": 120, "projection_learning_rate": 3e-4, **changes.pop("update", {})},
            "record_every": 1_000,
            **changes,
        }
    )
    names = ("article", "selection", "shuffle", "evaluation_selection")
    streams = {name: torch.Generator().manual_seed(1_000 * seed + i) for i, name in enumerate(names)}
    cases = cases or [Case(pool(), "asked", 0, (0,))] * len(batch)

    def policy(_: str) -> PoolPolicy:
        fresh = PoolPolicy(
            batch.queries.shape[-1],
            num_channels=batch.query_channels.shape[-1],
            num_rounds=config.study.num_rounds,
            cosine_scale=torch.tensor([0.0, 0.3]),
        )
        calibrate(fresh, batch, entropy_fraction=0.9)
        return fresh

    return SimpleNamespace(
        config=config,
        run=SimpleNamespace(streams=streams, notice=print, record=lambda rows: None, world=ALONE),
        train={"asked": SimpleNamespace(cases=cases, batch=batch)},
        modes=("asked",),
        policy=policy,
        encoder=lambda: encoder,
    )
