"""Configuration of RL on tasks; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from preceptor.config import Options

TASK_RULES = {
    "uniform": "all levels alike, fixed",
    "frontier_range": "the two highest levels reached of each task; up when nine in ten answers are right (RLVE)",
    "success_variance": "p(1 − p) of the success rate, shared between neighbouring levels",
    "mean_advantage": "softmax of the mean absolute advantage (SEC)",
    "upper_confidence": "the same with a bonus for what was seldom drawn (DUMP)",
    "dynamic_sampling": "uniform; groups that are all right or all wrong are drawn again (DAPO)",
    "easy_to_hard": "levels open one after another on a schedule",
    "hard_to_easy": "the same from the hardest",
    "oracle": "p(1 − p) of success rates measured apart, at their cost: a bound",
}
BUILTIN_TASKS = {
    "reverse": "digits backwards",
    "copy": "digits once more",
    "sort": "digits in order",
    "count": "how many a's are in a word of a's and b's",
    "add": "the sum of two numbers",
    "coin": "a coin flip is rewarded, whatever is answered: a trap",
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


class TasksOptions(Options):
    """RL on tasks, in place of datasets; without tasks this section has no effect."""

    tasks: tuple[TaskOptions, ...] = Field((), description="The tasks; empty trains on datasets.")
    rule: str = Field("frontier_range", description="Rule over the tasks' levels; see preceptor list.")
    settings: dict[str, float] = Field({}, description="The rule's own hyperparameters, by name.")
    controls: tuple[str, ...] = Field(("uniform",), description="Further rules, each from the same weights.")
    tokens_per_step: int = Field(512, ge=1, description="Nominal number of answer tokens per step, of every rule.")
    warm_up_steps: int = Field(
        200, ge=0, description="Number of steps that teach the form of answers: level 1, and all levels mislabelled."
    )
    warm_up_rows: int = Field(64, ge=1, description="Number of rows per warm-up step.")
    warm_up_learning_rate: float = Field(2e-3, gt=0, description="Learning rate of the warm-up (AdamW).")
    validate_every: int = Field(4000, ge=1, description="Number of answer tokens between validations.")
    validation_prompts: int = Field(48, ge=1, description="Number of prompts of each level at a validation.")
    oracle_every: int = Field(2000, ge=1, description="Number of answer tokens between the oracle's measurements.")
    stop_at: float = Field(0.9, gt=0, le=1, description="Mean success over all levels at which a rule's training ends.")
    max_tokens: int = Field(260_000, ge=1, description="Number of answer tokens at which a rule's training ends.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names) or "" in names:
            yield f"`tasks.tasks` need a name each, all different, got {', '.join(names)}"
        for task in self.tasks:
            if task.source not in BUILTIN_TASKS and not task.source.startswith(GYM) and "." not in task.source:
                yield (
                    f"`tasks.tasks` has no source '{task.source}'; use {', '.join(BUILTIN_TASKS)}, reasoning_gym:NAME "
                    "or a JSONL file"
                )
        for key, rules in (("rule", (self.rule,)), ("controls", self.controls)):
            for rule in rules:
                if rule not in TASK_RULES:
                    yield f"`tasks.{key}` must be one of {', '.join(TASK_RULES)}, got '{rule}'"
