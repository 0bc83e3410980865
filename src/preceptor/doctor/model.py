"""What must hold of a language model before it may learn by reinforcement, measured on the model itself.

The checks that a careful person makes by hand before a long run: that what was sampled is what is scored, that the old
model is the new one before the first step, that the gradient goes where it should and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from preceptor.doctor.check import Check, judged
from preceptor.lm.decode import Decoder
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling, draw
from preceptor.lm.score import pad_rows
from preceptor.objectives.kl import kl_exact

PROMPTS = ("The lighthouse stands on", "Water", "A keeper climbs the stairs every night and")
"""Of different lengths, so that rows of a batch have holes."""

NUM_TOKENS = 8
NUM_DRAWS = 20_000
MAX_DRAWN = 2**30
"""Draws times vocabulary: some seconds of work."""
MAX_ROWS = 2**23
"""Numbers in a block of draws: 64 MiB in float64, above what the C library keeps for itself once it is freed."""


@dataclass(frozen=True)
class Written:
    """Rows that the model has written on a KV cache: prompts, drawn tokens and their log-probabilities."""

    prompts: list[list[int]]
    tokens: Tensor  # row, token
    log_probs: Tensor  # row, token


def check_model(lm: LanguageModel, sampling: Sampling, *, seed: int = 0) -> Iterator[Check]:
    """Every check of ``lm`` under the distribution that it is sampled from; its weights are as before afterwards."""
    yield from _tokenizer(lm)
    generator = torch.Generator().manual_seed(seed)
    prompts = [[lm.begin_token, *lm.encode(text)] for text in PROMPTS]
    # The decoder writes on a KV cache as training does; everything below compares with what it wrote.
    decoder = Decoder(lm, batch_size=len(prompts))
    decoder.append(prompts)
    generated = decoder.generate(NUM_TOKENS, sampling=sampling, generator=generator)
    written = Written(prompts, generated.tokens, generated.log_probs)
    yield _cache(lm, written, sampling)
    yield _ratio(lm, written, sampling)
    yield _draws(lm, written, sampling, generator)
    reference = lm.initial_model()
    yield _divergence(lm, reference, written)
    # Last, since it changes weights for a moment.
    yield from _gradient(lm, reference, written, sampling)


def _tokenizer(lm: LanguageModel) -> Iterator[Check]:
    tokenizer = lm.tokenizer
    begin, end, pad = lm.begin_token, tokenizer.eos_token_id, tokenizer.pad_token_id
    named = f"begin {begin}, end {end}, pad {pad}"
    if end is None:
        yield Check("warn", "tokens", f"{named}: no end token", "texts of this model never end; set its eos_token")
    elif pad is not None and pad >= lm.vocab_size:
        yield Check("fail", "tokens", f"{named}: the model has {lm.vocab_size}", "use the model's own tokenizer")
    else:
        shared = ", pad is the end token (rows are masked, so that nothing depends on it)" if pad == end else ""
        yield Check("ok", "tokens", named + shared)
    if nameless := len(lm.nameless_tokens):
        figure = f"{nameless:,} of {lm.vocab_size:,} ids have no token in the tokenizer; they are never drawn"
        yield Check("ok", "ids without a token", figure)
    # Quotes and a dash outside ASCII, digits, a colon: what tokenizers normalise.
    text = "Reading and writing: 1 + 1 = 2, “é”."
    back = lm.decode(lm.encode(text))
    remedy = "what is decoded is not what was encoded; queries and texts in reports will look different"
    yield Check("ok" if back.strip() == text else "warn", "text and back", repr(back), remedy)
    control = set(lm.special_tokens)
    # Control tokens as a malicious text would spell them, alone and inside other text.
    spelled = [str(tokenizer.convert_ids_to_tokens(token)) for token in lm.special_tokens]
    contexts = ("{}", "a {} b", "a{}b", "\n{}\n")
    found = sum(bool(control & set(lm.encode(c.replace("{}", word)))) for word in spelled for c in contexts)
    figure = f"{found} of {len(spelled) * len(contexts)} texts that spell one became one"
    yield judged(found == 0, "control tokens from data", figure, "this tokenizer cannot be trusted with foreign text")


def _cache(lm: LanguageModel, written: Written, sampling: Sampling) -> Check:
    """The log-probabilities on the KV cache, ragged rows side by side, against each row encoded anew on its own."""
    worst = 0.0
    for prompt, tokens, log_probs in zip(written.prompts, written.tokens, written.log_probs, strict=True):
        row = [*prompt, *tokens.tolist()]
        # Logits at t − 1 predict token t, hence from the prompt's last position to the last but one.
        scored = sampling.log_probs(_logits(lm, [row])[0, len(prompt) - 1 : -1], drawn=tokens)
        worst = max(worst, float((scored.gather(-1, tokens[:, None])[:, 0] - log_probs).abs().max()))
    return judged(
        worst <= _tolerance(lm),
        "cache equals re-encoding",
        f"largest difference {worst:.1e} nats",
        "do not train with it: its KV cache is not its context; report the model's name",
    )


def _ratio(lm: LanguageModel, written: Written, sampling: Sampling) -> Check:
    """The probability ratio of new and old policy before any step, rows scored in one padded batch with gradient."""
    rows = [[*p, *t] for p, t in zip(written.prompts, written.tokens.tolist(), strict=True)]
    logits = _logits(lm, rows)
    worst = 0.0
    for index, (prompt, tokens) in enumerate(zip(written.prompts, written.tokens, strict=True)):
        # The rows are padded to one length; each has its own place.
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        scored = sampling.log_probs(logits[index, at], drawn=tokens).gather(-1, tokens[:, None])[:, 0]
        # exp(new − old) must be 1: a ratio that starts elsewhere biases every importance weight.
        worst = max(worst, float(((scored - written.log_probs[index]).exp() - 1).abs().max()))
    return judged(
        worst <= _tolerance(lm),
        "probability ratio at step 0",
        f"1 within {worst:.1e}",
        "sampling and scoring disagree; use float32, or a smaller top_k and temperature closer to 1",
    )


def _draws(lm: LanguageModel, written: Written, sampling: Sampling, generator: torch.Generator) -> Check:
    """Tokens drawn after one prompt against the probabilities that they are scored with, in standard errors."""
    log_probs = sampling.log_probs(_logits(lm, [written.prompts[0]])[0, -1:])
    # Few rows at a time, and fewer draws from a large vocabulary: each row is a vocabulary of float64 numbers.
    vocab_size = log_probs.shape[-1]
    num_draws = max(1_000, min(NUM_DRAWS, MAX_DRAWN // vocab_size))
    sizes = torch.arange(num_draws).split(max(1, MAX_ROWS // vocab_size))
    drawn = torch.cat([draw(log_probs.expand(len(rows), -1), generator).cpu() for rows in sizes])
    drawn = drawn.bincount(minlength=vocab_size).double()
    p = log_probs[0].double().exp().cpu()
    impossible = int(drawn[p == 0].sum())
    usual = p * num_draws >= 10  # of rarer tokens the count is not near normal
    # Standard error of a binomial count, √(n p (1 − p)).
    errors = (drawn - p * num_draws)[usual].abs() / (num_draws * p * (1 - p)).sqrt()[usual].clamp_min(1e-12)
    worst = float(errors.max()) if bool(usual.any()) else 0.0
    return judged(
        # Among hundreds of tokens the largest deviation is often near 3.5; 5 comes once in two million.
        impossible == 0 and worst < 5.0,
        "sampled distribution equals scored",
        f"{num_draws:,} draws, largest deviation {worst:.1f} standard errors, {impossible} impossible tokens",
        "the sampler draws from another distribution than it records; report this",
    )


def _divergence(lm: LanguageModel, reference: LanguageModel, written: Written) -> Check:
    rows = [[*p, *t] for p, t in zip(written.prompts, written.tokens.tolist(), strict=True)]
    # Exactly 0 would be too strict: adapter and base are computed along different paths.
    divergence = float(kl_exact(_logits(lm, rows), _logits(reference, rows)).max())
    return judged(
        abs(divergence) <= _tolerance(lm),
        "KL to the reference at step 0",
        f"{divergence:.1e} nats",
        "policy and reference must start as one; load both from the same folder",
    )


def _gradient(lm: LanguageModel, reference: LanguageModel, written: Written, sampling: Sampling) -> Iterator[Check]:
    """A policy-gradient step on the model: where its gradient goes, and that the reference does not move."""
    intended = lm.trainable_parameters()
    everything = dict(lm.model.named_parameters())
    rows = [[*p, *t] for p, t in zip(written.prompts, written.tokens.tolist(), strict=True)]
    # Before the step, to see below whether the reference has moved.
    before = _logits(reference, rows)
    chosen = []
    logits = _forward(lm, rows)
    for index, (prompt, tokens) in enumerate(zip(written.prompts, written.tokens, strict=True)):
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        chosen.append(sampling.log_probs(logits[index, at], drawn=tokens).gather(-1, tokens[:, None])[:, 0])
    # A policy gradient with advantage 1 for every token.
    (-torch.cat(chosen).mean()).backward()
    reached = {name for name, parameter in everything.items() if parameter.grad is not None}
    # Trainable and not reached means that it will not learn; reached and not trainable wastes memory or moves what is
    # frozen.
    missed, astray = sorted(intended.keys() - reached), sorted(reached - intended.keys())
    num_silent = sum(not bool(everything[name].grad.any()) for name in reached)  # type: ignore[union-attr]
    figure = f"{len(reached)} of {len(intended)} tensors"
    figure += f", {num_silent} of them with zeros (LoRA's first matrix at the start)" if num_silent else ""
    figure += f", misses {missed[0]}" if missed else ""
    figure += f", also reaches {astray[0]}" if astray else ""
    finite = all(bool(everything[name].grad.isfinite().all()) for name in reached)  # type: ignore[union-attr]
    yield judged(
        bool(intended) and not missed and not astray and finite,
        "gradient reaches what is to learn",
        figure if finite else f"{figure}, and is not finite",
        "freeze or free the parameters named, or choose another model",
    )
    with torch.no_grad():
        # A copy of each, since the weights must be as before afterwards, to the bit.
        saved = {name: parameter.clone() for name, parameter in intended.items()}
        for parameter in intended.values():
            # Large enough to be seen in the logits, whatever the precision.
            parameter.add_(torch.full_like(parameter, 1e-2))
        moved = float((_logits(lm, rows) - before).abs().max())
        drift = float((_logits(reference, rows) - before).abs().max())
        for name, parameter in intended.items():
            parameter.copy_(saved[name])
            parameter.grad = None
    yield judged(
        drift == 0.0 and moved > 0.0,
        "reference is frozen",
        f"the policy moved by {moved:.2g}, the reference by {drift:.2g}",
        "policy and reference share weights; report the model's name",
    )


def _forward(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits at every position: row, time, vocabulary; with gradient."""
    tokens = pad_rows(rows, filler=lm.begin_token, device=lm.device)
    logits = lm.forward(tokens, keep=torch.ones_like(tokens, dtype=torch.bool)).logits
    return logits.view(*tokens.shape, -1)


@torch.no_grad()
def _logits(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    return _forward(lm, rows)


def _tolerance(lm: LanguageModel) -> float:
    """Rounding through all layers: float32 stays below 1e-5 here, bfloat16 has three digits."""
    return 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
