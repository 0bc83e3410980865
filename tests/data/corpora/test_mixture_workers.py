"""A mixture that a loader's workers read: the rows of a loader without workers, and faults that change them."""

from __future__ import annotations

import json
import time
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from preceptor.data.corpora import mixture, mixture_workers
from preceptor.data.corpora.blocks import TokenBlocks
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler, collate
from preceptor.data.corpora.mixture_workers import SharedSchedule
from preceptor.errors import ConfigError, NumericError

SIZES = {"books": 5, "code": 3, "noise": 8}
SIZE = 4
"""Rows of a batch."""

# torch warns of forks beside threads; its loaders fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores
    # A worker that was forked beside the threads of other tests' libraries may abort as it ends, its rows long given.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function _MultiProcessingDataLoaderIter.__del__:"
        "pytest.PytestUnraisableExceptionWarning"
    ),
]


def dataset(seed: int = 0, weights: Any = None) -> MixtureDataset:
    # Token 100·dataset + row starts each block, which says where an example is from.
    blocks = [
        TokenBlocks(name, [[100 * place + row, 7] for row in range(size)])
        for place, (name, size) in enumerate(SIZES.items())
    ]
    return MixtureDataset(blocks, sampler=MixtureSampler(SIZES, seed=seed, weights=weights))


def firsts(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def changed(step: int) -> list[float]:
    """Weights that differ from step to step."""
    return [1.0 + step % 5, 1.0 + step % 2, 1.0 + step % 3]


def read(mixed: MixtureDataset, steps: range, *, every: int = 1, pause: float = 0.0, **loader: Any) -> list[list[int]]:
    """The rows of each step, after every ``every``-th of which the weights change."""
    batches = mixed.batches(batch_size=SIZE, collate_fn=partial(collate, filler=0), **loader)
    found = []
    for step in steps:
        time.sleep(pause)  # the workers get as far ahead as they may
        found.append(firsts(next(batches)))
        if step % every == 0:
            mixed.sampler.weights = changed(step)
    batches.close()
    return found


def expected(num: int, *, lookahead: int, every: int = 1) -> list[list[int]]:
    """The same from a sampler alone: the weights of step s hold from batch s + 1 + ``lookahead`` on."""
    sampler = MixtureSampler(SIZES, seed=0)
    found = []
    for batch in range(num):
        step = batch - 1 - lookahead
        if step >= 0 and step % every == 0:
            sampler.weights = changed(step)
        found.append([100 * place + row for place, row in (sampler.draw() for _ in range(SIZE))])
    return found


@pytest.mark.parametrize(("workers", "lookahead"), [(0, 0), (0, 6), (1, 2), (1, 6), (2, 4), (2, 6), (3, 6)])
def test_rows_are_those_of_a_sampler_whose_weights_come_later(workers, lookahead):
    found = read(dataset(), range(24), num_workers=workers, lookahead=lookahead, pause=0.02)
    assert found == expected(24, lookahead=lookahead)


def test_without_a_number_weights_come_as_soon_as_the_workers_allow():
    assert read(dataset(), range(20), num_workers=2) == expected(20, lookahead=4)
    assert read(dataset(), range(20), num_workers=2, prefetch_factor=1) == expected(20, lookahead=2)
    assert read(dataset(), range(20)) == expected(20, lookahead=0)


def test_weights_set_before_the_first_batch_hold_for_it():
    for workers in (0, 2):
        mixed = dataset(weights=[1, 0, 0])
        batches = mixed.batches(batch_size=SIZE, collate_fn=partial(collate, filler=0), num_workers=workers)
        mixed.sampler.weights = [0, 0, 1]
        assert {token // 100 for token in firsts(next(batches))} == {2}
        batches.close()


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 1), (1, 2)])
def test_another_number_of_workers_goes_on_exactly(before, after):
    whole = read(dataset(), range(30), num_workers=0, lookahead=4, every=3)
    first = dataset()
    begun = read(first, range(11), num_workers=before, lookahead=4, every=3)
    state = json.loads(json.dumps(first.state_dict()))
    assert sum(state["counts"].values()) == 11 * SIZE
    assert len(state["weights"]) > 1  # weights that were set and do not hold yet
    second = dataset()
    second.load_state_dict(state)
    assert begun + read(second, range(11, 30), num_workers=after, lookahead=4, every=3) == whole


def test_workers_that_are_spawned_read_the_same():
    context = get_context("spawn")
    found = read(dataset(), range(8), num_workers=1, multiprocessing_context=context)
    assert found == expected(8, lookahead=2)


def test_an_epoch_of_reading_leaves_a_mixture_that_can_be_read_again():
    mixed = dataset()
    first = read(mixed, range(6), num_workers=2, every=100)
    assert mixed.sampler.delay == 0
    assert first + read(mixed, range(6, 12), num_workers=0, every=100) == expected(12, lookahead=4, every=100)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_weights_that_workers_do_not_learn_of_are_seen(monkeypatch):
    monkeypatch.setattr(MixtureDataset, "post", lambda self: None)
    assert read(dataset(), range(20), num_workers=2, lookahead=4) != expected(20, lookahead=4)


def test_workers_that_all_read_the_same_rows_are_seen(monkeypatch):
    draws = MixtureDataset._worker_draws
    monkeypatch.setattr(MixtureDataset, "_worker_draws", lambda self, number, workers: draws(self, 0, workers))
    # Forked, whatever another library has made the default: workers that are spawned know nothing of the fault.
    found = read(dataset(), range(20), num_workers=2, lookahead=4, multiprocessing_context=get_context("fork"))
    assert found != expected(20, lookahead=4)


def test_weights_that_come_too_soon_stop_the_loader(monkeypatch):
    monkeypatch.setattr(mixture, "checked_lookahead", lambda lookahead, **_: 0)
    with pytest.raises(ConfigError, match="under the old ones; the loader reads further ahead than `lookahead` says"):
        read(dataset(), range(20), num_workers=2, pause=0.1)


def test_a_batch_of_another_size_than_was_said_stops_the_loader():
    """Workers that count batches of 4 rows in a loader of 8 would give rows twice."""
    mixed = dataset()
    mixed.share(batch_size=SIZE, num_workers=2, lookahead=4)
    loader = iter(DataLoader(mixed, batch_size=2 * SIZE, num_workers=2, collate_fn=partial(collate, filler=0)))

    def train() -> None:
        for step in range(20):
            next(loader)
            time.sleep(0.05)
            mixed.sampler.advance(given := (step + 1) * SIZE)
            mixed.set_weights(changed(step), begin=given + 4 * SIZE)

    with pytest.raises(ConfigError, match="batches are of another size"):
        train()


# --- the sampler ------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 400)), max_size=5), st.integers(0, 2500))
def test_advancing_is_drawing(changes, end):
    """Over pages of 1,024 numbers, changes of the weights on their way and epochs of the datasets."""
    drawing, advancing = MixtureSampler(SIZES, seed=3), MixtureSampler(SIZES, seed=3)
    for number, (row, wait) in enumerate(changes):
        for sampler in (drawing, advancing):
            while sampler is drawing and sampler.num_drawn < row:
                sampler.draw()
            sampler.advance(row)
            sampler.set_weights(changed(number), begin=sampler.num_drawn + wait)
    while drawing.num_drawn < end:
        drawing.draw()
    advancing.advance(end)
    assert advancing.state_dict() == drawing.state_dict()
    assert advancing._recent == drawing._recent
    assert [advancing.draw() for _ in range(5)] == [drawing.draw() for _ in range(5)]


def test_weights_for_a_row_that_was_drawn_are_refused():
    sampler = MixtureSampler(SIZES, seed=0)
    sampler.advance(10)
    with pytest.raises(ConfigError, match="cannot hold from row 9 on, 10 rows are drawn"):
        sampler.set_weights([1, 1, 1], begin=9)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_loaders_that_cannot_be_exact_are_refused():
    def begun(**loader: Any) -> None:
        next(dataset().batches(batch_size=SIZE, collate_fn=partial(collate, filler=0), **loader))

    with pytest.raises(ConfigError, match=r"`lookahead` must be at least 6 batches for 2 workers.*got 5"):
        begun(num_workers=2, prefetch_factor=3, lookahead=5)
    with pytest.raises(ConfigError, match=r"`lookahead` must be at least 0 batches for 0 workers.*got -1"):
        begun(lookahead=-1)
    for loader in ({"persistent_workers": True}, {"in_order": False}):
        with pytest.raises(ConfigError, match="give batches in order; leave both out"):
            begun(num_workers=1, **loader)


def test_workers_that_start_over_or_are_of_another_number_are_refused():
    mixed = dataset()
    mixed.share(batch_size=SIZE, num_workers=2, lookahead=4)
    with pytest.raises(ConfigError, match="a loader with 1 workers reads a mixture that knows of 2 workers"):
        next(iter(DataLoader(mixed, batch_size=SIZE, num_workers=1, collate_fn=partial(collate, filler=0))))
    loader = DataLoader(
        mixed, batch_size=SIZE, num_workers=2, collate_fn=partial(collate, filler=0), persistent_workers=True
    )
    next(iter(loader))
    with pytest.raises(ConfigError, match="cannot start over"):
        next(iter(loader))


def test_a_shared_schedule_holds_what_was_posted_last_and_no_more_than_it_can():
    shared = SharedSchedule(capacity=2, num_choices=2)
    assert shared.read() == []
    entry = (2**40, torch.tensor([0.1, 0.9], dtype=torch.float64))
    shared.post([(0, entry[1]), entry])
    shared.post([entry])
    ((begin, weights),) = shared.read()
    assert begin == 2**40
    assert torch.equal(weights, entry[1])
    with pytest.raises(ConfigError, match="3 changes of the weights wait for their rows, at most 2 can"):
        shared.post([entry] * 3)


def test_a_lock_that_a_killed_worker_held_is_an_error(monkeypatch):
    monkeypatch.setattr(mixture_workers, "_LOCK_SECONDS", 0.05)
    shared = SharedSchedule(capacity=2, num_choices=2)
    shared._lock.acquire()
    for use in (shared.read, lambda: shared.post([])):
        with pytest.raises(NumericError, match="a loader's worker was killed; resume"):
            use()
