"""Configuration of the bandit system. It stops at ``train.py``; everything below takes plain arguments."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from preceptor.config import option

FLAGS = {"model": "model.name", "tokenizer": "model.tokenizer", "seed": "seed"}
"""Command-line flags that stand for configuration keys."""

CHOICES = {
    "arms": {
        "learned": "the language model while REINFORCE moves it, and as it ends",
        "pretrained": "the same model before the first reward",
        "uniform": "every word alike",
        "greedy": "the best mean so far (every word once first)",
        "ucb1": "the best upper confidence bound",
        "thompson": "a draw from the posterior of every word",
        "gradient_bandit": "softmax preferences moved by their gradient, with a baseline",
        "optimum": "the word of the highest expected reward",
    },
    "rewards": {"bernoulli": "the base reward, or nothing", "gaussian": "normal around the mean of the word"},
    "baselines": {
        "none": "the raw reward (the method's text)",
        "running_mean": "minus the mean of all rewards so far",
        "bandit_mean": "minus the mean of this bandit's rewards so far",
        "leave_one_out": "minus the mean of the other rewards of the batch",
    },
}
"""What ``preceptor list`` shows."""

OPTIONS = "{options}"
"""Stands in a template for the words to choose from."""


@dataclass(frozen=True)
class BanditOptions:
    """One bandit: words, and what they pay."""

    name: str = option("", "how tables call it; empty is its words")
    words: tuple[str, ...] = option((), "the arms; a word may be several tokens")
    kind: Literal["bernoulli", "gaussian"] = option("bernoulli", "how an arm pays")
    base_reward: float = option(
        1.0, "scale of the reward: paid on a success, or times the gaussian's draw", within="(-inf, inf)"
    )
    success: tuple[float, ...] = option((), "success probability of every word (kind: bernoulli)", within="[0, 1]")
    mean: tuple[float, ...] = option((), "mean of every word, in base rewards (kind: gaussian)", within="(-inf, inf)")
    deviation: float = option(
        1.0, "standard deviation of every word, in base rewards (kind: gaussian)", within="[0, inf)"
    )
    prompts: tuple[str, ...] = option((), "prompts of its own, in words, instead of the templates")

    @property
    def label(self) -> str:
        """The name, or else the words."""
        return self.name or "/".join(self.words)

    def faults(self) -> list[str]:
        """Why this bandit cannot be played, besides numbers out of their range."""
        found = []
        if len(self.words) < 2:
            found.append(f"`words` of a bandit must be at least 2, got {len(self.words)}")
        for word, count in Counter(self.words).items():
            if count > 1:
                found.append(f"`words` of a bandit must differ, got '{word}' {count} times")
            if not word or word != word.strip():
                found.append(f"`words` must not be empty nor begin or end with a space, got '{word}'")
        pays, name = (self.success, "success") if self.kind == "bernoulli" else (self.mean, "mean")
        if len(pays) != len(self.words):
            found.append(f"`{name}` must have one number for each of {len(self.words)} words, got {len(pays)}")
        for prompt in self.prompts:
            missing = [word for word in self.words if not names(prompt, word)]
            if len(missing) == len(self.words):
                found.append(f"`prompts` must name the words of their bandit; '{prompt}' names none")
            elif missing:
                found.append(f"`prompts` must name every word that can be chosen; '{prompt}' lacks '{missing[0]}'")
        return found


@dataclass(frozen=True)
class ModelOptions:
    """The language model that decides."""

    name: str = option("", "'starter', a local folder or a hub name; empty is a GPT from random weights")
    tokenizer: str = option(
        "starter", "of a GPT from random weights: 'starter', a local folder, a hub name or 'tiktoken:NAME'"
    )
    width: int = option(192, "hidden size of the GPT", within="[1, inf)")
    num_layers: int = option(8, "layers of the GPT", within="[1, inf)")
    num_heads: int = option(8, "attention heads of the GPT", within="[1, inf)")
    dropout: float = option(0.3, "of the GPT", within="[0, 1)")
    context_length: int = option(256, "tokens of the GPT's context", within="[8, inf)")


@dataclass(frozen=True)
class PromptOptions:
    """How a choice is put into words; ``{options}`` is where the words stand."""

    templates: tuple[str, ...] = option(
        (
            "Pick {options}:",
            "Which, {options}?",
            "I choose {options}:",
            "{options}? I take",
            "Say {options}:",
            "{options}: my pick is",
        ),
        "seen in pretraining and by REINFORCE",
    )
    held_out: tuple[str, ...] = option(
        ("Choose {options}:", "{options}? Give me"),
        "kept for validation and for crossing",
    )


@dataclass(frozen=True)
class PretrainingOptions:
    """Cross-entropy on a balanced corpus, so that every named word is as likely as the others."""

    steps: int = option(800, "optimiser steps; 0 takes the model as it is", within="[0, inf)")
    batch_size: int = option(12, "windows a step", within="[1, inf)")
    window: int = option(24, "tokens of a sliding window", within="[2, inf)")
    learning_rate: float = option(4e-4, "of AdamW", within="[0, inf)")
    weight_decay: float = option(0.01, "of AdamW", within="[0, inf)")
    clip_norm: float = option(1.0, "global gradient norm", within="(0, inf]", hint=".inf clips nothing")
    pairs: Literal["all", "own"] = option("all", "which words stand together: any two, or those of one bandit")
    validate_every: int = option(100, "steps between validations on the held-out templates", within="[1, inf)")


@dataclass(frozen=True)
class UpdateOptions:
    """How REINFORCE moves the model."""

    epochs: int = option(100, "passes over the prompts of every bandit (mode: prompt)", within="[0, inf)")
    batch_size: int = option(0, "prompts of one bandit a step; 0 is all of them (mode: prompt)", within="[0, inf)")
    baseline: Literal["none", "running_mean", "bandit_mean", "leave_one_out"] = option(
        "leave_one_out", "subtracted from a reward before it teaches"
    )
    learning_rate: float = option(1e-4, "of AdamW, which starts fresh", within="[0, inf)")
    weight_decay: float = option(0.0, "of AdamW", within="[0, inf)")
    clip_norm: float = option(1.0, "global gradient norm", within="(0, inf]", hint=".inf clips nothing")
    entropy_coefficient: float = option(0.0, "bonus on the entropy over the words", within="[0, inf)")
    kl_coefficient: float = option(0.0, "KL to the pre-trained model over the words, exact", within="[0, inf)")
    dropout: bool = option(False, "whether dropout is on while acting and scoring, which are one forward pass")


@dataclass(frozen=True)
class HistoryOptions:
    """Acting on past rewards in the context, with the weights at rest (mode: history)."""

    rounds: int = option(12, "choices an episode", within="[1, inf)")
    batch_size: int = option(32, "episodes a step", within="[2, inf)")
    steps: int = option(150, "updates", within="[0, inf)")
    discount: float = option(1.0, "of later rewards in a choice's return", within="[0, 1]")
    evaluation_episodes: int = option(200, "episodes of every arm at the end", within="[2, inf)")


@dataclass(frozen=True)
class BanditConfig:
    """Configuration of ``preceptor run bandit``."""

    seed: int = option(0, "of every random stream")
    mode: Literal["prompt", "history"] = option("prompt", "what tells the words apart: the weights, or the context")
    bandits: tuple[BanditOptions, ...] = option(
        (
            BanditOptions(words=("bean", "chickpea"), base_reward=10.0, success=(0.75, 0.25)),
            BanditOptions(words=("lentil", "rice"), base_reward=1.0, success=(0.75, 0.25)),
        ),
        "what is played",
    )
    model: ModelOptions = field(default_factory=ModelOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    pretraining: PretrainingOptions = field(default_factory=PretrainingOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    history: HistoryOptions = field(default_factory=HistoryOptions)
    save_every: int = option(50, "steps between checkpoints", within="[1, inf)")

    def faults(self) -> list[str]:
        """What is at odds in this configuration, besides numbers out of their range."""
        found = []
        if self.model.num_heads > 0 and self.model.width % self.model.num_heads:
            found.append(
                f"`model.width` must be a multiple of `model.num_heads`, got {self.model.width} and "
                f"{self.model.num_heads}"
            )
        if self.pretraining.window > self.model.context_length and not self.model.name:
            found.append(
                f"`pretraining.window` must be at most `model.context_length` {self.model.context_length}, got "
                f"{self.pretraining.window}"
            )
        if self.update.batch_size == 1 and self.update.baseline == "leave_one_out":
            found.append("`update.baseline` leave_one_out needs `update.batch_size` of at least 2 (or 0), got 1")
        return found + self._faults_in_words()

    def _faults_in_words(self) -> list[str]:
        found = []
        if not self.bandits:
            found.append("`bandits` is empty; name at least one")
        owners = Counter(word for bandit in self.bandits for word in set(bandit.words))
        for word, count in owners.items():
            if count > 1:
                found.append(f"`bandits` must not share words, got '{word}' in {count} of them")
        if len({bandit.label for bandit in self.bandits}) < len(self.bandits):
            found.append("`bandits` must differ in their names")
        if not self.prompts.templates:
            found.append("`prompts.templates` is empty; give at least one with {options}")
        for template in (*self.prompts.templates, *self.prompts.held_out):
            if template.count(OPTIONS) != 1:
                found.append(
                    f"a prompt must name its options: '{template}' holds {OPTIONS} {template.count(OPTIONS)} times; "
                    "put it in once"
                )
            elif template != template.rstrip():
                found.append(f"`prompts` must not end with a space, since the word brings its own: '{template}'")
        if both := sorted(set(self.prompts.templates) & set(self.prompts.held_out)):
            found.append(f"`prompts.held_out` must not repeat a training template, got '{both[0]}'")
        return found


def names(prompt: str, word: str) -> bool:
    """Whether ``word`` stands in ``prompt`` as a word of its own.

    >>> names("rice or beans?", "rice"), names("rice or beans?", "bean")
    (True, False)
    """
    start = prompt.find(word)
    while start >= 0:
        around = prompt[start - 1 : start] + prompt[start + len(word) : start + len(word) + 1]
        if not any(character.isalnum() for character in around):
            return True
        start = prompt.find(word, start + 1)
    return False


Config = BanditConfig
