"""The reference language model: its next-token probabilities give partial rewards and score what the student writes.

It is an n-gram model counted on the training text, or a pretrained model in the student's vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from preceptor.errors import ConfigError, DataError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel

CHUNK_POSITIONS = 8192
"""Positions whose distributions over the vocabulary are held in memory at a time."""

TRAINING_FACTOR = 3
"""A training step costs three forward passes: the backward pass costs two."""


class ReferenceLM(Protocol):
    """Gives next-token probabilities.

    Attributes:
        flops_per_token: operations for the distribution at one position.
        training_flops: operations that its training took.
    """

    flops_per_token: int
    training_flops: int

    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """p(· | the row's tokens up to and including each position)."""
        ...


class NGramReference:
    """An n-gram model of the training text; it costs one count a token and order, and one mixing step an order."""

    def __init__(self, tokens: Int[Tensor, " token"], *, order: int, vocab_size: int) -> None:
        self._ngram = NGram(tokens, order=order, vocab_size=vocab_size)
        self.flops_per_token = 2 * order * vocab_size
        self.training_flops = order * len(tokens)

    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """As :class:`ReferenceLM`."""
        return self._ngram.probabilities(tokens)


class ModelReference:
    """A frozen language model in the student's vocabulary; its begin token is put before every row.

    Args:
        lm: the model.
        training_tokens: number of tokens it was trained on, at six operations a parameter each.
        block_size: tokens of the longest row.

    Raises:
        DataError: its context is too short for a row.
    """

    def __init__(self, lm: LanguageModel, *, training_tokens: int, block_size: int) -> None:
        if lm.context_length < block_size + 1:
            raise DataError(
                f"the reference model {lm.name} reads {lm.context_length} tokens, too few for a block of {block_size} "
                "and the begin token; choose a smaller `student.block_size`"
            )
        self._lm = lm
        self.flops_per_token = flops_per_token(lm.model, context=block_size + 1)
        self.training_flops = TRAINING_FACTOR * flops_per_token(lm.model, context=lm.context_length) * training_tokens

    @torch.no_grad()
    def probabilities(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
        """As :class:`ReferenceLM`."""
        begin = tokens.new_full((len(tokens), 1), self._lm.begin_token)
        logits: Tensor = self._lm.model(input_ids=torch.cat([begin, tokens], dim=1), use_cache=False).logits
        return logits[:, 1:].float().softmax(-1)  # the first position only saw the begin token


def load_reference_model(name: str, *, device: torch.device) -> LanguageModel:
    """The pretrained model in the folder ``name``, frozen."""
    lm = load_language_model(name, device=device)
    lm.model.requires_grad_(False)
    return lm


def training_tokens(name: str) -> int:
    """Number of tokens that ``preceptor pretrain`` trained the model in the folder ``name`` on.

    Raises:
        DataError: its result.json is not beside the folder.
    """
    result = Path(name).resolve().parent / "result.json"
    try:
        tokens: int = json.loads(result.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot tell how many tokens the reference model {name} was trained on: {result} does not say; "
            "set `referee.training_tokens`"
        ) from error
    return tokens


def flops_per_token(model: nn.Module, *, context: int) -> int:
    """Floating-point operations of a forward pass per token, attention over ``context`` tokens included.

    2 N + 4 · layers · width · context / 2, where N counts the weights that multiply the token's state: all matrices but
    embeddings that are only looked up (a tied one multiplies as the output head). Causal attention sees half the
    context on average.

    Source: Kaplan et al., arXiv 2001.08361, table 1.
    """
    config: Any = model.config
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplies = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in looked_up - {id(head)})
    operations: int = 2 * multiplies + 2 * config.num_hidden_layers * config.hidden_size * context
    return operations


# ---- n-grams --------------------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    """Counts after contexts of one length: one row a context, whose counts are a slice of the entries."""

    keys: Int[Tensor, " context"]  # (row of the context one token shorter) · V + the token before it, ascending
    starts: Int[Tensor, " context"]  # first entry of each row
    num_kinds: Int[Tensor, " context"]  # different tokens seen after it: T
    totals: Float[Tensor, " context"]  # tokens seen after it: c
    tokens: Int[Tensor, " entry"]
    counts: Float[Tensor, " entry"]


class NGram:
    """Interpolated n-gram probabilities with Witten-Bell smoothing.

    p_k(v | h) = (c(h, v) + T(h) · p_{k−1}(v | h')) / (c(h) + T(h))

    where h are the k − 1 tokens before, h' the same without the first of them, c(h) the number of tokens seen after h,
    T(h) how many different ones, and p_0 uniform. A context that was never seen passes p_{k−1} on as it is.

    Args:
        tokens: of the training text, in order, more than ``order``.
        order: n, at least 1; the model looks back n − 1 tokens.
        vocab_size: number of different tokens, V.

    Raises:
        ConfigError: ``order`` below 1.
        DataError: too few tokens.

    Source: Witten and Bell (1991), doi:10.1109/18.87000, in the recursive form of Chen and Goodman (1998).

    >>> bigram = NGram(torch.tensor([0, 1, 0, 1, 1]), order=2, vocab_size=2)
    >>> bigram.probabilities(torch.tensor([[0, 1]]))[0]  # after 0 came 1 twice: (2 + 1 · p_1(1)) / (2 + 1)
    tensor([[0.1429, 0.8571],
            [0.4643, 0.5357]])
    """

    def __init__(self, tokens: Int[Tensor, " token"], *, order: int, vocab_size: int) -> None:
        if order < 1:
            raise ConfigError(f"the order of an n-gram must be at least 1, got {order}")
        if len(tokens) <= order:
            raise DataError(f"an n-gram of order {order} is fitted on more than {order} tokens, got {len(tokens)}")
        self.order = order
        self.vocab_size = vocab_size
        self.num_tokens = len(tokens)
        self._orders: list[_Order] = []
        # Row of the context before each token. It grows by one token a round: the row of the context that is one token
        # shorter, times V, plus the new token, is a key, and the rank of a key among all keys is the new row.
        rows = torch.zeros(len(tokens), dtype=torch.long)  # the empty context
        for length in range(order):
            if length:
                rows = rows[1:] * vocab_size + tokens[: len(tokens) - length]
            keys, rows = rows.unique(return_inverse=True)
            self._orders.append(_count(keys, rows, tokens[length:], vocab_size))

    @property
    def num_counts(self) -> int:
        """The model's size: how many counts it keeps."""
        return sum(len(order.counts) for order in self._orders)

    def probabilities(
        self, tokens: Int[Tensor, "batch time"], *, order: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """p(· | the tokens up to and including each position): ``[:, t]`` belongs to the token at t + 1.

        Only the row itself is context, so early positions have short ones.

        Args:
            tokens: rows of text.
            order: a lower order of the same model; None is its own.
        """
        device, tokens = tokens.device, tokens.cpu()  # the counts are on the CPU
        # All positions at once, shortest context first: each order mixes its counts into the distribution below it.
        flat = torch.full((tokens.numel(), self.vocab_size), 1 / self.vocab_size)
        rows = torch.zeros(tokens.numel(), dtype=torch.long)
        known = torch.ones(tokens.numel(), dtype=torch.bool)
        for length, counted in enumerate(self._orders[: order or self.order]):
            if length:
                rows, known = self._longer(tokens, rows, known, length=length, counted=counted)
            flat = _interpolate(flat, rows, known, counted)
        return flat.view(*tokens.shape, self.vocab_size).to(device)

    def _longer(
        self,
        tokens: Int[Tensor, "batch time"],
        rows: Int[Tensor, " position"],
        known: Bool[Tensor, " position"],
        *,
        length: int,
        counted: _Order,
    ) -> tuple[Int[Tensor, " position"], Bool[Tensor, " position"]]:
        """Rows of the contexts one token longer, and which of them were ever seen."""
        before = torch.full_like(tokens, -1)  # [batch, time]: the token `length` before the predicted one, -1 if none
        before[:, length - 1 :] = tokens[:, : max(0, tokens.shape[1] - length + 1)]
        wanted = rows * self.vocab_size + before.flatten()  # [position]; keys ascend, so a binary search finds them
        found = torch.searchsorted(counted.keys, wanted).clamp(max=len(counted.keys) - 1)
        return found, known & (before.flatten() >= 0) & (counted.keys[found] == wanted)

    def score(self, tokens: Int[Tensor, " token"], *, order: int | None = None) -> tuple[float, float]:
        """Mean cross-entropy (nats per token) and top-1 accuracy on a running text, from its second token on."""
        nats, hits, overlap = 0.0, 0, self.order - 1
        for start in range(0, len(tokens) - 1, CHUNK_POSITIONS):
            first = max(0, start - overlap)  # so that a chunk's first tokens have their whole context too
            row = tokens[first : start + CHUNK_POSITIONS]
            targets = tokens[start + 1 : start + CHUNK_POSITIONS + 1]
            probabilities = self.probabilities(row[None], order=order)[0, start - first :][: len(targets)]
            nats -= float(probabilities.gather(1, targets[:, None]).double().log().sum())
            hits += int((probabilities.argmax(-1) == targets).sum())
        return nats / (len(tokens) - 1), hits / (len(tokens) - 1)


def _count(
    keys: Int[Tensor, " context"], rows: Int[Tensor, " token"], following: Int[Tensor, " token"], vocab_size: int
) -> _Order:
    pairs, counts = (rows * vocab_size + following).unique(return_counts=True)  # ascending, so by row
    num_kinds = torch.bincount(pairs // vocab_size, minlength=len(keys))
    totals = torch.bincount(rows, minlength=len(keys))
    return _Order(
        keys=keys,
        starts=num_kinds.cumsum(0) - num_kinds,  # exclusive cumulative sum
        num_kinds=num_kinds,
        totals=totals.float(),
        tokens=pairs % vocab_size,
        counts=counts.float(),
    )


def _interpolate(
    shorter: Float[Tensor, "position vocab"],
    rows: Int[Tensor, " position"],
    known: Bool[Tensor, " position"],
    counted: _Order,
) -> Float[Tensor, "position vocab"]:
    """``shorter`` with the counts after the ``known`` contexts mixed in: (c + T · p_{k-1}) / (Σ c + T)."""
    positions = known.nonzero().squeeze(1)
    rows = rows[positions]
    num_kinds = counted.num_kinds[rows]
    mixed = shorter.clone()  # unknown contexts keep the shorter one's distribution
    mixed[positions] *= num_kinds[:, None].float()
    # The entries of each row, side by side: its first entry plus 0, 1, 2, … within the row. [Σ num_kinds]
    within = torch.arange(int(num_kinds.sum())) - (num_kinds.cumsum(0) - num_kinds).repeat_interleave(num_kinds)
    entries = counted.starts[rows].repeat_interleave(num_kinds) + within
    mixed.index_put_(
        (positions.repeat_interleave(num_kinds), counted.tokens[entries]), counted.counts[entries], accumulate=True
    )
    mixed[positions] /= (counted.totals[rows] + num_kinds)[:, None]
    return mixed
