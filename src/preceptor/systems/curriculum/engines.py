"""The engine that writes the rollouts (``ppo.generator``), and what its rollouts need before they are learned from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from preceptor.lm.generators.audit import audit
from preceptor.lm.generators.base import Generator
from preceptor.lm.generators.transformers_generate import TransformersGenerator
from preceptor.lm.generators.vllm import VLLMGenerator
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.systems.curriculum.policy import Rollouts, rollout_log_probs
from preceptor.systems.curriculum.ppo_config import PPOOptions

if TYPE_CHECKING:
    from preceptor.runs.folder import Run
    from preceptor.systems.base import Services

WEIGHTS_FOLDER = "generator"
"""In the run folder: the policy's weights, as the last rollouts were written with, for a server to read."""


def build_engine(options: PPOOptions, lm: LanguageModel, run: Run, services: Services) -> Generator | None:
    """The engine that ``options`` name; None is the policy's own decoder.

    Raises:
        ConfigError: the run is on many processes.
        ServiceError: a server is out of reach.
        MissingExtraError: what it needs is not installed.
    """
    if not options.weight or options.generator == "own":
        return None
    run.world.refuse(f"`ppo.generator` {options.generator}")
    if options.generator == "transformers":
        return TransformersGenerator(lm)
    return VLLMGenerator(lm, url=options.generator_url, folder=run.path / WEIGHTS_FOLDER, api_key=services.vllm_api_key)


@torch.no_grad()
def corrected(
    rollouts: Rollouts, lm: LanguageModel, *, sampling: Sampling, engine: Generator, options: PPOOptions
) -> tuple[Rollouts, dict[str, float]]:
    """The rollouts of another engine as if the policy had sampled them, and the metrics of the audit.

    Their log-probabilities become the policy's, so that PPO's ratio begins at 1, and their weights say how much more
    likely the policy is to sample each token than the engine was. GSPO's ratio is one of whole sequences, the geometric
    mean over tokens, and so is its weight.

    Raises:
        ModelError: the engine is further from the policy than ``generator_max_gap``.
    """
    scored = rollout_log_probs(lm, rollouts, sampling)
    found = audit(
        rollouts.log_probs,
        scored,
        mask=rollouts.mask,
        max_weight=options.generator_max_weight,
        max_gap=options.generator_max_gap,
        engine=engine.name,
    )
    weights = found.weights
    if options.loss == "gspo":
        differences = (scored - rollouts.log_probs).masked_fill(~rollouts.mask, 0.0)
        mean = differences.sum(1, keepdim=True) / rollouts.mask.sum(1, keepdim=True).clamp_min(1)
        weights = mean.exp().clamp_max(options.generator_max_weight).expand_as(scored)
    # What does not count is scored too, and may be anything: it is never looked at, but must be finite.
    log_probs = scored.masked_fill(~rollouts.mask, 0.0)
    return replace(rollouts, log_probs=log_probs, weights=weights), found.metrics()
