"""What all arms of a run share: the model as it was, the datasets, and what rewards are measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.run.random import derived_seed
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.material import Corpus, read_corpora
from preceptor.systems.curriculum.policy_model import build_policy
from preceptor.systems.curriculum.rewards import RewardTerm, reward_terms
from preceptor.systems.curriculum.rollout import Prompt
from preceptor.systems.curriculum.validation import held_out_prompts, validation_losses

if TYPE_CHECKING:
    from preceptor.run.folder import Run


@dataclass(frozen=True)
class Setting:
    """What all arms of a run share, and nothing of it changes.

    Attributes:
        lm: the policy; its weights move, and go back to ``initial`` when an arm begins.
        initial: its first trainable weights.
        reference: the policy before training: of the KL, and of likelihoods on held-out prompts.
        corpora: the datasets.
        prompts: held-out ones, on which rewards are measured.
        held_out_terms: the reward's terms, as measured there.
        first_losses: validation losses before training.
    """

    lm: LanguageModel
    initial: Mapping[str, Tensor]
    reference: LanguageModel
    corpora: Sequence[Corpus]
    prompts: Sequence[Prompt]
    held_out_terms: Sequence[RewardTerm]
    first_losses: Mapping[str, float]


def prepare(config: CurriculumConfig, run: Run) -> Setting:
    """Load the model and the datasets, and measure both as they are."""
    lm = build_policy(config.model, device=run.device, seed=derived_seed(config.seed, "weights"))
    check_lengths(config, lm)
    corpora = read_corpora(config.data, lm)
    for corpus in corpora:
        run.notice(
            f"{corpus.name}: {corpus.train.num_tokens:,} tokens to train on in {len(corpus.documents):,} documents, "
            f"{len(corpus.validation)} rows to validate on{'' if corpus.target else '; not a target'}"
        )
    reference = lm.initial_model()
    return Setting(
        lm=lm,
        initial={name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()},
        reference=reference,
        corpora=corpora,
        prompts=held_out_prompts(
            corpora,
            num_prompts=config.validation.rows,
            prompt_tokens=config.ppo.prompt_tokens,
            continuation_tokens=config.ppo.continuation_tokens,
        ),
        held_out_terms=reward_terms(config.ppo.rewards, lm, likelihood=reference) if config.ppo.weight else (),
        first_losses=validation_losses(lm, corpora, num_rows=config.validation.rows),
    )


def check_lengths(config: CurriculumConfig, lm: LanguageModel) -> None:
    """Refuse rows that the model cannot hold, before anything is trained.

    Raises:
        ConfigError: with every length that is too large.
    """
    lengths = {"`data.block_tokens`": config.data.block_tokens}
    if config.ppo.weight:
        total = config.ppo.prompt_tokens + config.ppo.continuation_tokens
        lengths["`ppo.prompt_tokens` and `ppo.continuation_tokens` together"] = total
    if faults := [
        f"{name} must be at most the {lm.context_length} tokens of the context of {lm.name}, got {length}"
        for name, length in lengths.items()
        if length > lm.context_length
    ]:
        raise ConfigError(*faults)
