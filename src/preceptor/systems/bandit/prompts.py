"""Prompts that name the words to choose from, and the balanced corpus on which the model is pretrained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from preceptor.systems.bandit.config import OPTIONS
from preceptor.systems.bandit.environment import Bandit


@dataclass(frozen=True)
class Prompt:
    """A question and the words that may answer it.

    Attributes:
        text: as the model reads it; the answer brings its own leading space.
        words: the options, in the order of their bandit's arms.
        order: the order in which ``text`` names them, as indices into ``words``.
        template: what ``text`` was made from; a literal prompt is its own template.
        held_out: whether the template is kept out of training.
    """

    text: str
    words: tuple[str, ...]
    order: tuple[int, ...]
    template: str
    held_out: bool = False


def choice_text(words: Sequence[str]) -> str:
    """The words as a choice.

    >>> choice_text(["rice", "bean"]), choice_text(["a", "b", "c"])
    ('rice or bean', 'a, b or c')
    """
    return f"{', '.join(words[:-1])} or {words[-1]}"


def prompts_for(words: Sequence[str], templates: Sequence[str], *, held_out: bool = False) -> list[Prompt]:
    """Each template with each rotation of ``words``, so that each word stands once at each place."""
    # Rotations and not all orders: n instead of n!, and every word still stands once at each place.
    rotations = [tuple((start + place) % len(words) for place in range(len(words))) for start in range(len(words))]
    return [
        Prompt(
            text=template.replace(OPTIONS, choice_text([words[index] for index in order])),
            words=tuple(words),
            order=order,
            template=template,
            held_out=held_out,
        )
        for template in templates
        for order in rotations
    ]


def literal_prompts(words: Sequence[str], texts: Sequence[str]) -> list[Prompt]:
    """Prompts that are given whole; their order is that in which the words first appear in the text."""
    return [
        Prompt(
            text=text,
            words=tuple(words),
            order=tuple(sorted(range(len(words)), key=lambda index: text.index(words[index]))),
            template=text,
        )
        for text in texts
    ]


def corpus(prompts: Iterable[Prompt]) -> list[str]:
    """One line for each prompt and each answer to it, so that no answer is more frequent than another.

    >>> corpus(prompts_for(["a", "b"], ["Pick {options}:"]))[:2]
    ['Pick a or b: a.', 'Pick a or b: b.']
    """
    return [f"{prompt.text} {word}." for prompt in prompts for word in prompt.words]


def crossed_pairs(bandits: Sequence[Bandit]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All pairs of a word with a word of a later bandit, as ((bandit, arm), (bandit, arm))."""
    arms = [(number, arm) for number, bandit in enumerate(bandits) for arm in range(len(bandit.words))]
    # Words of one bandit compete already; only words that never met can show that something crosses.
    return [(first, second) for first, second in combinations(arms, 2) if first[0] != second[0]]


def training_word_sets(bandits: Sequence[Bandit], *, pairs: str) -> list[tuple[str, ...]]:
    """The sets of words that share a prompt in the corpus: each bandit's own and, with ``"all"``, any two words."""
    own = [bandit.words for bandit in bandits]
    if pairs == "own":
        return own
    every = [word for bandit in bandits for word in bandit.words]
    return own + [pair for pair in combinations(every, 2) if pair not in own]
