"""What is measured while a method trains: losses on held-out rows, rewards of held-out prompts, and samples to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from preceptor.errors import NumericError
from preceptor.lm.decode import Decoder
from preceptor.lm.generators.base import end_token
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.objectives.kl import kl_k3
from preceptor.objectives.statistics import masked_mean
from preceptor.runs.random import derived_seed
from preceptor.runs.scoring import shared_log_probs
from preceptor.runs.world import ALONE, World
from preceptor.systems.curriculum.environment import Corpus, evenly_spaced_rows
from preceptor.systems.curriculum.policy import rollout_sampling
from preceptor.systems.curriculum.result import macro_mean
from preceptor.systems.curriculum.scored import scored_rollouts
from preceptor.systems.curriculum.setup import Setup
from preceptor.systems.curriculum.state import State
from preceptor.systems.curriculum.verify import sample_rows

TEST_PROMPTS = (
    "Once upon a time, in a house by the sea,",
    "The poem begins with the sound of rain:",
    "To measure the resistance of a wire,",
    "The algorithm sorts the list by",
    "def fibonacci(n):",
    "for name, value in settings.items():",
    "Il était une fois",
    "Der kürzeste Weg führt",
    "En la plaza del pueblo",
)
"""Creative, technical, code, and French, German and Spanish."""


def evaluate(setup: Setup, state: State, step: int) -> dict[str, Any]:
    """Losses and rewards after ``step`` of the run, as metrics; records a sample for each test prompt."""
    measure(setup, state, step - state.steps_before)
    losses = state.outcome.curve[-1][1]
    row: dict[str, Any] = {
        "validation_loss": macro_mean(losses, {corpus.name: corpus.target for corpus in setup.judged}),
        "validation_losses": losses,
    }
    if state.method.policy_gradient:
        row["held_out"] = {name: value for name, value in state.outcome.rewards[-1].items() if name != "step"}
    validation = setup.config.validation
    prompts = validation.prompts or TEST_PROMPTS
    seed = derived_seed(setup.config.seed, "samples")
    texts = sample_texts(setup.lm, prompts, num_tokens=validation.prompt_tokens, seed=seed)
    setup.run.record(sample_rows(prompts[: len(texts)], texts, step=step, method=state.method.name))
    return row


def measure(setup: Setup, state: State, method_step: int) -> None:
    """Adds the losses and rewards after ``method_step`` steps of the method (0: before training) to its outcome."""
    losses = validation_losses(setup.lm, setup.judged, num_rows=setup.config.validation.rows, world=setup.run.world)
    state.outcome.curve.append((method_step, losses))
    if state.method.policy_gradient:
        state.outcome.rewards.append({"step": float(method_step), **held_out_rewards(setup)})


def validation_losses(
    lm: LanguageModel, corpora: Sequence[Corpus], *, num_rows: int, world: World = ALONE
) -> dict[str, float]:
    """Cross-entropy on at most ``num_rows`` held-out rows of each dataset, mean over tokens in nats; no gradient."""
    rows = {corpus.name: evenly_spaced_rows(corpus.validation, num_rows) for corpus in corpora}
    # All datasets in one call, which batches rows of similar length whatever dataset they come from.
    all_rows = [row for dataset_rows in rows.values() for row in dataset_rows]
    log_probs = iter(shared_log_probs(lm, all_rows, spans=[[(1, len(row))] for row in all_rows], world=world))
    losses = {}
    for name, dataset_rows in rows.items():
        dataset_log_probs = torch.cat([next(log_probs) for _ in dataset_rows])  # [tokens]: rows weigh by their length
        losses[name] = -float(dataset_log_probs.double().mean())
    return losses


@torch.no_grad()
def held_out_rewards(setup: Setup) -> dict[str, float]:
    """Mean ``reward``, ``kl`` to the initial model (k3, nats per token) and mean of each term of the reward.

    One continuation of each held-out prompt, sampled with the same random numbers at every call.

    Raises:
        NumericError: none of the rewards is finite.
    """
    lm, ppo = setup.lm, setup.config.ppo
    # The KL is to the initial model, not to the rolling one: it says how far training has led in all.
    scored = scored_rollouts(
        lm,
        setup.prompts,
        group_size=1,
        num_tokens=ppo.continuation_tokens,
        sampling=rollout_sampling(lm, ppo.temperature),
        generator=torch.Generator().manual_seed(derived_seed(setup.config.seed, "held-out rollouts")),
        terms=setup.held_out_terms,
        reference_model=setup.initial_model,
        world=setup.run.world,
    )
    rollouts, rewards = scored.rollouts, scored.rewards
    finite = rewards.finite_rows
    if not finite.any():
        raise NumericError("every reward on held-out prompts is NaN or infinite; look at `ppo.rewards`")
    return {
        "reward": float(rewards.total[finite].double().mean()),
        "kl": float(masked_mean(kl_k3(rollouts.log_probs, scored.reference_log_probs), rollouts.mask)),
        **{name: float(values[finite].double().mean()) for name, values in rewards.terms.items()},
    }


def sample_texts(lm: LanguageModel, prompts: Sequence[str], *, num_tokens: int, seed: int) -> list[str]:
    """A continuation of each prompt, sampled at temperature 0.7 with the same random numbers at every call."""
    if not prompts or not num_tokens:
        return []
    sampling = Sampling(temperature=0.7, suppressed=rollout_sampling(lm, 1.0).suppressed)
    decoder = Decoder(lm, batch_size=len(prompts))
    decoder.append([[lm.begin_token, *lm.encode(prompt)] for prompt in prompts])
    generated = decoder.generate(num_tokens, sampling=sampling, generator=torch.Generator().manual_seed(seed))
    texts = []
    for tokens in generated.tokens.tolist():
        end = tokens.index(end_token(lm)) if end_token(lm) in tokens else len(tokens)
        texts.append(lm.decode(tokens[:end]))
    return texts
