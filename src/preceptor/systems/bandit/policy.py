"""The policy: a language model's probabilities over the words that a prompt names.

A word may be several tokens. Its log-probability is the sum over them, and a log-softmax over the options makes the
policy. A context is encoded once: its options follow it side by side in one row, hidden from each other by the
attention mask, and gradient flows through every token.
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
"""The words to choose from, in tokens."""


@dataclass(frozen=True)
class Context:
    """A tokenized text and the places in it where a word is chosen.

    Attributes:
        tokens: the whole text.
        choices: (place, options), where the word chosen from ``options`` follows ``tokens[:place]``.
    """

    tokens: tuple[int, ...]
    choices: tuple[tuple[int, Options], ...]

    @classmethod
    def asking(cls, tokens: Sequence[int], options: Options) -> Context:
        """A text at whose end a word is chosen."""
        return cls(tuple(tokens), ((len(tokens), options),))


class Vocabulary:
    """The words that can be chosen, each with the tokens that it has after a text, its leading space included.

    Raises:
        ConfigError: one word's tokens are a prefix of another's, so their probabilities would overlap.
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
        """The tokens of ``words``."""
        return tuple(self.tokens[word] for word in words)

    def context(self, lm: LanguageModel, prompt: Prompt) -> Context:
        """``prompt`` in tokens, after the token that begins a text."""
        return Context.asking([lm.begin_token, *lm.encode(prompt.text)], self.options(prompt.words))


@dataclass(frozen=True)
class Decision:
    """The policy at each choice of a batch, in the order of the contexts and of the places in them.

    Attributes:
        log_probs: over the options, normalised, in nats; −inf where a choice has fewer options than the widest.
        p_candidates: probability of all options together under the model's whole vocabulary, in [0, 1]; no gradient.
    """

    log_probs: Float[Tensor, "choices options"]
    p_candidates: Float[Tensor, " choices"]


def decide(lm: LanguageModel, contexts: Sequence[Context]) -> Decision:
    """The policy at each choice, in one forward pass; carries gradient unless the caller switches it off."""
    rows = [_PackedRow(context) for context in contexts]
    tokens = pad_rows([row.tokens for row in rows], filler=lm.begin_token, device=lm.device)  # [batch, time]
    time = tokens.shape[1]
    # A row of attention must not be empty, so padding attends to what is before it; nothing attends to padding.
    visible = torch.ones(time, time, dtype=torch.bool).tril().repeat(len(rows), 1, 1)  # [batch, time, time]
    positions = torch.zeros(len(rows), time, dtype=torch.long)
    num_options = max(len(options) for context in contexts for _, options in context.choices)
    # Scores are kept flat, [choices * options]: a word's cell sums over its tokens.
    entries: list[tuple[int, int, int, int]] = []  # for each token of each option: row, place, token, cell
    num_choices = 0
    for number, row in enumerate(rows):
        visible[number, : len(row.tokens), : len(row.tokens)] = row.visible
        positions[number, : len(row.tokens)] = torch.tensor(row.positions)
        entries += [
            (number, place, token, (num_choices + choice) * num_options + option)
            for choice, option, place, token in row.entries
        ]
        num_choices += len(contexts[number].choices)
    numbers, places, wanted, cells = torch.tensor(entries).T  # [entries] each
    keep = torch.zeros(tokens.shape, dtype=torch.bool)
    keep[numbers, places] = True
    # The model gives logits for kept places alone; the running count says in which row of them an entry's logits are.
    kept = keep.flatten().cumsum(0).view(keep.shape)[numbers, places] - 1
    output = lm.forward(
        tokens,
        keep=keep.to(lm.device),
        attention_mask=visible.to(lm.device),
        positions=positions.to(lm.device),
    )
    log_probs = output.logits.log_softmax(-1)[kept.to(lm.device), wanted.to(lm.device)]  # [entries]
    scores = log_probs.new_zeros(num_choices * num_options).index_add(0, cells.to(lm.device), log_probs)
    is_missing = torch.ones(num_choices * num_options, dtype=torch.bool).index_fill(0, cells, False)
    scores = scores.masked_fill(is_missing.to(lm.device), -torch.inf).view(num_choices, num_options)
    return Decision(log_probs=scores.log_softmax(-1), p_candidates=scores.detach().exp().sum(-1))


class _PackedRow:
    """One row of a batch: the text, then each option of each choice without its last token.

    An option attends to the text before its place and to itself, never to another option, and its positions count from
    its place, as if it stood in the text.

    Attributes:
        tokens, positions: of the row.
        visible: [time, time], True = the row's token attends to the column's.
        entries: (choice, option, place whose logits predict it, token) for each token of each option.
    """

    def __init__(self, context: Context) -> None:
        self.tokens = list(context.tokens)
        self.positions = list(range(len(context.tokens)))
        self.entries: list[tuple[int, int, int, int]] = []
        spans = []  # (place of the choice, first, end) of each option in the row
        for number, (place, options) in enumerate(context.choices):
            for column, option in enumerate(options):
                first = len(self.tokens)
                self.tokens += option[:-1]
                self.positions += range(place, place + len(option) - 1)
                spans.append((place, first, len(self.tokens)))
                # The text predicts the first token, the option's own tokens the following ones.
                predicting = (place - 1, *range(first, len(self.tokens)))
                self.entries += [(number, column, at, token) for at, token in zip(predicting, option, strict=True)]
        self.visible = torch.ones(len(self.tokens), len(self.tokens), dtype=torch.bool).tril()
        for place, first, end in spans:
            # An option is causal within itself and sees neither the text after its place nor earlier options.
            self.visible[first:end, place:first] = False
