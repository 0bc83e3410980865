"""The policy: the language model that is trained, and its rollouts.

A rollout continues the first tokens of a document. All rollouts of a step are decoded in one batch that shares a KV
cache, and are scored again in one forward pass, in which rollouts of the same prompt may share the prompt's tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from preceptor.lm.generators.base import Generator, OwnGenerator, end_token
from preceptor.lm.load import Adapter, load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, Stream
from preceptor.lm.score import pad_rows
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems.curriculum.config import ModelOptions, num_heads

BYTES = "bytes"
"""Name of the small model over bytes."""
BYTE_TOKENS, BYTES_CONTEXT = 259, 512
"""256 bytes and three control tokens; the longest row."""

MAX_MASK_ENTRIES = 2**24
"""Largest attention mask of packed rows: 64 MiB in float32."""

MIN_SAVING = 1 / 8
"""Fraction of the tokens that packing must save to be worth its mask."""


def build_policy(options: ModelOptions, *, device: torch.device, seed: int) -> LanguageModel:
    """The language model that ``options`` describe, on ``device``.

    From scratch it keeps the named model's tokenizer and architecture. With another width it also keeps the ratio of
    feed-forward width to width, and has heads of 64 dimensions. ``bytes`` is a model over bytes, 64 wide with two
    layers and heads of 16 dimensions unless the options say otherwise; it always starts from random weights.

    Args:
        options: the ``model`` section of the configuration.
        device: where the weights live.
        seed: of the random weights of a model from scratch.
    """
    adapter = Adapter(options.adapter_rank, options.adapter_alpha) if options.adapter_rank else None
    if options.name == BYTES:
        return _bytes_model(options, device=device, seed=seed)
    named = load_language_model(options.name, device=device, dtype=getattr(torch, options.dtype), adapter=adapter)
    if not options.from_scratch:
        return named
    shape = copy.deepcopy(named.model.config)
    if options.num_layers:
        shape.num_hidden_layers = options.num_layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[: options.num_layers]  # one entry per layer (Qwen, Gemma)
    if options.width:
        shape.intermediate_size = shape.intermediate_size * options.width // shape.hidden_size
        shape.hidden_size = options.width
        shape.num_attention_heads = shape.num_key_value_heads = num_heads(options.width, dimensions=64)
        shape.head_dim = options.width // shape.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # drawn on the CPU, so that every device starts alike
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape, dtype=getattr(torch, options.dtype)
        )
    return LanguageModel(model.to(device), named.tokenizer, name=f"{options.name} from scratch")


def _bytes_model(options: ModelOptions, *, device: torch.device, seed: int) -> LanguageModel:
    """A small model from random weights whose tokens are bytes."""
    tokenizer = train_bpe_tokenizer([], vocab_size=BYTE_TOKENS, context_length=BYTES_CONTEXT)
    width = options.width or 64
    shared: dict[str, Any] = {
        "vocab_size": BYTE_TOKENS,
        "num_hidden_layers": options.num_layers or 2,
        "num_attention_heads": num_heads(width, dimensions=16),
        "hidden_size": width,
        "max_position_embeddings": BYTES_CONTEXT,
        "initializer_range": 0.1,  # for matrices of width 64; the libraries' 0.02 is for wide ones
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # drawn on the CPU, so that every device starts alike
        model: Any
        if options.positions == "learned":
            model = GPT2LMHeadModel(GPT2Config(**shared))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=3 * width))
    return LanguageModel(model.to(device, getattr(torch, options.dtype)), tokenizer, name=BYTES)


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document.

    Attributes:
        dataset: which it was drawn from.
        tokens: what the policy reads; at least one.
        reference: how the document really goes on: as many tokens as a continuation may have, or fewer.
    """

    dataset: str
    tokens: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Rollouts:
    """Continuations sampled from the policy; the ``group_size`` continuations of one prompt are adjacent rows.

    Attributes:
        prompts: one per row.
        tokens: the sampled tokens.
        mask: True = the token counts: the continuation had not ended before it.
        log_probs: of each sampled token under the distribution that it was sampled from, nats.
        entropy: of that distribution, nats.
        weights: importance weights of the tokens where another engine sampled them; None where the policy did.
    """

    prompts: tuple[Prompt, ...]
    tokens: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    log_probs: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"]
    weights: Float[Tensor, "batch token"] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens that a continuation may have."""
        return int(self.tokens.shape[1])

    def continuation(self, index: int) -> list[int]:
        """The tokens of a row that count."""
        return [int(token) for token in self.tokens[index][self.mask[index]]]

    def at(self, indices: Int[Tensor, " kept"]) -> Rollouts:
        """The rows at ``indices``."""
        return Rollouts(
            prompts=tuple(self.prompts[index] for index in indices.tolist()),
            tokens=self.tokens[indices],
            mask=self.mask[indices],
            log_probs=self.log_probs[indices],
            entropy=self.entropy[indices],
            weights=None if self.weights is None else self.weights[indices],
        )

    def without(self, rows: Bool[Tensor, " batch"]) -> Rollouts:
        """The same rollouts, but no token of ``rows`` counts."""
        return replace(self, mask=self.mask & ~rows[:, None])

    @property
    def groups(self) -> list[list[int]]:
        """Indices of the rows that share a prompt, in order of each prompt's first row."""
        members: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            members.setdefault(prompt.tokens, []).append(row)
        return list(members.values())

    def padded(self, filler: int) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
        """Prompts with their continuations as rows padded on the right, and where the sampled tokens are predicted.

        Every row has as many predicting positions as sampled tokens, so what is selected by the mask has the shape
        [batch, token] again.
        """
        rows = [[*prompt.tokens, *tokens] for prompt, tokens in zip(self.prompts, self.tokens.tolist(), strict=True)]
        padded = pad_rows(rows, filler=filler, device=self.tokens.device)
        # Position t predicts token t + 1, so the last token of the prompt is the first that predicts.
        first = torch.tensor([len(prompt.tokens) - 1 for prompt in self.prompts], device=padded.device)[:, None]
        time = torch.arange(padded.shape[1], device=padded.device)
        return padded, (time >= first) & (time < first + self.num_tokens)


def generate_rollouts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    num_tokens: int,
    sampling: Sampling,
    generator: Stream,
    engine: Generator | None = None,
) -> Rollouts:
    """``group_size`` continuations of every prompt, sampled in one batch.

    A row ends with the tokenizer's end token; that token counts, what is sampled after it does not.

    Args:
        lm: the policy.
        prompts: what it continues.
        group_size: continuations of each prompt, at least 1.
        num_tokens: tokens of a continuation, at most.
        sampling: the distribution to sample from, without truncation.
        generator: of the samples.
        engine: writes them; None is the policy's own decoder.
    """
    rows = [prompt.tokens for prompt in prompts]
    asked: dict[str, Any] = {"number": group_size, "num_tokens": num_tokens, "sampling": sampling}
    if engine is None:
        generated = OwnGenerator(lm).generate(rows, **asked, generator=generator)
    else:
        assert isinstance(generator, torch.Generator), "another engine writes in a world of one process"
        generated = engine.generate(rows, **asked, generator=generator)
    return Rollouts(
        prompts=tuple(prompt for prompt in prompts for _ in range(group_size)),
        tokens=generated.tokens,
        mask=generated.mask,
        log_probs=generated.log_probs,
        # −ln p of the sampled token is an unbiased estimate of its distribution's entropy.
        entropy=-generated.log_probs if generated.entropy is None else generated.entropy,
    )


def rollout_sampling(lm: LanguageModel, temperature: float) -> Sampling:
    """The distribution of rollouts: no control token but the end token, no token without text, and no truncation.

    With truncation, the two policies of PPO's ratio would have different supports.
    """
    end = end_token(lm)
    return Sampling(temperature=temperature, suppressed=[token for token in lm.never_drawn if token != end])


# ---- scoring rollouts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardBatch:
    """Rows for one forward pass that predicts every sampled token once.

    Attributes:
        tokens: token ids.
        keep: True = a sampled token is predicted here.
        order: which rollout each run of ``num_tokens`` kept positions belongs to, row by row.
        visible: True = this token attends to that one; None where rows are plain.
        positions: of each token in its own text; None where rows are plain.
    """

    tokens: Int[Tensor, "batch time"]
    keep: Bool[Tensor, "batch time"]
    order: Int[Tensor, " kept"]
    visible: Bool[Tensor, "batch time time"] | None = None
    positions: Int[Tensor, "batch time"] | None = None


def forward_batch(rollouts: Rollouts, *, filler: int, may_pack: bool) -> ForwardBatch:
    """One row per rollout or, where ``may_pack`` and it saves enough, one per group that holds the prompt only once.

    A packed row is the prompt followed by all continuations of its group. Each continuation starts from a copy of the
    prompt's last token and attends to the prompt and to itself, never to its siblings.
    """
    groups, num_tokens, device = rollouts.groups, rollouts.num_tokens, rollouts.tokens.device
    prompts = [rollouts.prompts[members[0]].tokens for members in groups]
    packed_sizes = [
        len(prompt) - 1 + len(members) * num_tokens for prompt, members in zip(prompts, groups, strict=True)
    ]
    plain_size = sum(len(prompt.tokens) + num_tokens for prompt in rollouts.prompts)
    saves_enough = sum(packed_sizes) <= (1 - MIN_SAVING) * plain_size
    mask_fits = len(groups) * max(packed_sizes) ** 2 <= MAX_MASK_ENTRIES  # [groups, time, time]
    if not (may_pack and saves_enough and mask_fits):
        return ForwardBatch(*rollouts.padded(filler), order=torch.arange(len(rollouts), device=device))

    # Prompt 0 1 2 with the continuations 5 6 and 8 9, whose last tokens predict nothing and are left out:
    #   tokens     0 1 | 2 5 | 2 8
    #   texts      0 0 | 1 1 | 2 2      0 is the prompt, 1 the first continuation, …
    #   positions  0 1 | 2 3 | 2 3
    sampled = rollouts.tokens.tolist()
    rows: list[list[int]] = []
    texts: list[list[int]] = []
    positions: list[list[int]] = []
    for prompt, members in zip(prompts, groups, strict=True):
        shared = len(prompt) - 1
        rows.append([*prompt[:-1], *(token for row in members for token in (prompt[-1], *sampled[row][:-1]))])
        texts.append([0] * shared + [text for text in range(1, len(members) + 1) for _ in range(num_tokens)])
        positions.append([*range(shared), *list(range(shared, shared + num_tokens)) * len(members)])
    text = pad_rows(texts, filler=-1, device=device)  # [groups, time]
    # [groups, time, time]: query i sees key j where j is in the prompt or in i's own continuation, and j ≤ i.
    visible = (text[:, None, :] == 0) | (text[:, None, :] == text[:, :, None])
    return ForwardBatch(
        tokens=pad_rows(rows, filler=filler, device=device),
        keep=text > 0,
        order=torch.tensor([row for members in groups for row in members], device=device),
        visible=visible.tril(),
        positions=pad_rows(positions, filler=0, device=device),
    )


def rollout_log_probs(lm: LanguageModel, rollouts: Rollouts, sampling: Sampling) -> Float[Tensor, "batch token"]:
    """Log-probability in nats of each sampled token, without holding the logits of all positions at once.

    Has a gradient with respect to the trainable parameters of ``lm``, unless the caller switches it off.
    """
    batch = forward_batch(rollouts, filler=lm.begin_token, may_pack=lm.skips_hidden_slots)
    log_probs = lm.chosen_log_probs(
        batch.tokens,
        keep=batch.keep,
        chosen=rollouts.tokens[batch.order].flatten(),
        attention_mask=batch.visible,
        positions=batch.positions,
        sampling=sampling,
    )
    # [batch · token] in the order of the packed rows; argsort of a permutation is its inverse.
    return log_probs.view_as(rollouts.tokens)[batch.order.argsort()]


def rollout_distributions(
    lm: LanguageModel, rollouts: Rollouts, sampling: Sampling
) -> Float[Tensor, "batch token vocab"]:
    """Log-probabilities in nats of the whole vocabulary at each position of the continuations.

    Has a gradient with respect to the trainable parameters of ``lm``, unless the caller switches it off.
    """
    batch = forward_batch(rollouts, filler=lm.begin_token, may_pack=lm.skips_hidden_slots)
    output = lm.forward(batch.tokens, keep=batch.keep, attention_mask=batch.visible, positions=batch.positions)
    # Kept logits [batch · token, vocab], put back into the order of the rollouts.
    logits = output.logits.view(len(rollouts), rollouts.num_tokens, -1)[batch.order.argsort()]
    return sampling.log_probs(logits, drawn=rollouts.tokens)
