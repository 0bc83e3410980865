"""Reading in one file: a language model learns in which order to read an article.

This is the method of ``preceptor run reading`` with its default options, on the library's own parts. Each update:

1. A batch of episodes begins with the article's title.
2. The policy writes a query. The inner products of its projected hidden state with the keys of the pairs not yet read,
   over a temperature, are the logits of a softmax over those pairs. One is drawn, and its value is read.
3. A frozen reader gives the log-probability of each value after those read before it: the reward of the step.
4. Each step is credited with its own and all later rewards, less what each value gets on average.
5. REINFORCE on query tokens and choices, with an exact KL to the initial model at the query tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from preceptor.lm.decode import Decoder
from preceptor.lm.embedding import HiddenStates, key_vectors
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, draw
from preceptor.lm.score import pad_rows, span_mask, token_log_probs
from preceptor.objectives.advantages import group_normalised, reward_to_go
from preceptor.objectives.kl import kl_exact
from preceptor.objectives.policy_gradient import reinforce_loss
from preceptor.objectives.selection import calibrated_temperature, selection_log_probs
from preceptor.runs.random import RandomStreams
from preceptor.systems.reading.articles import bundled_article, select_pairs
from preceptor.systems.reading.config import DataOptions

NUM_PAIRS, NUM_EPISODES, QUERY_TOKENS = 4, 8, 2
LAYER = -2  # whose hidden states are compared
ENTROPY_FRACTION = 0.9  # of ln(pairs): the mean entropy of the first selections before training
LEARNING_RATE, PROJECTION_LEARNING_RATE, CLIP_NORM = 1e-4, 1e-3, 1.0
KL_COEFFICIENT, BASELINE_DECAY = 0.02, 0.9


class Policy:
    """A language model that writes queries, and the attention by which a query chooses a pair."""

    def __init__(self, lm: LanguageModel, initial_lm: LanguageModel, keys: list[list[int]]) -> None:
        self.lm, self.sampling = lm, Sampling(suppressed=lm.special_tokens)
        self.embedding = HiddenStates(lm, layer=LAYER)
        vectors = key_vectors(initial_lm, HiddenStates(initial_lm, layer=LAYER), keys)  # pairs dimension
        self.centre = vectors.mean(0)
        self.keys = vectors - self.centre
        self.projection = nn.Linear(vectors.shape[1], vectors.shape[1], bias=False)
        nn.init.eye_(self.projection.weight)
        self.temperature = 1.0

    def query_vectors(self, states: Tensor) -> Tensor:
        """One vector per query, from the hidden states of its tokens (… token features)."""
        return self.projection(self.embedding.queries(states).mean(-2) - self.centre)

    def select(self, vectors: Tensor, available: Tensor) -> Tensor:
        """Log-probabilities over the pairs that are still available."""
        return selection_log_probs(vectors, self.keys, available_mask=available, temperature=self.temperature)


class Episodes(NamedTuple):
    rows: list[list[int]]  # what the policy saw
    query_spans: list[list[tuple[int, int]]]  # where its queries stand there
    queries: Tensor  # batch step token
    order: Tensor  # batch step: the pair that was read
    available: Tensor  # batch step pairs
    vectors: Tensor  # batch step dimension


@torch.no_grad()
def run_episodes(
    policy: Policy, prompt: list[int], values: list[list[int]], streams: RandomStreams, *, prefix: str = "", budget: int
) -> Episodes:
    """Steps 1 and 2; all episodes advance together on one KV cache."""
    decoder = Decoder(policy.lm, batch_size=NUM_EPISODES, capture=policy.embedding.query_module)
    decoder.append([prompt] * NUM_EPISODES)
    rows, spans, steps = [list(prompt) for _ in range(NUM_EPISODES)], [[] for _ in range(NUM_EPISODES)], []
    available = torch.ones(NUM_EPISODES, len(values), dtype=torch.bool)
    for _ in range(budget):
        query = decoder.generate(QUERY_TOKENS, sampling=policy.sampling, generator=streams[f"{prefix}query"])
        vectors = policy.query_vectors(query.captured)
        pair = draw(policy.select(vectors, available), streams[f"{prefix}selection"])
        steps.append((query.tokens, pair, available, vectors))
        available = available.scatter(1, pair[:, None], False)
        decoder.append([values[index] for index in pair.tolist()])
        for row, row_spans, tokens, index in zip(rows, spans, query.tokens.tolist(), pair.tolist(), strict=True):
            row_spans.append((len(row), len(row) + QUERY_TOKENS))
            row += [*tokens, *values[index]]
    return Episodes(rows, spans, *(torch.stack(tensors, 1) for tensors in zip(*steps, strict=True)))


def value_log_probs(reader: LanguageModel, values: list[list[int]], order: Tensor) -> Tensor:
    """Step 3: log-probability of each value, the mean over its tokens, batch × step."""
    means = []
    for pairs in order.tolist():
        row, spans = [reader.begin_token], []
        for pair in pairs:
            spans.append((len(row), len(row) + len(values[pair])))
            row += values[pair]
        (log_probs,) = token_log_probs(reader, [row], spans=[spans])
        means.append([float(part.mean()) for part in log_probs.split([end - start for start, end in spans])])
    return torch.tensor(means)


def losses(
    policy: Policy, reference_model: LanguageModel, episodes: Episodes, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 5: the policy-gradient loss, and the mean KL to the reference model in nats per query token."""
    queries, order = episodes.queries, episodes.order
    tokens = pad_rows(episodes.rows, filler=policy.lm.begin_token, device=policy.lm.device)  # batch time
    is_query = span_mask(episodes.query_spans, width=tokens.shape[1], device=policy.lm.device)
    keep = is_query.roll(-1, dims=1)  # the logits at t predict the token at t + 1
    output = policy.lm.forward(tokens, keep=keep, capture=policy.embedding.query_module)
    query_log_probs = policy.sampling.log_probs(output.logits).gather(-1, queries.flatten()[:, None])
    states = output.captured[is_query].unflatten(0, queries.shape)  # batch step token features
    choice_log_probs = policy.select(policy.query_vectors(states), episodes.available).gather(-1, order[..., None])
    policy_loss = torch.zeros(())
    for log_probs in (query_log_probs.view(NUM_EPISODES, -1), choice_log_probs[..., 0]):
        repeats = log_probs.shape[1] // NUM_PAIRS  # every token of a query has the advantage of its step
        policy_loss = policy_loss + reinforce_loss(
            log_probs,
            advantages.repeat_interleave(repeats, dim=1),
            mask=torch.ones_like(log_probs, dtype=torch.bool),
            aggregation="token_mean",
        )
    with torch.no_grad():
        reference_logits = reference_model.forward(tokens, keep=keep).logits
    return policy_loss, kl_exact(output.logits, reference_logits).mean()


def learn(num_updates: int, *, seed: int = 0) -> Iterator[tuple[list[list[int]], float, float]]:
    """For each update the orders read, the mean reward (nats per value token) and the policy loss."""
    lm = load_language_model("starter", device=torch.device("cpu"))
    initial_lm = lm.initial_model()  # embeds the keys, is the reader, and the reference of the KL
    article = select_pairs(bundled_article(), DataOptions(num_pairs=NUM_PAIRS), lm, name="article")
    prompt = [lm.begin_token, *lm.encode(f"{article.title}\n")]
    values = [lm.encode(" " + value) for value in article.values]
    policy = Policy(lm, initial_lm, [lm.encode(key) for key in article.keys])
    streams = RandomStreams(seed, ("query", "selection", "calibration_query", "calibration_selection"))
    first = run_episodes(policy, prompt, values, streams, prefix="calibration_", budget=1)
    policy.temperature = calibrated_temperature(
        first.vectors[:, 0], policy.keys, available_mask=first.available[:, 0], target_fraction=ENTROPY_FRACTION
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": list(lm.trainable_parameters().values()), "lr": LEARNING_RATE},
            {"params": list(policy.projection.parameters()), "lr": PROJECTION_LEARNING_RATE},
        ],
        weight_decay=0.0,
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lengths = torch.tensor([len(value) for value in values])
    pair_means = torch.full((NUM_PAIRS,), torch.nan)  # running mean log-probability of each value

    for _ in range(num_updates):
        episodes = run_episodes(policy, prompt, values, streams, budget=NUM_PAIRS)  # 1, 2
        order = episodes.order
        log_probs = value_log_probs(initial_lm, values, order)  # 3; batch step
        share = lengths[order] / lengths.sum()  # of the value tokens, so that a row of rewards sums to their mean

        # 4. Some sentences are hard wherever they stand; less their mean, what remains is the effect of the order.
        for pair in range(NUM_PAIRS):
            batch_mean = log_probs[order == pair].mean()
            old = batch_mean if pair_means[pair].isnan() else pair_means[pair]
            pair_means[pair] = BASELINE_DECAY * old + (1 - BASELINE_DECAY) * batch_mean
        step_rewards = (log_probs - pair_means[order]) * share
        returns = reward_to_go(step_rewards, torch.ones_like(step_rewards, dtype=torch.bool))
        advantages = group_normalised(returns)

        policy_loss, kl = losses(policy, initial_lm, episodes, advantages)  # 5
        (policy_loss + KL_COEFFICIENT * kl).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield order.tolist(), float((log_probs * share).sum(1).mean()), float(policy_loss.detach())


if __name__ == "__main__":
    for number, (orders, reward, policy_loss) in enumerate(learn(4), start=1):
        print(f"update {number}: {reward:.4f} nats per value token, loss {policy_loss:+.4f}, first order {orders[0]}")
