"""How per-token losses become one number: the choice that most policy-gradient variants differ in."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preceptor.errors import ConfigError, did_you_mean
from preceptor.objectives.statistics import check_same_shape

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def aggregate(
    values: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    aggregation: str,
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """One number from per-token ``values``; exactly 0, with a graph, where the mask is empty.

    - ``"token_mean"``: Σ x / (counted tokens of the batch); every token weighs the same (DAPO, arXiv 2503.14476).
    - ``"sequence_mean"``: the mean over sequences of each one's token mean; every sequence weighs the same, so a token
      of a long one weighs less (GRPO, arXiv 2402.03300).
    - ``"sequence_sum"``: the mean over sequences of each one's token sum, the policy gradient as derived.
    - ``"constant"``: Σ x / ``divisor``, e.g. batch × the most tokens allowed (Dr. GRPO, arXiv 2503.20783).

    The means over sequences run over those with at least one counted token, so that a sequence which a filter emptied
    does not dilute the others. (TRL and verl divide by the number of rows.)

    Args:
        values: a per-token loss; may be NaN or infinite where it does not count.
        mask: True = counts.
        aggregation: one of the above.
        divisor: > 0, for ``"constant"`` alone.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: an unknown ``aggregation``; a ``divisor`` that is missing, superfluous or not positive.

    >>> values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> {kind: aggregate(values, mask, aggregation=kind).item() for kind in ("token_mean", "sequence_mean")}
    {'token_mean': 2.5, 'sequence_mean': 3.0}
    >>> aggregate(values, mask, aggregation="sequence_sum")
    tensor(5.)
    >>> aggregate(values, mask, aggregation="constant", divisor=4.0)
    tensor(2.5000)
    """
    check_same_shape(values=values, mask=mask)
    if aggregation not in get_args(Aggregation):
        allowed = ", ".join(get_args(Aggregation))
        hint = did_you_mean(aggregation, get_args(Aggregation))
        raise ConfigError(f"aggregation must be one of {allowed}, got '{aggregation}'{hint}.")
    if aggregation != "constant" and divisor is not None:
        raise ConfigError(f"divisor goes with the aggregation 'constant' alone, got {divisor} with '{aggregation}'.")
    # Masked before any arithmetic, so that a NaN where nothing counts reaches neither value nor gradient.
    counted = values.masked_fill(~mask, 0.0)
    if aggregation == "constant":
        if divisor is None or not divisor > 0:
            raise ConfigError(f"divisor must be positive for the aggregation 'constant', got {divisor}; set it.")
        return counted.sum() / divisor
    if aggregation == "token_mean":
        return counted.sum() / mask.sum().clamp(min=1)
    num_tokens = mask.sum(dim=-1)  # [batch]
    per_sequence = counted.sum(dim=-1)
    if aggregation == "sequence_mean":
        # Rows without a counted token are 0/1 here and do not enter the divisor below.
        per_sequence = per_sequence / num_tokens.clamp(min=1)
    return per_sequence.sum() / torch.count_nonzero(num_tokens).clamp(min=1)
