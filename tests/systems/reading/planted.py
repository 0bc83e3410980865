"""A planted task: an article of four nonsense pairs and a reader with a known table, so that the best order is known.

The reader gives every token of value ``v`` read after value ``u`` the log-probability ``-cost[u, v]`` (row 0 is the
empty context), so an order's worth is a sum over its steps and the optimum is found by trying all 24 orders.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.config import load_config, to_dict
from preceptor.lm.embedding import HiddenStates
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.runs.folder import Run, create_run
from preceptor.systems.base import Services
from preceptor.systems.reading import SYSTEM
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, TokenSequence, tokenize_article
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.loop import train
from preceptor.systems.reading.policy import Policy, identity_projection
from preceptor.systems.reading.rewards import SequenceScores
from preceptor.systems.reading.setup import Setup, calibrate

KEYS = ("red apples fall", "nine ships wait", "old towers lean", "small birds sing")
VALUES = ("They rot in grass.", "No wind comes up.", "Masons shore them.", "Dawn is loud now.")
SETTINGS = (
    "data.num_pairs=4",
    "data.num_probes=0",
    "episode.batch_size=16",
    "episode.query_tokens=2",
    "selection.layer=-1",
    "reward.context=values",
    "update.learning_rate=1e-3",
    "update.projection_learning_rate=3e-3",
    "update.value_kl_coefficient=0",
    "update.query_kl_coefficient=0",
    "update.query_entropy_coefficient=0.01",
    "update.selection_entropy_coefficient=0.1",
    "evaluation.every=0",
    "evaluation.num_episodes=32",
    "evaluation.num_orders=240",
    "evaluation.best_of=20",
    "record_every=1000",
    "save_every=1000",
)


class PlantedReader:
    """A reader with a table instead of a model."""

    def __init__(self, cost: Tensor) -> None:
        self.cost = cost

    def article(self, policy_article: TokenizedArticle) -> TokenizedArticle:
        return policy_article

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        return query

    def score(self, sequences: Sequence[TokenSequence]) -> list[SequenceScores]:
        scores = []
        for sequence in sequences:
            log_probs, last = [], -1
            for span in sequence.spans:
                if span.kind == "value":
                    log_probs.append(torch.full((span.end - span.start,), -float(self.cost[last + 1, span.pair])))
                    last = span.pair
            scores.append(SequenceScores(sequence, tuple(log_probs)))
        return scores

    def branches(self, sequence: TokenSequence, branches: Sequence[tuple[int, Sequence[int], int]]) -> list[Tensor]:
        raise NotImplementedError("the planted article has no probe")


def planted_cost(seed: int) -> Tensor:
    """Costs in nats per token, standard normal around 5: row u + 1 is "after u", row 0 is "first"."""
    return 5 + torch.randn(len(KEYS) + 1, len(KEYS), generator=torch.Generator().manual_seed(1000 + seed))


def order_value(article: TokenizedArticle, cost: Tensor, order: Sequence[int]) -> float:
    """What the table says of ``order``: mean log-probability per value token."""
    lengths = [len(article.values[pair]) for pair in order]
    costs = [float(cost[before + 1, pair]) for before, pair in zip((-1, *order), order, strict=False)]
    return -sum(each * length for each, length in zip(costs, lengths, strict=True)) / sum(lengths)


def best_order_value(article: TokenizedArticle, cost: Tensor) -> float:
    """The optimum by enumeration, mean log-probability per value token."""
    return max(order_value(article, cost, order) for order in itertools.permutations(range(len(KEYS))))


def tiny_language_model(seed: int) -> LanguageModel:
    """A random Llama of two layers over a byte-level vocabulary."""
    tokenizer = train_bpe_tokenizer([*KEYS, *VALUES], vocab_size=300, context_length=256)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    return LanguageModel(model, tokenizer, name="tiny")


def planted_config(*overrides: str) -> ReadingConfig:
    return load_config(ReadingConfig, overrides=[*SETTINGS, *overrides])


def planted_run(path: Path, config: ReadingConfig) -> Run:
    return create_run(
        path,
        system="reading",
        config=to_dict(config),
        seed=config.seed,
        save_every=config.save_every,
        streams=SYSTEM.streams,
        device="cpu",
        threads=1,
        quiet=True,
    )


def planted_setup(config: ReadingConfig, run: Run) -> Setup:
    lm = tiny_language_model(config.seed)
    initial_lm = lm.initial_model()
    pairs = ArticlePairs("planted", "Planted", KEYS, VALUES)
    article = tokenize_article(pairs, lm, prompt="{title}\n", use_chat_template=False)
    sampling = Sampling(suppressed=lm.special_tokens)
    policy, initial_policy = (
        Policy(model, sampling=sampling, embedding=HiddenStates(model, layer=config.selection.layer))
        for model in (lm, initial_lm)
    )
    keys = initial_policy.embed_keys(article)
    policy.projection = identity_projection(keys.vectors.shape[1], device=lm.device)
    reader = PlantedReader(planted_cost(config.seed))
    setup = Setup(
        config=config,
        run=run,
        policy=policy,
        initial_policy=initial_policy,
        reader=reader,
        initial_reader=reader,
        articles={"planted": article},
        keys={"planted": keys},
        train=("planted",),
    )
    policy.temperature = initial_policy.temperature = calibrate(setup)
    return setup


def learn(setup: Setup) -> dict[str, Any]:
    """The system's own loop on a setup that is ready."""
    return train(setup.config, setup.run, Services(cache_dir=setup.run.path / "cache"), setup=setup)
