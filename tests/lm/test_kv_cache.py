"""The KV cache of a layer: what was given comes back, in buffers that the compiled decode step can read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from preceptor.lm.forward import KVCacheLayer

BLOCK = 64
"""Slots that ``decode_step.c`` reads at once, from any multiple of it on."""


def block(num_slots: int, *, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of two heads; the heads of values are wider, so that exchanging them shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, num_slots, 4, generator=generator), torch.randn(
        rows, 2, num_slots, 6, generator=generator
    )


@pytest.mark.parametrize("slots_innermost", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (255, 1, 1), (300, 1), (256, 257, 600), (700, 1, 900)])
def test_what_was_given_comes_back_however_the_buffers_grow(slots_innermost: bool, sizes: tuple[int, ...]) -> None:
    layer = KVCacheLayer(slots_innermost=slots_innermost)
    blocks = [block(size, seed=seed) for seed, size in enumerate(sizes)]
    for given in blocks:
        keys, values = layer.update(*given)
        assert layer.capacity >= layer.length
        assert layer.capacity % BLOCK == 0  # else the step would read beyond the last row
    assert layer.get_seq_length() == sum(sizes)
    assert torch.equal(keys, torch.cat([given[0] for given in blocks], -2))
    assert torch.equal(values, torch.cat([given[1] for given in blocks], -2))


def test_keys_lie_as_the_step_reads_them() -> None:
    """[row][head][coordinate][slot], and values [row][head][slot][coordinate], also after rows were repeated."""
    layer = KVCacheLayer(slots_innermost=True)
    layer.update(*block(3))
    for _ in range(2):
        assert layer.keys is not None
        assert layer.values is not None
        assert layer.keys.transpose(-1, -2).is_contiguous()
        assert layer.values.is_contiguous()
        layer.batch_repeat_interleave(3)


@pytest.mark.parametrize("slots_innermost", [False, True])
def test_copies_of_a_row_stand_side_by_side_and_part(slots_innermost: bool) -> None:
    layer = KVCacheLayer(slots_innermost=slots_innermost)
    keys, values = block(5)
    layer.update(keys, values)
    layer.batch_repeat_interleave(3)
    more_keys, more_values = block(2, rows=6, seed=1)
    found_keys, found_values = layer.update(more_keys, more_values)
    for row in range(6):
        assert torch.equal(found_keys[row], torch.cat([keys[row // 3], more_keys[row]], -2))
        assert torch.equal(found_values[row], torch.cat([values[row // 3], more_values[row]], -2))


def test_a_length_set_back_forgets() -> None:
    layer = KVCacheLayer()
    first, other = block(4), block(2, seed=1)
    layer.update(*first)
    layer.update(*block(300, seed=2))
    layer.length = 4
    keys, values = layer.update(*other)
    assert torch.equal(keys, torch.cat([first[0], other[0]], -2))
    assert torch.equal(values, torch.cat([first[1], other[1]], -2))
    assert layer.get_mask_sizes(3) == (9, 0)


def test_nothing_is_there_to_repeat_before_the_first_token() -> None:
    layer = KVCacheLayer()
    layer.batch_repeat_interleave(4)
    assert (layer.capacity, layer.get_seq_length()) == (0, 0)
