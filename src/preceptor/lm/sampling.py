"""The distribution that tokens are sampled from, as log-probabilities: what is recorded is what was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preceptor.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits, > 0; 0 is greedy (all probability on the largest logit).
        top_k: only the k largest logits keep probability; 0 keeps all.
        top_p: only the smallest set of tokens whose probability reaches p keeps probability; 1 keeps all.
        suppressed: token ids that are never drawn (control tokens).

    Raises:
        ConfigError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppressed: Sequence[int] = ()

    def __post_init__(self) -> None:
        faults = []
        if self.temperature < 0:
            faults.append(f"`temperature` must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            faults.append(f"`top_k` must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            faults.append(f"`top_p` must lie in (0, 1], got {self.top_p}")
        if faults:
            raise ConfigError(*faults)

    def log_probs(
        self, logits: Float[Tensor, "*batch vocab"], *, drawn: Int[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities in nats of the truncated and renormalised distribution; −inf for tokens that cannot be drawn.

        Args:
            logits: float32 logits of the model.
            drawn: tokens drawn earlier from the same distribution. They always keep their probability, so that a logit
                that moved by a rounding error across the edge of the truncation never gets −inf.
        """
        if self.suppressed:
            logits = logits.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)
        if self.temperature == 0:
            greedy = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(-1, greedy, 0.0)
        logits = logits / self.temperature
        if self.top_k == 0 and self.top_p == 1:
            return logits.log_softmax(-1)
        allowed = self._allowed(logits.detach())
        if drawn is not None:
            allowed = allowed.scatter(-1, drawn[..., None], True)
        return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def _allowed(self, logits: Tensor) -> Tensor:
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if 0 < self.top_k < logits.shape[-1]:
            allowed &= logits >= logits.topk(self.top_k, dim=-1).values[..., -1:]
        if self.top_p < 1:
            ordered, indices = (
                logits.masked_fill(~allowed, -torch.inf).softmax(-1).sort(-1, descending=True, stable=True)
            )
            before = ordered.cumsum(-1) - ordered
            allowed &= torch.zeros_like(allowed).scatter(-1, indices, before < self.top_p)
        return allowed


def draw(log_probs: Float[Tensor, "batch choices"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    """One index per row, drawn with ``generator`` (a CPU generator, so that a run draws alike on every device)."""
    probabilities = log_probs.detach().double().exp().cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(log_probs.device)
