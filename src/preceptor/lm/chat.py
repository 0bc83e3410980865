"""The turn markers of a chat template, so that an episode can grow turn by turn on a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError

from preceptor.errors import ModelError
from preceptor.lm.model import LanguageModel

_MARKS = tuple(f"\u2e28{number}\u2e29" for number in ("zero", "one", "two", "three", "four"))


@dataclass(frozen=True)
class ChatMarkers:
    """Tokens around the assistant's turns (queries) and the user's (values); empty without a chat template.

    Attributes:
        before_prompt: begins the conversation and opens the user's first turn.
        before_query: closes the user's turn and opens the assistant's.
        before_value: closes the assistant's turn and opens the user's.
    """

    before_prompt: tuple[int, ...] = ()
    before_query: tuple[int, ...] = ()
    before_value: tuple[int, ...] = ()

    @classmethod
    def of(cls, lm: LanguageModel) -> ChatMarkers:
        """The markers of ``lm``'s template, read off a rendered conversation of marked texts.

        They are those of past turns. Where a template opens the assistant's *next* turn otherwise (with an invitation
        to think), that is left out: on a KV cache a query is a past turn as soon as its value is read.

        Raises:
            ModelError: the template changes or drops the texts that it is given, or renders later turns unlike
                earlier ones.
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
        between: list[str] = []
        for mark in _MARKS:
            before, found, rendered = rendered.partition(mark)
            if not found or mark in rendered:
                raise ModelError(f"the chat template of {lm.name} does not keep its texts as they are; {remedy}")
            between.append(before)
        start, query, value, later_query, later_value = between
        if (query, value) != (later_query, later_value):
            raise ModelError(f"the chat template of {lm.name} renders later turns unlike earlier ones; {remedy}")
        return cls(*(_markers(lm, text) for text in (start, query, value)))

    def opening(self, lm: LanguageModel, text: str) -> tuple[int, ...]:
        """The first user turn holding ``text``, and the assistant's turn opened."""
        return (*self.before_prompt, *lm.encode(text), *self.before_query)


def _markers(lm: LanguageModel, text: str) -> tuple[int, ...]:
    """Control tokens spelled in a template are control tokens; a template is the model's own and is trusted."""
    return tuple(lm.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])
