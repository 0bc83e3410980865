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
from preceptor.run.folder import Run, create_run, open_run
from preceptor.systems.reading.classroom import Classroom, calibrate, identity_projection
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.material import Material, Reading, Row, encode_reading
from preceptor.systems.reading.policy import Policy
from preceptor.systems.reading.reader import Scored
from preceptor.systems.reading.train import STREAMS

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

    def material(self, policy_material: Material) -> Material:
        return policy_material

    def query_tokens(self, query: Sequence[int]) -> Sequence[int]:
        return query

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        scored = []
        for row in rows:
            log_probs, last = [], -1
            for span in row.spans:
                if span.kind == "value":
                    log_probs.append(torch.full((span.end - span.start,), -float(self.cost[last + 1, span.pair])))
                    last = span.pair
            scored.append(Scored(row, tuple(log_probs)))
        return scored

    def branches(self, row: Row, branches: Sequence[tuple[int, Sequence[int], int]]) -> list[Tensor]:
        raise NotImplementedError("the planted article has no probe")


def planted_cost(seed: int) -> Tensor:
    """Costs in nats per token, standard normal around 5: row u + 1 is "after u", row 0 is "first"."""
    return 5 + torch.randn(len(KEYS) + 1, len(KEYS), generator=torch.Generator().manual_seed(1000 + seed))


def order_value(material: Material, cost: Tensor, order: Sequence[int]) -> float:
    """What the table says of ``order``: mean log-probability per value token."""
    lengths = [len(material.values[pair]) for pair in order]
    costs = [float(cost[before + 1, pair]) for before, pair in zip((-1, *order), order, strict=False)]
    return -sum(each * length for each, length in zip(costs, lengths, strict=True)) / sum(lengths)


def best_order_value(material: Material, cost: Tensor) -> float:
    """The optimum by enumeration, mean log-probability per value token."""
    return max(order_value(material, cost, order) for order in itertools.permutations(range(len(KEYS))))


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
        streams=STREAMS,
        device="cpu",
        threads=1,
        quiet=True,
    )


def planted_classroom(config: ReadingConfig, run: Run, **policy_options: Any) -> Classroom:
    lm = tiny_language_model(config.seed)
    untrained_lm = lm.initial_model()
    reading = Reading("planted", "Planted", KEYS, VALUES)
    material = encode_reading(reading, lm, prompt="{title}\n", use_chat_template=False)
    sampling = Sampling(suppressed=lm.special_tokens)
    policy, untrained = (
        Policy(model, sampling=sampling, embedding=HiddenStates(model, layer=config.selection.layer), **policy_options)
        for model in (lm, untrained_lm)
    )
    keys = untrained.embed_keys(material)
    policy.projection = identity_projection(keys.vectors.shape[1], device=lm.device)
    reader = PlantedReader(planted_cost(config.seed))
    classroom = Classroom(
        policy=policy,
        untrained=untrained,
        reader=reader,
        untrained_reader=reader,
        materials={"planted": material},
        keys={"planted": keys},
        train=("planted",),
    )
    policy.temperature = untrained.temperature = calibrate(
        classroom,
        target_fraction=config.selection.entropy_fraction,
        num_episodes=config.episode.batch_size,
        query_tokens=config.episode.query_tokens,
        generators={name: run.streams[f"calibration_{name}"] for name in ("query", "selection")},
    )
    return classroom


__all__ = ["open_run", "planted_classroom", "planted_config", "planted_run"]
