"""Configuration of the curriculum system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from preceptor.config import option
from preceptor.data.datasets import Source, source_faults

RULES = {
    "second_order": "weights move along the change over time of mean + variance of the losses, with a velocity",
    "learning_progress": "fast minus slow average of the loss: what is being learned now",
    "difficulty": "the loss itself",
    "exp3": "Exp3 with the loss as reward (ODM)",
    "ado": "the slope of a power law fitted to each loss (ADO)",
    "proportional": "the sizes of the datasets, fixed",
    "uniform": "all alike, fixed",
    "static": "given weights, fixed",
}
FIXED_RULES = ("proportional", "uniform", "static")
"""Rules that no measurement moves."""

REWARDS = {
    "repetition": "minus the share of tokens that repeat the token before them (the method's text)",
    "repeated_bigrams": "minus the share of tokens that complete a pair of tokens seen before",
    "log_likelihood": "log-probability under the rolling frozen model, nats per token",
    "overlap": "F1 of the tokens with those of the true continuation",
    "distinct": "distinct pairs of tokens over all pairs",
    "length": "share of the allowed tokens written before an end",
}
ADVANTAGES = {
    "gae": "generalised advantage estimation with a value network (PPO)",
    "rloo": "against the other continuations of the prompt",
    "grpo": "against the group's mean, over its standard deviation",
    "dr_grpo": "against the group's mean",
    "reinforce_plus_plus": "the reward to go, whitened over the batch",
}
LOSSES = {
    "clip": "PPO's clipped ratio, asymmetric if asked",
    "cispo": "REINFORCE with a truncated importance weight",
    "gspo": "PPO's clip on one ratio a sequence",
    "reinforce": "no ratio at all",
}
KL_PLACES = {
    "none": "no KL to the reference",
    "reward_k1": "k1 of each token subtracted from its reward",
    "loss_k2": "k2 in the loss",
    "loss_k3": "k3 in the loss (GRPO's)",
    "loss_exact": "over the whole vocabulary, in the loss",
}
BUILTIN = {
    "code": "source files of Python's standard library, as installed",
    "manual": "Python's own reference manual, as installed (pydoc topics)",
    "dialogue": "short dialogues and sums from a small grammar",
    "noise": "random letters, which nothing can be learned from",
}

FLAGS = {"model": "model.name", "seed": "seed", "rule": "mixture.rule"}
"""Command-line flags that stand for configuration keys."""

CHOICES: dict[str, dict[str, str]] = {
    "rules": RULES,
    "rewards": REWARDS,
    "advantages": ADVANTAGES,
    "losses": LOSSES,
    "KL places": KL_PLACES,
    "built-in datasets": BUILTIN,
}
"""What ``preceptor list`` shows."""


@dataclass(frozen=True)
class ModelOptions:
    """The policy."""

    name: str = option("starter", "'starter', a local folder or a hub name; gives the tokenizer too")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights")
    adapter_rank: int = option(0, "rank of a LoRA adapter; 0 trains every weight", within="[0, inf)")
    adapter_alpha: float = option(16.0, "scale of the LoRA adapter (alpha / rank multiplies its update)")
    from_scratch: bool = option(False, "start from random weights (drawn from the seed) instead of the named model's")
    width: int = option(0, "hidden size of a model from scratch; 0 is the named model's shape", within="[0, inf)")
    num_layers: int = option(0, "layers of a model from scratch; 0 is the named model's shape", within="[0, inf)")


@dataclass(frozen=True)
class DatasetOptions:
    """One dataset of the mixture."""

    name: str = option("", "what it is called everywhere")
    location: str = option("", "a file or folder, a hub name, or 'builtin:NAME'")
    adapter: str = option("text", "how a row becomes a document, or 'field:NAME'")
    split: str = option("train", "of a hub dataset")
    subset: str = option("", "configuration of a hub dataset, such as wikitext-103-raw-v1")
    join: int = option(1, "consecutive rows that make one document")
    max_documents: int = option(0, "at most; 0 takes all (a hub dataset needs a limit)")
    target: bool = option(True, "counts in the macro mean of the validation loss; a noise dataset should not")

    @property
    def builtin(self) -> str | None:
        """Which built-in dataset it is, or None."""
        return self.location.removeprefix("builtin:") if self.location.startswith("builtin:") else None

    @property
    def source(self) -> Source:
        """Where its documents come from, unless it is built in."""
        return Source(
            name=self.name,
            location=self.location,
            adapter=self.adapter,
            split=self.split,
            subset=self.subset,
            join=self.join,
            max_documents=self.max_documents,
        )


DEFAULT_DATASETS = (
    DatasetOptions("code", "builtin:code"),
    DatasetOptions("manual", "builtin:manual"),
    DatasetOptions("dialogue", "builtin:dialogue"),
    DatasetOptions("noise", "builtin:noise", target=False),
)


@dataclass(frozen=True)
class DataOptions:
    """What is learned from."""

    root: str = option("", "folder that locations are relative to; empty is the current one")
    datasets: tuple[DatasetOptions, ...] = option(DEFAULT_DATASETS, "the mixture")
    block_tokens: int = option(128, "tokens of a row, the begin token included", within="[8, inf)")
    cross_documents: bool = option(False, "pack several documents into one row")
    validation_fraction: float = option(0.1, "of each dataset's documents, held out for validation", within="(0, 0.5)")
    difficulty_fraction: float = option(
        0.1, "of each dataset's documents, held out for measuring difficulty", within="(0, 0.5)"
    )


@dataclass(frozen=True)
class DifficultyOptions:
    """How the rolling frozen model measures the datasets."""

    every: int = option(10, "M: steps between measurements and updates of the mixture", within="[1, inf)")
    refresh_every: int = option(10, "K: steps between refreshes of the frozen model", within="[1, inf)")
    sample_size: int = option(100, "rows of each dataset that are scored, at most", within="[1, inf)")
    resample: bool = option(False, "draw a new sample at each measurement instead of keeping the first")


@dataclass(frozen=True)
class MixtureOptions:
    """How the weights of the datasets move."""

    rule: str = option("learning_progress", "mixture rule; see preceptor list")
    exploration: float = option(0.1, "share of the weight that is spread evenly", within="[0, 1]")
    settings: dict[str, float] = option({}, "the rule's own hyperparameters, by name")  # noqa: RUF009 - it is copied
    weights: tuple[float, ...] = option((), "of the datasets, for the rule static")


@dataclass(frozen=True)
class RewardOptions:
    """One term of the reward."""

    name: str = option("", "a built-in term or module:function")
    weight: float = option(1.0, "factor of the term", within="(-inf, inf)")


@dataclass(frozen=True)
class PPOOptions:
    """Policy gradient on continuations of the documents' first tokens."""

    weight: float = option(1.0, "of the policy-gradient loss; 0 writes no rollouts at all", within="[0, inf)")
    prompts: int = option(16, "prompts a step", within="[1, inf)")
    group_size: int = option(
        1, "continuations of each prompt; at least 2 for rloo, grpo and dr_grpo", within="[1, inf)"
    )
    prompt_tokens: int = option(
        16, "first tokens of a document that make a prompt, at most half of it", within="[1, inf)"
    )
    continuation_tokens: int = option(24, "tokens of a continuation, at most", within="[1, inf)")
    temperature: float = option(0.7, "of the rollouts' sampling", within="(0, inf)")
    rewards: tuple[RewardOptions, ...] = option(
        (RewardOptions("repetition", 5.0), RewardOptions("repeated_bigrams", 5.0), RewardOptions("overlap", 1.0)),
        "weighted terms of the reward",
    )
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus"] = option(
        "gae", "what a token is credited with; gae uses a value network"
    )
    discount: float = option(1.0, "gamma, per token", within="[0, 1]")
    gae_lambda: float = option(0.95, "lambda of gae", within="[0, 1]")
    whiten_advantages: bool = option(True, "of gae, over the tokens of the batch")
    loss: Literal["clip", "cispo", "gspo", "reinforce"] = option("clip", "policy loss")
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = option("token_mean", "of the policy loss")
    clip_epsilon_low: float = option(0.2, "how far the ratio may fall", within="(0, 1)")
    clip_epsilon_high: float = option(0.2, "how far the ratio may rise; 0.28 is clip-higher", within="(0, inf]")
    dual_clip: float = option(
        0.0, "bound of the loss where the advantage is negative, above 1; 0 for none (loss: clip)"
    )
    value_clip_epsilon: float = option(
        0.2, "how far a value may move before its loss is cut, in reward units; 0 off", within="[0, inf)"
    )
    max_ratio: float = option(5.0, "largest importance weight (loss: cispo)", within="(0, inf]")
    epochs: int = option(2, "passes over a batch of rollouts", within="[1, inf)")
    minibatches: int = option(2, "optimiser steps a pass", within="[1, inf)")
    kl_place: Literal["none", "reward_k1", "loss_k2", "loss_k3", "loss_exact"] = option(
        "reward_k1", "where the KL to the reference enters, and how it is estimated"
    )
    kl_reference: Literal["frozen", "untrained"] = option(
        "frozen", "the rolling frozen model, or the untrained one; cross-entropy leads away from the latter"
    )
    kl_coefficient: float = option(0.1, "beta, in reward per nat; where an adaptive one starts", within="[0, inf)")
    kl_target: float = option(0.1, "nats per token that beta is moved to hold; 0 keeps beta fixed", within="[0, inf)")
    kl_horizon: float = option(
        200.0, "continuations over which beta moves by 20 % (Ziegler et al. 2019)", within="(0, inf]"
    )
    kl_early_stop: float = option(
        0.0, "nats per token from the policy that sampled after which a step's PPO ends; 0 off", within="[0, inf)"
    )


@dataclass(frozen=True)
class ValueOptions:
    """The value network of gae."""

    kind: Literal["small", "copy"] = option("small", "a small transformer of its own, or a copy of the policy")
    width: int = option(128, "hidden size of a small one", within="[1, inf)")
    num_layers: int = option(2, "layers of a small one", within="[1, inf)")
    learning_rate: float = option(1e-3, "of the value network", within="[0, inf)")


@dataclass(frozen=True)
class UpdateOptions:
    """How the policy learns."""

    steps: int = option(60, "steps of each arm", within="[1, inf)")
    batch_tokens: int = option(1024, "tokens of documents a step", within="[1, inf)")
    cross_entropy_weight: float = option(
        1.0, "of the loss on the documents; 0 is pure PPO, large is pretraining", within="[0, inf)"
    )
    learning_rate: float = option(1e-4, "of the policy (AdamW)", within="[0, inf)")
    weight_decay: float = option(0.0, "decoupled", within="[0, inf)")
    clip_norm: float = option(
        1.0, "gradient norm of the policy, and of the value network", within="(0, inf]", hint=".inf clips nothing"
    )
    warm_up_steps: int = option(5, "linear warm-up of the learning rates", within="[0, inf)")
    decay: Literal["none", "linear", "cosine"] = option("linear", "of the learning rates after the warm-up, to 0")
    micro_batch_size: int = option(
        0, "rows per backward pass, for less memory (gradient accumulation); 0 is all", within="[0, inf)"
    )
    bf16: bool = option(False, "mixed precision: matrix products in bfloat16")


@dataclass(frozen=True)
class ValidationOptions:
    """What is measured on the way."""

    every: int = option(10, "steps between validations", within="[1, inf)")
    rows: int = option(32, "rows of each dataset, at most", within="[1, inf)")
    prompts: tuple[str, ...] = option((), "test prompts; empty is the built-in list, in several styles and languages")
    prompt_tokens: int = option(24, "tokens written after each test prompt; 0 writes none", within="[0, inf)")


@dataclass(frozen=True)
class ControlOptions:
    """Arms beside the configured one, each from the same weights, on the same streams, for the same steps."""

    rules: tuple[str, ...] = option(
        ("uniform", "proportional", "second_order"), "further mixture rules, learned by cross-entropy alone"
    )
    static_grid: Literal["none", "omit", "omit_and_double"] = option(
        "omit", "static mixtures: each dataset left out, and each doubled"
    )
    frozen_policy: bool = option(True, "the configured arm at learning rate 0, where it writes rollouts")


@dataclass(frozen=True)
class CurriculumConfig:
    """Configuration of ``preceptor run curriculum``."""

    seed: int = option(0, "of every random stream")
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    difficulty: DifficultyOptions = field(default_factory=DifficultyOptions)
    mixture: MixtureOptions = field(default_factory=MixtureOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)
    value: ValueOptions = field(default_factory=ValueOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    controls: ControlOptions = field(default_factory=ControlOptions)
    save_every: int = option(20, "steps between checkpoints (an epoch)", within="[1, inf)")
    record_every: int = option(1, "steps between recorded rollouts in decisions.jsonl", within="[1, inf)")

    def faults(self) -> list[str]:
        """What is at odds in this configuration, besides numbers out of their range."""
        return [*_mixture_faults(self), *_ppo_faults(self)]


Config = CurriculumConfig


def _mixture_faults(config: CurriculumConfig) -> Iterator[str]:
    datasets = config.data.datasets
    names = [dataset.name for dataset in datasets]
    if not datasets:
        yield "`data.datasets` is empty; name at least one dataset"
    elif not any(dataset.target for dataset in datasets):
        yield "`data.datasets` has no target; at least one must count in the validation loss"
    if len(set(names)) < len(names) or "" in names:
        yield f"`data.datasets` need a name each, all different, got {', '.join(names)}"
    for dataset in datasets:
        if dataset.builtin is not None and dataset.builtin not in BUILTIN:
            yield f"`data.datasets` has no {dataset.location}; built in are {', '.join(BUILTIN)}"
    if sources := [dataset.source for dataset in datasets if dataset.builtin is None]:
        yield from (f"`data.datasets`: {fault}" for fault in source_faults(sources))
    for key, rules in (("mixture.rule", (config.mixture.rule,)), ("controls.rules", config.controls.rules)):
        for rule in rules:
            if rule not in RULES:
                yield f"`{key}` must be one of {', '.join(RULES)}, got '{rule}'"
    if "static" in config.controls.rules:
        yield "`controls.rules` cannot hold static; use `controls.static_grid`"
    weights = config.mixture.weights
    if config.mixture.rule == "static" and len(weights) != len(datasets):
        yield f"`mixture.weights` must be {len(datasets)} numbers for the rule static, got {len(weights)}"
    if config.mixture.rule != "static" and weights:
        yield f"`mixture.weights` go with the rule static alone, got them with {config.mixture.rule}"


def _ppo_faults(config: CurriculumConfig) -> Iterator[str]:
    ppo = config.ppo
    if not ppo.weight and not config.update.cross_entropy_weight:
        yield "`ppo.weight` and `update.cross_entropy_weight` are both 0; then nothing is learned"
    if not ppo.weight:
        return
    for reward in ppo.rewards:
        if reward.name not in REWARDS and ":" not in reward.name:
            yield f"`ppo.rewards` has no term '{reward.name}'; use {', '.join(REWARDS)} or module:function"
    if not ppo.rewards:
        yield "`ppo.rewards` is empty; name at least one term"
    if len({reward.name for reward in ppo.rewards}) < len(ppo.rewards):
        yield "`ppo.rewards` names a term twice; add up its weights"
    if ppo.advantage in ("rloo", "grpo", "dr_grpo") and ppo.group_size < 2:
        yield f"`ppo.advantage` {ppo.advantage} compares continuations of a prompt; `ppo.group_size` must be at least 2"
    if ppo.loss == "gspo" and ppo.advantage in ("gae", "reinforce_plus_plus"):
        yield f"`ppo.loss` gspo needs one advantage a sequence, which `ppo.advantage` {ppo.advantage} does not give"
    if ppo.dual_clip and not ppo.dual_clip > 1:
        yield f"`ppo.dual_clip` must be above 1 (or 0 for none), got {ppo.dual_clip}"
    if ppo.kl_target and not ppo.kl_coefficient and ppo.kl_place != "none":
        yield "`ppo.kl_coefficient` must be above 0 for an adaptive KL (`ppo.kl_target`); 0 would stay 0"
    if ppo.minibatches > ppo.prompts * ppo.group_size:
        yield f"`ppo.minibatches` must be at most the {ppo.prompts * ppo.group_size} continuations of a step"
