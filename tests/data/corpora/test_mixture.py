from __future__ import annotations

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

from preceptor.data.corpora.blocks import TokenBlocks
from preceptor.data.corpora.mixture import MixtureDataset, MixtureSampler, collate
from preceptor.errors import CheckpointError, ConfigError

SIZES = {"books": 5, "code": 3, "noise": 8}


def drawn(sampler: MixtureSampler, num: int) -> list[tuple[int, int]]:
    return [sampler.draw() for _ in range(num)]


def dataset(seed: int = 0, weights=None) -> MixtureDataset:
    # Token 100·dataset + row starts each block, which says where an example is from.
    blocks = [
        TokenBlocks(name, [[100 * place + row, *([7] * (1 + row))] for row in range(size)])
        for place, (name, size) in enumerate(SIZES.items())
    ]
    return MixtureDataset(blocks, sampler=MixtureSampler(SIZES, seed=seed, weights=weights))


# --- sampler ----------------------------------------------------------------------------------------------------------


def test_datasets_come_in_the_shares_of_the_weights():
    weights = [0.5, 0.2, 0.3]
    sampler = MixtureSampler(SIZES, seed=0, weights=weights)
    num = 20_000
    counts = np.bincount([place for place, _ in drawn(sampler, num)], minlength=3)
    # One draw in a million samples of a right sampler would be further off.
    assert stats.chisquare(counts, num * np.array(weights)).pvalue > 1e-6
    assert sampler.counts.tolist() == counts.tolist()


def test_choices_are_independent_of_each_other():
    places = np.array([place for place, _ in drawn(MixtureSampler({"a": 1, "b": 1}, seed=0), 10_000)])
    for lag in (1, 2, 1023, 1024):  # 1,024 numbers are computed at a time
        table = np.histogram2d(places[:-lag], places[lag:], bins=2)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-6


def test_every_row_comes_once_an_epoch_and_in_another_order_the_next():
    rows = [row for _, row in drawn(MixtureSampler({"a": 50}, seed=3), 150)]
    epochs = [rows[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_share_of_zero_is_never_drawn():
    places = {place for place, _ in drawn(MixtureSampler(SIZES, seed=0, weights=[0, 1, 0]), 500)}
    assert places == {1}


def test_the_extreme_random_numbers_stay_inside():
    sampler = MixtureSampler({str(number): 3 for number in range(10)}, seed=0, weights=[0.1] * 10)
    assert sampler.weights.cumsum(0)[-1] == 1 - 2**-53  # ten tenths do not sum to 1
    sampler._numbers = 0, torch.full((1024,), 1 - 2**-53, dtype=torch.float64)
    assert sampler.draw()[0] == 9
    sampler.weights = [0.0, 0.0, *[1.0] * 8]
    sampler._numbers = 0, torch.zeros(1024, dtype=torch.float64)
    assert sampler.draw()[0] == 2


def test_seeds_differ_and_repeat():
    assert drawn(MixtureSampler(SIZES, seed=1), 50) == drawn(MixtureSampler(SIZES, seed=1), 50)
    assert drawn(MixtureSampler(SIZES, seed=1), 50) != drawn(MixtureSampler(SIZES, seed=2), 50)


def test_the_order_of_rows_depends_on_nothing_but_seed_and_name():
    alone = [row for _, row in drawn(MixtureSampler({"noise": 8}, seed=5), 24)]
    among = MixtureSampler(SIZES, seed=5)
    assert [row for place, row in drawn(among, 100) if place == 2][:24] == alone


def test_drawing_uses_no_global_randomness():
    state = torch.get_rng_state()
    drawn(MixtureSampler(SIZES, seed=0), 20)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=20)
@given(st.integers(0, 3000), st.integers(1, 60), st.lists(st.floats(0.01, 10), min_size=3, max_size=3))
def test_resuming_anywhere_changes_nothing(before, after, weights):
    whole = MixtureSampler(SIZES, seed=9)
    drawn(whole, before)
    whole.weights = weights
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = MixtureSampler(SIZES, seed=9)
    resumed.load_state_dict(state)
    assert drawn(resumed, after) == drawn(whole, after)
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.state_dict() == whole.state_dict()


def test_the_state_does_not_grow():
    sampler = MixtureSampler(SIZES, seed=0)
    early = len(json.dumps(sampler.state_dict()))
    drawn(sampler, 5000)
    assert len(json.dumps(sampler.state_dict())) < early + 20  # a few more digits


def test_what_a_loader_read_ahead_is_drawn_again():
    whole, ahead = MixtureSampler(SIZES, seed=4), MixtureSampler(SIZES, seed=4)
    drawn(whole, 30)
    drawn(ahead, 47)
    state = ahead.state_dict(num_consumed=30)
    assert state == whole.state_dict()
    assert ahead.num_drawn == 47  # asking changes nothing
    resumed = MixtureSampler(SIZES, seed=4)
    resumed.load_state_dict(state)
    assert drawn(resumed, 10) == drawn(whole, 10)


def test_what_was_read_ahead_is_drawn_again_under_its_own_weights():
    whole, ahead = MixtureSampler(SIZES, seed=4, weights=[1, 0, 0]), MixtureSampler(SIZES, seed=4, weights=[1, 0, 0])
    drawn(ahead, 12)
    ahead.weights = [0, 1, 0]  # from row 12 on
    drawn(ahead, 3)
    ahead.weights = [0, 0, 1]  # from row 15 on
    state = json.loads(json.dumps(ahead.state_dict(num_consumed=8)))
    resumed = MixtureSampler(SIZES, seed=4)
    resumed.load_state_dict(state)
    assert [place for place, _ in drawn(resumed, 10)] == [0] * 4 + [1] * 3 + [2] * 3
    drawn(whole, 8)
    assert resumed.weights.tolist() == [0, 0, 1]
    # What the weights were before the rows that can still be taken back is forgotten.
    assert len(resumed.state_dict()["weights"]) == 1


def test_weights_set_anew_before_a_draw_replace_each_other():
    sampler = MixtureSampler(SIZES, seed=4)
    for _ in range(100):
        sampler.weights = [1, 2, 3]
    assert len(sampler.state_dict()["weights"]) == 1
    for _ in range(2000):
        sampler.draw()
        sampler.weights = [1, 2, 3]
    assert len(sampler.state_dict()["weights"]) == 1
    assert len(sampler.state_dict(num_consumed=1990)["weights"]) == 11
    for _ in range(100):
        sampler.weights = [3, 2, 1]
    assert len(sampler.state_dict(num_consumed=1990)["weights"]) == 11


def test_weights_that_no_row_can_go_back_to_are_forgotten(monkeypatch):
    monkeypatch.setattr("preceptor.data.corpora.mixture._REMEMBERED", 8)
    sampler = MixtureSampler(SIZES, seed=4)
    for _ in range(200):
        sampler.draw()
        sampler.weights = [1, 2, 3]
    assert len(sampler._schedule) <= 10
    assert len(sampler.state_dict(num_consumed=192)["weights"]) == 9


def test_what_cannot_have_been_consumed_is_refused():
    sampler = MixtureSampler(SIZES, seed=4)
    drawn(sampler, 3)
    for impossible in (4, -1):
        with pytest.raises(CheckpointError, match="cannot have been consumed of 3 drawn"):
            sampler.state_dict(num_consumed=impossible)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(CheckpointError, match="the last 0 can be taken back"):
        sampler.state_dict(num_consumed=2)


def test_state_of_other_datasets_is_refused():
    sampler = MixtureSampler(SIZES, seed=4)
    drawn(sampler, 3)
    before = sampler.state_dict()
    for other in (MixtureSampler({"books": 5}, seed=4), MixtureSampler(SIZES, seed=5)):
        with pytest.raises(CheckpointError, match="resume with the same"):
            sampler.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="has seed, counts and weights"):
        sampler.load_state_dict({})
    assert sampler.state_dict() == before


def test_unusable_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"at least one row each, got \{'a': 0\}"):
        MixtureSampler({"a": 0}, seed=0)
    with pytest.raises(ConfigError, match="at least one row each"):
        MixtureSampler({}, seed=0)
    sampler = MixtureSampler(SIZES, seed=0)
    for weights in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]):
        with pytest.raises(ConfigError):
            sampler.weights = weights
    assert sampler.weights.tolist() == pytest.approx([1 / 3] * 3)


# --- dataset ----------------------------------------------------------------------------------------------------------


def firsts(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def loader(mixture: MixtureDataset, num_workers: int = 0) -> DataLoader:
    return DataLoader(mixture, batch_size=4, num_workers=num_workers, collate_fn=partial(collate, filler=0))


def test_examples_are_the_rows_that_the_sampler_draws():
    expected = [100 * place + row for place, row in drawn(MixtureSampler(SIZES, seed=0), 40)]
    batches = [batch for batch, _ in zip(loader(dataset()), range(10), strict=False)]
    assert [token for batch in batches for token in firsts(batch)] == expected
    lengths = batches[0]["attention_mask"].sum(1)
    assert lengths.tolist() == [2 + token % 100 for token in firsts(batches[0])]
    assert ((batches[0]["labels"] == -100) == (batches[0]["attention_mask"] == 0)).all()


def test_weights_act_on_the_next_batch():
    mixture = dataset(weights=[1, 0, 0])
    batches = iter(loader(mixture))
    assert {token // 100 for token in firsts(next(batches))} == {0}
    mixture.sampler.weights = [0, 0, 1]
    assert {token // 100 for token in firsts(next(batches))} == {2}


def test_resuming_between_batches_changes_nothing():
    whole = dataset(seed=6)
    batches = iter(loader(whole))
    for _ in range(7):
        next(batches)
    resumed = dataset(seed=6)
    resumed.load_state_dict(whole.state_dict())
    again = iter(loader(resumed))
    for _ in range(5):
        assert torch.equal(next(again)["input_ids"], next(batches)["input_ids"])


def test_another_iterator_goes_on_where_the_first_was():
    mixture = dataset()
    first = [example["input_ids"][0].item() for example, _ in zip(mixture, range(5), strict=False)]
    second = [example["input_ids"][0].item() for example, _ in zip(mixture, range(5), strict=False)]
    expected = [100 * place + row for place, row in drawn(MixtureSampler(SIZES, seed=0), mixture.sampler.num_drawn)]
    assert Counter(first + second) <= Counter(expected)
    assert first != second


def test_workers_are_refused():
    with pytest.raises(ConfigError, match="num_workers=0"):
        next(iter(loader(dataset(), num_workers=1)))


def test_datasets_and_sampler_must_agree():
    blocks = TokenBlocks("books", [[1, 2]])
    for sizes in ({"books": 2}, {"code": 1}):
        with pytest.raises(ConfigError, match="they must agree, in order"):
            MixtureDataset([blocks], sampler=MixtureSampler(sizes, seed=0))
    with pytest.raises(ConfigError, match="they must agree, in order"):
        MixtureDataset([blocks, blocks], sampler=MixtureSampler({"books": 1}, seed=0))
