"""Configuration of the surgery system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from preceptor.config import option

FLAGS = {"seed": "seed", "text": "data.text"}
"""Command-line flags that stand for configuration keys."""

ARMS = {
    "no_edit": "the student as bootstrapping leaves it",
    "learned": "SAC chooses the edits",
    "shuffled": "SAC that is paid with rewards of other edits, which must teach it nothing",
    "evolution": "(1+1)-ES: Gaussian edits whose size follows the one-fifth rule",
    "random": "random edits, each as large as SAC's at the same step",
    "best_of_n": "the best of every N random edits",
    "gradient": "gradient steps that cost as many FLOPs as SAC's edits",
    "joint": "SAC and the objective together, after exclusive surgery",
    "training": "the same updates as in joint, without any surgery",
}
EDITING_ARMS = ("learned", "shuffled", "evolution", "random", "best_of_n")
OBJECTIVES = {
    "sampled": "policy gradient on a group of tokens drawn at every position",
    "expected": "policy gradient with the expectation over the vocabulary in closed form",
    "avatarl": "soft labels from reality and referee, as the predecessor's last version",
    "cross_entropy": "control: the true token's log-probability",
    "distil": "control: KL to the referee",
}
CHOICES = {
    "arms": ARMS,
    "objectives": OBJECTIVES,
    "edits": {
        "singular_values": "scale the leading singular values of attention matrices",
        "head_scale": "scale each head's output",
        "low_rank": "add a small matrix in the space of the leading singular vectors",
    },
}


@dataclass(frozen=True)
class DataOptions:
    """What is learned from."""

    text: str = option("", "UTF-8 text file; empty is the reference documentation that comes with Python")
    tokens: Literal["characters", "bpe", "referee"] = option("characters", "unit; referee: the referee model's own")
    vocab_size: int = option(512, "entries of the byte-pair encoding (tokens: bpe)", within="[2, inf)")
    train_share: float = option(0.9, "leading share of the text that teaches; the rest only judges", within="(0, 1)")


@dataclass(frozen=True)
class StudentOptions:
    """The model that learns to speak, from random weights."""

    architecture: Literal["gpt2", "llama"] = option("gpt2", "of the transformer")
    num_layers: int = option(2, "layers", within="[1, inf)")
    num_heads: int = option(4, "attention heads", within="[1, inf)")
    width: int = option(64, "hidden size", within="[1, inf)")
    block_size: int = option(48, "tokens of context", within="[2, inf)")


@dataclass(frozen=True)
class RefereeOptions:
    """Whose opinion gives partial rewards and judges what the student writes."""

    kind: Literal["ngram", "model"] = option("ngram", "counts on the training text, or a pretrained model")
    order: int = option(5, "n of the n-gram", within="[1, inf)")
    model: str = option("", "folder that `preceptor pretrain` wrote (kind: model)")
    training_tokens: int = option(
        0, "that the model cost; 0 reads them from result.json beside its folder", within="[0, inf)"
    )


@dataclass(frozen=True)
class LearningOptions:
    """How the student learns the next token."""

    objective: Literal["sampled", "expected", "avatarl", "cross_entropy", "distil"] = option(
        "expected", "what is optimised at every position of every sequence"
    )
    partial_reward: float = option(
        1.0, "c: what a token earns that the referee is sure of (sampled, expected)", within="[0, inf)"
    )
    confidence_penalty: float = option(
        1.0, "share of its own probability that an action is taxed; 1 is proper", within="[0, inf)"
    )
    group_size: int = option(32, "tokens drawn at a position (sampled)", within="[2, inf)")
    advantage: Literal["leave_one_out", "group_normalised"] = option("leave_one_out", "within a group (sampled)")
    batch_size: int = option(16, "sequences a step", within="[1, inf)")
    learning_rate: float = option(3e-3, "AdamW, the highest", within="[0, inf)")
    final_learning_rate: float = option(
        3e-4, "AdamW, where the cosine ends; also in the joint phase", within="[0, inf)"
    )
    warm_up_steps: int = option(50, "of linear warm-up", within="[0, inf)")
    beta2: float = option(0.99, "AdamW's second", within="(0, 1)")
    weight_decay: float = option(0.1, "of matrices", within="[0, inf)")
    clip_norm: float = option(1.0, "global gradient norm", within="(0, inf]", hint=".inf clips nothing")


@dataclass(frozen=True)
class PhaseOptions:
    """How long each phase lasts."""

    bootstrap_steps: int = option(800, "updates of the objective alone", within="[1, inf)")
    surgery_edits: int = option(150, "edits tried on the frozen student, by each arm that edits", within="[0, inf)")
    joint_edits: int = option(30, "edits tried while the student goes on learning", within="[0, inf)")
    updates_per_edit: int = option(5, "of the objective before each edit of the joint phase", within="[0, inf)")
    plateau_window: int = option(5, "measurements over which a plateau is judged", within="[2, inf)")
    plateau_slope: float = option(0.01, "nats per 100 steps; a plateau falls more slowly", within="[0, inf)")


@dataclass(frozen=True)
class EditOptions:
    """What a surgeon can do."""

    kind: Literal["singular_values", "head_scale", "low_rank"] = option("singular_values", "action space")
    roles: tuple[str, ...] = option(("query", "key", "value", "output"), "attention matrices that are edited")
    layers: tuple[int, ...] = option((), "numbers of their layers; empty is all")
    rank: int = option(2, "leading singular values or vectors of each matrix", within="[1, inf)")
    max_relative_norm: float = option(0.1, "of an edit to one matrix", within="(0, 1)")
    moments: Literal["keep", "zero", "scale"] = option("keep", "Adam's moments of a matrix after a committed edit")


@dataclass(frozen=True)
class QualityOptions:
    """What an edit is paid for, and what it must pass to stay."""

    num_prompts: int = option(16, "continuations that are judged, drawn anew for each edit", within="[1, inf)")
    prompt_tokens: int = option(12, "of each", within="[1, inf)")
    continuation_tokens: int = option(32, "drawn after each prompt; both must fit the block", within="[1, inf)")
    num_windows: int = option(32, "sequences of the fixed batch whose loss counts", within="[1, inf)")
    loss_weight: float = option(1.0, "reward per nat of that batch's loss", within="[0, inf)")
    referee_weight: float = option(
        0.02, "reward per nat of the referee's log-likelihood of the continuations", within="[0, inf)"
    )
    repetition_weight: float = option(
        0.02, "reward lost where every 4-gram was written before in the continuation", within="[0, inf)"
    )
    distinct_weight: float = option(0.02, "reward where all pairs of tokens are different", within="[0, inf)")
    acceptance_windows: int = option(192, "sequences drawn afresh for the test of one edit", within="[2, inf)")
    acceptance_z: float = option(1.64, "standard errors by which their paired loss must fall", within="[0, inf)")


@dataclass(frozen=True)
class AgentOptions:
    """The SAC surgeon."""

    hidden_dim: int = option(64, "of every network", within="[1, inf)")
    learning_rate: float = option(2e-3, "of every network and the temperature", within="[0, inf)")
    discount: float = option(0.5, "of rewards, per edit", within="[0, 1)")
    target_step: float = option(0.01, "of the target critics, per update", within="(0, 1]")
    batch_size: int = option(64, "transitions an update", within="[1, inf)")
    updates_per_edit: int = option(8, "of the agent", within="[0, inf)")
    initial_temperature: float = option(
        0.05, "entropy weight; rewards are divided by their running deviation", within="(0, inf)"
    )
    random_edits: int = option(30, "drawn uniformly before the policy acts", within="[0, inf)")
    capacity: int = option(10_000, "transitions kept", within="[1, inf)")


@dataclass(frozen=True)
class ControlOptions:
    """What the surgeon and the objective are compared with."""

    arms: tuple[str, ...] = option(tuple(ARMS), "which; no_edit is always there")
    best_of: int = option(10, "N of best_of_n", within="[1, inf)")
    objectives: tuple[str, ...] = option(("cross_entropy",), "further bootstraps at equal tokens and at equal FLOPs")


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured."""

    every: int = option(100, "updates between measurements on the held-out text", within="[1, inf)")
    num_windows: int = option(64, "sequences of it, on the way; the end uses all", within="[1, inf)")
    ladder_order: int = option(7, "highest n of the n-gram ladder", within="[1, inf)")
    num_prompts: int = option(128, "held-out prompts whose continuations are judged at the end", within="[1, inf)")


@dataclass(frozen=True)
class SurgeryConfig:
    """Configuration of ``preceptor run surgery``."""

    seed: int = option(0, "of everything that is drawn")
    data: DataOptions = field(default_factory=DataOptions)
    student: StudentOptions = field(default_factory=StudentOptions)
    referee: RefereeOptions = field(default_factory=RefereeOptions)
    learning: LearningOptions = field(default_factory=LearningOptions)
    phases: PhaseOptions = field(default_factory=PhaseOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    quality: QualityOptions = field(default_factory=QualityOptions)
    agent: AgentOptions = field(default_factory=AgentOptions)
    controls: ControlOptions = field(default_factory=ControlOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    save_every: int = option(200, "steps between checkpoints", within="[1, inf)")

    def faults(self) -> list[str]:
        """What is at odds in this configuration, besides numbers out of their range."""
        return [*self._unknown(), *self._at_odds()]

    def _unknown(self) -> list[str]:
        roles = ("query", "key", "value", "output")
        return [
            f"`{key}` may hold {', '.join(allowed)}, got {name}"
            for key, names, allowed in (
                ("controls.arms", self.controls.arms, tuple(ARMS)),
                ("controls.objectives", self.controls.objectives, tuple(OBJECTIVES)),
                ("edit.roles", self.edit.roles, roles),
            )
            for name in names
            if name not in allowed
        ]

    def _at_odds(self) -> list[str]:
        found = []
        heads = max(self.student.num_heads, 1)  # fewer are told above
        if self.student.width % heads or (self.student.architecture == "llama" and self.student.width // heads % 2):
            found.append(
                f"`student.width` must be a multiple of `student.num_heads` (an even one for llama), got "
                f"{self.student.width} and {self.student.num_heads}"
            )
        if self.quality.prompt_tokens + self.quality.continuation_tokens > self.student.block_size:
            found.append(
                f"`quality.prompt_tokens` + `quality.continuation_tokens` must fit `student.block_size` "
                f"{self.student.block_size}, got {self.quality.prompt_tokens} + {self.quality.continuation_tokens}"
            )
        if (self.referee.kind == "model") != bool(self.referee.model):
            found.append("`referee.model` names a folder exactly where `referee.kind` is model")
        if (self.data.tokens == "referee") != (self.referee.kind == "model"):
            found.append("`data.tokens` must be referee exactly where `referee.kind` is model: they share a vocabulary")
        if not self.edit.roles:
            found.append("`edit.roles` is empty; name at least one of query, key, value, output")
        if self.edit.kind == "head_scale" and self.edit.roles != ("output",):
            found.append("`edit.kind` head_scale scales heads' outputs, so `edit.roles` must be (output)")
        if "learned" not in self.controls.arms:
            for arm in ("random", "gradient", "joint"):
                if arm in self.controls.arms:
                    found.append(f"`controls.arms` {arm} is matched to learned; add learned or leave {arm} out")
        if self.learning.objective in self.controls.objectives:
            found.append(f"`controls.objectives` holds `learning.objective` {self.learning.objective} itself")
        return found


Config = SurgeryConfig
