"""A language model that decides by words: probabilities over the words that a prompt names.

A word may be several tokens. Its log-probability is the sum over them, and an exact log-softmax over the options makes
the policy. A context is encoded once: its options grow out of it side by side in one row, and gradient flows through
every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.lm.score import pad_rows
from preceptor.systems.bandit.prompts import Prompt

Options = tuple[tuple[int, ...], ...]
"""The words that may stand at a place, in tokens."""


@dataclass(frozen=True)
class Context:
    """A text in tokens and the places in it where a word is chosen.

    Attributes:
        tokens: the whole text.
        choices: (place, options): a word of the options follows ``tokens[:place]``.
    """

    tokens: tuple[int, ...]
    choices: tuple[tuple[int, Options], ...]

    @classmethod
    def asking(cls, tokens: Sequence[int], options: Options) -> Context:
        """A text that ends where the word is chosen."""
        return cls(tuple(tokens), ((len(tokens), options),))


class Vocabulary:
    """The closed vocabulary: every word as the tokens that it is after a text, with its leading space.

    Raises:
        ConfigError: a word's tokens begin another's, so that the model could not choose the one without the other.
    """

    def __init__(self, lm: LanguageModel, words: Iterable[str]) -> None:
        self.tokens = {word: tuple(lm.encode(f" {word}")) for word in words}
        faults = [
            f"the words '{first}' and '{second}' cannot be told apart: the tokens of '{first}' begin those of "
            f"'{second}' in the tokenizer of {lm.name}; use other words"
            for first, one in self.tokens.items()
            for second, other in self.tokens.items()
            if first != second and other[: len(one)] == one and (one != other or first < second)
        ]
        if faults:
            raise ConfigError(*faults)

    def options(self, words: Sequence[str]) -> Options:
        """Tokens of ``words``."""
        return tuple(self.tokens[word] for word in words)

    def context(self, lm: LanguageModel, prompt: Prompt) -> Context:
        """``prompt`` in tokens, behind the token that begins a text."""
        return Context.asking([lm.begin_token, *lm.encode(prompt.text)], self.options(prompt.words))


@dataclass(frozen=True)
class Decision:
    """What the model makes of every choice of a batch, in the order of the contexts and of the places in them.

    Attributes:
        log_probs: over the options, normalised, in nats; −inf where a choice has fewer options than the widest.
        mass: probability that the whole vocabulary puts on the named options together, in [0, 1].
    """

    log_probs: Float[Tensor, "choices options"]
    mass: Float[Tensor, " choices"]


def decide(lm: LanguageModel, contexts: Sequence[Context]) -> Decision:
    """The policy at every choice, in one forward pass; carries gradient unless the caller switches it off."""
    packed = [_Packed(context) for context in contexts]
    tokens = pad_rows([row.tokens for row in packed], filler=lm.begin_token, device=lm.device)
    time = tokens.shape[1]
    # What fills a row up attends to what is before it; nothing attends to the filling.
    visible = torch.ones(time, time, dtype=torch.bool).tril().repeat(len(packed), 1, 1)
    positions = torch.zeros(len(packed), time, dtype=torch.long)
    width = max(len(options) for context in contexts for _, options in context.choices)
    entries: list[tuple[int, int, int, int]] = []  # of every token of every option: row, place, token, cell
    num_choices = 0
    for number, row in enumerate(packed):
        visible[number, : len(row.tokens), : len(row.tokens)] = row.visible
        positions[number, : len(row.tokens)] = torch.tensor(row.positions)
        entries += [
            (number, at, token, (num_choices + choice) * width + column) for choice, column, at, token in row.entries
        ]
        num_choices += len(contexts[number].choices)
    numbers, places, wanted, cells = torch.tensor(entries).T
    keep = torch.zeros(tokens.shape, dtype=torch.bool)
    keep[numbers, places] = True
    kept = keep.flatten().cumsum(0).view(keep.shape)[numbers, places] - 1  # where the logits of each entry stand
    output = lm.forward(
        tokens,
        keep=keep.to(lm.device),
        attention_mask=visible.to(lm.device),
        positions=positions.to(lm.device),
    )
    log_probs = output.logits.log_softmax(-1)[kept.to(lm.device), wanted.to(lm.device)]
    scores = log_probs.new_zeros(num_choices * width).index_add(0, cells.to(lm.device), log_probs)
    missing = torch.ones(num_choices * width, dtype=torch.bool).index_fill(0, cells, False)
    scores = scores.masked_fill(missing.to(lm.device), -torch.inf).view(num_choices, width)
    return Decision(log_probs=scores.log_softmax(-1), mass=scores.detach().exp().sum(-1))


class _Packed:
    """One row: the text, then every option of every choice up to its last token.

    An option sees the text before its place and itself, never another option, and counts its positions from its place.

    Attributes:
        tokens, positions: of the row.
        visible: [time, time], True = the row's token attends to that column's.
        entries: (choice, option, place that predicts it, token) for every token of every option.
    """

    def __init__(self, context: Context) -> None:
        self.tokens = list(context.tokens)
        self.positions = list(range(len(context.tokens)))
        self.entries: list[tuple[int, int, int, int]] = []
        stretches = []
        for number, (place, options) in enumerate(context.choices):
            for column, option in enumerate(options):
                first = len(self.tokens)
                self.tokens += option[:-1]
                self.positions += range(place, place + len(option) - 1)
                stretches.append((place, first, len(self.tokens)))
                predicting = (place - 1, *range(first, len(self.tokens)))
                self.entries += [(number, column, at, token) for at, token in zip(predicting, option, strict=True)]
        self.visible = torch.ones(len(self.tokens), len(self.tokens), dtype=torch.bool).tril()
        for place, first, end in stretches:
            self.visible[first:end, place:first] = False
