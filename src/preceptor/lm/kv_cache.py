"""Keys and values that are kept between passes, in the form that Transformers' caches and our own forward share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

_FIRST_SLOTS = 256
_SLOTS_MULTIPLE = 64  # as decode_step.c reads them


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that grow by doubling and are written in place.

    Setting ``length`` back forgets what came after.

    Args:
        slots_innermost: lay keys out with the slots of one coordinate side by side, as products with few queries on a
            CPU want them; what is given looks the same.
    """

    is_sliding = False

    def __init__(self, *, slots_innermost: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self._slots_innermost = slots_innermost

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for tensors like these: batch, heads, slots, width of a head."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffers(key_states, value_states, _FIRST_SLOTS)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and give everything that is kept."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start = self.length
        self.extend(key_states.shape[-2])
        self.keys[..., start : self.length, :] = key_states
        self.values[..., start : self.length, :] = value_states
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    @property
    def capacity(self) -> int:
        """Slots of the buffers."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def extend(self, num_slots: int) -> None:
        """Take ``num_slots`` more into use, whose content is for the caller to write; what is kept stays."""
        start, self.length = self.length, self.length + num_slots
        if self.length > self.capacity:
            assert self.keys is not None
            assert self.values is not None
            old_keys, old_values = self.keys, self.values
            self.keys, self.values = self._buffers(old_keys, old_values, _round_up(2 * self.length))
            self.keys[..., :start, :] = old_keys[..., :start, :]
            self.values[..., :start, :] = old_values[..., :start, :]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """``repeats`` copies of each row, side by side."""
        if self.keys is None or self.values is None:
            return
        keys, values = (held[..., : self.length, :].repeat_interleave(repeats, 0) for held in (self.keys, self.values))
        self.keys, self.values = self._buffers(keys, values, self.capacity)
        self.keys[..., : self.length, :] = keys
        self.values[..., : self.length, :] = values

    def _buffers(self, keys: Tensor, values: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Empty buffers of ``slots`` for tensors like ``keys`` and ``values``."""
        *outer, _, width = keys.shape
        new_values = values.new_empty(*values.shape[:-2], slots, values.shape[-1])
        if self._slots_innermost:
            return keys.new_empty(*outer, width, slots).transpose(-1, -2), new_values
        return keys.new_empty(*outer, slots, width), new_values

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def get_max_length(self) -> int:
        """−1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a block of ``query_length`` tokens may attend to, and the first of them."""
        return self.length + query_length, 0


def _round_up(slots: int) -> int:
    return -(-slots // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE
