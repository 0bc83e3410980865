"""What readings are worth to a frozen reader: held-out values scored apart after each, many in one pass."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import ModelError, ShapeError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import batches_by_length
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.study.pool import Case

Target = tuple[Sequence[int], Sequence[int]]
"""Token ids of a key, which is given, and of its value, which is scored."""

MAX_TOKENS = 8_192
"""Padded tokens in a pass."""


@torch.no_grad()
def target_log_probs(
    lm: LanguageModel, prefixes: Sequence[Sequence[int]], targets: Sequence[Target], *, max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "prefix target"]:
    """Mean log-probability (nats per token) of every target's value after every prefix and the target's key.

    A row of a pass is a prefix and then all targets. A mask lets a target attend to the prefix and to itself alone, and
    its positions go on from the end of the prefix, so each is scored as if it were the only one. No gradient.

    Args:
        lm: the reader.
        prefixes: token ids, at least one each.
        targets: the same after every prefix; a key has at least one token, and so has a value.
        max_tokens: padded tokens in a pass.

    Raises:
        ShapeError: there is nothing to score, or a part is empty.
        ModelError: a prefix with a target is longer than the reader's context.
    """
    if not prefixes or not targets or not all(map(len, prefixes)) or not all(key and value for key, value in targets):
        raise ShapeError("every prefix, key and value must have at least one token, and there must be one of each")
    lengths = [len(key) + len(value) for key, value in targets]
    longest = max(map(len, prefixes)) + max(lengths)
    if longest > lm.context_length:
        raise ModelError(
            f"a reading of {longest} tokens does not fit the context of {lm.context_length} tokens of {lm.name}; lower "
            "episode.budget or data.max_value_tokens"
        )
    packed = torch.tensor([token for key, value in targets for token in (*key, *value)])  # [T]
    segment = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor(lengths))  # [T]
    offset = torch.cat([torch.arange(length) for length in lengths])  # [T], place in its own target
    # True = the next token is a scored one of the same target: the last token of a key up to the last but one.
    keep = torch.cat([torch.arange(n) >= len(key) - 1 for (key, _), n in zip(targets, lengths, strict=True)])
    keep &= torch.cat([torch.arange(n) < n - 1 for n in lengths])
    apart = (segment[:, None] == segment) & (offset[None] <= offset[:, None])  # [T query, T key]
    num_scored = torch.tensor([float(len(value)) for _, value in targets])

    total = len(packed)
    results = torch.empty(len(prefixes), len(targets))
    for batch in batches_by_length([len(prefix) + total for prefix in prefixes], max_tokens=max_tokens):
        rows = [prefixes[index] for index in batch]
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width + total), lm.begin_token)
        positions = torch.arange(width + total).repeat(len(rows), 1)
        visible = torch.zeros(len(rows), width + total, width + total, dtype=torch.bool)
        visible[:, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril()
        visible[:, width:, width:] = apart
        for row, prefix in enumerate(rows):
            tokens[row, : len(prefix)] = torch.tensor(prefix)
            positions[row, width:] = len(prefix) + offset
            visible[row, width:, : len(prefix)] = True  # the prefix, but not its padding
        tokens[:, width:] = packed
        marked = torch.cat([torch.zeros(width, dtype=torch.bool), keep]).expand(len(rows), -1)
        log_probs = lm.chosen_log_probs(
            tokens.to(lm.device),
            keep=marked.to(lm.device),
            chosen=packed.roll(-1)[keep].repeat(len(rows)).to(lm.device),
            attention_mask=visible.to(lm.device),
            positions=positions.to(lm.device),
        ).cpu()  # [row · scored token]
        sums = torch.zeros(len(rows), len(targets)).index_add_(1, segment[keep], log_probs.view(len(rows), -1))
        results[batch] = sums / num_scored
    return results


class Scorer:
    """Gains of readings over reading nothing, remembered by content in a file that runs share.

    Args:
        lm: the frozen reader.
        store: database of scores; None remembers nothing.
        world: processes that share the passes of the reader; the first one alone has the database.
    """

    def __init__(self, lm: LanguageModel, store: Path | None = None, *, world: World = ALONE) -> None:
        self.lm = lm
        self.world = world
        self._remembers = store is not None
        self.num_readings = 0  # rows of the reader that were really computed
        self._database: sqlite3.Connection | None = None
        if store is not None and world.is_first:
            store.parent.mkdir(parents=True, exist_ok=True)
            # Several runs may fill the store at once; each waits for the others' short transactions.
            self._database = sqlite3.connect(store, timeout=60, isolation_level=None)
            self._database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB)")
        weights = hashlib.sha256(f"{lm.name} {lm.dtype}".encode())
        for name, tensor in sorted(lm.model.state_dict().items()):
            weights.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._identity = weights.digest()

    def value(self, text: str) -> tuple[int, ...]:
        """Tokens of a sentence as it stands in running text."""
        return tuple(self.lm.encode(" " + text))

    def targets(self, case: Case, indices: Sequence[int] | None = None) -> list[Target]:
        """Keys and values that are asked after a reading."""
        pairs = case.pairs(case.targets if indices is None else indices)
        return [(self.value(pair.key), self.value(pair.value)) for pair in pairs]

    def prefix(self, case: Case, picks: Sequence[int]) -> list[int]:
        """What the reader has read: begin token, the seed where there is one, and the values of ``picks`` in order."""
        values = [case.pairs([case.seed])[0].value] if case.seed is not None else []
        values += [case.pool.candidates[pick].value for pick in picks]
        return [self.lm.begin_token, *(token for value in values for token in self.value(value))]

    def candidate_gains(self, case: Case) -> Float[Tensor, "candidate target"]:
        """Of each candidate read alone, in nats per value token over reading nothing: the table of the case's state."""
        picks: list[tuple[int, ...]] = [(), *((index,) for index in range(len(case.pool.candidates)))]
        # All held-out pairs of the pool share the state of `asked`, so one pass serves its cases.
        if case.mode == "asked":
            everything = [(self.value(p.key), self.value(p.value)) for pairs in case.pool.held_out for p in pairs]
            first = sum(len(pairs) for pairs in case.pool.held_out[: case.target])
            scores = self.log_probs([self.prefix(case, each) for each in picks], everything)
            scores = scores[:, [first + index for index in case.targets]]
        else:
            scores = self.log_probs([self.prefix(case, each) for each in picks], self.targets(case))
        return scores[1:] - scores[0]

    def reading_gains(self, case: Case, readings: Sequence[Sequence[int]]) -> Float[Tensor, " reading"]:
        """Of each reading, in nats per value token over reading nothing: the mean over the held-out values."""
        distinct = list(dict.fromkeys([(), *map(tuple, readings)]))
        # One row of the store for each reading, so that methods that choose alike share it.
        scores = torch.stack(self._rows([self.prefix(case, reading) for reading in distinct], self.targets(case)))
        gains = scores.mean(1) - scores[0].mean()
        return gains[[distinct.index(tuple(reading)) for reading in readings]]

    def log_probs(self, prefixes: Sequence[Sequence[int]], targets: Sequence[Target]) -> Float[Tensor, "prefix target"]:
        """:func:`target_log_probs`, remembered as one entry of the store."""

        def compute() -> Tensor:
            return self._computed(prefixes, targets)

        return self.remembered(self._key(prefixes, targets), compute).view(len(prefixes), len(targets))

    def remembered(self, key: bytes, compute: Callable[[], Tensor]) -> Float[Tensor, " number"]:
        """What ``compute`` gives, flat, in float32; from the store if it is there under ``key`` and this model."""
        key = hashlib.sha256(self._identity + key).digest()
        (found,) = self._load([key])
        if found is None:
            found = compute().flatten().float()
            self._save(key, found)
        return found

    def _rows(self, prefixes: Sequence[Sequence[int]], targets: Sequence[Target]) -> list[Tensor]:
        keys = [hashlib.sha256(self._identity + self._key([prefix], targets)).digest() for prefix in prefixes]
        rows = self._load(keys)
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing:
            computed = self._computed([prefixes[index] for index in missing], targets)
            for index, row in zip(missing, computed, strict=True):
                rows[index] = row
                self._save(keys[index], row)
        return [row for row in rows if row is not None]

    def _key(self, prefixes: Sequence[Sequence[int]], targets: Sequence[Target]) -> bytes:
        content = repr(([tuple(p) for p in prefixes], [(tuple(k), tuple(v)) for k, v in targets]))
        return content.encode()

    def _computed(self, prefixes: Sequence[Sequence[int]], targets: Sequence[Target]) -> Tensor:
        """:func:`target_log_probs`, of which each process computes some prefixes."""
        self.num_readings += len(prefixes)
        (scores,) = self.world.gathered(
            len(prefixes), lambda rows: (target_log_probs(self.lm, prefixes[rows], targets),)
        )
        return scores

    def _load(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """What the store holds, the same in all processes: another run may fill it meanwhile."""

        def look() -> list[Tensor | None]:
            assert self._database is not None, "the first process has the database"
            query = "SELECT value FROM scores WHERE key = ?"
            rows = [self._database.execute(query, (key,)).fetchone() for key in keys]
            return [None if row is None else torch.frombuffer(bytearray(row[0]), dtype=torch.float32) for row in rows]

        return self.world.of_first(look) if self._remembers else [None] * len(keys)

    def _save(self, key: bytes, scores: Tensor) -> None:
        if self._database is not None:
            value = scores.contiguous().float().numpy().tobytes()
            self._database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, value))
