"""Configuration of RL on tasks; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from preceptor.config import Options

TASK_RULES = {
    "uniform": "all levels alike, fixed",
    "frontier_range": "the two highest levels reached of each task; up when half of the answers are right (RLVE)",
    "success_variance": "p(1 − p) of the success rate, shared between neighbouring levels",
    "mean_advantage": "softmax of the mean absolute advantage (SEC)",
    "upper_confidence": "the same with a bonus for what was seldom drawn (DUMP)",
    "dynamic_sampling": "uniform; groups that are all right or all wrong are drawn again (DAPO)",
    "easy_to_hard": "levels open one after another on a schedule",
    "hard_to_easy": "the same from the hardest",
    "learned": "a policy that was trained over many sets of tasks (tasks.policy)",
    "oracle": "p(1 − p) of success rates measured apart, at their cost: a bound",
}
COIN = "coin"
"""The task that teaches nothing."""
BUILTIN_TASKS = {
    "reverse": "digits backwards",
    "copy": "digits once more",
    "sort": "digits in order",
    "count": "how many a's are in a word of a's and b's",
    "add": "the sum of two numbers",
    "rotate": "digits backwards, the last one at the end",
    "complement": "digits backwards, nine less each",
    "successor": "digits backwards, one more each; 9 becomes 0",
    "largest": "the largest digit and how often it is there",
    COIN: "a coin flip is rewarded, whatever is answered: a trap",
}
GYM = "reasoning_gym:"
"""How a task of reasoning-gym is named: ``reasoning_gym:spell_backward``."""


class TaskOptions(Options):
    """One task."""

    name: str = Field("", description="Name of the task in tables and logs.")
    source: str = Field(
        "", description="A built-in task, 'reasoning_gym:NAME', or a JSONL file with prompt, answer and level."
    )
    levels: int = Field(8, ge=1, description="Number of levels of difficulty.")
    check: str = Field(
        "", description="module:function or file.py:function of (text, answer) to true or false; empty compares texts."
    )
    max_tokens: int = Field(16, ge=1, description="Maximum length of an answer in tokens (built-in tasks know theirs).")


def task_conflicts(key: str, tasks: tuple[TaskOptions, ...]) -> Iterator[str]:
    """What is wrong with the list of tasks under ``key``."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or "" in names:
        yield f"`{key}` need a name each, all different, got {', '.join(names)}"
    for task in tasks:
        if task.source not in BUILTIN_TASKS and not task.source.startswith(GYM) and "." not in task.source:
            yield (
                f"`{key}` has no source '{task.source}'; use {', '.join(BUILTIN_TASKS)}, reasoning_gym:NAME "
                "or a JSONL file"
            )
    if tasks and all(task.source == COIN for task in tasks):
        yield f"`{key}` must hold a task that can be learned, got {COIN} alone"


class TasksOptions(Options):
    """RL on tasks, in place of datasets; without tasks this section has no effect."""

    tasks: tuple[TaskOptions, ...] = Field((), description="The tasks; empty trains on datasets.")
    rule: str = Field("frontier_range", description="Rule over the tasks' levels; see preceptor list.")
    settings: dict[str, float] = Field({}, description="The rule's own hyperparameters, by name.")
    policy: str = Field("", description="Folder of a run that trained a teacher (rule: learned); see amortised.")
    controls: tuple[str, ...] = Field(("uniform",), description="Further rules, each from the same weights.")
    tokens_per_step: int = Field(512, ge=1, description="Nominal number of answer tokens per step, of every rule.")
    warm_up_steps: int = Field(
        200,
        ge=0,
        description="Number of steps that teach the form of answers: the first levels, and all levels mislabelled.",
    )
    warm_up_levels: int = Field(1, ge=1, description="Number of levels, from the first, whose right answers it shows.")
    warm_up_rows: int = Field(64, ge=1, description="Number of rows per warm-up step.")
    warm_up_learning_rate: float = Field(2e-3, gt=0, description="Learning rate of the warm-up (AdamW).")
    validate_every: int = Field(4000, ge=1, description="Number of answer tokens between validations.")
    validation_prompts: int = Field(48, ge=1, description="Number of prompts of each level at a validation.")
    oracle_every: int = Field(2000, ge=1, description="Number of answer tokens between the oracle's measurements.")
    stop_at: float = Field(0.9, gt=0, le=1, description="Mean success over all levels at which a rule's training ends.")
    max_tokens: int = Field(260_000, ge=1, description="Number of answer tokens at which a rule's training ends.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        yield from task_conflicts("tasks.tasks", self.tasks)
        if ("learned" in (self.rule, *self.controls)) != bool(self.policy):
            yield "`tasks.policy` and the rule learned need each other; give the folder of a run with --preset teacher"
        for key, rules in (("rule", (self.rule,)), ("controls", self.controls)):
            for rule in rules:
                if rule not in TASK_RULES:
                    yield f"`tasks.{key}` must be one of {', '.join(TASK_RULES)}, got '{rule}'"


class AmortisedOptions(Options):
    """A teacher trained over many sets of `tasks.tasks`; without steps this section has no effect."""

    steps: int = Field(0, ge=0, description="Number of updates of the teacher (PPO); 0 trains none.")
    num_sets: int = Field(12, ge=1, description="Number of sets of tasks to train on, each with a student of its own.")
    tasks_per_set: int = Field(2, ge=1, description="Number of tasks of a set.")
    sets_per_step: int = Field(2, ge=1, description="Number of sets per update.")
    students_per_set: int = Field(4, ge=2, description="Number of students per set and update; they are compared.")
    decision_batches: int = Field(
        4, ge=1, description="Number of batches that a decision of the teacher lasts while it is trained."
    )
    decision_draws: int = Field(2, ge=1, description="Number of levels that a decision draws while it is trained.")
    student_tokens: int = Field(10_000, ge=1, description="Number of answer tokens that a student learns from.")
    hidden_dim: int = Field(32, ge=1, description="Width of the teacher's network.")
    learning_rate: float = Field(1e-2, ge=0, description="Learning rate of the teacher (Adam).")
    epochs: int = Field(8, ge=1, description="Number of passes over the decisions of an update.")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="How far a probability ratio may move.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of the advantage estimates.")
    entropy_coefficient: float = Field(0.01, ge=0, description="Weight of the entropy bonus of the weights.")
    exploration: float = Field(0.05, ge=0, le=1, description="Share of the weights that stays even.")
    search: bool = Field(
        True, description="Also search frontier_range's window and threshold, with as many students as the teacher had."
    )
    unseen: tuple[TaskOptions, ...] = Field((), description="The tasks to judge on, none of which it was trained on.")
    judged_tokens: int = Field(30_000, ge=1, description="Number of answer tokens of a student when rules are judged.")
    judged_prompts: int = Field(48, ge=1, description="Number of prompts of each level at a validation then.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        yield from task_conflicts("amortised.unseen", self.unseen)
        if self.steps and len(self.unseen) < self.tasks_per_set:
            yield f"`amortised.unseen` needs at least `amortised.tasks_per_set` {self.tasks_per_set} tasks to judge on"
