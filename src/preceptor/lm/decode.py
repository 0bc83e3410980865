"""Decoding a batch of sequences on one KV cache: append, generate, append again; nothing is encoded twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from preceptor.errors import ModelError, ShapeError
from preceptor.lm.forward import KVCacheLayer
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, Stream, draw
from preceptor.lm.score import pad_rows


@dataclass(frozen=True)
class Generated:
    """Generated tokens of a batch.

    Attributes:
        tokens: the sampled tokens.
        log_probs: log-probability of each under the distribution it was sampled from, in nats.
        entropy: entropy of that distribution, in nats.
        captured: output of the captured module at each of them, or None.
    """

    tokens: Int[Tensor, "batch token"]
    log_probs: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"]
    captured: Float[Tensor, "batch token dimension"] | None


@dataclass(frozen=True)
class Mark:
    """A state that a :class:`Decoder` can return to; the cache itself is not copied."""

    filled: Bool[Tensor, "batch slots"]
    lengths: Int[Tensor, " batch"]
    next_logits: Float[Tensor, "batch vocab"] | None
    has_holes: bool


class Decoder:
    """A batch of open-ended sequences that advance together on one KV cache.

    Sequences may differ in length. Every call to :meth:`append` adds the same number of slots to each row; the slots
    that a shorter row does not need are padding, which is masked and takes no position, so a row does not depend on its
    neighbours beyond rounding. No gradient is recorded. A call that raises leaves the rows unchanged.

    Tokens go through the model's engine (:meth:`~preceptor.lm.model.LanguageModel.engine`) if there is one and it can
    capture ``capture``, with the weights as they are at the first :meth:`append`; otherwise through the model itself.

    Args:
        lm: the model.
        batch_size: number of rows.
        capture: a module of ``lm`` whose output is recorded at generated tokens.
        dtype: decode with matrices in this dtype, which needs an engine; None is autocast's where it is on, else the
            model's own. Recorded log-probabilities are those under the rounded weights, which were sampled from.
        use_engine: False sends tokens through the model itself in any case.

    Raises:
        ModelError: ``dtype`` is not the model's and there is no engine.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int,
        capture: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        use_engine: bool = True,
    ) -> None:
        self.lm = lm
        self.batch_size = batch_size
        self._capture = capture
        # Under autocast the model's products run in a lower precision; an engine, which turns autocast off, has to be
        # told.
        autocast = lm.device.type if torch.is_autocast_enabled(lm.device.type) else None
        weights_dtype = dtype or (torch.get_autocast_dtype(autocast) if autocast else lm.dtype)
        engine = lm.engine(dtype=weights_dtype) if use_engine else None
        self._engine = engine if engine is not None and engine.can_capture(capture) else None
        if not self.uses_engine and dtype not in (None, lm.dtype):
            raise ModelError(f"{lm.name} decodes in {lm.dtype} alone, got {dtype}; load it in that dtype")
        # The compiled step reads keys with slots innermost; the model's own attention reads rows.
        slots_innermost = self.uses_engine and lm.device.type == "cpu"
        self._layers = [KVCacheLayer(slots_innermost=slots_innermost) for _ in lm.layers]
        self._cache = Cache(layers=list(self._layers))
        # Without holes a single new token attends to every slot, and then needs no mask at all.
        self._has_holes = False
        self._filled = torch.zeros(batch_size, 0, dtype=torch.bool, device=lm.device)
        self._lengths = torch.zeros(batch_size, dtype=torch.long, device=lm.device)
        self._next_logits: Tensor | None = None

    @property
    def uses_engine(self) -> bool:
        """Whether tokens go through the model's engine."""
        return self._engine is not None

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of tokens in each row."""
        return self._lengths.clone()

    @property
    def next_log_probs(self) -> Float[Tensor, "batch vocab"]:
        """Log-probabilities, in nats, of every possible next token of each row.

        Raises:
            ModelError: nothing has been read yet.
        """
        if self._next_logits is None:
            raise ModelError("nothing has been read yet; append a prompt before asking for the next token")
        return self._next_logits.log_softmax(-1)

    def append(self, sequences: Sequence[Sequence[int]]) -> None:
        """Append one sequence of tokens to each row; they may differ in length and, except in the first call, be empty.

        Raises:
            ShapeError: the number of sequences is not the batch size.
            ModelError: a row would outgrow the model's context, or is empty in the first call.
        """
        if len(sequences) != self.batch_size:
            raise ShapeError(f"`sequences` must hold one for each of {self.batch_size} rows, got {len(sequences)}")
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.lm.device)
        if self._next_logits is None and not bool(lengths.all()):
            raise ModelError("a row of the batch starts empty; give every row at least one token first")
        if not bool(lengths.any()):
            return
        # Before anything is written, so that a batch that does not fit leaves the decoder as it was.
        self._check_room(lengths)
        self._has_holes = self._has_holes or len({len(sequence) for sequence in sequences}) > 1
        tokens = pad_rows(sequences, filler=self.lm.begin_token, device=self.lm.device)  # [batch, longest new sequence]
        steps = torch.arange(tokens.shape[1], device=self.lm.device)
        # Logits only at the last token of each row: [rows with tokens, vocab].
        # `steps < lengths` is True at real tokens and False at padding.
        logits, _ = self._advance(tokens, steps < lengths[:, None], keep=steps == lengths[:, None] - 1)
        if self._next_logits is None:
            self._next_logits = logits
        else:  # rows without new tokens still have the logits of before
            self._next_logits = self._next_logits.masked_scatter((lengths > 0)[:, None], logits)

    def repeat(self, times: int) -> None:
        """Replace each row by ``times`` copies, next to each other: many continuations of a prompt that is read once.

        Invalidates earlier marks.

        Raises:
            ShapeError: ``times`` is below 1.
        """
        if times < 1:
            raise ShapeError(f"`times` must be at least 1, got {times}")
        if times == 1:
            return
        self.batch_size *= times
        # One prompt is read once, then copied: a group of n continuations pays for its prompt once.
        for layer in self._layers:
            layer.batch_repeat_interleave(times)
        self._filled, self._lengths = (held.repeat_interleave(times, 0) for held in (self._filled, self._lengths))
        if self._next_logits is not None:
            self._next_logits = self._next_logits.repeat_interleave(times, 0)

    @torch.no_grad()
    def generate(self, num_tokens: int, *, sampling: Sampling, generator: Stream) -> Generated:
        """Sample ``num_tokens`` tokens for every row and append them.

        The log-probabilities are those of the forward pass that the tokens were sampled from, not of a second one.

        Raises:
            ShapeError: ``num_tokens`` is below 1.
            ModelError: a row would outgrow the model's context, or nothing has been read yet.
            NumericError: the model's logits are NaN.
        """
        if num_tokens < 1:
            raise ShapeError(f"`num_tokens` must be at least 1, got {num_tokens}")
        if self._next_logits is None:
            raise ModelError("nothing has been read yet; append a prompt before generating")
        # Checked for the whole generation at once: failing half way would leave tokens nobody recorded.
        self._check_room(torch.tensor(num_tokens, device=self.lm.device))
        every = torch.ones(self.batch_size, 1, dtype=torch.bool, device=self.lm.device)
        tokens, token_log_probs, entropies, captured = [], [], [], []
        for _ in range(num_tokens):
            log_probs = sampling.log_probs(self._next_logits)  # [batch, vocab]
            token = draw(log_probs, generator)  # [batch]
            tokens.append(token)
            token_log_probs.append(log_probs.gather(-1, token[:, None])[:, 0])
            finite = log_probs.clamp_min(
                torch.finfo(log_probs.dtype).min
            )  # p·log p is 0·(−∞) = NaN for ruled-out tokens
            entropies.append(-(log_probs.exp() * finite).sum(-1))
            # The last token is read too: its output may be captured, and the next call goes on after it.
            self._next_logits, state = self._advance(token[:, None], every, keep=every)
            if state is not None:
                captured.append(state[:, 0])  # [batch, dimension]
        return Generated(
            tokens=torch.stack(tokens, 1),
            log_probs=torch.stack(token_log_probs, 1),
            entropy=torch.stack(entropies, 1),
            captured=torch.stack(captured, 1) if captured else None,
        )

    def mark(self) -> Mark:
        """A state to :meth:`rewind` to, as often as wanted, until the decoder is rewound to before it."""
        # No copy of keys and values: tensors here are replaced, never written to, so holding them is enough.
        return Mark(self._filled, self._lengths, self._next_logits, self._has_holes)

    def rewind(self, mark: Mark) -> None:
        """Forget everything read since ``mark``."""
        slots = mark.filled.shape[1]  # later slots stay in the buffers and are overwritten
        assert slots <= self._filled.shape[1], "a mark lies beyond what has been read"
        # Keys and values of forgotten slots stay in memory; `length` alone says which slots exist.
        for layer in self._layers:
            layer.length = slots
        self._filled, self._lengths, self._next_logits = mark.filled, mark.lengths, mark.next_logits
        self._has_holes = mark.has_holes

    def _check_room(self, new_tokens: Tensor) -> None:
        longest = int((self._lengths + new_tokens).max())
        if longest > self.lm.context_length:
            raise ModelError(
                f"a sequence of {longest} tokens does not fit the context of {self.lm.context_length} tokens of "
                f"{self.lm.name}; read fewer or shorter pairs"
            )

    @torch.no_grad()
    def _advance(
        self, tokens: Int[Tensor, "batch time"], counts: Bool[Tensor, "batch time"], *, keep: Bool[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "kept vocab"], Float[Tensor, "batch time dimension"] | None]:
        """Read one block of tokens; ``counts`` is False at padding."""
        time = tokens.shape[1]
        # Padding repeats the position of the token before it, so that the next token continues the count.
        positions = (self._lengths[:, None] + counts.cumsum(1) - 1).clamp_min(0)  # [batch, time]
        mask = None
        if not self.uses_engine or time > 1 or self._has_holes:
            causal = torch.ones(time, time, dtype=torch.bool, device=tokens.device).tril()
            earlier = self._filled[:, None].expand(-1, time, -1)  # [batch, time, slots so far]
            # Every row begins with a token, so that padding too has something to attend to and no softmax is empty.
            mask = torch.cat([earlier, counts[:, None] & causal], dim=-1)  # [batch, time, slots so far + time]
        if self._engine is not None:
            logits, captured = self._engine.forward(
                tokens,
                keep=keep,
                attention_mask=mask,
                positions=positions,
                cache=self._layers,
                capture=self._capture,
            )
        else:
            output = self.lm.forward(
                tokens,
                keep=keep,
                attention_mask=mask,
                positions=positions,
                cache=self._cache,
                capture=self._capture,
            )
            logits, captured = output.logits, output.captured
        # The next call's mask must know which of these slots are padding.
        self._filled = torch.cat([self._filled, counts], dim=1)
        self._lengths = self._lengths + counts.sum(1)
        return logits, captured
