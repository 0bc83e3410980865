"""What goes into a forward pass and what comes out of it: masks, the KV cache of a layer, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


@dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
        logits: float32 logits at the positions marked by ``keep``, in row-major order.
        captured: output of the module ``capture`` at every position, or None.
    """

    logits: Float[Tensor, "kept vocab"]
    captured: Tensor | None


def additive_mask(mask: Bool[Tensor, "batch time slots"], dtype: torch.dtype) -> Float[Tensor, "batch 1 time slots"]:
    """0 where ``mask`` is True, else the lowest finite number: the form that every attention of Transformers takes."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    # The new axis broadcasts over the heads.
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The first output of a module: what a hook sees is a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


_FIRST_SLOTS = 256
_SLOTS_MULTIPLE = 64  # decode_step.c reads whole blocks of this many slots


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, in buffers that are written in place and double when they are full.

    Lowering ``length`` forgets the slots beyond it.

    Args:
        slots_innermost: store keys as [batch, head, width, slot] in memory, the fastest layout for few queries on a
            CPU. The tensors returned have the same shape either way.
    """

    is_sliding = False

    def __init__(self, *, slots_innermost: bool = False) -> None:
        # Transformers' constructor sets keys and values to None; they are allocated at the first update.
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self._slots_innermost = slots_innermost

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for tensors like these, [batch, head, slot, width]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffers(key_states, value_states, _FIRST_SLOTS)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, head, time, width]; return all of them, [batch, head, length, width]."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        # [batch, head, slot, width]: new slots follow the old ones.
        start = self.length
        self.extend(key_states.shape[-2])
        self.keys[..., start : self.length, :] = key_states
        self.values[..., start : self.length, :] = value_states
        # Views of the used part, no copies: an append costs its own tokens, not the whole sequence.
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    @property
    def capacity(self) -> int:
        """Slots that fit into the buffers."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def extend(self, num_slots: int) -> None:
        """Add ``num_slots`` slots for the caller to write; keys and values so far are preserved."""
        start, self.length = self.length, self.length + num_slots
        if self.length > self.capacity:
            assert self.keys is not None
            assert self.values is not None
            # Doubling copies each slot about once on average, however long the sequence grows.
            old_keys, old_values = self.keys, self.values
            self.keys, self.values = self._buffers(old_keys, old_values, _round_up(2 * self.length))
            self.keys[..., :start, :] = old_keys[..., :start, :]
            self.values[..., :start, :] = old_values[..., :start, :]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Replace each row by ``repeats`` copies, next to each other."""
        if self.keys is None or self.values is None:
            return
        keys, values = (held[..., : self.length, :].repeat_interleave(repeats, 0) for held in (self.keys, self.values))
        # The capacity stays, so that the copies grow no sooner than the original would have.
        self.keys, self.values = self._buffers(keys, values, self.capacity)
        self.keys[..., : self.length, :] = keys
        self.values[..., : self.length, :] = values

    def _buffers(self, keys: Tensor, values: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Empty buffers of ``slots`` for tensors like ``keys`` and ``values``."""
        *outer, _, width = keys.shape
        new_values = values.new_empty(*values.shape[:-2], slots, values.shape[-1])
        if self._slots_innermost:
            return keys.new_empty(*outer, width, slots).transpose(-1, -2), new_values  # same shape, other strides
        return keys.new_empty(*outer, slots, width), new_values

    def get_seq_length(self) -> int:
        """Slots in use."""
        return self.length

    def get_max_length(self) -> int:
        """−1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of slots that a block of ``query_length`` tokens may attend to, and the first of them."""
        return self.length + query_length, 0


def num_slots(length: int) -> int:
    """Slots that a layer holds once it has grown, token by token, to ``length``.

    >>> num_slots(256), num_slots(257)
    (256, 576)
    """
    slots = _FIRST_SLOTS
    while slots < length:
        slots = _round_up(2 * (slots + 1))
    return slots


def _round_up(slots: int) -> int:
    return -(-slots // _SLOTS_MULTIPLE) * _SLOTS_MULTIPLE
