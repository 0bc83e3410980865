"""Llama-3.2-3B's architecture with random weights on one GPU: decode against bandwidth, update against arithmetic,
episodes a second, and a GRPO step against TRL's.

Without CUDA there is nothing to measure, and ``comparisons`` gives nothing; ``quick`` runs a tiny shape on the CPU.
``python -m benchmarks.gpu_session`` runs each part under a time limit and keeps what is done.
The limits are measured on the same device: bytes a second of a large copy, operations a second of a large product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks import episode, gpu_graph
from benchmarks.episodes import KEPT, kept_cache
from benchmarks.limits import (
    arithmetic,
    arithmetic_seconds,
    bandwidth,
    forward_operations,
    synchronised,
    update_operations,
)
from benchmarks.measurement import OURS, Bar, Comparison, require_equal
from benchmarks.models import LLAMA_3B, random_llama
from benchmarks.naive_episode import naive_query_log_probs
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4_096,
}


DECODE_GOAL, UPDATE_GOAL = 0.60, 0.45
"""Of the measured bandwidth while decoding, and of the measured arithmetic in an update."""


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Every part, but the GRPO step where ``quick``: TRL takes longer to import than all others take."""
    if not (quick or torch.cuda.is_available()):
        return
    lm = model(quick=quick)
    for name, part in PARTS.items():
        if not (quick and name == "grpo"):
            yield from part(lm, quick)


def model(*, quick: bool) -> LanguageModel:
    """Llama-3.2-3B's shape in bfloat16 on the GPU, or a tiny one on the CPU."""
    return random_llama(TINY if quick else LLAMA_3B, device="cpu" if quick else "cuda", dtype=torch.bfloat16)


def _limit_size(quick: bool) -> int:
    """Rows and columns of the matrices by which the device's limits are measured."""
    return 128 if quick else 8_192


def decodes(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """Batches of 8 and 32 rows, 512 + 128 tokens."""
    limit = bandwidth(lm.device, _limit_size(quick))
    for batch_size in (2,) if quick else (8, 32):
        yield decode(lm, batch_size, *((4, 4) if quick else (512, 128)), bandwidth=limit)


def graphs(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """Decoding by a CUDA graph, of 1 and 8 rows."""
    yield from gpu_graph.comparisons(lm, quick)


def updates(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """4 x 1,024 tokens."""
    limit = arithmetic(lm.device, _limit_size(quick), torch.bfloat16)
    yield update(lm, *((2, 8) if quick else (4, 1_024)), arithmetic=limit)


def reading(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """16 episodes of 20 pairs."""
    yield episodes(lm, episode.Sizes(2, 3, 4, 8) if quick else episode.Sizes(16, 20, 16, 32))


def grpo_steps(lm: LanguageModel, quick: bool) -> Iterator[Comparison]:
    """4 prompts x 8 rollouts of 128 + 128 tokens against TRL's trainer."""
    from benchmarks import grpo  # it needs TRL, whose import takes seconds

    num_prompts, tokens = (1, 4) if quick else (4, 128)
    step = grpo.compare("", lm, num_prompts=num_prompts, prompt_tokens=tokens, new_tokens=tokens)
    yield replace(step, benchmark="gpu grpo", case=f"{lm.model.num_parameters() / 1e9:.2f}B{step.case}")


PARTS: dict[str, Callable[[LanguageModel, bool], Iterator[Comparison]]] = {
    "decode": decodes,
    "update": updates,
    "graphs": graphs,
    "episodes": reading,
    "grpo": grpo_steps,
}
"""Name, and what gives its comparisons for a model, at tiny sizes where the second argument says so."""


def decode(lm: LanguageModel, batch_size: int, prompt: int, new: int, *, bandwidth: float) -> Comparison:
    """Every step reads every weight once, and every kept key and value."""
    config = lm.model.config
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.vocab_size, (batch_size, prompt), generator=generator).to(lm.device)
    kept_width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    element = torch.finfo(lm.dtype).bits // 8
    weights = sum(parameter.numel() for parameter in lm.model.parameters()) * element
    step_bytes = weights + batch_size * (prompt + new / 2) * kept_width * element

    def ours() -> None:
        decoder = Decoder(lm, batch_size=batch_size)
        decoder.append(prompts.tolist())
        decoder.generate(new, sampling=Sampling(), generator=torch.Generator().manual_seed(0))

    def generate() -> None:
        lm.model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            pad_token_id=lm.begin_token,
        )

    return Comparison(
        benchmark="gpu decode",
        case=f"{lm.model.num_parameters() / 1e9:.2f}B, batch {batch_size}, {prompt} + {new} tokens",
        ways={OURS: synchronised(ours, lm.device), "generate()": synchronised(generate, lm.device)},
        bars=(Bar("generate()", at_least=1.0, limit_at_least=DECODE_GOAL),),
        units=dict.fromkeys((OURS, "generate()"), batch_size * new),
        ideal_seconds=dict.fromkeys((OURS, "generate()"), new * step_bytes / bandwidth),
        device=lm.device,
    )


def episodes(lm: LanguageModel, sizes: episode.Sizes) -> Comparison:
    """Episodes of reading at once against a kept ``DynamicCache``, one at a time."""
    case = episode.prepare(lm, sizes, seed=0)
    sampled = episode.ours(case, sampling=replace(case.policy.sampling, temperature=1.0))
    expected = naive_query_log_probs(
        lm.model,
        prompt=case.article.prompt,
        values=case.article.values,
        orders=case.orders[:1],
        queries=sampled.queries[:1].cpu(),
        suppressed=lm.special_tokens,
    )
    difference = float((sampled.query_log_probs[:1].cpu() - expected).abs().max())
    one = replace(case, orders=case.orders[:1])
    length = len(case.article.prompt) + sizes.pairs * (sizes.query_tokens + sizes.value_tokens)
    seconds = arithmetic_seconds(forward_operations(lm, 1, length), ("bfloat16",), lm.device)["bfloat16"]
    return Comparison(
        benchmark="gpu episodes",
        case=f"{lm.model.num_parameters() / 1e9:.2f}B, {sizes.episodes} episodes x {sizes.pairs} pairs, "
        f"{sizes.query_tokens} query and {sizes.value_tokens} value tokens",
        ways={
            OURS: synchronised(lambda: episode.ours(case), lm.device),
            KEPT: synchronised(lambda: kept_cache(one), lm.device),
        },
        bars=(Bar(KEPT, at_least=1.0),),
        # bfloat16 rounds a logit of 10 to 0.03, and so does every layer before it.
        agreement={"query log-probabilities": require_equal("log-probabilities", difference, at_most=0.25)},
        units={OURS: sizes.episodes, KEPT: 1},
        ideal_seconds={OURS: sizes.episodes * seconds, KEPT: seconds},
        device=lm.device,
    )


def update(lm: LanguageModel, rows: int, time: int, *, arithmetic: float) -> Comparison:
    """Forward and backward: 6 operations a weight and token, and the attention's own (model-FLOPs utilisation)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, lm.vocab_size, (rows, time), generator=generator).to(lm.device)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, -1] = False

    def ours() -> None:
        (-lm.chosen_log_probs(tokens, keep=keep, chosen=tokens[:, 1:].flatten()).mean()).backward()
        lm.model.zero_grad()

    def plain() -> None:
        lm.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        lm.model.zero_grad()

    return Comparison(
        benchmark="gpu update",
        case=f"{lm.model.num_parameters() / 1e9:.2f}B, {rows} x {time} tokens, forward and backward",
        ways={OURS: synchronised(ours, lm.device), "Transformers": synchronised(plain, lm.device)},
        bars=(Bar("Transformers", at_least=1.0, limit_at_least=UPDATE_GOAL),),
        units=dict.fromkeys((OURS, "Transformers"), rows * time),
        ideal_seconds=dict.fromkeys((OURS, "Transformers"), update_operations(lm, rows, time) / arithmetic),
        device=lm.device,
    )
