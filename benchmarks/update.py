"""One update on plain text: forward, backward and AdamW over B × T tokens, against plain Transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.limits import arithmetic_seconds, update_operations
from benchmarks.measurement import OURS, Bar, Comparison, matmul_precision, require_equal
from benchmarks.models import H192, random_llama, starter
from preceptor.lm.model import LanguageModel
from preceptor.runs.device import exact_matmul_precision
from preceptor.systems.reading.articles import bundled_article

LEARNING_RATE = 1e-4
STEPS = 50
"""Over which the losses are compared."""


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """8 rows of 512 tokens; losses are compared over 50 steps on fewer tokens."""
    if quick:
        yield compare("starter", starter(), rows=2, time=16, steps=3)
        return
    yield compare("starter", starter(), rows=8, time=512, steps=STEPS)
    yield compare("width 192, 8 layers", random_llama(H192), rows=8, time=512, steps=STEPS)


def compare(name: str, lm: LanguageModel, *, rows: int, time: int, steps: int) -> Comparison:
    """Plain float32 Transformers, ours in float32 and in bfloat16, from the same weights on the same tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor(lm.encode(bundled_article().text))
    tokens = text.repeat(-(-rows * time // len(text)))[: rows * time].view(rows, time)
    length = min(time, 64)
    starts = torch.randint(len(text) - length, (steps, 4), generator=generator).tolist()
    batches = [torch.stack([text[start : start + length] for start in row]) for row in starts]
    kinds: dict[str, Callable[[LanguageModel], Callable[[Tensor], float]]] = {
        OURS: lambda lm: ours(lm, dtype=None),
        f"{OURS}, bfloat16": lambda lm: ours(lm, dtype=torch.bfloat16),
        "Transformers": plain,
    }
    losses = {}
    for way, make in kinds.items():
        step = make(_copy(lm))
        losses[way] = [step(batch) for batch in batches]
    agreement = {
        f"loss over {steps} steps, {way}": require_equal(
            f"losses of {way}",
            max(abs(a - b) / b for a, b in zip(losses[way], losses["Transformers"], strict=True)),
            at_most=1e-5 if way == OURS else 1e-2,
        )
        for way in (OURS, f"{OURS}, bfloat16")
    }
    stepping = {way: make(_copy(lm)) for way, make in kinds.items()}
    return Comparison(
        benchmark="update",
        case=f"{name}: {rows} x {time} tokens, vocabulary {lm.vocab_size:,}",
        ways={way: lambda step=step: step(tokens) for way, step in stepping.items()},  # type: ignore[misc]
        bars=(Bar("Transformers", at_least=1.4), Bar("Transformers", at_least=1.8, way=f"{OURS}, bfloat16")),
        agreement=agreement,
        details={"parameters": lm.model.num_parameters()},
        units=dict.fromkeys(kinds, rows * time),
        ideal_seconds=arithmetic_seconds(update_operations(lm, rows, time), kinds, lm.device),
    )


def ours(lm: LanguageModel, *, dtype: torch.dtype | None) -> Callable[[Tensor], float]:
    """Our forward and chosen log-probabilities, the measured kernel, fused AdamW; autocast where ``dtype`` is given."""
    optimiser = torch.optim.AdamW(lm.model.parameters(), lr=LEARNING_RATE, fused=True)
    setting = exact_matmul_precision(lm.device)

    def step(tokens: Tensor) -> float:
        keep = torch.ones_like(tokens, dtype=torch.bool)
        keep[:, -1] = False
        with matmul_precision(setting):
            with torch.autocast(lm.device.type, dtype, enabled=dtype is not None):
                log_probs = lm.chosen_log_probs(tokens, keep=keep, chosen=tokens[:, 1:].flatten())
            loss = -log_probs.mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return loss.item()

    return step


def plain(lm: LanguageModel) -> Callable[[Tensor], float]:
    """What one writes first with Transformers."""
    model = lm.model
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step(tokens: Tensor) -> float:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def _copy(lm: LanguageModel) -> LanguageModel:
    model: nn.Module = copy.deepcopy(lm.model)
    return LanguageModel(model, lm.tokenizer, name=lm.name)
