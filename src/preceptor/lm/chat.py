"""The turn markers of a chat template, so that an episode can grow turn by turn on a kept cache."""

from __future__ import annotations

from dataclasses import dataclass

from preceptor.errors import ModelError
from preceptor.lm.language_model import LanguageModel

_MARKS = ("\u2e28zero\u2e29", "\u2e28one\u2e29", "\u2e28two\u2e29")


@dataclass(frozen=True)
class Turns:
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
    def of(cls, lm: LanguageModel) -> Turns:
        """The markers of ``lm``'s template, read off a rendered conversation of marked texts.

        Raises:
            ModelError: the template changes or drops the texts that it is given.
        """
        zero, one, two = _MARKS
        conversation = [
            {"role": "user", "content": zero},
            {"role": "assistant", "content": one},
            {"role": "user", "content": two},
        ]
        rendered = str(lm.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        if any(rendered.count(mark) != 1 for mark in _MARKS):
            raise ModelError(
                f"the chat template of {lm.name} does not keep its texts; set model.use_chat_template to false"
            )
        start, rest = rendered.split(zero)
        between, rest = rest.split(one)
        after, end = rest.split(two)
        # ``end`` closes the user's turn and opens the assistant's as every later step needs it; ``between`` does so for
        # the first, and some templates differ there.
        return cls(_markers(lm, start), _markers(lm, end), _markers(lm, after)) if between else cls()

    def opening(self, lm: LanguageModel, text: str) -> tuple[int, ...]:
        """The first user turn holding ``text``, and the assistant's turn opened."""
        return (*self.before_prompt, *lm.encode(text), *self.before_query)


def _markers(lm: LanguageModel, text: str) -> tuple[int, ...]:
    """Control tokens spelled in a template are control tokens; a template is the model's own and is trusted."""
    return tuple(lm.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])
