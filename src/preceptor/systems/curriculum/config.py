"""Configuration of the curriculum system, and the names that it may use with a line on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from preceptor.config import Options
from preceptor.data.corpora.datasets import Source, source_faults
from preceptor.errors import did_you_mean
from preceptor.systems.curriculum.ppo_config import PPOOptions as PPOOptions
from preceptor.systems.curriculum.ppo_config import RewardOptions as RewardOptions
from preceptor.systems.curriculum.tasks.config import BUILTIN_TASKS, TASK_RULES, AmortisedOptions, TasksOptions

RULES = {
    "second_order": "weights move along the smoothed fall over time of mean + variance of the losses",
    "learning_progress": "slow minus fast average of the loss: what is being learned now; relearning earns nothing",
    "progress_on_targets": "how much the losses of the targets move; the other datasets are only explored",
    "alignment": "how far the gradient of each dataset agrees with that of the targets",
    "difficulty": "the loss itself",
    "exp3": "Exp3 with the loss as reward (ODM)",
    "ado": "the slope of a power law fitted to each loss (ADO)",
    "proportional": "in proportion to the sizes of the datasets, fixed",
    "uniform": "equal weights, fixed",
    "targets": "equal weights on the targets and none on the rest, fixed",
    "static": "given weights, fixed",
}
FIXED_RULES = ("proportional", "uniform", "targets", "static")
"""Rules that no measurement moves."""

REWARDS = {
    "repetition": "minus the fraction of tokens that repeat the token before them (the method's text)",
    "repeated_bigrams": "minus the fraction of tokens that complete a bigram seen before",
    "log_likelihood": "log-probability under the rolling frozen model, nats per token",
    "overlap": "F1 of the tokens with those of the document's own continuation",
    "distinct": "distinct bigrams over all bigrams",
    "length": "tokens up to the end token over the tokens allowed",
}
ADVANTAGES = {
    "gae": "generalized advantage estimation with a value network (PPO)",
    "rloo": "total reward minus the mean of the prompt's other continuations",
    "grpo": "total reward minus the group's mean, over its standard deviation",
    "dr_grpo": "total reward minus the group's mean",
    "reinforce_plus_plus": "the reward to go, whitened over the batch",
}
LOSSES = {
    "clip": "PPO's clipped ratio; the two bounds may differ",
    "cispo": "REINFORCE with a truncated importance weight",
    "gspo": "PPO's clip on one ratio per sequence",
    "reinforce": "no importance ratio",
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
    "noise": "random letters and digits, which nothing can be learned from",
    "symbols": "random digits and punctuation",
    "salad": "words of the manual in random order",
}

WORLDS = {
    "chain": "each dataset can be learned as far as the one before it is mastered",
    "noise": "four datasets and four noises that look learnable at first",
    "copies": "four copies of one dataset and three others",
    "far": "a target that no dataset holds, which some of them help",
    "forgetting": "what is not practised fades",
    "parity": "nothing moves until all of it does: losses and gradients say nothing",
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
    "task rules": TASK_RULES,
    "built-in tasks": BUILTIN_TASKS,
    "planted worlds": WORLDS,
}
"""What ``preceptor list`` shows."""


class ModelOptions(Options):
    """The policy."""

    name: str = Field(
        "starter",
        description="'starter', a local folder or a hub name; gives the tokenizer too. 'bytes' is a small model "
        "from random weights that reads bytes.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the weights.")
    adapter_rank: int = Field(0, ge=0, description="Rank of a LoRA adapter; 0 trains every weight.")
    adapter_alpha: float = Field(16.0, description="Scale of the LoRA adapter: alpha / rank multiplies its update.")
    from_scratch: bool = Field(
        False, description="Start from random weights (drawn from the seed) instead of those of the named model."
    )
    positions: Literal["rotary", "learned"] = Field(
        "rotary", description="How 'bytes' knows positions: relative ones (Llama) or absolute ones (GPT-2)."
    )
    width: int = Field(0, ge=0, description="Hidden size of a model from scratch; 0 keeps that of the named model.")
    num_layers: int = Field(
        0, ge=0, description="Number of layers of a model from scratch; 0 keeps that of the named model."
    )

    @property
    def made_by_run(self) -> bool:
        """Whether the run makes the model itself, so that there is no folder or hub name to look at before."""
        return self.name == "bytes"


class DatasetOptions(Options):
    """One dataset of the mixture."""

    name: str = Field("", description="Name of the dataset in tables and logs.")
    location: str = Field("", description="A file or folder, a hub name, or 'builtin:NAME'.")
    adapter: str = Field("text", description="How a row becomes a document, or 'field:NAME'.")
    split: str = Field("train", description="Split of a hub dataset.")
    subset: str = Field("", description="Configuration of a hub dataset, such as wikitext-103-raw-v1.")
    join: int = Field(1, description="Number of consecutive rows that make one document.")
    max_documents: int = Field(0, description="Maximum number of documents; 0 takes all (a hub dataset needs a limit).")
    target: bool = Field(
        True, description="Count it in the macro mean of the validation loss; a noise dataset should not count."
    )
    train: bool = Field(True, description="Learn from it; false for a target that is only judged.")

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
    DatasetOptions(name="code", location="builtin:code"),
    DatasetOptions(name="manual", location="builtin:manual"),
    DatasetOptions(name="dialogue", location="builtin:dialogue"),
    DatasetOptions(name="noise", location="builtin:noise", target=False),
)


class DataOptions(Options):
    """What is learned from."""

    root: str = Field("", description="Folder that locations are relative to; empty is the current one.")
    datasets: tuple[DatasetOptions, ...] = Field(DEFAULT_DATASETS, description="The mixture.")
    block_tokens: int = Field(128, ge=8, description="Length of a row in tokens, including the begin token.")
    cross_documents: bool = Field(False, description="Pack several documents into one row.")
    validation_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="Fraction of each dataset's documents held out for validation."
    )
    difficulty_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="Fraction of each dataset's documents held out for measuring difficulty."
    )


class DifficultyOptions(Options):
    """How the rolling frozen model measures the datasets."""

    every: int = Field(10, ge=1, description="M: number of steps between measurements and updates of the mixture.")
    refresh_every: int = Field(10, ge=1, description="K: number of steps between refreshes of the frozen model.")
    sample_size: int = Field(24, ge=1, description="Maximum number of rows of each dataset that are scored.")
    alignment_rows: int = Field(
        0,
        ge=0,
        description="Number of rows of each dataset and target whose gradient is taken (rule: alignment); 0 takes "
        "the gradients of the training batch itself, at every step and no cost.",
    )
    target_rows: int = Field(
        2, ge=1, description="Number of rows of each target that is not learned from (rule: alignment, from the batch)."
    )
    resample: bool = Field(
        False, description="Draw a new sample for each measurement instead of keeping the first one."
    )


class MixtureOptions(Options):
    """How the weights of the datasets move."""

    rule: str = Field("learning_progress", description="Mixture rule; see preceptor list.")
    exploration: float = Field(0.1, ge=0, le=1, description="Fraction of the weight that is spread evenly.")
    target_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Fraction of the weight that is kept on the targets; null is the rule's own (a half or none).",
    )
    settings: dict[str, float] = Field({}, description="The rule's own hyperparameters, by name.")
    weights: tuple[float, ...] = Field((), description="Weights of the datasets (rule: static).")


class ValueOptions(Options):
    """The value network of gae."""

    kind: Literal["small", "copy"] = Field(
        "small", description="A small transformer of its own, or a copy of the policy."
    )
    width: int = Field(128, ge=1, description="Hidden size of a small network.")
    num_layers: int = Field(2, ge=1, description="Number of layers of a small network.")
    learning_rate: float = Field(1e-3, ge=0, description="Learning rate of the value network.")


class UpdateOptions(Options):
    """How the policy learns."""

    steps: int = Field(60, ge=1, description="Number of steps of each method.")
    batch_tokens: int = Field(1024, ge=1, description="Number of document tokens per step.")
    cross_entropy_weight: float = Field(
        1.0, ge=0, description="Weight of the loss on the documents; 0 is pure PPO, a large one is pretraining."
    )
    learning_rate: float = Field(1e-4, ge=0, description="Learning rate of the policy (AdamW).")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    clip_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="Maximum gradient norm, of policy and value network each; .inf clips nothing.",
    )
    warm_up_steps: int = Field(5, ge=0, description="Number of steps of linear warm-up of the learning rates.")
    decay: Literal["none", "linear", "cosine"] = Field(
        "linear", description="Decay of the learning rates to 0 after the warm-up."
    )
    micro_batch_size: int = Field(
        0,
        ge=0,
        description="Number of rows per backward pass (gradient accumulation); 0 is all, halved while memory runs out.",
    )
    bf16: bool = Field(False, description="Mixed precision: compute matrix products in bfloat16.")


class ValidationOptions(Options):
    """What is measured on the way."""

    every: int = Field(10, ge=1, description="Number of steps between validations.")
    rows: int = Field(32, ge=1, description="Maximum number of validation rows of each dataset.")
    prompts: tuple[str, ...] = Field(
        (), description="Test prompts; empty is the built-in list, in several styles and languages."
    )
    prompt_tokens: int = Field(24, ge=0, description="Number of tokens written after each test prompt; 0 writes none.")


class ControlOptions(Options):
    """Arms beside the configured one, each from the same weights, on the same streams, for the same steps."""

    rules: tuple[str, ...] = Field(
        ("uniform", "proportional", "second_order"),
        description="Further mixture rules, trained by cross-entropy alone.",
    )
    static_grid: Literal["none", "omit", "omit_and_double"] = Field(
        "omit", description="Static mixtures: each dataset left out, and each doubled."
    )
    mixtures: dict[str, tuple[float, ...]] = Field(
        {}, description="Further fixed mixtures: a weight for each dataset that is learned from, by name."
    )
    equal_cost: tuple[Literal["rows", "flops"], ...] = Field(
        (), description="Uniform for more steps, which cost as many rows or FLOPs as the rule with its measurements."
    )
    frozen_policy: bool = Field(True, description="Add the configured method at learning rate 0, if it has rollouts.")


class PlantedOptions(Options):
    """Worlds whose best schedule is known, in place of a model and datasets; without any this section has no effect."""

    worlds: tuple[str, ...] = Field((), description="Worlds to play in; see preceptor list.")


class CurriculumConfig(Options):
    """Configuration of ``preceptor run curriculum``."""

    seed: int = Field(0, description="Seed of every random stream.")
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    tasks: TasksOptions = TasksOptions()
    amortised: AmortisedOptions = AmortisedOptions()
    planted: PlantedOptions = PlantedOptions()
    difficulty: DifficultyOptions = DifficultyOptions()
    mixture: MixtureOptions = MixtureOptions()
    ppo: PPOOptions = PPOOptions()
    value: ValueOptions = ValueOptions()
    update: UpdateOptions = UpdateOptions()
    validation: ValidationOptions = ValidationOptions()
    controls: ControlOptions = ControlOptions()
    save_every: int = Field(20, ge=1, description="Number of steps between checkpoints (an epoch).")
    record_every: int = Field(1, ge=1, description="Number of steps between rollouts recorded in decisions.jsonl.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        for key, width in (("model.width", self.model.width), ("value.width", self.value.width)):
            if width % 2:
                yield f"`{key}` must be even, since rotary positions turn pairs of dimensions, got {width}"
        if self.planted.worlds:
            yield from _planted_conflicts(self)
            return
        if self.tasks.tasks:
            yield from _task_conflicts(self)
            yield from _ppo_conflicts(self)
            return
        yield from _mixture_conflicts(self)
        yield from _ppo_conflicts(self)


Config = CurriculumConfig


def num_heads(width: int, *, dimensions: int) -> int:
    """How many heads a model of an even ``width`` gets: each of ``dimensions`` or more, all of the same even number.

    >>> [num_heads(width, dimensions=16) for width in (8, 64, 70, 1000)]
    [1, 4, 1, 50]
    """
    return next(number for number in range(max(width // dimensions, 1), 0, -1) if width % (2 * number) == 0)


def _planted_conflicts(config: CurriculumConfig) -> Iterator[str]:
    for world in config.planted.worlds:
        if world not in WORLDS:
            hint = did_you_mean(world, WORLDS)
            yield f"`planted.worlds` must be some of {', '.join(WORLDS)}, got '{world}'{hint}"
    if len(set(config.planted.worlds)) < len(config.planted.worlds):
        yield f"`planted.worlds` must be all different, got {', '.join(config.planted.worlds)}"
    if "uniform" not in (config.mixture.rule, *config.controls.rules):
        yield "`controls.rules` must hold uniform, from which the share of the gap is counted"
    for key, rules in (("mixture.rule", (config.mixture.rule,)), ("controls.rules", config.controls.rules)):
        for rule in rules:
            if rule not in RULES:
                yield f"`{key}` must be one of {', '.join(RULES)}, got '{rule}'{did_you_mean(rule, RULES)}"
            if rule in ("static", "proportional"):
                yield f"`{key}` {rule} needs datasets of its own; in a planted world use another rule"
    if config.tasks.tasks:
        yield "`planted.worlds` and `tasks.tasks` are two kinds of run; give one of them"


def _task_conflicts(config: CurriculumConfig) -> Iterator[str]:
    yield from config.tasks.conflicts()
    yield from _amortised_conflicts(config)
    if config.ppo.advantage == "gae":
        yield "`ppo.advantage` gae needs a value network, which RL on tasks does not have; use grpo, dr_grpo or rloo"
    if config.ppo.kl_place != "none":
        yield f"`ppo.kl_place` must be none in RL on tasks, got {config.ppo.kl_place}"
    if not config.ppo.weight:
        yield "`ppo.weight` is 0; RL on tasks learns from nothing else"


def _amortised_conflicts(config: CurriculumConfig) -> Iterator[str]:
    options, tasks = config.amortised, config.tasks
    if not options.steps:
        return
    yield from options.conflicts()
    if len(tasks.tasks) < options.tasks_per_set:
        yield f"`tasks.tasks` must hold at least `amortised.tasks_per_set` {options.tasks_per_set}"
    if both := sorted({task.name for task in tasks.tasks} & {task.name for task in options.unseen}):
        yield f"`amortised.unseen` must hold other tasks than `tasks.tasks`, got '{both[0]}' in both"
    if "learned" in (tasks.rule, *tasks.controls):
        yield "`tasks.rule` and `tasks.controls` cannot hold learned while a teacher is trained, which is judged anyway"
    if config.ppo.generator != "own":
        yield f"`ppo.generator` must be own while a teacher is trained, got {config.ppo.generator}"


def _mixture_conflicts(config: CurriculumConfig) -> Iterator[str]:
    datasets = config.data.datasets
    names = [dataset.name for dataset in datasets]
    if not datasets:
        yield "`data.datasets` is empty; name at least one dataset"
    elif not any(dataset.target for dataset in datasets):
        yield "`data.datasets` has no target; at least one must count in the validation loss"
    elif not any(dataset.train for dataset in datasets):
        yield "`data.datasets` has nothing to learn from; at least one must have train: true"
    if useless := [dataset.name for dataset in datasets if not (dataset.train or dataset.target)]:
        yield f"`data.datasets` has {', '.join(useless)} with neither train nor target; leave it out"
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
    if "targets" in (config.mixture.rule, *config.controls.rules) and not any(
        dataset.train and dataset.target for dataset in datasets
    ):
        yield "the rule targets needs a dataset with train and target; `data.datasets` has none"
    weights, num_mixed = config.mixture.weights, sum(dataset.train for dataset in datasets)
    if config.mixture.rule == "static" and len(weights) != num_mixed:
        yield f"`mixture.weights` must be {num_mixed} numbers for the rule static, got {len(weights)}"
    for name, fixed in config.controls.mixtures.items():
        if len(fixed) != num_mixed or not sum(fixed) > 0 or min(fixed) < 0:
            yield f"`controls.mixtures` {name} must be {num_mixed} numbers, at least 0 and not all 0, got {fixed}"
    if config.mixture.rule != "static" and weights:
        yield f"`mixture.weights` go with the rule static alone, got them with {config.mixture.rule}"


def _ppo_conflicts(config: CurriculumConfig) -> Iterator[str]:
    if config.mixture.rule in ("learning_progress", "second_order") and config.difficulty.sample_size == 1:
        yield (
            f"`mixture.rule` {config.mixture.rule} weighs a fall of the loss by its standard error, which one row does "
            "not have; `difficulty.sample_size` must be at least 2, got 1"
        )
    ppo = config.ppo
    if not ppo.weight and not config.update.cross_entropy_weight:
        yield "`ppo.weight` and `update.cross_entropy_weight` are both 0; then nothing is learned"
    if not ppo.weight:
        return
    yield from ppo.generator_conflicts(adapter=bool(config.model.adapter_rank))
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
