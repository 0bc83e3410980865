"""The markers between the turns of a chat template, so that a conversation can grow turn by turn on a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from preceptor.errors import ModelError
from preceptor.lm.model import LanguageModel

# Texts that no template contains and every one must reproduce; they stand for turns in a sample conversation.
_MARKS = tuple(f"\u2e28{number}\u2e29" for number in ("zero", "one", "two", "three", "four"))

RenderedMarkers: TypeAlias = tuple[str, str, str]
"""Texts of a chat template before the first user turn, before a query and before a value."""


@dataclass(frozen=True)
class ChatMarkers:
    """Tokens between the user's turns (prompt and values) and the assistant's (queries); empty without a chat template.

    Attributes:
        before_prompt: begin the conversation and open the user's first turn.
        before_query: close the user's turn and open the assistant's.
        before_value: close the assistant's turn and open the user's.
        texts: the three as text, as they were rendered; None without a template.
    """

    before_prompt: tuple[int, ...] = ()
    before_query: tuple[int, ...] = ()
    before_value: tuple[int, ...] = ()
    texts: RenderedMarkers | None = None

    @classmethod
    def of(cls, lm: LanguageModel) -> ChatMarkers:
        """The markers of the model's chat template, taken from a rendered sample conversation.

        They are the markers of past turns. Some templates open the assistant's *next* turn differently (with a prompt
        to think), which is left out: on a KV cache a query becomes a past turn as soon as its value is read.

        Raises:
            ModelError: the template changes or drops texts, or renders later turns unlike earlier ones.
        """
        return cls.rendered(lm, texts) if (texts := rendered_markers(lm)) else cls()

    @classmethod
    def rendered(cls, lm: LanguageModel, texts: RenderedMarkers) -> ChatMarkers:
        """The markers whose texts :func:`rendered_markers` gave, perhaps on another day."""
        before_prompt, before_query, before_value = (_markers(lm, text) for text in texts)
        return cls(before_prompt, before_query, before_value, texts)

    def opening(self, lm: LanguageModel, text: str) -> tuple[int, ...]:
        """Tokens of a first user turn that says ``text``, up to where the assistant's turn begins."""
        before = self.texts[0] if self.texts else ""
        return (*self.before_prompt, *_following(lm, before, text), *self.before_query)

    def value(self, lm: LanguageModel, text: str) -> tuple[int, ...]:
        """Tokens of a later user turn that says ``text``, without its markers; without a template after a space."""
        return _following(lm, self.texts[2], text) if self.texts else tuple(lm.encode(" " + text))


def rendered_markers(lm: LanguageModel) -> RenderedMarkers | None:
    """The markers as text, or None without a template.

    A template may read the clock, so a run keeps what was rendered at its start.

    Raises:
        ModelError: as :meth:`ChatMarkers.of`.
    """
    if not lm.tokenizer.chat_template:
        return None
    conversation = [
        {"role": "assistant" if number % 2 else "user", "content": mark} for number, mark in enumerate(_MARKS)
    ]
    remedy = "set model.use_chat_template to false"
    try:
        rendered = str(lm.tokenizer.apply_chat_template(conversation, tokenize=False))
    except Exception as error:  # a template is a program, which fails in whatever way it likes
        raise ModelError(f"the chat template of {lm.name} fails ({error}); {remedy}") from error
    between: list[str] = []  # the template's own text before each turn
    for mark in _MARKS:
        before, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise ModelError(f"the chat template of {lm.name} does not keep its texts as they are; {remedy}")
        between.append(before)
    # Turns alternate user, assistant, user, …, so the texts before them open a query and a value in turn.
    start, query, value, later_query, later_value = between
    if (query, value) != (later_query, later_value):
        raise ModelError(f"the chat template of {lm.name} renders later turns unlike earlier ones; {remedy}")
    return start, query, value


def _markers(lm: LanguageModel, text: str) -> tuple[int, ...]:
    """Tokens of ``text``, in which control tokens may be spelled: unlike an article, a template is trusted."""
    return tuple(lm.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def _following(lm: LanguageModel, before: str, text: str) -> tuple[int, ...]:
    """Tokens of ``text`` where it follows ``before`` directly.

    A tokenizer that puts a space in front of every text would put one between a marker and the turn that it opens.
    """
    anchor = before[-1:]
    alone, both = lm.encode(anchor), lm.encode(anchor + text)
    # Where text and marker would share a token there is no boundary to cut at, and the text stands alone.
    return tuple(both[len(alone) :]) if anchor.strip(" ") and both[: len(alone)] == alone else tuple(lm.encode(text))
