"""Recorded readings of a study read again by the frozen reader, without the policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preceptor.data.articles.pairs import Pair
from preceptor.errors import DataError, StorageError
from preceptor.runs.files import storage_errors
from preceptor.runs.metrics import read_jsonl
from preceptor.systems.base import Replayed
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study.pool import Case, Pool
from preceptor.systems.reading.study.scores import Scorer
from preceptor.systems.reading.study.setup import frozen_reader


def verify(config: ReadingConfig, folder: Path) -> Iterator[Replayed]:
    """The gain of every recorded reading of the run in ``folder``, from its ``pools.json``; nothing is remembered.

    Raises:
        DataError: a decision names a pool or a candidate that there is not.
        StorageError: a file of the run is missing or damaged.
    """
    pools = read_pools(folder / "pools.json")
    scorer = Scorer(frozen_reader(config, "cpu")[0])
    for decision in read_jsonl(folder / "decisions.jsonl"):
        where = f"step {decision.get('step')}, episode {decision.get('episode')} of {decision.get('arm')}"
        try:
            case, order = named_case(decision["case"], pools), decision["order"]
            if not all(isinstance(pick, int) and 0 <= pick < len(case.pool.candidates) for pick in order):
                raise DataError(f"decisions.jsonl, {where}: candidates {order} are not all in the pool")
            # In training a reading was worth the mean of its candidates, each read alone.
            readings = [order] if decision["really_read"] else [[pick] for pick in order]
            recorded = float(decision["reward"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"decisions.jsonl, {where}: malformed ({error!r}); restore the file from a copy") from error
        yield Replayed(where, recorded, float(scorer.reading_gains(case, readings).mean()))


def read_pools(path: Path) -> dict[str, Pool]:
    """Every pool of a run by name."""
    with storage_errors(f"read {path}"):
        text = path.read_bytes()
    try:
        return {
            name: Pool(
                name=name,
                articles=tuple(pool["articles"]),
                sources=tuple(pool["sources"]),
                candidates=_pairs(pool["candidates"]),
                held_out=tuple(_pairs(pairs) for pairs in pool["held_out"]),
            )
            for split in json.loads(text).values()
            for name, pool in split.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} is damaged ({error}); restore it from a copy") from error


def _pairs(texts: list[Any]) -> tuple[Pair, ...]:
    return tuple(Pair(index, key, value) for index, (key, value) in enumerate(texts))


def named_case(name: str, pools: dict[str, Pool]) -> Case:
    """The case that :attr:`Case.name` names."""
    pool, mode, target, indices = name.split("/")
    if mode not in ("asked", "seed"):
        raise ValueError(f"mode {mode!r}")
    targets = tuple(map(int, indices.split("-")))
    return Case(
        pools[pool], "asked" if mode == "asked" else "seed", int(target), targets, 0 if mode == "seed" else None
    )
