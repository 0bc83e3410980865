"""Episodes of reading the naive way, in plain Transformers: one at a time, the whole context anew at every step.

This is what one writes first: ``generate()`` for the query, a forward pass over everything for its vector. Nothing here
comes from Preceptor, so that equal outputs mean something. Within one call ``generate()`` keeps its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

LAYER = -2
"""Where vectors are read, counted from the end of ``hidden_states``: the output of the last layer but one."""


@dataclass(frozen=True)
class NaiveEpisodes:
    """What the naive way wrote and how it would have chosen.

    Attributes:
        queries: greedy tokens.
        selection_log_probs: over pairs at each step, nats; −inf for what is gone.
    """

    queries: Int[Tensor, "batch step token"]
    selection_log_probs: Float[Tensor, "batch step pairs"]


@torch.no_grad()
def naive_key_vectors(
    model: PreTrainedModel, keys: Sequence[Sequence[int]], *, begin: int
) -> Float[Tensor, "pairs dimension"]:
    """Mean hidden state over each key's tokens, each key read alone after ``begin``."""
    return torch.stack([_states(model, [begin, *key])[1:].mean(0) for key in keys])


@torch.no_grad()
def naive_episodes(
    model: PreTrainedModel,
    *,
    prompt: Sequence[int],
    keys: Float[Tensor, "pairs dimension"],
    values: Sequence[Sequence[int]],
    orders: Sequence[Sequence[int]],
    query_tokens: int,
    temperature: float,
    suppressed: Sequence[int],
) -> NaiveEpisodes:
    """One episode per order: a greedy query, the softmax over the keys that remain, then the value the order says.

    Args:
        model: in evaluation mode.
        prompt: tokens that every episode begins with.
        keys: as :func:`naive_key_vectors` gives them; their mean is subtracted from keys and queries.
        values: tokens of each pair's value.
        orders: the pairs that each episode reads.
        query_tokens: tokens of each query.
        temperature: of the softmax, in units of the inner product.
        suppressed: tokens that a query never holds.
    """
    generate: Any = model.generate  # Transformers types it as a submodule
    centre = keys.mean(0)
    queries, selections = [], []
    for order in orders:
        context = list(prompt)
        gone: list[int] = []
        for pair in order:
            tokens = torch.tensor([context], device=model.device)
            written = generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=query_tokens,
                do_sample=False,
                suppress_tokens=list(suppressed) or None,
                pad_token_id=prompt[0],
            )
            query = written[0, len(context) :]
            context += query.tolist()
            vector = _states(model, context)[-query_tokens:].mean(0) - centre
            scores = (keys - centre) @ vector / temperature
            scores[gone] = -torch.inf
            queries.append(query)
            selections.append(scores.log_softmax(-1))
            gone.append(pair)
            context += values[pair]
    shape = (len(orders), len(orders[0]))
    return NaiveEpisodes(torch.stack(queries).unflatten(0, shape), torch.stack(selections).unflatten(0, shape))


@torch.no_grad()
def naive_query_log_probs(
    model: PreTrainedModel,
    *,
    prompt: Sequence[int],
    values: Sequence[Sequence[int]],
    orders: Sequence[Sequence[int]],
    queries: Int[Tensor, "batch step token"],
    suppressed: Sequence[int],
) -> Float[Tensor, "batch step token"]:
    """Log-probability in nats of given queries at temperature 1 without ``suppressed``, one full pass per query."""
    found = []
    for order, episode in zip(orders, queries, strict=True):
        context = list(prompt)
        for pair, query in zip(order, episode, strict=True):
            context += query.tolist()
            read = torch.tensor([context], device=model.device)
            logits = model(input_ids=read, use_cache=False).logits[0, -len(query) - 1 : -1].float()
            logits[:, list(suppressed)] = -torch.inf
            found.append(logits.log_softmax(-1).cpu()[torch.arange(len(query)), query])
            context += values[pair]
    return torch.stack(found).view(queries.shape)


def _states(model: PreTrainedModel, tokens: Sequence[int]) -> Float[Tensor, "time dimension"]:
    # The decoder without its output head: the naive way is not charged for logits that nobody reads.
    read = torch.tensor([tokens], device=model.device)
    output = model.base_model(input_ids=read, use_cache=False, output_hidden_states=True)
    states: Tensor = output.hidden_states[LAYER][0].float()
    return states
