"""Configuration of the surgery system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from pydantic import Field

from preceptor.config import Options

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
    "pretrained": "a surgeon that was trained on many damaged models (surgeon: pretrained:RUN)",
    "joint_pretrained": "that surgeon and the objective together",
}
EDITING_ARMS = ("learned", "shuffled", "evolution", "random", "best_of_n")
OBJECTIVES = {
    "sampled": "policy gradient on a group of tokens drawn at every position",
    "expected": "policy gradient with the expectation over the vocabulary in closed form",
    "avatarl": "soft labels from reality and referee, as the predecessor's last version",
    "cross_entropy": "control: the true token's log-probability",
    "distil": "control: KL to the referee",
}
DAMAGES = {
    "head_scale": "planted: every head's output is scaled",
    "singular_values": "planted: the singular values of every output projection shrink",
    "low_rank_noise": "planted: noise of rank 2 on every output projection",
    "permuted_heads": "planted: the heads of every layer change places",
    "wiped_head": "planted: a head of every layer is set to 0",
    "round_2": "compression: weights rounded to the nearest of 2 bits",
    "round_3": "compression: weights rounded to the nearest of 3 bits",
    "round_4": "compression: weights rounded to the nearest of 4 bits",
    "magnitude_pruning": "compression: half to three quarters of the weights, the smallest, are set to 0",
    "head_pruning": "compression: a quarter of each layer's heads, the smallest, is set to 0",
    "truncation": "compression: an eighth to a third of the singular values, the largest, is kept",
    "merging": "two fine-tunes of a student on different halves of the text are averaged",
}
REPAIRS = {
    "inverse": "the known inverse of the damage",
    "amortised": "the surgeon trained over many damaged models",
    "shuffled": "the same, each edit paid with the reward of another damage",
    "norms": "every head's norm is set to the mean of its layer",
    "calibration": "every row scaled to be nearest to the original's, in closed form",
    "calibration_norms": "every row's norm is set to the original's",
    "calibration_outputs": "every output scaled to be nearest to the original's on the searches' text",
    "gradient": "Adam on the numbers of the edit",
    "tuning": "Adam on all damaged weights, on fresh text",
    "evolution": "(1+1)-ES on the numbers of the edit",
    "cma_es": "CMA-ES on the numbers of the edit",
    "sac": "SAC that starts from nothing on the one model",
    "no_edit": "the damaged model",
}
CHOICES = {
    "arms": ARMS,
    "damages": DAMAGES,
    "repairs": REPAIRS,
    "objectives": OBJECTIVES,
    "edits": {
        "singular_values": "scale the leading singular values of attention matrices",
        "head_scale": "scale each head's output",
        "low_rank": "add a small matrix in the space of the leading singular vectors",
    },
}


Objective = Literal["sampled", "expected", "avatarl", "cross_entropy", "distil"]
Arm = Literal["no_edit", "learned", "shuffled", "evolution", "random", "best_of_n", "gradient", "joint", "training"]


class DataOptions(Options):
    """What is learned from."""

    text: str = Field("", description="UTF-8 text file; empty is the reference documentation that comes with Python.")
    tokens: Literal["characters", "bpe", "referee"] = Field(
        "characters", description="Unit of the text; referee is the referee model's own vocabulary."
    )
    vocab_size: int = Field(512, ge=2, description="Number of entries of the byte-pair encoding (tokens: bpe).")
    train_share: float = Field(
        0.9, gt=0, lt=1, description="First fraction of the text, for training; the rest is for evaluation."
    )


class StudentOptions(Options):
    """The model that learns to speak, from random weights."""

    architecture: Literal["gpt2", "llama"] = Field("gpt2", description="Architecture of the transformer.")
    num_layers: int = Field(2, ge=1, description="Number of layers.")
    num_heads: int = Field(4, ge=1, description="Number of attention heads.")
    width: int = Field(64, ge=1, description="Hidden size.")
    block_size: int = Field(48, ge=2, description="Context length in tokens.")


class RefereeOptions(Options):
    """The reference model that gives partial rewards and scores what the student writes."""

    kind: Literal["ngram", "model"] = Field(
        "ngram", description="Counts of n-grams in the training text, or a pretrained model."
    )
    order: int = Field(5, ge=1, description="Order n of the n-gram model.")
    model: str = Field("", description="Folder that `preceptor pretrain` wrote (kind: model).")
    training_tokens: int = Field(
        0, ge=0, description="Tokens that the model was trained on; 0 reads them from result.json beside its folder."
    )


class LearningOptions(Options):
    """How the student learns the next token."""

    objective: Objective = Field(
        "expected", description="Objective that is optimised at every position of every sequence."
    )
    partial_reward: float = Field(
        1.0, ge=0, description="c: reward of a token that the referee is certain of (sampled, expected)."
    )
    confidence_penalty: float = Field(
        1.0, ge=0, description="Fraction of its own probability subtracted from an action's reward; 1 makes it proper."
    )
    group_size: int = Field(32, ge=2, description="Number of tokens drawn at a position (sampled).")
    advantage: Literal["leave_one_out", "group_normalised"] = Field(
        "leave_one_out", description="Advantage within a group of drawn tokens (sampled)."
    )
    batch_size: int = Field(16, ge=1, description="Number of sequences per step.")
    learning_rate: float = Field(3e-3, ge=0, description="Highest learning rate of AdamW.")
    final_learning_rate: float = Field(
        3e-4, ge=0, description="Learning rate of AdamW at the end of the cosine, and in the joint phase."
    )
    warm_up_steps: int = Field(50, ge=0, description="Number of steps of linear warm-up.")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's decay of the second moment.")
    weight_decay: float = Field(0.1, ge=0, description="Weight decay of matrices.")
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Maximum global gradient norm; .inf clips nothing."
    )


class PhaseOptions(Options):
    """How long each phase lasts."""

    bootstrap_steps: int = Field(800, ge=1, description="Number of updates of the objective alone.")
    surgery_edits: int = Field(
        150, ge=0, description="Number of edits that each editing arm tries on the frozen student."
    )
    joint_edits: int = Field(30, ge=0, description="Number of edits tried while the student goes on learning.")
    updates_per_edit: int = Field(
        5, ge=0, description="Number of updates of the objective before each edit of the joint phase."
    )
    plateau_window: int = Field(5, ge=2, description="Number of measurements over which a plateau is judged.")
    plateau_slope: float = Field(
        0.01, ge=0, description="Nats per 100 steps; a loss that falls more slowly is on a plateau."
    )


class EditOptions(Options):
    """What a surgeon can do."""

    kind: Literal["singular_values", "head_scale", "low_rank"] = Field("singular_values", description="Action space.")
    roles: tuple[Literal["query", "key", "value", "output"], ...] = Field(
        ("query", "key", "value", "output"), description="Attention matrices that are edited."
    )
    mlp: bool = Field(
        False, description="Edit the matrices of the MLPs as well, each as one head (an amortised surgeon's alone)."
    )
    layers: tuple[int, ...] = Field((), description="Numbers of the layers that are edited; empty is all.")
    rank: int = Field(2, ge=1, description="Number of leading singular values or vectors of each matrix.")
    max_relative_norm: float = Field(
        0.1, gt=0, lt=1, description="Largest norm of an edit, relative to the norm of its matrix."
    )
    moments: Literal["keep", "zero", "scale"] = Field(
        "keep", description="What becomes of Adam's moments of a matrix after a committed edit."
    )


class QualityOptions(Options):
    """What an edit is rewarded for, and the test that it must pass to stay."""

    num_prompts: int = Field(
        16, ge=1, description="Number of continuations that are scored, from prompts drawn afresh for each edit."
    )
    prompt_tokens: int = Field(12, ge=1, description="Length of a prompt in tokens.")
    continuation_tokens: int = Field(
        32, ge=1, description="Length of a continuation in tokens; prompt and continuation must fit the block."
    )
    num_windows: int = Field(32, ge=1, description="Number of sequences of the fixed batch whose loss counts.")
    loss_weight: float = Field(1.0, ge=0, description="Reward per nat of that batch's loss.")
    referee_weight: float = Field(
        0.02, ge=0, description="Reward per nat of the referee's log-likelihood of the continuations."
    )
    repetition_weight: float = Field(
        0.02, ge=0, description="Reward lost if every 4-gram of a continuation occurred in it before."
    )
    distinct_weight: float = Field(0.02, ge=0, description="Reward if all pairs of tokens are different.")
    acceptance_windows: int = Field(
        192, ge=2, description="Number of sequences drawn afresh for the acceptance test of one edit."
    )
    acceptance_z: float = Field(
        1.64, ge=0, description="Standard errors by which their paired loss must fall for an edit to be accepted."
    )


class AgentOptions(Options):
    """The SAC surgeon."""

    hidden_dim: int = Field(64, ge=1, description="Hidden size of every network.")
    learning_rate: float = Field(2e-3, ge=0, description="Learning rate of every network and of the temperature.")
    discount: float = Field(0.5, ge=0, lt=1, description="Discount of rewards per edit.")
    target_step: float = Field(0.01, gt=0, le=1, description="Step of the target critics per update (Polyak).")
    batch_size: int = Field(64, ge=1, description="Number of transitions per update.")
    updates_per_edit: int = Field(8, ge=0, description="Number of the agent's updates per edit.")
    initial_temperature: float = Field(
        0.05, gt=0, description="Initial entropy weight; rewards are divided by their running root mean square."
    )
    random_edits: int = Field(30, ge=0, description="Number of edits drawn uniformly before the policy acts.")
    capacity: int = Field(10_000, ge=1, description="Number of transitions in the replay buffer.")


class ControlOptions(Options):
    """What the surgeon and the objective are compared with."""

    arms: tuple[Arm, ...] = Field(get_args(Arm), description="Arms that are run; no_edit always is.")
    best_of: int = Field(10, ge=1, description="N of best_of_n.")
    objectives: tuple[Objective, ...] = Field(
        ("cross_entropy",), description="Further objectives, bootstrapped at equal tokens and at equal FLOPs."
    )


Damage = Literal[
    "head_scale", "singular_values", "low_rank_noise", "permuted_heads", "wiped_head",
    "round_2", "round_3", "round_4", "magnitude_pruning", "head_pruning", "truncation", "merging",
]  # fmt: skip
Repair = Literal[
    "inverse", "amortised", "shuffled", "norms", "calibration", "calibration_norms", "calibration_outputs",
    "gradient", "tuning", "evolution", "cma_es", "sac", "no_edit",
]  # fmt: skip


class AmortisedOptions(Options):
    """The surgeon that learns on many damaged models (training: amortised)."""

    learner: Literal["sac", "ppo"] = Field("sac", description="How the surgeon learns from what its edits earned.")
    steps: int = Field(200, ge=1, description="Number of training steps.")
    damages_per_step: int = Field(16, ge=1, description="Number of damaged students in a step.")
    updates_per_step: int = Field(
        8, ge=0, description="Number of the agent's updates in a step; for ppo, of passes over the step's edits."
    )
    edits_per_damage: int = Field(
        1, ge=1, description="Number of edits of a damaged student; with a discount of 0 each is an episode of its own."
    )
    num_students: int = Field(4, ge=1, description="Number of students that are trained from random weights.")
    sizes: tuple[str, ...] = Field(
        ("2x4x64",), description="LAYERSxHEADSxWIDTH of these students, which take turns with the sizes."
    )
    models: tuple[str, ...] = Field((), description="Folders of pretrained models to train the surgeon on as well.")
    unseen_sizes: tuple[str, ...] = Field(
        ("2x4x64", "3x4x96"), description="Size of each student that the surgeon is judged on and has never seen."
    )
    unseen_models: tuple[str, ...] = Field(
        (), description="Pretrained models that it is judged on: starter, or a folder."
    )
    damages: tuple[Damage, ...] = Field(("head_scale",), description="Kinds of damage to train on.")
    unseen_damages: tuple[Damage, ...] = Field(
        ("permuted_heads", "wiped_head"), description="Further kinds of damage to judge on."
    )
    strength: float = Field(6.0, gt=1, description="Largest factor of a planted damage.")
    max_factor: float = Field(6.0, gt=1, description="Largest factor of an edit.")
    gradients: bool = Field(True, description="Let the surgeon see the gradient, which costs a backward pass an edit.")
    probe_windows: int = Field(4, ge=1, description="Number of sequences that the surgeon sees and is paid for.")
    search_evaluations: int = Field(100, ge=8, description="Number of evaluations of a search.")
    search_windows: int = Field(8, ge=1, description="Number of sequences that the searches minimise the loss of.")
    test_windows: int = Field(32, ge=1, description="Number of held-out sequences that a repair is judged on.")
    patients: int = Field(8, ge=1, description="Number of damages of each kind of each student it is judged on.")
    sac_patients: int = Field(1, ge=0, description="Number of those that SAC from nothing is given, which is slow.")
    fine_tune_steps: int = Field(100, ge=1, description="Number of updates of a fine-tune that is merged (merging).")
    fine_tune_rate: float = Field(
        0.01, gt=0, description="Learning rate of these updates, which falls to 0; the higher, the more a merge costs."
    )
    repairs: tuple[Repair, ...] = Field(
        ("inverse", "amortised", "shuffled", "norms", "gradient", "evolution", "cma_es", "sac", "no_edit"),
        description="Ways of repair that are compared.",
    )


class EvaluationOptions(Options):
    """What is measured."""

    every: int = Field(100, ge=1, description="Number of updates between measurements on the held-out text.")
    num_windows: int = Field(
        64, ge=1, description="Number of held-out sequences measured during the run; the end uses all."
    )
    ladder_order: int = Field(7, ge=1, description="Highest order n of the n-gram ladder.")
    num_prompts: int = Field(
        128, ge=1, description="Number of held-out prompts whose continuations are scored at the end."
    )


class SurgeryConfig(Options):
    """Configuration of ``preceptor run surgery``."""

    seed: int = Field(0, description="Seed of every random stream.")
    training: Literal["phases", "amortised"] = Field(
        "phases", description="A surgeon of one student in three phases, or one trained on many damaged students."
    )
    surgeon: str = Field(
        "trained",
        description="trained on the spot, or pretrained:RUN, which adds the surgeon of that amortised run beside it.",
    )
    data: DataOptions = DataOptions()
    student: StudentOptions = StudentOptions()
    referee: RefereeOptions = RefereeOptions()
    learning: LearningOptions = LearningOptions()
    phases: PhaseOptions = PhaseOptions()
    edit: EditOptions = EditOptions()
    quality: QualityOptions = QualityOptions()
    agent: AgentOptions = AgentOptions()
    amortised: AmortisedOptions = AmortisedOptions()
    controls: ControlOptions = ControlOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    save_every: int = Field(200, ge=1, description="Number of steps between checkpoints.")

    @property
    def pretrained_run(self) -> str:
        """The folder in ``pretrained:RUN``, or nothing."""
        kind, _, run = self.surgeon.partition(":")
        return run if kind == "pretrained" else ""

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        heads = self.student.num_heads
        if self.student.width % heads or (self.student.architecture == "llama" and self.student.width // heads % 2):
            yield (
                f"`student.width` must be a multiple of `student.num_heads` (an even one for llama), got "
                f"{self.student.width} and {self.student.num_heads}"
            )
        if self.quality.prompt_tokens + self.quality.continuation_tokens > self.student.block_size:
            yield (
                f"`quality.prompt_tokens` + `quality.continuation_tokens` must fit `student.block_size` "
                f"{self.student.block_size}, got {self.quality.prompt_tokens} + {self.quality.continuation_tokens}"
            )
        if (self.referee.kind == "model") != bool(self.referee.model):
            yield "`referee.model` names a folder exactly where `referee.kind` is model"
        if (self.data.tokens == "referee") != (self.referee.kind == "model"):
            yield "`data.tokens` must be referee exactly where `referee.kind` is model: they share a vocabulary"
        if self.surgeon != "trained" and not self.pretrained_run:
            yield f"`surgeon` must be trained or pretrained:RUN, got {self.surgeon}"
        yield from self._amortised_conflicts()
        if not self.edit.roles:
            yield "`edit.roles` is empty; name at least one of query, key, value, output"
        if self.training == "phases":
            if self.edit.kind == "head_scale" and self.edit.roles != ("output",):
                yield "`edit.kind` head_scale scales heads' outputs, so `edit.roles` must be (output)"
            if self.edit.mlp:
                yield "`edit.mlp` needs `training` amortised: a surgeon of one student edits attention alone"
        if "learned" not in self.controls.arms:
            for arm in ("random", "gradient", "joint"):
                if arm in self.controls.arms:
                    yield f"`controls.arms` {arm} is matched to learned; add learned or leave {arm} out"
        if self.learning.objective in self.controls.objectives:
            yield f"`controls.objectives` holds `learning.objective` {self.learning.objective} itself"

    def _amortised_conflicts(self) -> Iterator[str]:
        if self.training != "amortised":
            return
        if self.edit.kind == "low_rank":
            yield "`edit.kind` of an amortised surgeon must be head_scale or singular_values, got low_rank"
        if not self.amortised.damages:
            yield "`amortised.damages` is empty; name at least one"
        for key in ("sizes", "unseen_sizes"):
            for size in getattr(self.amortised, key):
                numbers = [int(part) for part in size.split("x") if part.isdecimal()]
                if len(numbers) != 3 or size.count("x") != 2 or 0 in numbers or numbers[2] % numbers[1]:
                    yield f"`amortised.{key}` must be LAYERSxHEADSxWIDTH, the width a multiple of the heads, got {size}"
        if "merging" in self.amortised.damages and self.amortised.models:
            yield "`amortised.damages` merging is of students alone; leave it or `amortised.models` out"
        if "merging" in self.amortised.unseen_damages and not self.amortised.unseen_sizes:
            yield "`amortised.unseen_damages` merging is of students alone; give `amortised.unseen_sizes`"
        if not self.amortised.sizes:
            yield "`amortised.sizes` is empty; give at least one, such as 2x4x64"


Config = SurgeryConfig
