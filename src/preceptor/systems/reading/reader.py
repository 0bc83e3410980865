"""The student: a language model that scores what was read, and what the scores are worth as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import branch_log_probs, token_log_probs
from preceptor.systems.reading.material import Material, Row
from preceptor.systems.reading.policy import Trajectories

Context = Literal["values", "queries"]
Order = Sequence[int]


@dataclass(frozen=True)
class Scored:
    """A row that the reader has scored: log-probabilities in nats of each value and probe span, in order."""

    row: Row
    log_probs: tuple[Float[Tensor, " token"], ...]


class Reader(Protocol):
    """What the system asks of a student."""

    def material(self, policy_material: Material) -> Material:
        """The same article in the reader's own tokens."""
        ...

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        """The policy's query in the reader's own tokens."""
        ...

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """Every value and probe span of each row, given all that stands before it in its row."""
        ...

    def branches(self, row: Row, branches: Sequence[tuple[int, Sequence[int], int]]) -> list[Float[Tensor, " token"]]:
        """Log-probabilities of continuations of prefixes of ``row`` (:func:`~preceptor.lm.score.branch_log_probs`)."""
        ...


class LanguageModelReader:
    """A language model as the student.

    Args:
        lm: scores; it may be the policy itself.
        policy_lm: the policy, if its vocabulary is not the reader's; queries are then passed on as text.
        materials: articles in the reader's tokens by name, needed with ``policy_lm``.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        policy_lm: LanguageModel | None = None,
        materials: Mapping[str, Material] | None = None,
    ) -> None:
        self.lm = lm
        self._policy_lm = policy_lm
        self._materials = materials or {}

    def material(self, policy_material: Material) -> Material:
        return policy_material if self._policy_lm is None else self._materials[policy_material.reading.name]

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        return query if self._policy_lm is None else self.lm.encode(self._policy_lm.decode(query))

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        spans = [row.stretches("value", "probe") for row in rows]
        log_probs = token_log_probs(self.lm, [row.tokens for row in rows], spans=spans)
        return [
            Scored(row, values.split([end - start for start, end in row_spans]))
            for row, row_spans, values in zip(rows, spans, log_probs, strict=True)
        ]

    def branches(self, row: Row, branches: Sequence[tuple[int, Sequence[int], int]]) -> list[Float[Tensor, " token"]]:
        return branch_log_probs(self.lm, row.tokens, branches)


def reader_rows(reader: Reader, trajectories: Trajectories, *, context: Context, with_probe: bool = False) -> list[Row]:
    """What the reader sees of each trajectory: the values alone, or the queries too; then the probe if it is wanted."""
    material = reader.material(trajectories.material)
    if context == "values":
        return [material.value_row(order, with_probe=with_probe) for order in trajectories.order.tolist()]
    return [
        material.query_row(order, [reader.query_tokens(query) for query in queries], with_probe=with_probe)
        for order, queries in zip(trajectories.order.tolist(), trajectories.queries.tolist(), strict=True)
    ]


def probe_curve(reader: Reader, material: Material, order: Order) -> Float[Tensor, " read"]:
    """Mean log-probability in nats per probe token after 0, 1, … pairs of ``order``, in one pass.

    The probe sentences are scored as one passage, which grows out of the values read so far as a branch.

    Raises:
        DataError: the material has no probe.
    """
    if not material.probe:
        raise DataError(f"{material.reading.name} has no probe sentences; set data.num_probes to at least 1")
    row = material.value_row(order)
    ends = [1, *(end for _, end in row.stretches("value"))]
    return torch.stack([scores.mean() for scores in reader.branches(row, [(end, material.probe, 0) for end in ends])])


def scores_after_reference_queries(reader: Reader, trajectories: Trajectories, rows: Sequence[Row]) -> list[Scored]:
    """Each value after the query that the *untrained* model wrote in its place, everything before it as it was.

    Reference query and value grow out of the shared trajectory as a branch, so nothing is encoded twice.

    Raises:
        DataError: the trajectories carry no reference queries.
    """
    if trajectories.reference_queries is None:
        raise DataError("untrained_query needs trajectories with reference queries; run the episodes with a reference")
    material = reader.material(trajectories.material)
    scored = []
    for row, order, queries in zip(
        rows, trajectories.order.tolist(), trajectories.reference_queries.tolist(), strict=True
    ):
        branches = []
        for (start, _), pair, query in zip(row.stretches("query"), order, queries, strict=True):
            given = (*reader.query_tokens(query), *material.chat_markers.before_value)
            branches.append((start, (*given, *material.values[pair]), len(given)))
        scored.append(Scored(row, tuple(reader.branches(row, branches))))
    return scored
