"""Articles as a run uses them: pairs to read and a held-out probe, as text and as the token sequences of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from preceptor.data.articles.article import Article, article_folder, read_article, read_file
from preceptor.data.articles.pairs import Pair, chunk_pairs, other_language, sentence_pairs
from preceptor.errors import DataError
from preceptor.lm.chat import ChatMarkers, RenderedMarkers
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.config import DataOptions

Kind = Literal["prompt", "query", "value", "probe"]


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArticlePairs:
    """The text of one article, cut into pairs of a key and a value.

    Attributes:
        name: unique within a run.
        title: fills ``{title}`` in the prompt.
        keys: text by which a pair is chosen.
        values: text that is read once its pair is chosen.
        probe: held-out text that is never read, only scored; empty if there is none.
        remarks: what to tell about how the text was cut: sentences left out by reason, another language.
    """

    name: str
    title: str
    keys: tuple[str, ...]
    values: tuple[str, ...]
    probe: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def num_pairs(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Articles:
    """The articles of a run: those trained on, and those that are only evaluated."""

    train: tuple[ArticlePairs, ...]
    held_out: tuple[ArticlePairs, ...]


def load_articles(options: DataOptions, lm: LanguageModel, *, cache_dir: Path) -> Articles:
    """Every article that ``options`` names, cut into pairs.

    Raises:
        DataError: an article is missing, too short, or both trained on and held out.
    """
    if options.train_articles:
        train = [read_file(path) for path in article_folder(Path(options.train_articles))]
    elif options.article:
        train = [read_article(options.article, cache_dir=cache_dir, language=options.language)]
    else:
        train = [bundled_article()]
    held_out = (
        [read_file(path) for path in article_folder(Path(options.eval_articles))] if options.eval_articles else []
    )
    # By content, not by name: the same text under two titles is still one article.
    titles = {article.sha256: article.title for article in train}
    for article in held_out:
        if article.sha256 in titles:
            raise DataError(
                f"'{article.title}' is among the training articles as '{titles[article.sha256]}'; a held-out article "
                "must not be trained on, so remove it from one of the two folders"
            )
    pairs: dict[str, ArticlePairs] = {}
    for article in (*train, *held_out):
        # Everything is looked up by name, so two articles of one title must not share it.
        name, number = article.title, 2
        while name in pairs:
            name, number = f"{article.title} ({number})", number + 1
        pairs[name] = select_pairs(article, options, lm, name=name)
    in_order = tuple(pairs.values())
    return Articles(train=in_order[: len(train)], held_out=in_order[len(train) :])


def bundled_article() -> Article:
    """The article that ships with the package."""
    with resources.as_file(resources.files("preceptor") / "starter" / "article.md") as path:
        return read_file(path)


def select_pairs(article: Article, options: DataOptions, lm: LanguageModel, *, name: str) -> ArticlePairs:
    """``num_pairs`` pairs and ``num_probes`` probe sentences, both spread evenly over the article and disjoint.

    Pairs whose value has more than ``max_value_tokens`` tokens are left out, except that the three shortest always
    stay. A short article gives what it has: a third of its pairs (at most ``num_probes``) as probes, the others to
    read.

    Raises:
        DataError: fewer than two pairs are left to read.
    """
    left_out: Counter[str] = Counter()
    candidates = _cut(article, options, lm, left_out)
    # Tokens of each value; a key without tokens cannot be embedded.
    lengths = {pair.index: len(lm.encode(" " + pair.value)) for pair in candidates if lm.encode(pair.key)}
    shortest = sorted((index for index, length in lengths.items() if length), key=lengths.__getitem__)[:3]
    usable = [
        pair
        for pair in candidates
        if 0 < lengths.get(pair.index, 0) <= options.max_value_tokens or pair.index in shortest
    ]
    too_long = f"in a pair whose value has more than {options.max_value_tokens} tokens"
    left_out[too_long] += 2 * sum(lengths.get(pair.index, 0) > 0 for pair in candidates if pair not in usable)
    # Too short an article gives up probes first, down to a third of it, and then pairs.
    num_probes = options.num_probes
    if len(usable) < (options.num_pairs or 2) + num_probes:
        num_probes = min(num_probes, len(usable) // 3)
    num_pairs = min(options.num_pairs or len(usable), len(usable) - num_probes)
    if num_pairs < 2:
        raise DataError(
            f"'{name}' has {len(usable)} usable pairs, and at least 2 are to be read; take a longer article"
        )
    # Places of the pairs that are used, and among those the places of the probes.
    places = evenly_spread(len(usable), num_pairs + num_probes)
    probe_places = {places[index] for index in evenly_spread(len(places), num_probes)}
    selected = [usable[place] for place in places if place not in probe_places]
    return ArticlePairs(
        name=name,
        title=article.title,
        keys=tuple(pair.key for pair in selected),
        values=tuple(pair.value for pair in selected),
        probe=" ".join(usable[place].value for place in sorted(probe_places)),
        remarks=tuple(_remarks(article, options, +left_out)),
    )


def _remarks(article: Article, options: DataOptions, left_out: Counter[str]) -> Iterator[str]:
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        yield f"{left_out.total()} sentences of '{article.title}' cannot be read: {reasons}"
    if options.pairing == "sentences" and (other := other_language(article.text, options.language)):
        yield (
            f"'{article.title}' reads like '{other}', and its sentences are split as '{options.language}'; "
            f"set data.language={other}"
        )


def evenly_spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places: place i is the middle of the i-th of ``count`` equal parts.

    >>> evenly_spread(10, 3)
    [1, 5, 8]
    """
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _cut(article: Article, options: DataOptions, lm: LanguageModel, left_out: Counter[str]) -> list[Pair]:
    if options.pairing == "sentences":
        return sentence_pairs(article.text, language=options.language, left_out=left_out)
    # Chunks are cut in tokens and go back to text, since the reader may have another vocabulary.
    chunks = chunk_pairs(lm.encode(article.text), key_tokens=options.key_tokens, value_tokens=options.value_tokens)
    return [Pair(index, lm.decode(key), lm.decode(value).strip()) for index, (key, value) in enumerate(chunks)]


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Tokens ``start`` to ``end`` (exclusive) of a sequence; ``pair`` is the value's index, or −1."""

    kind: Kind
    start: int
    end: int
    pair: int = -1


@dataclass(frozen=True)
class TokenSequence:
    """Token ids that a model sees in one pass, and the spans they consist of."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]

    def ranges(self, *kinds: Kind) -> list[tuple[int, int]]:
        """``(start, end)`` of the spans of these kinds, in order."""
        return [(span.start, span.end) for span in self.spans if span.kind in kinds]


@dataclass(frozen=True)
class TokenizedArticle:
    """An article in the tokens of one model.

    Attributes:
        pairs: the text.
        keys, values: token ids of each pair's key and value.
        probe: token ids of the held-out text.
        prompt: token ids that the policy reads first.
        begin_token: starts the reader's sequence.
        chat_markers: tokens around queries and values (empty without a chat template).
        chat_turns: token ids of each value as a turn of the chat template; empty without one.
    """

    pairs: ArticlePairs
    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]
    probe: tuple[int, ...]
    prompt: tuple[int, ...]
    begin_token: int
    chat_markers: ChatMarkers = field(default_factory=ChatMarkers)
    chat_turns: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> str:
        return self.pairs.name

    @property
    def num_pairs(self) -> int:
        return len(self.keys)

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of each value where the policy reads it; the reader alone reads ``values``."""
        return self.chat_turns or self.values

    def policy_sequence(
        self, order: Sequence[int], queries: Sequence[Sequence[int]], *, with_probe: bool = False
    ) -> TokenSequence:
        """What the policy sees: the prompt, then each step's query and value, then the probe if it is wanted."""
        pieces: list[tuple[Kind, Sequence[int], int]] = [("prompt", self.prompt, -1)]
        for step, (pair, query) in enumerate(zip(order, queries, strict=True)):
            # The prompt itself ends with the markers that open the first query.
            pieces += [("prompt", self.chat_markers.before_query, -1)] if step else []
            pieces += [("query", query, -1), ("prompt", self.chat_markers.before_value, -1)]
            pieces += [("value", self.turns[pair], pair)]
        return _sequence([*pieces, ("probe", self.probe if with_probe else (), -1)])

    def reader_sequence(self, order: Sequence[int], *, with_probe: bool = False) -> TokenSequence:
        """The begin token and the values alone, then the probe if it is wanted."""
        values: list[tuple[Kind, Sequence[int], int]] = [("value", self.values[pair], pair) for pair in order]
        return _sequence(
            [("prompt", (self.begin_token,), -1), *values, ("probe", self.probe if with_probe else (), -1)]
        )


def _sequence(pieces: Iterable[tuple[Kind, Sequence[int], int]]) -> TokenSequence:
    tokens: list[int] = []
    spans: list[Span] = []
    for kind, piece, pair in pieces:
        # A query may have no tokens in another model's vocabulary; its place is kept all the same.
        if piece or kind == "query":
            spans.append(Span(kind, len(tokens), len(tokens) + len(piece), pair))
            tokens += piece
    return TokenSequence(tuple(tokens), tuple(spans))


def tokenize_article(
    pairs: ArticlePairs,
    lm: LanguageModel,
    *,
    prompt: str,
    use_chat_template: bool,
    rendered: RenderedMarkers | None = None,
) -> TokenizedArticle:
    """``pairs`` in the tokens of ``lm``. A value is preceded by a space, as a sentence is in running text.

    Args:
        pairs: the text.
        lm: whose tokens.
        prompt: with ``{title}`` for the article's.
        use_chat_template: mark turns where the tokenizer has a template.
        rendered: what that template gave when the run began; None renders it now.

    Raises:
        DataError: a key or value has no tokens.
    """
    keys = tuple(tuple(lm.encode(key)) for key in pairs.keys)
    values = tuple(tuple(lm.encode(" " + value)) for value in pairs.values)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        if not key or not value:
            raise DataError(f"pair {index} of {pairs.name} has no tokens for {lm.name}; remove the sentence")
    text = prompt.replace("{title}", pairs.title)  # once, so that a title that spells {title} stays as it is
    # Without a template the prompt is plain text, and queries and values follow one another.
    markers = None
    if use_chat_template and lm.tokenizer.chat_template:
        markers = ChatMarkers.rendered(lm, rendered) if rendered else ChatMarkers.of(lm)
    return TokenizedArticle(
        pairs=pairs,
        keys=keys,
        values=values,
        probe=tuple(lm.encode(" " + pairs.probe)) if pairs.probe else (),
        prompt=(lm.begin_token, *lm.encode(text)) if markers is None else markers.opening(lm, text),
        begin_token=lm.begin_token,
        chat_markers=markers or ChatMarkers(),
        chat_turns=() if markers is None else tuple(markers.value(lm, value) for value in pairs.values),
    )
