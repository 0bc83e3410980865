"""Decoding a batch of open sequences on one kept cache: generate, append, generate again; nothing is encoded twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from preceptor.errors import ModelError
from preceptor.lm.language_model import LanguageModel
from preceptor.lm.sampling import Sampling, draw


class KeptLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that grow by doubling and are written in place; it can be rewound."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = (_buffer(states, 256) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self._keys.shape[-2]:
            self._keys, self._values = (self._grown(buffer, start) for buffer in (self._keys, self._values))
        self._keys[..., start : self.length, :] = key_states
        self._values[..., start : self.length, :] = value_states
        return self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def _grown(self, buffer: Tensor, used: int) -> Tensor:
        grown = _buffer(buffer, 2 * self.length)
        grown[..., :used, :] = buffer[..., :used, :]
        return grown

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def _buffer(like: Tensor, slots: int) -> Tensor:
    return like.new_empty(*like.shape[:-2], slots, like.shape[-1])


@dataclass(frozen=True)
class Generated:
    """Tokens that a batch generated.

    Attributes:
        tokens: what was drawn.
        log_probs: log-probability of each drawn token under the distribution it was drawn from, in nats.
        entropy: entropy of that distribution, in nats.
        captured: the captured module's output at each drawn token, or None.
    """

    tokens: Int[Tensor, "batch token"]
    log_probs: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"]
    captured: Float[Tensor, "batch token dimension"] | None


class Decoder:
    """A batch of open sequences that advance together on one kept cache.

    Rows may differ in length: what a row lacks beside a longer one is a hole that no query attends to, and each row
    counts its own positions, so a row's numbers do not depend on its neighbours. No gradient is recorded.

    Args:
        lm: the model.
        batch_size: number of rows.
        capture: a module of ``lm`` whose output is wanted at generated tokens.
    """

    def __init__(self, lm: LanguageModel, *, batch_size: int, capture: nn.Module | None = None) -> None:
        self.lm = lm
        self.batch_size = batch_size
        self._capture = capture
        self._cache = Cache(layers=[KeptLayer() for _ in lm.layers])
        self._filled = torch.zeros(batch_size, 0, dtype=torch.bool, device=lm.device)
        self._lengths = torch.zeros(batch_size, dtype=torch.long, device=lm.device)
        self._next_logits: Tensor | None = None

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens that each row holds."""
        return self._lengths.clone()

    def append(self, sequences: Sequence[Sequence[int]]) -> None:
        """Read each row's own tokens; rows may differ in length, and be empty but for the first call.

        Raises:
            ModelError: a row would outgrow the model's context.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.lm.device)
        width = int(lengths.max())
        if width == 0:
            return
        tokens = torch.tensor(
            [[*sequence, *([self.lm.begin_token] * (width - len(sequence)))] for sequence in sequences],
            device=self.lm.device,
        )
        counts = torch.arange(width, device=self.lm.device) < lengths[:, None]
        last = torch.arange(width, device=self.lm.device) == (lengths[:, None] - 1)
        logits, _ = self._advance(tokens, counts, keep=last)
        if self._next_logits is None:
            if int(lengths.min()) == 0:
                raise ModelError("a row of the batch starts empty; give every row at least one token first")
            self._next_logits = logits
        else:
            self._next_logits = self._next_logits.masked_scatter((lengths > 0)[:, None], logits)

    def generate(self, num_tokens: int, *, sampling: Sampling, generator: torch.Generator) -> Generated:
        """Draw ``num_tokens`` for every row and read them.

        Log-probabilities come from the very forward pass that the tokens were drawn from.
        """
        if self._next_logits is None:
            raise ModelError("nothing has been read yet; append a prompt before generating")
        counts = torch.ones(self.batch_size, 1, dtype=torch.bool, device=self.lm.device)
        tokens, token_log_probs, entropies, captured = [], [], [], []
        for _ in range(num_tokens):
            log_probs = sampling.log_probs(self._next_logits)
            token = draw(log_probs, generator)
            tokens.append(token)
            token_log_probs.append(log_probs.gather(-1, token[:, None])[:, 0])
            entropies.append(-(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1))
            self._next_logits, state = self._advance(token[:, None], counts, keep=counts)
            if state is not None:
                captured.append(state[:, 0])
        return Generated(
            tokens=torch.stack(tokens, 1),
            log_probs=torch.stack(token_log_probs, 1),
            entropy=torch.stack(entropies, 1),
            captured=torch.stack(captured, 1) if captured else None,
        )

    def mark(self) -> tuple[int, Tensor, Tensor | None]:
        """A place to :meth:`rewind` to."""
        return self._filled.shape[1], self._lengths, self._next_logits

    def rewind(self, mark: tuple[int, Tensor, Tensor | None]) -> None:
        """Forget everything read since ``mark``."""
        slots, self._lengths, self._next_logits = mark
        self._filled = self._filled[:, :slots]
        for layer in self._cache.layers:
            layer.length = slots

    @torch.no_grad()
    def _advance(self, tokens: Tensor, counts: Tensor, *, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read one block; ``counts`` is False at holes."""
        new_lengths = self._lengths + counts.sum(1)
        if int(new_lengths.max()) > self.lm.context_length:
            raise ModelError(
                f"a sequence of {int(new_lengths.max())} tokens does not fit the context of {self.lm.context_length} tokens "
                f"of {self.lm.name}; read fewer or shorter pairs"
            )
        width, slots = tokens.shape[1], self._filled.shape[1]
        self._filled = torch.cat([self._filled, counts], dim=1)
        visible = self._filled[:, None, :].expand(-1, width, -1)
        if width > 1:
            causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
            # A hole attends to itself alone: a row without any key would give NaN, which sums would spread.
            own = torch.eye(width, dtype=torch.bool, device=tokens.device)
            block = (visible[..., slots:] & causal) | own
            visible = torch.cat([visible[..., :slots], block], dim=-1)
        mask = torch.zeros(visible.shape, dtype=self.lm.dtype, device=tokens.device)
        mask.masked_fill_(~visible, torch.finfo(self.lm.dtype).min)
        positions = (self._lengths[:, None] + counts.cumsum(1) - 1).clamp_min(0)
        output = self.lm.forward(
            tokens,
            keep=keep,
            attention_mask=mask[:, None],
            positions=positions,
            cache=self._cache,
            capture=self._capture,
        )
        self._lengths = new_lengths
        return output.logits, output.captured
