"""How hard each dataset is for a model now: the loss of a sample of its documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import token_log_probs


def document_losses(
    lm: LanguageModel, samples: Sequence[Sequence[Sequence[int]]], *, max_tokens: int | None = None
) -> list[Float[Tensor, " text"]]:
    """The loss of each sampled row of each dataset in nats per token, its first token being given; no gradient.

    All rows of all datasets go through the model together, sorted by length, so that little is padded. Give the result
    to :func:`preceptor.objectives.document_difficulty`.

    Args:
        lm: the model, usually a frozen copy of the one that learns.
        samples: rows of token ids for each dataset, each row of two tokens or more.
        max_tokens: padded tokens a pass; None bounds the logits held at once.

    Returns:
        one float32 tensor a dataset on the CPU, in the order of its rows.

    Raises:
        DataError: a dataset without rows, or a row in which nothing is predicted.
        ModelError: a row is longer than the model's context.
    """
    for index, rows in enumerate(samples):
        if not rows or min(len(row) for row in rows) < 2:
            raise DataError(f"the sample of dataset {index} must hold rows of two tokens or more, to have a loss")
    rows = [row for sample in samples for row in sample]
    log_probs = token_log_probs(lm, rows, spans=[[(1, len(row))] for row in rows], max_tokens=max_tokens)
    losses = iter([-values.mean() for values in log_probs])
    return [torch.stack([next(losses) for _ in sample]) for sample in samples]
