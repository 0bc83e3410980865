"""What the methods that learn nothing read, on cases whose targets and gains are known; whose vectors are judged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from preceptor.systems.reading.study.evaluate import evaluate, fixed_readings, nearest_chain
from preceptor.systems.reading.study.pool import Case
from tests.systems.reading.study.small import planted_cases, planted_setup, pool


def readings(**changes: Any) -> dict[str, torch.Tensor]:
    cases = planted_cases(6, seed=0)
    untrained = planted_setup(cases, seed=0).policy("asked")
    options = {"budget": 4, "num_random": 50, "num_samples": 20, "generator": torch.Generator().manual_seed(0)}
    return fixed_readings(cases, untrained, channels=("cosine", "bm25"), **{**options, **changes})


def worth(picks: torch.Tensor) -> torch.Tensor:
    """Share of each reading that is on the target, the mean over cases and readings."""
    on_target = planted_cases(6, seed=0).on_target[:, None].expand(-1, picks.shape[1], -1)
    return on_target.gather(2, picks).double().mean()


def test_each_method_reads_what_its_name_says() -> None:
    found = readings()
    assert worth(found["topic"]) == worth(found["oracle"]) == 1.0  # four of the four on the target
    assert 0.28 < worth(found["random"]) < 0.38  # a third of the candidates is on it
    assert worth(found["bm25"]) > 0.9  # the channel that knows
    assert worth(found["cosine"]) < 0.7  # the one that does not
    assert set(found) == {"random", "topic", "untrained", "cosine", "bm25", "cosine_bm25", "nearest", "oracle"}
    for picks in found.values():
        assert picks.shape[0] == 6
        assert all(len(set(reading)) == 4 for case in picks.tolist() for reading in case), "nothing is read twice"
    # Topic draws among those of its source; it does not always take them in one order.
    assert len({tuple(reading) for reading in found["topic"][0].tolist()}) > 5


def test_a_chain_goes_on_from_what_was_read_last() -> None:
    first = torch.tensor([[0.0, 1.0, 0.5]])
    # After candidate 1 its value is likest to candidate 0, after 0 only 2 is left.
    likeness = torch.zeros(1, 3, 3)
    likeness[0, 0, 1], likeness[0, 2, 1] = 0.9, 0.1
    assert nearest_chain(first, likeness, 3).tolist() == [[1, 0, 2]]


def test_the_learned_policy_reads_by_the_vectors_of_its_encoder() -> None:
    cases = planted_cases(6, seed=0)
    setup = planted_setup(cases, seed=0, study={"judged_by": "table", "num_random": 4})
    setup.judge = {"asked": SimpleNamespace(cases=[Case(pool(), "asked", 0, (0,))] * 6, batch=cases)}
    setup.run.stop_if_requested = lambda: None
    setup.config = setup.config.model_copy(
        update={"study": setup.config.study.model_copy(update={"channels": ("bm25",)})}
    )

    class Turned:
        def encode(self, _: Any, batch: Any) -> tuple[Any, None]:
            """Keys on the target point where the query does, the others the opposite way."""
            sign = torch.where(batch.on_target, 1.0, -1.0)[..., None]
            return SimpleNamespace(**{**vars(batch), "keys": sign * batch.queries[:, None]}), None

    def gain(encoder: Any) -> dict[str, float]:
        records = evaluate(setup, {"asked": setup.policy("asked")}, encoder=encoder, first_episode=0)
        return {record["arm"]: record["asked_gain"] for record in records}

    plain, turned = gain(None), gain(Turned())
    assert plain["learned_greedy"] == plain["cosine"] == turned["cosine"] < 0.7
    assert turned["learned_greedy"] == 1.0
