"""Attention selection: a softmax over the keys that remain, and the temperature that gives it a chosen entropy."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import ConfigError, DataError, ShapeError
from preceptor.objectives.kl import entropy


def selection_log_probs(
    queries: Float[Tensor, "*batch dimension"],
    keys: Float[Tensor, "pairs dimension"],
    *,
    available_mask: Bool[Tensor, "*batch pairs"],
    temperature: float,
) -> Float[Tensor, "*batch pairs"]:
    """Log-probability (nats) with which each query selects each key.

    ln π(k | q) = log-softmax over the available keys of ⟨q, k⟩ / temperature, and −∞ for a key that is not available.
    ``*batch`` is any number of axes, e.g. ``batch`` for one step or ``batch step`` for whole trajectories at once.

    A row without any available key (an episode that is over, in a batch of unequal ones) is −∞ throughout: every key
    has probability 0, ``selection_entropy`` is 0 and ``sample_selection`` refuses it. Nothing is ever NaN.

    Gradients flow into ``queries`` and ``keys`` and are finite although −∞ is present; unavailable keys get none. Half
    precision is scored in float32: cosines of language-model states crowd at 0.95 to 0.98, where bfloat16 has seven
    distinct numbers.

    Args:
        queries: one vector per decision.
        keys: the vectors to choose from, shared by all queries.
        available_mask: True = this key can still be chosen.
        temperature: > 0, in units of the inner product.

    Raises:
        ConfigError: a temperature that is not positive and finite.
        ShapeError: the shapes do not fit.

    >>> queries, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 5.0], [9.0, 9.0]])
    >>> available = torch.tensor([[True, True, False]])
    >>> selection_log_probs(queries, keys, available_mask=available, temperature=1.0).exp()
    tensor([[0.7311, 0.2689, 0.0000]])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature must be positive and finite, got {temperature}.")
    scores = _inner_products(queries, keys, available_mask=available_mask) / temperature  # [..., pairs]
    # Rows without an available key go through the softmax unmasked, because softmax(−∞, …, −∞) is NaN, and the last
    # masking replaces them. It also stops gradients at the unavailable entries.
    some_available = available_mask.any(dim=-1, keepdim=True)
    log_probs = torch.log_softmax(scores.masked_fill(~available_mask & some_available, float("-inf")), dim=-1)
    return log_probs.masked_fill(~available_mask, float("-inf"))


def sample_selection(
    log_probs: Float[Tensor, "*batch pairs"], *, generator: torch.Generator | None
) -> Int[Tensor, "*batch"]:
    """The index of one key per row, drawn with probabilities exp(``log_probs``).

    Args:
        log_probs: as ``selection_log_probs`` returns them, nats.
        generator: the source of randomness, on the device of ``log_probs``; ``None`` is torch's global one.

    Raises:
        ShapeError: a row has no available key left.

    >>> certain = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    >>> sample_selection(certain, generator=torch.Generator().manual_seed(0))
    tensor([1])
    """
    # multinomial would report a row of zeros as a device-side assert on a GPU.
    exhausted = (log_probs == float("-inf")).all(dim=-1)
    if exhausted.any():
        raise ShapeError(
            f"{int(exhausted.sum())} of {exhausted.numel()} rows have no available key left; "
            "stop an episode when all its keys are read"
        )
    # [rows, pairs]: multinomial takes two axes at most.
    probabilities = log_probs.detach().exp().reshape(-1, log_probs.shape[-1])
    return torch.multinomial(probabilities, num_samples=1, generator=generator).reshape(log_probs.shape[:-1])


def selection_entropy(
    log_probs: Float[Tensor, "*batch pairs"], available_mask: Bool[Tensor, "*batch pairs"]
) -> Float[Tensor, "*batch"]:
    """The entropy of each selection in nats, between 0 and ln(available keys); 0 for a row without any.

    Gradients flow into ``log_probs``, and are finite.

    >>> log_probs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    >>> selection_entropy(log_probs, torch.tensor([[True, True, False]]))
    tensor([0.6931])
    """
    # Masked again, since the caller may pass log-probabilities from before a key was taken.
    return entropy(log_probs.masked_fill(~available_mask, float("-inf")))


def relative_selection_entropy(
    log_probs: Float[Tensor, "*batch pairs"], available_mask: Bool[Tensor, "*batch pairs"]
) -> Float[Tensor, "*batch"]:
    """Each selection's entropy over its maximum ln(available keys): 1 is uniform, 0 is deterministic; dimensionless.

    With fewer than two available keys there is nothing to choose; the result is then 1, because a forced choice is no
    sign of collapse. Leave such rows out of an average: ``masked_mean(relative, available_mask.sum(-1) > 1)``.

    >>> log_probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).log()
    >>> relative_selection_entropy(log_probs, torch.tensor([[True, True, False], [False, False, True]]))
    tensor([1., 1.])
    """
    num_available = available_mask.sum(dim=-1)
    maximum = num_available.clamp(min=2).to(log_probs.dtype).log()  # ln n; at least ln 2, so never a division by 0
    return (selection_entropy(log_probs, available_mask) / maximum).masked_fill(num_available < 2, 1.0)


def calibrated_temperature(
    queries: Float[Tensor, "*batch dimension"],
    keys: Float[Tensor, "pairs dimension"],
    *,
    available_mask: Bool[Tensor, "*batch pairs"],
    target_fraction: float,
) -> float:
    """The temperature at which the mean of ``relative_selection_entropy`` equals ``target_fraction``.

    Entropy rises with temperature, from that of a uniform choice among the best keys to ln(available keys), so
    bisection on ln(temperature) finds the one solution; all in float64, to about 1e-12. The mean runs over the rows
    with at least two available keys. No gradient.

    Why: at temperature 1, inner products between 0.95 and 0.98 give a policy that is uniform to 1 %, so "learned"
    and "random" are the same thing; calibration makes the start of training independent of an embedder's scale.

    Args:
        queries: one vector per decision.
        keys: the vectors to choose from.
        available_mask: True = this key can still be chosen.
        target_fraction: in (0, 1), dimensionless.

    Raises:
        ConfigError: ``target_fraction`` outside (0, 1).
        ShapeError: the shapes do not fit.
        DataError: no row has two available keys; an inner product is not finite; all inner products of every row are
            equal, or so many keys tie for the best that even temperature 0 is above the target.

    >>> queries, keys = torch.tensor([[1.0]]), torch.tensor([[0.96], [0.97]])
    >>> available = torch.tensor([[True, True]])
    >>> temperature = calibrated_temperature(queries, keys, available_mask=available, target_fraction=0.9)
    >>> log_probs = selection_log_probs(queries, keys, available_mask=available, temperature=temperature)
    >>> f"{temperature:.5f} {relative_selection_entropy(log_probs, available).item():.4f}"
    '0.01295 0.9000'
    """
    if not 0 < target_fraction < 1:
        raise ConfigError(f"target_fraction must lie in (0, 1), got {target_fraction}.")
    scores = _inner_products(queries.detach().double(), keys.detach().double(), available_mask=available_mask)
    has_choice = available_mask.sum(dim=-1) > 1  # rows with something to choose
    scores, available = scores[has_choice], available_mask[has_choice]
    if len(scores) == 0:
        raise DataError("no row has two available keys, so no temperature can be calibrated; give at least two keys.")
    if not scores[available].isfinite().all():
        raise DataError("an inner product of a query and a key is not finite; check the embedder's vectors.")

    unavailable = ~available
    # Distance of each score from the row's best: subtracting it keeps exp from overflowing at tiny temperatures.
    best = scores.masked_fill(unavailable, float("-inf")).amax(dim=-1, keepdim=True)
    gaps = (best - scores).masked_fill(unavailable, 0.0)
    # Equal keys give inner products that differ by the rounding of float64 sums; a gap must be well above that.
    rounding = 1e-13 * (queries.detach().double().norm(dim=-1).max() * keys.detach().double().norm(dim=-1).max()).item()
    gaps = gaps.masked_fill(gaps <= rounding, 0.0)
    largest = gaps.max().item()
    if largest == 0.0:
        raise DataError("all keys are equally near to each query, so the selection is uniform at every temperature.")

    def fraction_at(log_temperature: float) -> float:
        log_probs = torch.log_softmax(
            (-gaps * math.exp(-log_temperature)).masked_fill(unavailable, float("-inf")), dim=-1
        )
        return relative_selection_entropy(log_probs, available).mean().item()

    # At these ends exp(−gap / temperature) is 0 for the smallest gap and 1 for the largest, to the last bit or so.
    low = math.log(gaps[gaps > 0].min().item() / 1e3)
    high = math.log(largest * 1e9)
    if fraction_at(low) >= target_fraction or fraction_at(high) <= target_fraction:
        raise DataError(
            f"target_fraction {target_fraction} cannot be reached: the selection entropy lies between "
            f"{fraction_at(low):.6f} and {fraction_at(high):.6f} of its maximum; "
            "choose a target in between, or keys that differ more."
        )
    # Each step halves an interval of ln(temperature) some tens wide; after 60 it is below float64's spacing.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fraction_at(middle) < target_fraction else (low, middle)
    return math.exp((low + high) / 2)


def _inner_products(queries: Tensor, keys: Tensor, *, available_mask: Tensor) -> Float[Tensor, "*batch pairs"]:
    """⟨query, key⟩ for all pairs, in float32 or better; ShapeError where the three do not fit."""
    if queries.shape[-1] != keys.shape[-1]:
        raise ShapeError(
            f"queries have {queries.shape[-1]} dimensions and keys {keys.shape[-1]}; embed both by the same embedder"
        )
    expected = (*queries.shape[:-1], keys.shape[0])
    if available_mask.shape != expected:
        raise ShapeError(f"available_mask has shape {tuple(available_mask.shape)}; queries and keys need {expected}")
    # float32 at least: see `selection_log_probs` on cosines in bfloat16.
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    return queries.to(dtype) @ keys.to(dtype).T
