"""The environment: a batch of episodes of one article, in which each query chooses what is read next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preceptor.errors import DataError, ShapeError
from preceptor.lm.decode import Decoder
from preceptor.lm.sampling import Stream, draw
from preceptor.objectives.selection import selection_log_probs
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.articles import TokenizedArticle, TokenSequence
from preceptor.systems.reading.policy import Keys, Policy


@dataclass(frozen=True)
class Trajectories:
    """A batch of episodes over one article, on the CPU.

    Attributes:
        article: what was read.
        queries: tokens that the policy wrote at each step.
        query_log_probs: of those tokens under the distribution that they were drawn from, nats.
        query_entropy: of that distribution at each token, nats.
        query_vectors: compared with the keys.
        order: pair chosen at each step.
        available_mask: True = the pair could still be chosen at that step.
        selection_log_probs: over pairs, at each step, nats; −inf for pairs already read.
        initial_queries: what the initial policy would have written at each step, or None.
    """

    article: TokenizedArticle
    queries: Int[Tensor, "batch step token"]
    query_log_probs: Float[Tensor, "batch step token"]
    query_entropy: Float[Tensor, "batch step token"]
    query_vectors: Float[Tensor, "batch step dimension"]
    order: Int[Tensor, "batch step"]
    available_mask: Bool[Tensor, "batch step pairs"]
    selection_log_probs: Float[Tensor, "batch step pairs"]
    initial_queries: Int[Tensor, "batch step token"] | None = None

    def __post_init__(self) -> None:
        batch, step, token = self.queries.shape
        pairs = self.article.num_pairs
        for name, shape in (
            ("query_log_probs", (batch, step, token)),
            ("query_entropy", (batch, step, token)),
            ("order", (batch, step)),
            ("available_mask", (batch, step, pairs)),
            ("selection_log_probs", (batch, step, pairs)),
        ):
            if tuple(getattr(self, name).shape) != shape:
                raise ShapeError(f"`{name}` must have shape {shape}, got {tuple(getattr(self, name).shape)}")

    def __len__(self) -> int:
        return len(self.order)

    def at(self, indices: Int[Tensor, " chosen"]) -> Trajectories:
        """The trajectories at ``indices``."""
        return replace(
            self,
            queries=self.queries[indices],
            query_log_probs=self.query_log_probs[indices],
            query_entropy=self.query_entropy[indices],
            query_vectors=self.query_vectors[indices],
            order=self.order[indices],
            available_mask=self.available_mask[indices],
            selection_log_probs=self.selection_log_probs[indices],
            initial_queries=None if self.initial_queries is None else self.initial_queries[indices],
        )

    def policy_sequences(self) -> list[TokenSequence]:
        """What the policy had seen at the end of each episode."""
        episodes = zip(self.order.tolist(), self.queries.tolist(), strict=True)
        return [self.article.policy_sequence(order, queries) for order, queries in episodes]


@torch.no_grad()
def run_episodes(
    policy: Policy,
    article: TokenizedArticle,
    keys: Keys,
    *,
    num_episodes: int,
    budget: int,
    query_tokens: int,
    generators: Mapping[str, torch.Generator],
    orders: Sequence[Sequence[int]] | None = None,
    initial_policy: Policy | None = None,
    greedy: bool = False,
    world: World = ALONE,
) -> Trajectories:
    """``num_episodes`` episodes over ``article``, which advance together on one KV cache.

    1. The context is the prompt; all pairs are available.
    2. The policy writes a query of ``query_tokens`` tokens given everything it has read.
    3. A softmax of inner products over the available keys gives the probability of each; one is drawn.
    4. That pair becomes unavailable; its value joins the context.
    5. From 2, until ``budget`` pairs are read.

    Args:
        policy: writes and chooses.
        article: in the policy's tokens.
        keys: the article's key vectors.
        num_episodes: batch size.
        budget: pairs to read, 1..pairs.
        query_tokens: tokens of each query.
        generators: the streams ``query`` and ``selection``; with ``initial_policy`` also ``reference``.
        orders: read in these orders instead of drawn ones (a baseline writes queries but does not choose).
        initial_policy: also record what this policy would write at each step.
        greedy: take the most likely token and pair at each step instead of drawing them.
        world: the processes that share the batch: each runs its own episodes and gets all of them.

    Raises:
        DataError: the budget does not fit the pairs or the context.
    """
    check_budget(policy.lm.context_length, article, budget=budget, query_tokens=query_tokens)

    def episodes(rows: slice) -> tuple[Tensor, ...]:
        streams = {name: world.stream(each, rows, num_episodes) for name, each in generators.items()}
        return _run_rows(
            policy,
            article,
            keys,
            num_episodes=rows.stop - rows.start,
            budget=budget,
            query_tokens=query_tokens,
            streams=streams,
            orders=None if orders is None else orders[rows],
            initial_policy=initial_policy,
            greedy=greedy,
        )

    queries, log_probs, entropies, query_vectors, order, masks, selections, *initial = world.gathered(
        num_episodes, episodes
    )
    return Trajectories(
        article=article,
        queries=queries,
        query_log_probs=log_probs,
        query_entropy=entropies,
        query_vectors=query_vectors,
        order=order,
        available_mask=masks,
        selection_log_probs=selections,
        initial_queries=initial[0] if initial else None,
    )


def _run_rows(
    policy: Policy,
    article: TokenizedArticle,
    keys: Keys,
    *,
    num_episodes: int,
    budget: int,
    query_tokens: int,
    streams: Mapping[str, Stream],
    orders: Sequence[Sequence[int]] | None,
    initial_policy: Policy | None,
    greedy: bool,
) -> tuple[Tensor, ...]:
    """This process's episodes: the fields of :class:`Trajectories` in their order, the last one if there is one."""
    device, markers = policy.lm.device, article.chat_markers
    # Greedy by temperature 0, under the same truncation and suppressed tokens.
    sampling = replace(policy.sampling, temperature=0.0) if greedy else policy.sampling
    decoder = _after_prompt(policy, article, num_episodes)
    initial_decoder = None if initial_policy is None else _after_prompt(initial_policy, article, num_episodes)
    available = torch.ones(num_episodes, article.num_pairs, dtype=torch.bool, device=device)
    initial_queries: list[Tensor] = []
    steps: list[tuple[Tensor, ...]] = []
    for step in range(budget):
        if initial_policy is not None and initial_decoder is not None:
            # Its query is rewound: only the policy's own enters the context.
            mark = initial_decoder.mark()
            initial_query = initial_decoder.generate(
                query_tokens, sampling=initial_policy.sampling, generator=streams["reference"]
            )
            initial_decoder.rewind(mark)
            initial_queries.append(initial_query.tokens)

        query = decoder.generate(query_tokens, sampling=sampling, generator=streams["query"])  # batch token
        vectors = policy.query_vectors(keys, captured=query.captured, queries=query.tokens)  # batch dimension
        selection = selection_log_probs(  # batch pairs
            vectors, keys.vectors, available_mask=available, temperature=policy.temperature
        )
        if orders is not None:
            # The probabilities that are recorded stay the policy's own.
            pair = torch.tensor([order[step] for order in orders], device=device)
        else:
            pair = selection.argmax(-1) if greedy else draw(selection, streams["selection"])
        steps.append((query.tokens, query.log_probs, query.entropy, vectors, pair, available, selection))

        available = available.scatter(1, pair[:, None], False)  # a new tensor: the old one is recorded
        if step + 1 < budget:  # the last value is never followed by a query
            values = [[*markers.before_value, *article.turns[i], *markers.before_query] for i in pair.tolist()]
            decoder.append(values)
            if initial_decoder is not None:
                queries_and_values = zip(query.tokens.tolist(), values, strict=True)
                initial_decoder.append([[*tokens, *value] for tokens, value in queries_and_values])
    # Everything recorded is batch × …; the step becomes the second axis.
    recorded = [torch.stack(tensors, 1).cpu() for tensors in zip(*steps, strict=True)]
    if initial_queries:
        recorded.append(torch.stack(initial_queries, 1).cpu())
    return tuple(recorded)


def _after_prompt(policy: Policy, article: TokenizedArticle, num_episodes: int) -> Decoder:
    decoder = Decoder(policy.lm, batch_size=num_episodes, capture=policy.captured_module)
    decoder.append([article.prompt] * num_episodes)
    return decoder


def check_budget(
    context_length: int, article: TokenizedArticle, *, budget: int, query_tokens: int, probe_after_queries: bool = False
) -> None:
    """Refuse a budget that the pairs or the context cannot hold.

    The longest possible sequences count, so that no run fails half-way: prompt, queries and values; values and probe;
    and with ``probe_after_queries`` (a probe reward in a context that holds the queries) all of them in one sequence.

    Raises:
        DataError: says how many pairs fit.
    """
    num_pairs, markers = article.num_pairs, article.chat_markers
    if not 1 <= budget <= num_pairs:
        raise DataError(
            f"`episode.budget` must lie in 1..{num_pairs} for {article.name}, which has {num_pairs} pairs, got {budget}"
        )
    prompt = len(article.prompt) - len(markers.before_query)  # the prompt has opened the first query already
    # Longest values first: whichever pairs an episode chooses, they fit.
    values, fitting = 0, 0
    lengths = [max(map(len, both)) for both in zip(article.values, article.turns, strict=True)]
    for length in sorted(lengths, reverse=True):
        values += length
        queries = (fitting + 1) * (query_tokens + len(markers.before_value) + len(markers.before_query))
        with_queries = prompt + queries + values + len(article.probe) * probe_after_queries
        # The policy's sequence, and the reader's: a begin token, the values alone, and the probe.
        if max(with_queries, 1 + values + len(article.probe)) > context_length:
            break
        fitting += 1
    if fitting < budget:
        raise DataError(
            f"{budget} pairs of {article.name} do not fit the context of {context_length} tokens: {fitting} do; lower "
            "data.num_pairs to that, or data.max_value_tokens, data.num_probes or episode.query_tokens"
        )
