"""Transformers' ``generate`` as an engine: any model, cache and attention that Transformers has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from preceptor.lm.generators.base import Generations, counted, end_token
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling


class TransformersGenerator:
    """The model's own ``generate``, which samples from our distribution and not from one of its own.

    Args:
        lm: whose present weights write.
    """

    name = "transformers"

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        number: int,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> Generations:
        """``number`` continuations of every prompt (:meth:`~preceptor.lm.generators.base.Generator.generate`)."""
        lm, end = self._lm, end_token(self._lm)
        width = max(map(len, prompts))
        # Padded on the left, as `generate` wants it; what pads is hidden by the mask.
        rows = [[lm.begin_token] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        visible = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        record = _SampleFrom(sampling)
        seed = int(torch.randint(2**62, (), generator=generator))
        devices = [lm.device] if lm.device.type == "cuda" else []
        model: Any = lm.model
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)  # it draws from the global generator alone
            sequences = model.generate(
                torch.tensor(rows, device=lm.device),
                attention_mask=torch.tensor(visible, device=lm.device),
                num_return_sequences=number,
                max_new_tokens=num_tokens,
                min_new_tokens=None,
                do_sample=True,
                # Truncation and temperature are in the processor; these switch off what the model's own file sets.
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=None if end < 0 else end,
                pad_token_id=lm.begin_token if end < 0 else end,
                logits_processor=LogitsProcessorList([record]),
                return_dict_in_generate=False,
            )
        tokens = sequences[:, width:]
        log_probs = record.log_probs(tokens)
        mask = counted(tokens, end=end)
        missing = num_tokens - tokens.shape[1]  # all rows ended early
        pad = torch.nn.functional.pad
        return Generations(
            tokens=pad(tokens, (0, missing), value=max(end, 0)),
            mask=pad(mask, (0, missing), value=False),
            log_probs=pad(log_probs.masked_fill(~mask, 0.0), (0, missing)),
            entropy=pad(torch.stack(record.entropies, 1).masked_fill(~mask, 0.0), (0, missing)),
        )

    def refresh(self) -> None:
        """Nothing to do: ``generate`` reads the model's own weights."""


class _SampleFrom(LogitsProcessor):
    """Replaces the scores by our log-probabilities, and keeps those of the tokens that are then drawn from them."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._last: Tensor | None = None
        self._kept: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "batch time"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The distribution of the next token; the last token of ``input_ids`` was drawn from the one before."""
        if self._last is not None:
            self._kept.append(self._last.gather(1, input_ids[:, -1:])[:, 0])
        self._last = self._sampling.log_probs(scores.float())
        finite = self._last.clamp_min(torch.finfo(self._last.dtype).min)  # 0·(−∞) is NaN
        self.entropies.append(-(self._last.exp() * finite).sum(-1))
        return self._last

    def log_probs(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
        """Of all tokens that were drawn; only one step's distribution was ever held."""
        assert self._last is not None, "nothing was generated"
        return torch.stack([*self._kept, self._last.gather(1, tokens[:, -1:])[:, 0]], 1)
