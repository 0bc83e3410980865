"""The environment: a batch of episodes of one article, in which each query chooses what is read next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from preceptor.errors import DataError
from preceptor.lm.decode import Decoder
from preceptor.lm.sampling import draw
from preceptor.systems.reading.material import Material
from preceptor.systems.reading.policy import Keys, Policy, Trajectories

_RECORDED = ("tokens", "log_probs", "entropy", "vectors", "pair", "available", "selection", "other")


@torch.no_grad()
def run_episodes(
    policy: Policy,
    material: Material,
    keys: Keys,
    *,
    num_episodes: int,
    budget: int,
    query_tokens: int,
    generators: dict[str, torch.Generator],
    orders: Sequence[Sequence[int]] | None = None,
    reference: Policy | None = None,
) -> Trajectories:
    """``num_episodes`` readings of ``material``, advancing together on one KV cache.

    1. The context is the prompt; all pairs are available.
    2. The policy writes a query of ``query_tokens`` tokens given all that it has read.
    3. A softmax of inner products over the available keys gives the probability of each; one is drawn.
    4. Its key becomes unavailable (by index); query and value stay in the context.
    5. From 2, until ``budget`` pairs are read.

    Args:
        policy: writes and chooses.
        material: the article in the policy's tokens.
        keys: the article's key vectors.
        num_episodes: rows of the batch.
        budget: pairs to read, 1..pairs.
        query_tokens: tokens of each query.
        generators: the streams ``query`` and ``selection``; with ``reference`` also ``reference``.
        orders: the choices to make instead of drawing them (a control writes queries but does not choose).
        reference: the untrained policy, if what it would write in the same place is wanted.

    Raises:
        DataError: the budget does not fit the pairs or the context.
    """
    check_budget(policy.lm.context_length, material, budget=budget, query_tokens=query_tokens)
    decoder = _open(policy, material, num_episodes)
    other = None if reference is None else _open(reference, material, num_episodes)
    available = torch.ones(num_episodes, material.reading.num_pairs, dtype=torch.bool, device=policy.lm.device)
    steps: dict[str, list[Tensor]] = {name: [] for name in _RECORDED}
    for step in range(budget):
        if other is not None and reference is not None:
            mark = other.mark()
            written = other.generate(query_tokens, sampling=reference.sampling, generator=generators["reference"])
            other.rewind(mark)
            steps["other"].append(written.tokens)
        query = decoder.generate(query_tokens, sampling=policy.sampling, generator=generators["query"])
        vectors = policy.query_vectors(keys, captured=query.captured, queries=query.tokens)
        selection = policy.select(keys, vectors, available)
        if orders is None:
            pair = draw(selection, generators["selection"])
        else:
            pair = torch.tensor([order[step] for order in orders], device=policy.lm.device)
        for name, value in (
            ("tokens", query.tokens),
            ("log_probs", query.log_probs),
            ("entropy", query.entropy),
            ("vectors", vectors),
            ("pair", pair),
            ("available", available),
            ("selection", selection),
        ):
            steps[name].append(value)
        available = available.scatter(1, pair[:, None], False)
        if step + 1 < budget:
            read = [
                [*material.chat_markers.before_value, *material.values[index], *material.chat_markers.before_query]
                for index in pair.tolist()
            ]
            decoder.append(read)
            if other is not None:
                other.append([[*tokens, *value] for tokens, value in zip(query.tokens.tolist(), read, strict=True)])
    stacked = {name: torch.stack(values, 1).cpu() for name, values in steps.items() if values}
    return Trajectories(
        material=material,
        queries=stacked["tokens"],
        query_log_probs=stacked["log_probs"],
        query_entropy=stacked["entropy"],
        query_vectors=stacked["vectors"],
        order=stacked["pair"],
        available_mask=stacked["available"],
        selection_log_probs=stacked["selection"],
        reference_queries=stacked.get("other"),
    )


def check_budget(
    context_length: int, material: Material, *, budget: int, query_tokens: int, probe_after_queries: bool = False
) -> None:
    """Refuse a budget that the pairs or the context cannot hold.

    The longest possible rows count, so that no run fails half-way: prompt, queries and values; values and probe; and
    with ``probe_after_queries`` (a probe reward in a context that holds the queries) all of them in one row.

    Raises:
        DataError: and says how many pairs fit.
    """
    name, num_pairs, chat_markers = material.reading.name, material.reading.num_pairs, material.chat_markers
    if not 1 <= budget <= num_pairs:
        raise DataError(
            f"`episode.budget` must lie in 1..{num_pairs} for {name}, which has {num_pairs} pairs, got {budget}"
        )
    prompt = len(material.prompt) - len(chat_markers.before_query)  # the prompt has opened the first query already
    values, fitting = 0, 0
    for length in sorted((len(value) for value in material.values), reverse=True):
        values += length
        queries = (fitting + 1) * (query_tokens + len(chat_markers.before_value) + len(chat_markers.before_query))
        with_queries = prompt + queries + values + len(material.probe) * probe_after_queries
        if max(with_queries, 1 + values + len(material.probe)) > context_length:
            break
        fitting += 1
    if fitting < budget:
        raise DataError(
            f"{budget} pairs of {name} do not fit the context of {context_length} tokens: {fitting} do; lower "
            "data.num_pairs to that, or data.max_value_tokens, data.num_probes or episode.query_tokens"
        )


def _open(policy: Policy, material: Material, num_episodes: int) -> Decoder:
    capture = None if policy.embedding is None else policy.embedding.query_module
    decoder = Decoder(policy.lm, batch_size=num_episodes, capture=capture)
    decoder.append([material.prompt] * num_episodes)
    return decoder
