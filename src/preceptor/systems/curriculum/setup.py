"""What never changes in a run: the configuration, the methods, the initial model, the datasets and held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.lm.generators.base import Generator
from preceptor.lm.model import LanguageModel
from preceptor.runs.random import derived_seed
from preceptor.systems.base import Services
from preceptor.systems.curriculum.baselines import Method, plan_methods
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.engines import build_engine
from preceptor.systems.curriculum.environment import Corpus, held_out_prompts, read_corpora
from preceptor.systems.curriculum.policy import Prompt, build_policy
from preceptor.systems.curriculum.rewards import RewardTerm, reward_terms

if TYPE_CHECKING:
    from preceptor.runs.folder import Run


@dataclass(frozen=True)
class Setup:
    """What all methods of a run share.

    Attributes:
        config: of the run.
        run: its folder, random streams and logs.
        methods: in the order in which they are trained.
        lm: the policy. Its weights are trained in place and go back to ``initial_weights`` when a method begins.
        initial_weights: the policy's trainable weights before training, by name.
        initial_model: the policy before training.
        corpora: the datasets that are learned from, in the order of the mixture's weights.
        judged: all datasets whose validation loss is measured: ``corpora`` and targets that are not learned from.
        prompts: held out; rewards are measured on them.
        held_out_terms: the reward's terms on held-out prompts, where ``log_likelihood`` is that of the initial model.
        engine: writes the rollouts that are learned from; None is the policy's own decoder.
    """

    config: CurriculumConfig
    run: Run
    methods: Sequence[Method]
    lm: LanguageModel
    initial_weights: Mapping[str, Tensor]
    initial_model: LanguageModel
    corpora: Sequence[Corpus]
    judged: Sequence[Corpus]
    prompts: Sequence[Prompt]
    held_out_terms: Sequence[RewardTerm]
    engine: Generator | None = None

    def steps_before(self, method: Method) -> int:
        """Steps of the run that the methods before ``method`` take."""
        return sum(earlier.num_steps for earlier in self.methods[: self.methods.index(method)])

    @property
    def dataset_names(self) -> list[str]:
        """In the order of the mixture's weights."""
        return [corpus.name for corpus in self.corpora]


def prepare(config: CurriculumConfig, run: Run, services: Services) -> Setup:
    """Loads the model and the datasets.

    Raises:
        ConfigError: a row does not fit into the model's context.
        DataError: a dataset is missing, unreadable or too small.
        ModelError: the model cannot be loaded.
        ServiceError: a server that is to write rollouts is out of reach.
    """
    # The seed of the weights is derived, so that another number of draws elsewhere leaves them as they are.
    lm = build_policy(config.model, device=run.device, seed=derived_seed(config.seed, "weights"))
    # Before the datasets are read, which may take minutes.
    check_lengths(config, lm)
    engine = build_engine(config.ppo, lm, run, services)
    corpora = read_corpora(config.data, lm)
    for corpus in corpora:
        trained = f"{corpus.train.num_tokens:,} tokens to train on in {len(corpus.documents):,} documents"
        run.notice(
            f"{corpus.name}: {trained if corpus.learned_from else 'not learned from'}, "
            f"{len(corpus.validation)} rows to validate on{'' if corpus.target else '; not a target'}"
        )
    # Before the first update: afterwards there is no untrained model to copy.
    initial_model = lm.initial_model()
    return Setup(
        config=config,
        run=run,
        methods=plan_methods(config),
        lm=lm,
        # Copies: the live weights are trained in place and go back to these when a method begins.
        initial_weights={name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()},
        initial_model=initial_model,
        corpora=[corpus for corpus in corpora if corpus.learned_from],
        judged=corpora,
        prompts=held_out_prompts(
            corpora,
            num_prompts=config.validation.rows,
            prompt_tokens=config.ppo.prompt_tokens,
            continuation_tokens=config.ppo.continuation_tokens,
        ),
        held_out_terms=reward_terms(config.ppo.rewards, lm, likelihood=initial_model) if config.ppo.weight else (),
        engine=engine,
    )


def check_lengths(config: CurriculumConfig, lm: LanguageModel) -> None:
    """Refuses rows that the model's context cannot hold, before anything is trained.

    Raises:
        ConfigError: names every length that is too large.
    """
    lengths = {"`data.block_tokens`": config.data.block_tokens}
    # Both lengths are reported at once, if both are too large.
    if config.ppo.weight:
        total = config.ppo.prompt_tokens + config.ppo.continuation_tokens
        lengths["`ppo.prompt_tokens` and `ppo.continuation_tokens` together"] = total
    if errors := [
        f"{name} must be at most the {lm.context_length} tokens of the context of {lm.name}, got {length}"
        for name, length in lengths.items()
        if length > lm.context_length
    ]:
        raise ConfigError(*errors)
