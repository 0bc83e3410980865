"""Configuration of the bandit system."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from preceptor.config import Options

FLAGS = {"model": "model.name", "tokenizer": "model.tokenizer", "seed": "seed"}
"""Command-line flags that stand for configuration keys."""

CHOICES = {
    "arms": {
        "learned": "the language model while rewards move it, and as it ends",
        "pretrained": "the same model before the first reward",
        "uniform": "every word alike",
        "greedy": "the best mean so far (every word once first)",
        "epsilon_greedy": "greedy, but any word in a twentieth of the pulls (mode: in-context)",
        "ucb1": "the best upper confidence bound",
        "ucb1_tuned": "the same with the constant 0.3 instead of √2 (mode: in-context)",
        "thompson": "a draw from the posterior of every word",
        "gradient_bandit": "softmax preferences moved by their gradient, with a baseline",
        "optimum": "the word of the highest expected reward",
        "optimal": "the Bayes-optimal player of two Bernoulli arms, by dynamic programming (mode: in-context)",
        "warm_start": "the model when its warm start ends (mode: in-context)",
        "untrained": "the model before any update (mode: in-context)",
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


class BanditOptions(Options):
    """One bandit: words, and what they pay."""

    name: str = Field("", description="Name in tables; empty is the words themselves.")
    words: tuple[str, ...] = Field((), description="The arms; a word may be several tokens.")
    kind: Literal["bernoulli", "gaussian"] = Field("bernoulli", description="Distribution of an arm's reward.")
    base_reward: float = Field(
        1.0, description="Scale of the reward: what a success pays, or the factor of a Gaussian draw."
    )
    success: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (), description="Success probability of each word (kind: bernoulli)."
    )
    mean: tuple[float, ...] = Field((), description="Mean reward of each word in base rewards (kind: gaussian).")
    deviation: float = Field(
        1.0, ge=0, description="Standard deviation of every word's reward in base rewards (kind: gaussian)."
    )
    prompts: tuple[str, ...] = Field((), description="Prompts that name the words, used instead of the templates.")

    @property
    def label(self) -> str:
        """The name, or else the words."""
        return self.name or "/".join(self.words)

    def conflicts(self) -> Iterator[str]:
        """Why this bandit cannot be played."""
        if len(self.words) < 2:
            yield f"`words` of a bandit must be at least 2, got {len(self.words)}"
        for word, count in Counter(self.words).items():
            if count > 1:
                yield f"`words` of a bandit must differ, got '{word}' {count} times"
            if not word or word != word.strip():
                yield f"`words` must not be empty nor begin or end with a space, got '{word}'"
        pays, name = (self.success, "success") if self.kind == "bernoulli" else (self.mean, "mean")
        if len(pays) != len(self.words):
            yield f"`{name}` must have one number for each of {len(self.words)} words, got {len(pays)}"
        for prompt in self.prompts:
            missing = [word for word in self.words if not names(prompt, word)]
            if len(missing) == len(self.words):
                yield f"`prompts` must name the words of their bandit; '{prompt}' names none"
            elif missing:
                yield f"`prompts` must name every word that can be chosen; '{prompt}' lacks '{missing[0]}'"


class ModelOptions(Options):
    """The language model that decides."""

    name: str = Field(
        "", description="'starter', a local folder or a hub name; empty is a GPT initialised with random weights."
    )
    tokenizer: str = Field(
        "starter", description="Tokenizer of that GPT: 'starter', a local folder, a hub name or 'tiktoken:NAME'."
    )
    width: int = Field(192, ge=1, description="Hidden size of the GPT.")
    num_layers: int = Field(8, ge=1, description="Number of layers of the GPT.")
    num_heads: int = Field(8, ge=1, description="Number of attention heads of the GPT.")
    dropout: float = Field(0.3, ge=0, lt=1, description="Dropout probability of the GPT.")
    context_length: int = Field(256, ge=8, description="Context length of the GPT in tokens.")


class PromptOptions(Options):
    """How a choice is put into words; ``{options}`` is where the words stand."""

    templates: tuple[str, ...] = Field(
        (
            "Pick {options}:",
            "Which, {options}?",
            "I choose {options}:",
            "{options}? I take",
            "Say {options}:",
            "{options}: my pick is",
        ),
        description="Templates that pretraining and REINFORCE use.",
    )
    held_out: tuple[str, ...] = Field(
        ("Choose {options}:", "{options}? Give me"),
        description="Templates kept for validation and for measuring transfer.",
    )


class PretrainingOptions(Options):
    """Cross-entropy on a balanced corpus, so that every named word is as likely as the others."""

    steps: int = Field(800, ge=0, description="Number of optimizer steps; 0 takes the model as it is.")
    batch_size: int = Field(12, ge=1, description="Number of windows per step.")
    window: int = Field(24, ge=2, description="Length of a sliding window in tokens.")
    learning_rate: float = Field(4e-4, ge=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Maximum global gradient norm; .inf clips nothing."
    )
    pairs: Literal["all", "own"] = Field(
        "all", description="Which words appear together in a text: any two, or only those of one bandit."
    )
    validate_every: int = Field(100, ge=1, description="Number of steps between validations on held-out templates.")


class UpdateOptions(Options):
    """How REINFORCE moves the model."""

    epochs: int = Field(100, ge=0, description="Number of passes over the prompts of every bandit (mode: prompt).")
    batch_size: int = Field(
        0, ge=0, description="Number of prompts of one bandit per step; 0 uses all of them (mode: prompt)."
    )
    baseline: Literal["none", "running_mean", "bandit_mean", "leave_one_out"] = Field(
        "leave_one_out", description="What is subtracted from a reward to reduce variance."
    )
    learning_rate: float = Field(1e-4, ge=0, description="Learning rate of AdamW, which starts afresh here.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Maximum global gradient norm; .inf clips nothing."
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="Weight of the entropy bonus over the words.")
    kl_coefficient: float = Field(
        0.0, ge=0, description="Weight of the exact KL to the pretrained model over the words, in nats."
    )
    dropout: bool = Field(False, description="Keep dropout on while acting and scoring, which are one forward pass.")


class HistoryOptions(Options):
    """Acting on past rewards in the context, with fixed weights (mode: history)."""

    rounds: int = Field(12, ge=1, description="Number of choices per episode.")
    batch_size: int = Field(32, ge=2, description="Number of episodes per step.")
    steps: int = Field(150, ge=0, description="Number of updates.")
    discount: float = Field(1.0, ge=0, le=1, description="Discount of later rewards in a choice's return.")
    evaluation_episodes: int = Field(200, ge=2, description="Number of episodes of every baseline at the end.")


def _pool(letters: str) -> tuple[str, ...]:
    """Words of a consonant, a vowel and a consonant, which mean nothing."""
    return tuple(f"{first}{vowel}{last}" for first in letters for vowel in "aeiou" for last in "lnr" if first != last)


class InContextOptions(Options):
    """Learning to explore bandits that were never seen, from the rewards in the context (mode: in-context)."""

    text: Literal["tokens", "words"] = Field(
        "tokens",
        description="A round is one token for arm and reward together, or a word drawn afresh for the episode and a "
        "reward.",
    )
    num_arms: int = Field(2, ge=2, le=5, description="Number of arms of every bandit.")
    kind: Literal["bernoulli", "gaussian"] = Field("bernoulli", description="Distribution of an arm's reward.")
    prior: Literal["uniform", "low", "three_in_four", "close", "certain", "normal"] = Field(
        "uniform",
        description="Prior of the means: uniform, Beta(2, 8), dealt 3/4 and 1/4, dealt 0.6 and 0.4, dealt 1 and 0; "
        "normal is for gaussian rewards.",
    )
    rounds: int = Field(100, ge=2, description="Number of rounds of an episode.")
    words: tuple[str, ...] = Field(_pool("bdfg")[:64], description="Words that are dealt in training (text: words).")
    held_out_words: tuple[str, ...] = Field(
        _pool("kmpt")[:16], description="Words that are dealt in evaluation alone (text: words)."
    )
    fresh_words: bool = Field(
        True,
        description="Draw the words' vectors anew for every update of a model from random weights, so that words it "
        "was never dealt are like the others (text: words).",
    )
    template: str = Field(
        "{options}", description="How an episode begins; {options} is where the words stand, each after its number."
    )
    warm_start: Literal["none", "best_arm", "thompson"] = Field(
        "none",
        description="Supervised start: nothing, labels of the best arm, or these until rewards are as uncertain as in "
        "the prior and then Thompson sampling's choices.",
    )
    warm_steps: int = Field(0, ge=0, description="Number of updates of the warm start.")
    warm_learning_rate: float = Field(3e-3, ge=0, description="Learning rate of the warm start.")
    warm_pace: float = Field(
        0.005,
        gt=0,
        le=1,
        description="How much harder the warm start may get in one update, as a share of the way from nearly certain "
        "rewards and 4 rounds to the prior and all rounds.",
    )
    algorithm: Literal["ppo", "reinforce"] = Field("ppo", description="How rewards move the model.")
    steps: int = Field(60, ge=0, description="Number of batches of episodes that the model plays and learns from.")
    batch_size: int = Field(192, ge=4, description="Number of episodes of a batch; more while they are short.")
    epochs: int = Field(3, ge=1, description="Number of passes over a batch (algorithm: ppo).")
    minibatches: int = Field(3, ge=1, description="Number of updates in a pass over a batch.")
    learning_rate: float = Field(2e-3, ge=0, description="Largest learning rate of AdamW.")
    first_rounds: int = Field(15, ge=2, description="Number of rounds of the first episodes.")
    ramp: float = Field(0.5, ge=0, le=1, description="Share of the steps in which episodes grow to `rounds`.")
    entropy_coefficient: float = Field(0.02, ge=0, description="Weight of the entropy bonus; 0 after 4/5 of the steps.")
    discount: float = Field(1.0, ge=0, le=1, description="Discount of later rewards, per round.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of the advantage estimates (algorithm: ppo).")
    clip_epsilon: float = Field(0.2, gt=0, lt=1, description="How far a probability ratio may move (algorithm: ppo).")
    reward_coefficient: float = Field(
        0.2, ge=0, description="Weight of the cross-entropy of reward tokens, which keeps words bound to rewards."
    )
    clip_norm: float = Field(0.5, gt=0, description="Maximum global gradient norm.")
    shuffle_rewards: bool = Field(
        False, description="A control: each episode shows the rewards of another bandit, which say nothing."
    )
    evaluation_bandits: int = Field(2000, ge=40, description="Number of unseen bandits, in twenty blocks.")
    horizons: tuple[int, ...] = Field((1, 2, 6), description="Horizons of the evaluation, in multiples of `rounds`.")

    def conflicts(self) -> Iterator[str]:
        """Why these bandits cannot be played."""
        if (self.prior == "normal") != (self.kind == "gaussian"):
            yield f"`prior` normal is for `kind` gaussian and no other, got {self.prior} with {self.kind}"
        if self.text == "words":
            for name, words in (("words", self.words), ("held_out_words", self.held_out_words)):
                if len(words) < self.num_arms:
                    yield f"`{name}` must hold one for each of {self.num_arms} arms, got {len(words)}"
            if both := sorted(set(self.words) & set(self.held_out_words)):
                yield f"`held_out_words` must not be dealt in training, got '{both[0]}' in `words` too"
            if self.template.count(OPTIONS) != 1:
                yield f"`template` must hold {OPTIONS} once, got '{self.template}'"
        if self.warm_steps and self.warm_start == "none":
            yield f"`warm_steps` needs a `warm_start`, got {self.warm_steps} with none"
        if self.first_rounds > self.rounds:
            yield f"`first_rounds` must be at most `rounds` {self.rounds}, got {self.first_rounds}"


class BanditConfig(Options):
    """Configuration of ``preceptor run bandit``."""

    seed: int = Field(0, description="Seed of every random stream.")
    mode: Literal["prompt", "history", "in-context"] = Field(
        "prompt",
        description="Learn which words pay in the weights, find it out from rewards in the context, or learn to "
        "explore bandits never seen.",
    )
    bandits: tuple[BanditOptions, ...] = Field(
        (
            BanditOptions(words=("bean", "chickpea"), base_reward=10.0, success=(0.75, 0.25)),
            BanditOptions(words=("lentil", "rice"), base_reward=1.0, success=(0.75, 0.25)),
        ),
        description="The bandits that are played.",
    )
    model: ModelOptions = ModelOptions()
    prompts: PromptOptions = PromptOptions()
    pretraining: PretrainingOptions = PretrainingOptions()
    update: UpdateOptions = UpdateOptions()
    history: HistoryOptions = HistoryOptions()
    in_context: InContextOptions = InContextOptions()
    save_every: int = Field(50, ge=1, description="Number of steps between checkpoints.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if self.model.width % self.model.num_heads:
            yield (
                f"`model.width` must be a multiple of `model.num_heads`, got {self.model.width} and "
                f"{self.model.num_heads}"
            )
        if self.pretraining.window > self.model.context_length and not self.model.name:
            yield (
                f"`pretraining.window` must be at most `model.context_length` {self.model.context_length}, got "
                f"{self.pretraining.window}"
            )
        if self.update.batch_size == 1 and self.update.baseline == "leave_one_out":
            yield "`update.baseline` leave_one_out needs `update.batch_size` of at least 2 (or 0), got 1"
        yield from self._conflicts_in_words()

    def _conflicts_in_words(self) -> Iterator[str]:
        if not self.bandits:
            yield "`bandits` is empty; name at least one"
        owners = Counter(word for bandit in self.bandits for word in set(bandit.words))
        for word, count in owners.items():
            if count > 1:
                yield f"`bandits` must not share words, got '{word}' in {count} of them"
        if len({bandit.label for bandit in self.bandits}) < len(self.bandits):
            yield "`bandits` must differ in their names"
        if not self.prompts.templates:
            yield "`prompts.templates` is empty; give at least one with {options}"
        for template in (*self.prompts.templates, *self.prompts.held_out):
            if template.count(OPTIONS) != 1:
                yield (
                    f"a prompt must name its options: '{template}' holds {OPTIONS} {template.count(OPTIONS)} times; "
                    "put it in once"
                )
            elif template != template.rstrip():
                yield f"`prompts` must not end with a space, since the word brings its own: '{template}'"
        if both := sorted(set(self.prompts.templates) & set(self.prompts.held_out)):
            yield f"`prompts.held_out` must not repeat a training template, got '{both[0]}'"


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
