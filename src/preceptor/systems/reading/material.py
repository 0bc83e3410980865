"""An article as a model reads it: token ids of keys, values and the probe, and the rows in which they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from preceptor.errors import DataError
from preceptor.lm.chat import ChatMarkers
from preceptor.lm.model import LanguageModel

Kind = Literal["prompt", "query", "value", "probe"]


@dataclass(frozen=True)
class Reading:
    """What can be read of one article, as text.

    Attributes:
        name: of the article, unique within a run.
        title: what a prompt calls it.
        keys: the text by which a pair is found.
        values: the text that is read when its pair is chosen.
        probe: held-out text that is never read, only scored; empty if there is none.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    probe: str = ""

    @property
    def num_pairs(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``end`` (exclusive) of a row; ``pair`` is the value's index, or −1."""

    kind: Kind
    start: int
    end: int
    pair: int = -1


@dataclass(frozen=True)
class Row:
    """Tokens that one model sees in one pass, with what they are."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]

    def stretches(self, *kinds: Kind) -> list[tuple[int, int]]:
        """``(start, end)`` of the spans of these kinds, in order."""
        return [(span.start, span.end) for span in self.spans if span.kind in kinds]


@dataclass(frozen=True)
class Material:
    """A :class:`Reading` in the tokens of one model.

    Attributes:
        reading: the text.
        keys, values: token ids of each pair's key and value.
        probe: token ids of the held-out text.
        prompt: token ids that the policy reads first.
        chat_markers: tokens around queries and values (empty without a chat template).
    """

    reading: Reading
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]
    probe: tuple[int, ...]
    prompt: tuple[int, ...]
    begin: int
    chat_markers: ChatMarkers = field(default_factory=ChatMarkers)

    def query_row(self, order: Sequence[int], queries: Sequence[Sequence[int]], *, with_probe: bool = False) -> Row:
        """Prompt, then each step's query and value (what the policy sees), then the probe if it is wanted."""
        builder = _RowBuilder("prompt", self.prompt)
        for step, (pair, query) in enumerate(zip(order, queries, strict=True)):
            if step:
                builder.add("prompt", self.chat_markers.before_query)
            builder.add("query", query)
            builder.add("prompt", self.chat_markers.before_value)
            builder.add("value", self.values[pair], pair)
        if with_probe:
            builder.add("probe", self.probe)
        return builder.row()

    def value_row(self, order: Sequence[int], *, with_probe: bool = False) -> Row:
        """The begin token and the values alone, then the probe if it is wanted."""
        builder = _RowBuilder("prompt", (self.begin,))
        for pair in order:
            builder.add("value", self.values[pair], pair)
        if with_probe:
            builder.add("probe", self.probe)
        return builder.row()


class _RowBuilder:
    def __init__(self, kind: Kind, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._spans: list[Span] = []
        self.add(kind, tokens)

    def add(self, kind: Kind, tokens: Sequence[int], pair: int = -1) -> None:
        # A query may be nothing in another vocabulary than that it was written in; its place is kept.
        if tokens or kind == "query":
            start = len(self._tokens)
            self._tokens += tokens
            self._spans.append(Span(kind, start, len(self._tokens), pair))

    def row(self) -> Row:
        return Row(tuple(self._tokens), tuple(self._spans))


def encode_reading(reading: Reading, lm: LanguageModel, *, prompt: str, use_chat_template: bool) -> Material:
    """``reading`` in the tokens of ``lm``. A value is preceded by a space, as a sentence is in running text.

    Raises:
        DataError: a key or value that encodes to no token.
    """
    keys = tuple(tuple(lm.encode(key)) for key in reading.keys)
    values = tuple(tuple(lm.encode(" " + value)) for value in reading.values)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        if not key or not value:
            raise DataError(f"pair {index} of {reading.name} has no tokens for {lm.name}; remove the sentence")
    text = prompt.replace("{title}", reading.title)
    chat_markers = ChatMarkers.of(lm) if use_chat_template and lm.tokenizer.chat_template else None
    return Material(
        reading=reading,
        keys=keys,
        values=values,
        probe=tuple(lm.encode(" " + reading.probe)) if reading.probe else (),
        prompt=(lm.begin_token, *lm.encode(text)) if chat_markers is None else chat_markers.opening(lm, text),
        begin=lm.begin_token,
        chat_markers=chat_markers or ChatMarkers(),
    )
