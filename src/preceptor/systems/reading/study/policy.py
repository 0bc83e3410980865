"""The policy over a pool: a learned mixture of similarities, spread over candidates that are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from preceptor.lm.sampling import draw
from preceptor.objectives.selection import relative_selection_entropy
from preceptor.systems.reading.study.features import CaseBatch


class PoolPolicy(nn.Module):
    """Scores of all candidates of a case, and a temperature.

    1. Query and keys, standardised, are projected on both sides; their cosine is the first channel, and the score of
       a candidate is a weighted sum of its channels.
    2. Message passing: in each of ``num_rounds`` rounds a candidate takes up the scores of those it is like. How alike
       two candidates are is a weighted sum of channels too, and a softmax over all others.
    3. What was read lowers (or raises) the score of candidates that are like it: adaptivity.

    As created it is the plain cosine of the text, whatever ``num_rounds``: every other weight is 0. The projections are
    the identity, shared by all articles.

    Args:
        dimension: of the vectors.
        num_channels: of the cases.
        num_rounds: of message passing.
        cosine_scale: mean and standard deviation of the unprojected cosine, by which the first channel is standardised.
    """

    cosine_scale: Tensor

    def __init__(
        self, dimension: int, *, num_channels: int, num_rounds: int, cosine_scale: Float[Tensor, " 2"]
    ) -> None:
        super().__init__()
        self.query_projection = nn.Parameter(torch.eye(dimension))
        self.key_projection = nn.Parameter(torch.eye(dimension))
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.weights = nn.Parameter(torch.eye(num_channels)[0].clone())
        self.read_weights = nn.Parameter(torch.zeros(num_channels))
        # Of each round: which channels make two candidates alike, and how much is taken up, of scores and of beliefs.
        self.round_weights = nn.Parameter(torch.eye(num_channels)[0].repeat(num_rounds, 1))
        self.gates = nn.Parameter(torch.zeros(num_rounds, 2))
        self.register_buffer("cosine_scale", cosine_scale.clone())

    def scores(self, cases: CaseBatch) -> Float[Tensor, "case candidate"]:
        """Scores before anything is read, in standard deviations of the first channel; with gradient."""
        queries = normalize(cases.queries @ self.query_projection.T, dim=-1)  # case dimension
        keys = normalize(cases.keys @ self.key_projection.T, dim=-1)  # case candidate dimension
        cosine = (keys @ queries[..., None])[..., 0]
        cosine = (cosine - self.cosine_scale[0]) / (self.cosine_scale[1] + 1e-6)
        scores = cosine * self.weights[0] + cases.query_channels @ self.weights
        itself = torch.eye(scores.shape[1], dtype=torch.bool)
        for weights, gates in zip(self.round_weights, self.gates, strict=True):
            alike = (cases.key_channels @ weights).masked_fill(itself, -torch.inf).softmax(-1)  # case i j
            # A belief is how many times likelier than chance a candidate is the best one.
            beliefs = scores.softmax(-1) * scores.shape[1]
            scores = scores + torch.tanh(gates[0]) * (alike @ scores[..., None])[..., 0]
            scores = scores + gates[1] * (alike @ beliefs[..., None])[..., 0]
        return scores

    def redundancy(self, cases: CaseBatch) -> Float[Tensor, "case candidate read"]:
        """What each candidate's score gains from each value that was read."""
        return cases.read_channels @ self.read_weights

    @property
    def temperature(self) -> Tensor:
        """Of the softmax over scores; with gradient."""
        return self.log_temperature.exp()


@dataclass(frozen=True)
class Readings:
    """Readings of a batch of cases.

    Attributes:
        picks: candidates in the order in which they were read.
        log_probs: with which each was drawn, nats; with gradient.
        entropy: of each draw over its maximum.
    """

    picks: Int[Tensor, "case reading step"]
    log_probs: Float[Tensor, "case reading step"]
    entropy: Float[Tensor, "case reading step"]


def read(
    policy: PoolPolicy,
    cases: CaseBatch,
    *,
    budget: int,
    num_readings: int,
    generator: torch.Generator | None,
    imposed: Int[Tensor, "case reading step"] | None = None,
) -> Readings:
    """``num_readings`` readings of every case, candidate by candidate without replacement.

    Args:
        policy: chooses.
        cases: what there is.
        budget: candidates to read.
        num_readings: of each case.
        generator: draws; None takes the likeliest candidate each time.
        imposed: read these instead; the probabilities that are given stay the policy's own.
    """
    scores, redundancy = policy.scores(cases), policy.redundancy(cases)
    num_cases, num_candidates = scores.shape
    available = torch.ones(num_cases, num_readings, num_candidates, dtype=torch.bool)
    picks, chosen, entropies = [], [], []
    for step in range(budget):
        has_read = (~available).float()  # case reading candidate
        # The mean over what was read, so that its weight does not grow with the number of steps.
        adapted = scores[:, None] + (has_read @ redundancy.mT) / max(step, 1)
        log_probs = (adapted / policy.temperature).masked_fill(~available, -torch.inf).log_softmax(-1)
        if imposed is not None:
            pick = imposed[:, :, step]
        elif generator is None:
            pick = log_probs.argmax(-1)
        else:
            pick = draw(log_probs.detach().flatten(0, 1), generator).view(num_cases, num_readings)
        picks.append(pick)
        chosen.append(log_probs.gather(-1, pick[..., None])[..., 0])
        entropies.append(relative_selection_entropy(log_probs.detach(), available))
        available = available.scatter(-1, pick[..., None], False)
    return Readings(torch.stack(picks, -1), torch.stack(chosen, -1), torch.stack(entropies, -1))


@torch.no_grad()
def calibrate(policy: PoolPolicy, cases: CaseBatch, *, entropy_fraction: float) -> None:
    """Set the temperature at which first choices have this share of maximum entropy, the mean over ``cases``."""
    scores = policy.scores(cases)
    everything = torch.ones_like(scores, dtype=torch.bool)

    def fraction(log_temperature: float) -> float:
        log_probs = (scores / torch.tensor(log_temperature).exp()).log_softmax(-1)
        return float(relative_selection_entropy(log_probs, everything).mean())

    policy.log_temperature.fill_(_bisect(fraction, entropy_fraction))


def _bisect(rising: Callable[[float], float], target: float) -> float:
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def topk_readings(
    scores: Float[Tensor, "case candidate"], budget: int, *, available: Bool[Tensor, "case candidate"] | None = None
) -> Int[Tensor, "case 1 step"]:
    """The ``budget`` best candidates of each case, best first; ties go to the first."""
    if available is not None:
        scores = scores.masked_fill(~available, -torch.inf)
    # A stable sort: topk does not say which of equal scores it takes, and BM25 ties often.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, None, :budget]
