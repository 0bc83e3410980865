"""Decoding a batch: our decoder against Transformers' ``generate()``, with the same weights, prompts and lengths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.limits import arithmetic_seconds, forward_operations
from benchmarks.measurement import OURS, Bar, Comparison, measured_precision, require_equal
from benchmarks.models import H192, random_llama, starter
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

PROMPT_TOKENS, NEW_TOKENS = 64, 64


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """Batches of 1, 8 and 32 on the bundled model, and of 8 on a deeper, narrower one."""
    lm = starter()
    for batch_size in (2,) if quick else (1, 8, 32):
        yield compare("starter", lm, batch_size, *((4, 4) if quick else (PROMPT_TOKENS, NEW_TOKENS)))
    if not quick:
        yield compare("width 192, 8 layers", random_llama(H192), 8, PROMPT_TOKENS, NEW_TOKENS, compiled=True)


def compare(
    name: str, lm: LanguageModel, batch_size: int, prompt_tokens: int, new_tokens: int, *, compiled: bool = False
) -> Comparison:
    """One batch, sampled at temperature 1 by all ways; greedy tokens are compared first."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, lm.vocab_size, (batch_size, prompt_tokens), generator=generator).to(lm.device)

    def generate(*, model: Any = lm.model, sample: bool = True, **more: Any) -> torch.Tensor:
        tokens: torch.Tensor = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=sample,
            top_k=0 if sample else None,
            pad_token_id=lm.begin_token,
            **more,
        )
        return tokens[:, prompt_tokens:]

    def ours(*, sample: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        end = lm.tokenizer.eos_token_id  # which min_new_tokens keeps generate() from drawing
        sampling = Sampling(temperature=float(sample), suppressed=() if end is None else (int(end),))
        decoder = Decoder(lm, batch_size=batch_size, dtype=dtype)
        decoder.append(prompts.tolist())
        drawn = decoder.generate(new_tokens, sampling=sampling, generator=torch.Generator().manual_seed(0))
        return drawn.tokens

    ways: dict[str, Callable[[], object]] = {
        OURS: measured_precision(ours),
        f"{OURS}, bfloat16": measured_precision(lambda: ours(dtype=torch.bfloat16)),
        "generate()": generate,
        "generate(), static cache": lambda: generate(cache_implementation="static", disable_compile=True),
    }
    if compiled:
        twin = copy.deepcopy(lm.model)
        twin.forward = torch.compile(twin.forward)
        ways["generate(), compiled"] = lambda: generate(model=twin, cache_implementation="static")
        for _ in range(2):  # compiling takes a minute, and is not what is measured
            ways["generate(), compiled"]()
    unlike = float((measured_precision(lambda: ours(sample=False))() != generate(sample=False)).double().mean())
    bars = (Bar("generate()", at_least=1.6), Bar("generate()", at_least=2.2, way=f"{OURS}, bfloat16"))
    tokens = batch_size * new_tokens
    return Comparison(
        benchmark="decode",
        case=f"{name}: batch {batch_size}, {prompt_tokens} + {new_tokens} tokens",
        ways=ways,
        bars=bars if batch_size == 8 else (),
        # Two logits that tie within rounding may fall either way; from there on a row's tokens differ.
        agreement={"share of greedy tokens": require_equal("greedy tokens", unlike, at_most=0.05)},
        details={"parameters": lm.model.num_parameters(), "batch_size": batch_size},
        units=dict.fromkeys(ways, tokens),
        ideal_seconds=arithmetic_seconds(
            forward_operations(lm, batch_size, prompt_tokens + new_tokens), ways, lm.device
        ),
    )
