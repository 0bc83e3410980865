"""A small article of our own and a policy over it, for tests that look at one part of reading at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from preceptor.lm.embedding import HiddenStates
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.reading.articles import ArticlePairs, TokenizedArticle, tokenize_article
from preceptor.systems.reading.environment import Trajectories, run_episodes
from preceptor.systems.reading.policy import Keys, Policy, identity_projection

BEES = ArticlePairs(
    name="bees",
    title="Bees",
    keys=("A hive has one queen.", "Bees dance.", "Nectar is thin.", "Wax is made of honey.", "Winter is long."),
    values=(
        "She lays every egg.",
        "The dance tells where flowers are, and how far.",
        "They fan it until it is thick.",
        "It costs them much.",
        "The cluster shivers to keep warm.",
    ),
    probe="A swarm leaves in May. Scouts look for a hollow tree.",
)


def language_model(*, seed: int = 0, num_layers: int = 3, tied: bool = False, context: int = 256) -> LanguageModel:
    """A random Llama, by default of three layers with an output head of its own, over a byte-level vocabulary."""
    tokenizer = train_bpe_tokenizer([*BEES.keys, *BEES.values], vocab_size=300, context_length=context)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    return LanguageModel(model, tokenizer, name="small")


def policies(
    lm: LanguageModel, *, layer: int = -2, projection: bool = True, temperature: float = 2.0, **sampling: Any
) -> tuple[Policy, Policy, TokenizedArticle, Keys]:
    """The policy, what it was before training, the article, and its keys."""
    lms = (lm, lm.initial_model())
    policy, untrained = (
        Policy(
            model,
            sampling=Sampling(suppressed=lm.special_tokens, **sampling),
            embedding=HiddenStates(model, layer=layer),
            temperature=temperature,
        )
        for model in lms
    )
    article = tokenize_article(BEES, lm, prompt="{title}\n", use_chat_template=True)
    keys = untrained.embed_keys(article)
    if projection:
        policy.projection = identity_projection(keys.vectors.shape[1], device=lm.device).to(keys.vectors.dtype)
    return policy, untrained, article, keys


def rollout(policy: Policy, article: TokenizedArticle, keys: Keys, **options: Any) -> Trajectories:
    """Four episodes that read everything with queries of three tokens, unless ``options`` say otherwise."""
    seed = options.pop("seed", 0)
    generators = {
        name: torch.Generator().manual_seed(10 * seed + number)
        for number, name in enumerate(("query", "selection", "reference"))
    }
    settings = {"num_episodes": 4, "budget": article.num_pairs, "query_tokens": 3, **options}
    return run_episodes(policy, article, keys, generators=generators, **settings)


class HashedBytes:
    """A text embedder without gradient: the SHA-256 of a text as 32 numbers in [−1, 1]."""

    name, version, dimension = "hashed", "hashed-1", 32

    def embed(self, texts: Sequence[str]) -> Tensor:
        assert all(texts), "no embedder takes an empty text"
        digests = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
        return torch.tensor(digests, dtype=torch.float32) / 127.5 - 1


def perturb(policy: Policy, *, scale: float, seed: int = 5) -> None:
    """Move every parameter of the policy a little, as a step of learning would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.lm.trainable_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(scale * noise.to(parameter.dtype))


def snapshot(parameters: Callable[[], Sequence[tuple[str, Tensor]]] | Any) -> dict[str, Tensor]:
    """Copies of named tensors."""
    return {name: tensor.detach().clone() for name, tensor in parameters}
