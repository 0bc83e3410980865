"""The weights of a mixture in memory that the workers of a ``DataLoader`` share with the training process.

Each worker holds a copy of the sampler and draws for itself. Draws are a function of the seed, of counts and of the
weights, so all copies draw the same rows as long as every change of the weights reaches them before the first row that
it holds for. A worker is given the task of a batch when the training process asks for one ``prefetch_factor ×
num_workers`` batches before, so new weights hold from a row that lies at least so far ahead.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.errors import ConfigError, NumericError

Entry = tuple[int, Tensor]
"""The row from which weights hold, and the weights, float64 [choices]."""

_LOCK_SECONDS = 60.0


class SharedSchedule:
    """Entries that the training process writes as a whole and any worker reads.

    Args:
        capacity: of entries at a time.
        num_choices: weights of an entry.
    """

    def __init__(self, *, capacity: int, num_choices: int) -> None:
        # A row of −1 is empty; float64 holds row numbers up to 2^53.
        self._entries = torch.full((capacity, 1 + num_choices), -1.0, dtype=torch.float64).share_memory_()
        # A lock of the context `spawn` serves workers of every start method.
        self._lock = multiprocessing.get_context("spawn").Lock()

    def post(self, entries: Sequence[Entry]) -> None:
        """Puts ``entries`` in the place of those before.

        Raises:
            ConfigError: there are more than ``capacity``.
            NumericError: the lock is not to be had, because a worker was killed while it held it.
        """
        if len(entries) > len(self._entries):
            raise ConfigError(
                f"{len(entries)} changes of the weights wait for their rows, at most {len(self._entries)} can; change "
                "the weights at most once a batch"
            )
        rows = torch.full_like(self._entries, -1.0)
        for place, (begin, weights) in enumerate(entries):
            rows[place, 0], rows[place, 1:] = begin, weights
        self._take_lock()
        self._entries.copy_(rows)
        self._lock.release()

    def read(self) -> list[Entry]:
        """The entries that were posted last.

        Raises:
            NumericError: the lock is not to be had, because a process was killed while it held it.
        """
        self._take_lock()
        rows = self._entries.clone()
        self._lock.release()
        return [(int(row[0]), row[1:]) for row in rows if row[0] >= 0]

    def _take_lock(self) -> None:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise NumericError(
                f"the weights of a mixture were not to be had for {_LOCK_SECONDS:g} s: a loader's worker was killed; "
                "resume from the last checkpoint"
            )


@dataclass
class Readers:
    """The workers that read a mixture.

    Attributes:
        num_workers: of the loader.
        batch_size: rows of a batch as a worker makes it.
        schedule: the weights as they learn of them.
        started: whether this copy, a worker's own, has begun to draw.
    """

    num_workers: int
    batch_size: int
    schedule: SharedSchedule
    started: bool = False


def least_lookahead(num_workers: int, prefetch_factor: int | None) -> int:
    """Batches that a loader's workers may have begun beyond those that it has given out (PyTorch's default factor: 2).

    >>> least_lookahead(0, None), least_lookahead(2, None), least_lookahead(2, 4)
    (0, 4, 8)
    """
    return num_workers * (2 if prefetch_factor is None else prefetch_factor)


def checked_lookahead(lookahead: int | None, *, num_workers: int, prefetch_factor: int | None) -> int:
    """``lookahead``, or the least that the loader's workers allow where it is ``None``; in batches.

    Raises:
        ConfigError: it is less than that.
    """
    least = least_lookahead(num_workers, prefetch_factor)
    if lookahead is not None and lookahead < least:
        raise ConfigError(
            f"`lookahead` must be at least {least} batches for {num_workers} workers (each begins "
            f"{least // max(num_workers, 1)} ahead), got {lookahead}; raise it, or take fewer workers or a smaller "
            "prefetch factor"
        )
    return least if lookahead is None else lookahead
