"""The markers between the turns of a chat template, so that a conversation can grow turn by turn on a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from preceptor.errors import ModelError
from preceptor.lm.model import LanguageModel

# Texts that no template contains and every one must reproduce; they stand for turns in a sample conversation.
_MARKS = tuple(f"\u2e28{number}\u2e29" for number in ("zero", "one", "two", "three", "four"))


@dataclass(frozen=True)
class ChatMarkers:
    """Tokens between the user's turns (prompt and values) and the assistant's (queries); empty without a chat template.

    Attributes:
        before_prompt: begin the conversation and open the user's first turn.
        before_query: close the user's turn and open the assistant's.
        before_value: close the assistant's turn and open the user's.
    """

    before_prompt: tuple[int, ...] = ()
    before_query: tuple[int, ...] = ()
    before_value: tuple[int, ...] = ()

    @classmethod
    def of(cls, lm: LanguageModel) -> ChatMarkers:
        """The markers of the model's chat template, taken from a rendered sample conversation.

        They are the markers of past turns. Some templates open the assistant's *next* turn differently (with a prompt
        to think), which is left out: on a KV cache a query becomes a past turn as soon as its value is read.

        Raises:
            ModelError: the template changes or drops texts, or renders later turns unlike earlier ones.
        """
        if not lm.tokenizer.chat_template:
            return cls()
        conversation = [
            {"role": "assistant" if number % 2 else "user", "content": mark} for number, mark in enumerate(_MARKS)
        ]
        remedy = "set model.use_chat_template to false"
        try:
            rendered = str(lm.tokenizer.apply_chat_template(conversation, tokenize=False))
        except TemplateError as error:
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
        return cls(*(_markers(lm, text) for text in (start, query, value)))

    def opening(self, lm: LanguageModel, text: str) -> tuple[int, ...]:
        """Tokens of a first user turn that says ``text``, up to where the assistant's turn begins."""
        return (*self.before_prompt, *lm.encode(text), *self.before_query)


def _markers(lm: LanguageModel, text: str) -> tuple[int, ...]:
    """Tokens of ``text``, in which control tokens may be spelled: unlike an article, a template is trusted."""
    return tuple(lm.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])
