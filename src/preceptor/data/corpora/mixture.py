"""Rows drawn from several datasets in the shares of a mixture, endlessly, and resumable at any row.

Which dataset comes next is random under the current weights; within a dataset every row comes once before any comes
again, in an order that is shuffled anew each epoch. All of it is a function of the seed and of counts, so the whole
state is a few integers, however much has been drawn.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from preceptor.data.corpora.blocks import TokenBlocks, pad_blocks
from preceptor.data.corpora.mixture_workers import Entry, Readers, SharedSchedule, checked_lookahead
from preceptor.errors import CheckpointError, ConfigError

_REMEMBERED = 16_384
"""Latest rows that can be taken back, for loaders that read ahead."""

_PAGE = 1_024
"""Random numbers that are computed at a time."""


class MixtureSampler:
    """Draws (dataset, row), the dataset by weight, the row by a shuffled order of its own.

    The t-th choice uses the t-th random number of the seed, and the order of a dataset's rows in an epoch is that of
    the seed, its name and the epoch: another list of datasets, or other weights, leave both as they were.

    Args:
        sizes: rows of each dataset by name, each at least 1.
        seed: of all choices and orders, any integer.
        weights: shares on any scale, in the order of ``sizes``; ``None``: uniform.

    Attributes:
        delay: rows between those that were drawn and the first one that new weights hold for; 0 unless a loader's
            workers draw ahead.

    Raises:
        ConfigError: no dataset, one without rows, or unusable weights.

    >>> sampler = MixtureSampler({"books": 2, "code": 3}, seed=1, weights=[1, 0])
    >>> [dataset for dataset, _ in (sampler.draw(), sampler.draw(), sampler.draw())]
    [0, 0, 0]
    >>> sampler.counts.tolist()
    [3, 0]
    """

    def __init__(self, sizes: Mapping[str, int], *, seed: int, weights: Sequence[float] | Tensor | None = None) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ConfigError(f"a mixture needs datasets of at least one row each, got {dict(sizes)}")
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self.seed = seed
        self._counts = [0] * len(sizes)
        self._recent: deque[int] = deque(maxlen=_REMEMBERED)
        self._orders: dict[int, tuple[int, Tensor]] = {}  # dataset -> (epoch, order of its rows): a cache
        self._numbers: tuple[int, Tensor] = (-1, torch.empty(0))  # (page, random numbers): a cache
        self._schedule: list[Entry] = []  # (row from which they hold, weights), ascending
        self.delay = 0
        self.weights = torch.ones(len(sizes)) if weights is None else torch.as_tensor(weights)

    @property
    def weights(self) -> Float[Tensor, " choices"]:
        """Shares of the datasets, float64, as set last; they may be set at any time, for what is drawn from then on.

        Where ``delay`` is not 0, they hold from so many rows later on.
        """
        return self._schedule[-1][1].clone()

    @weights.setter
    def weights(self, weights: Sequence[float] | Tensor) -> None:
        self.set_weights(weights, begin=self.num_drawn + self.delay)

    def set_weights(self, weights: Sequence[float] | Tensor, *, begin: int) -> None:
        """Sets the shares of the datasets for row ``begin`` and those after it, counted from the first row ever drawn.

        Raises:
            ConfigError: unusable weights, or the row has been drawn.
        """
        checked = torch.as_tensor(weights).detach().to("cpu", torch.float64)
        if checked.shape != (len(self.names),):
            raise ConfigError(f"{len(self.names)} datasets need as many weights, got shape {tuple(checked.shape)}")
        if not (torch.isfinite(checked).all() and (checked >= 0).all() and checked.sum() > 0):
            raise ConfigError(f"weights must be finite, at least 0 and not all 0, got {checked.tolist()}")
        if begin < self.num_drawn:
            raise ConfigError(
                f"new weights cannot hold from row {begin} on, {self.num_drawn} rows are drawn; give that or more"
            )
        # Weights that no row was drawn under are dropped, and those older than the oldest row that can still be taken
        # back.
        held = [entry for entry in self._schedule if entry[0] < begin]
        self._schedule = [*held[self._in_force(held, self.num_drawn - len(self._recent)) :]]
        self._schedule.append((begin, checked / checked.sum()))

    @staticmethod
    def _in_force(schedule: Sequence[tuple[int, Tensor]], row: int) -> int:
        """Which entry of ``schedule`` holds for ``row``: the last that begins at it or before."""
        # Not below 0: an empty schedule has no entry in force.
        return max(bisect_right(schedule, row, key=lambda entry: entry[0]) - 1, 0)

    @property
    def num_drawn(self) -> int:
        """Rows drawn in all."""
        return sum(self._counts)

    @property
    def counts(self) -> Int[Tensor, " choices"]:
        """Rows drawn from each dataset; over its size, the epochs it has been through."""
        return torch.tensor(self._counts)

    def draw(self) -> tuple[int, int]:
        """The next dataset's place in the list, and the place of the next row in it."""
        # Cumulative shares [choices]: the random number falls into one of the intervals.
        boundaries = self._schedule[self._in_force(self._schedule, self.num_drawn)][1].cumsum(dim=0)
        # Scaled to the sum of the weights, which rounding may leave beside 1; a share of 0 is never drawn.
        number = self._random_number(self.num_drawn) * boundaries[-1]
        dataset = int(torch.searchsorted(boundaries, number, right=True))
        # The count alone gives epoch and place, so nothing else has to be saved.
        epoch, position = divmod(self._counts[dataset], self.sizes[dataset])
        self._counts[dataset] += 1
        self._recent.append(dataset)
        return dataset, int(self._order(dataset, epoch)[position])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            yield self.draw()

    def advance(self, num_drawn: int) -> None:
        """Draws until ``num_drawn`` rows are drawn in all, and gives none of them; nothing, if there are as many.

        Much faster than as many calls of :meth:`draw`: it is how one process keeps up with what others draw.
        """
        while (begin := self.num_drawn) < num_drawn:
            place = self._in_force(self._schedule, begin)
            # Up to the next change of the weights and the end of the page of random numbers.
            changes = [entry[0] for entry in self._schedule[place + 1 :]]
            end = min([num_drawn, (begin // _PAGE + 1) * _PAGE, *(row for row in changes if row > begin)])
            boundaries = self._schedule[place][1].cumsum(dim=0)
            self._random_number(begin)  # fills the page
            numbers = self._numbers[1][begin % _PAGE :][: end - begin] * boundaries[-1]
            datasets = torch.searchsorted(boundaries, numbers, right=True)
            for dataset, count in enumerate(datasets.bincount(minlength=len(self.sizes)).tolist()):
                self._counts[dataset] += count
            self._recent.extend(datasets.tolist())

    def entries_from(self, row: int) -> list[Entry]:
        """The weights that hold for ``row`` and those that hold later, each with the row from which it holds."""
        return self._schedule[self._in_force(self._schedule, row) :]

    def follow(self, entries: Sequence[Entry]) -> None:
        """Takes over the weights of another sampler of the same mixture, as :meth:`entries_from` gave them.

        Raises:
            ConfigError: they hold for rows that this one has drawn under other weights; the loader reads further ahead
                than was said.
        """
        drawn = self.num_drawn
        known = dict(self._schedule)
        for begin, weights in entries:
            if self._schedule[0][0] <= begin < drawn and not (begin in known and torch.equal(known[begin], weights)):
                raise ConfigError(
                    f"new weights hold from row {begin} on, and a loader's worker has drawn {drawn} rows under the old "
                    "ones; the loader reads further ahead than `lookahead` says, or its batches are of another size"
                )
        held = self.entries_from(drawn)[:1]
        self._schedule = [*held, *(entry for entry in entries if entry[0] > held[0][0])]

    def state_dict(self, *, num_consumed: int | None = None) -> dict[str, Any]:
        """Where the sampler is, as JSON: of a size that does not grow.

        Args:
            num_consumed: rows that were really used, where a loader has drawn ahead of that (Accelerate's holds one
                batch back); what was drawn after them is drawn again on resuming. ``None``: all that was drawn.

        Raises:
            CheckpointError: ``num_consumed`` is more than was drawn, or further back than is remembered.
        """
        counts = list(self._counts)
        num_consumed = self.num_drawn if num_consumed is None else num_consumed
        ahead = self.num_drawn - num_consumed
        if not 0 <= ahead <= len(self._recent):
            raise CheckpointError(
                f"{num_consumed} rows cannot have been consumed of {self.num_drawn} drawn, of which the last "
                f"{len(self._recent)} can be taken back; count the rows that were trained on since the start"
            )
        # The last `ahead` draws are undone.
        for dataset in list(self._recent)[len(self._recent) - ahead :]:
            counts[dataset] -= 1
        return {
            "seed": self.seed,
            "counts": dict(zip(self.names, counts, strict=True)),
            # Rows that were read ahead may have been drawn under earlier weights than those that hold now.
            "weights": [[begin, weights.tolist()] for begin, weights in self.entries_from(num_consumed)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken.

        Raises:
            CheckpointError: the state is of other datasets or another seed; nothing has changed then.
        """
        # All checks before anything changes.
        if state.keys() != {"seed", "counts", "weights"}:
            raise CheckpointError(f"a sampler's state has seed, counts and weights, this one has {sorted(state)}")
        if state["seed"] != self.seed or list(state["counts"]) != list(self.names):
            raise CheckpointError(
                f"the sampler's state is of the datasets {', '.join(state['counts'])} under seed {state['seed']}, this "
                f"sampler of {', '.join(self.names)} under seed {self.seed}; resume with the same"
            )
        self._schedule = [
            (int(begin), torch.tensor(weights, dtype=torch.float64)) for begin, weights in state["weights"]
        ]
        self._counts = [int(count) for count in state["counts"].values()]
        # Rows drawn before the state was taken cannot be taken back after it.
        self._recent.clear()

    def _random_number(self, index: int) -> Float[Tensor, ""]:
        """The ``index``-th number in [0, 1) of this seed; computed a page at a time."""
        # Numbers by the page: any index is reached without drawing all before it, which makes resuming instant.
        page, offset = divmod(index, _PAGE)
        if self._numbers[0] != page:
            generator = _generator(f"{self.seed}:choice:{page}")
            self._numbers = page, torch.rand(_PAGE, generator=generator, dtype=torch.float64)
        return self._numbers[1][offset]

    def _order(self, dataset: int, epoch: int) -> Tensor:
        """The dataset's rows in the order of ``epoch``."""
        # One order a dataset is kept: epochs come one after the other.
        cached_epoch, order = self._orders.get(dataset, (-1, torch.empty(0)))
        if cached_epoch != epoch:
            generator = _generator(f"{self.seed}:order:{self.names[dataset]}:{epoch}")
            order = torch.randperm(self.sizes[dataset], generator=generator)
            self._orders[dataset] = epoch, order
        return order


def _generator(name: str) -> torch.Generator:
    """A generator that is a function of ``name`` alone."""
    # A hash of the name seeds it, because Python's own hash() differs from process to process.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


class MixtureDataset(IterableDataset[dict[str, Any]]):
    """Blocks of several datasets in the shares of ``sampler``, endlessly, for a ``torch.utils.data.DataLoader``.

    An example is ``{"input_ids": …, "dataset": …}``, the block and the place of its dataset; :func:`collate` makes a
    batch of them. Iterating goes on where the sampler is, it does not start over.

    Loader workers draw the same rows as the training process would, if :meth:`batches` makes the loader, or a
    ``MixtureCallback`` watches the Trainer that does; without either they are refused. Since they read ahead, new
    weights hold from a fixed row a few batches later on. Blocks are in memory and drawing one is an index, so workers
    pay where collating is dear.

    In a distributed Trainer give the samplers of all processes one seed: Accelerate hands the rows of the first one's
    out. In a loop of your own, in which each process reads for itself, give each its own.

    Args:
        datasets: the tokenised datasets.
        sampler: over the same datasets in the same order.

    Raises:
        ConfigError: the sampler is of other datasets.

    >>> blocks = TokenBlocks("books", [[0, 5, 6], [0, 7]])
    >>> dataset = MixtureDataset([blocks], sampler=MixtureSampler({"books": 2}, seed=0))
    >>> sorted(len(example["input_ids"]) for example, _ in zip(dataset, range(2)))
    [2, 3]
    """

    def __init__(self, datasets: Sequence[TokenBlocks], *, sampler: MixtureSampler) -> None:
        sizes = {blocks.name: len(blocks) for blocks in datasets}
        expected = dict(zip(sampler.names, sampler.sizes, strict=True))
        # Names and sizes in order: indices from the sampler are looked up here.
        if list(sizes.items()) != list(expected.items()) or len(datasets) != len(sizes):
            raise ConfigError(f"the datasets have the rows {sizes}, the sampler {expected}; they must agree, in order")
        self.datasets = datasets
        self.sampler = sampler
        self._readers: Readers | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        draws = iter(self.sampler) if info is None else self._worker_draws(info.id, info.num_workers)
        for dataset, row in draws:
            yield {"input_ids": self.datasets[dataset][row], "dataset": dataset}

    def batches(
        self,
        *,
        batch_size: int,
        collate_fn: Callable[[list[dict[str, Any]]], Any],
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        lookahead: int | None = None,
        **loader: Any,
    ) -> Iterator[Any]:
        """Batches without end, made by a loader's workers; the rows are those of a loader without workers.

        The sampler counts the batches that were given, so its state is exact at any of them. New weights hold
        ``lookahead`` batches after the next one.

        Args:
            batch_size: rows of a batch.
            collate_fn: makes a batch of examples, in the workers.
            num_workers: processes that read; 0: this one.
            prefetch_factor: batches that each worker reads ahead, 2 by default.
            lookahead: batches under the old weights after new ones are set. ``None``: as few as the workers allow,
                ``num_workers × prefetch_factor``. Given the same, the rows are the same for any number of workers.
            loader: further arguments of ``torch.utils.data.DataLoader``.

        Raises:
            ConfigError: fewer than that, or persistent workers or batches out of order.
        """
        if loader.get("persistent_workers") or not loader.get("in_order", True):
            raise ConfigError("workers of a mixture start with its loader and give batches in order; leave both out")
        self.share(
            batch_size=batch_size,
            num_workers=num_workers,
            lookahead=checked_lookahead(lookahead, num_workers=num_workers, prefetch_factor=prefetch_factor),
        )
        sampler, given = self.sampler, self.sampler.num_drawn
        try:
            for batch in DataLoader(
                self,
                batch_size=batch_size,
                collate_fn=collate_fn,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                **loader,
            ):
                given += batch_size
                sampler.advance(given)  # what the workers drew; without workers it is drawn already
                yield batch
                self.post()  # before the loader gives out the next task
        finally:
            self.unshare()

    def share(self, *, batch_size: int, num_workers: int, lookahead: int) -> None:
        """Prepares for a loader that is iterated next: its workers draw the rows from here on.

        Args:
            batch_size: rows that a worker makes one batch of.
            num_workers: of the loader.
            lookahead: batches between the rows that were drawn and the first one that new weights hold for.
        """
        self.sampler.delay = lookahead * batch_size
        self._readers = None
        if num_workers:
            # The weights of the last `num_workers` batches, which a worker may not have passed, and a change a batch.
            schedule = SharedSchedule(capacity=num_workers + lookahead + 4, num_choices=len(self.sampler.names))
            self._readers = Readers(num_workers, batch_size, schedule)
        self.post()

    def unshare(self) -> None:
        """The loader is over: new weights hold from the next row on."""
        self.sampler.delay = 0
        self._readers = None

    def set_weights(self, weights: Sequence[float] | Tensor, *, begin: int) -> None:
        """Those of the sampler and its workers, from row ``begin`` on.

        Raises:
            ConfigError: unusable weights, or the row has been drawn.
        """
        self.sampler.set_weights(weights, begin=begin)
        self.post()

    def post(self) -> None:
        """Tells the workers, if there are any, what the sampler's weights are."""
        if self._readers is not None:
            behind = self._readers.num_workers * self._readers.batch_size
            self._readers.schedule.post(self.sampler.entries_from(self.sampler.num_drawn - behind))

    def _worker_draws(self, number: int, num_workers: int) -> Iterator[tuple[int, int]]:
        """The rows of worker ``number``: each ``num_workers``-th batch."""
        readers = self._readers
        if readers is None or readers.num_workers != num_workers:
            told = "no workers" if readers is None else f"{readers.num_workers} workers"
            raise ConfigError(
                f"a loader with {num_workers} workers reads a mixture that knows of {told}: make it by "
                "MixtureDataset.batches(num_workers=…), watch the Trainer by a MixtureCallback, or use num_workers=0"
            )
        if readers.started:
            raise ConfigError("workers of a mixture cannot start over: leave out `persistent_workers`")
        readers.started = True
        # PyTorch hands out batches in turn, so this worker's next one is `num_workers` batches after its last.
        first, size = self.sampler.num_drawn, readers.batch_size
        for start in itertools.count(first + number * size, num_workers * size):
            # Read now and not earlier: all that may hold for this batch was posted before its task was given out.
            self.sampler.follow(readers.schedule.read())
            self.sampler.advance(start)
            for _ in range(size):
                yield self.sampler.draw()

    def state_dict(self, *, num_consumed: int | None = None) -> dict[str, Any]:
        """That of the sampler."""
        return self.sampler.state_dict(num_consumed=num_consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """That of the sampler."""
        self.sampler.load_state_dict(state)


def collate(examples: Sequence[Mapping[str, Any]], *, filler: int) -> dict[str, Tensor]:
    """What a causal language model of Transformers takes: ``input_ids``, ``attention_mask``, ``labels``.

    Rows are filled on the right with ``filler``; the mask is 0 and the label −100 (not counted) there.

    >>> batch = collate([{"input_ids": [5, 6]}, {"input_ids": [7]}], filler=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6], [7, 0]], [[5, 6], [7, -100]])
    """
    batch = pad_blocks([torch.as_tensor(example["input_ids"]) for example in examples], filler=filler)
    return {
        "input_ids": batch.tokens,
        "attention_mask": batch.token_mask.long(),
        # −100 is the index that PyTorch's cross-entropy ignores.
        "labels": batch.tokens.masked_fill(~batch.token_mask, -100),
    }
