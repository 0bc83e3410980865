"""From the configuration's articles to readings: pairs spread over each article, and its held-out probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from preceptor.data.articles.article import Article, article_folder, read_article, read_file
from preceptor.data.articles.pairs import Pair, chunk_pairs, sentence_pairs
from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.config import DataOptions
from preceptor.systems.reading.material import Reading


@dataclass(frozen=True)
class Readings:
    """The articles of a run: those that teach and those that only judge."""

    train: tuple[Reading, ...]
    held_out: tuple[Reading, ...]


def load_readings(options: DataOptions, lm: LanguageModel, *, cache_dir: Path) -> Readings:
    """Every article that ``options`` names, cut into pairs.

    Raises:
        DataError: an article that is missing, too short, or in both folders.
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
    texts = {article.sha256: article.title for article in train}
    for article in held_out:
        if article.sha256 in texts:
            raise DataError(
                f"'{article.title}' is among the training articles as '{texts[article.sha256]}'; a held-out article "
                "must not be trained on, so remove it from one of the two folders"
            )
    readings = _named((*train, *held_out), options, lm)
    return Readings(train=tuple(readings[: len(train)]), held_out=tuple(readings[len(train) :]))


def bundled_article() -> Article:
    """The article that ships with the package."""
    with resources.as_file(resources.files("preceptor") / "starter" / "article.md") as path:
        return read_file(path)


def _named(articles: Sequence[Article], options: DataOptions, lm: LanguageModel) -> list[Reading]:
    """Readings with unique names: the title, with a number where two articles share one."""
    readings: list[Reading] = []
    for article in articles:
        taken = {reading.name for reading in readings}
        name, number = article.title, 2
        while name in taken:
            name, number = f"{article.title} ({number})", number + 1
        readings.append(to_reading(article, options, lm, name=name))
    return readings


def to_reading(article: Article, options: DataOptions, lm: LanguageModel, *, name: str) -> Reading:
    """``num_pairs`` pairs and ``num_probes`` probes of an article, both spread evenly over it, none shared.

    Pairs whose value is longer than ``max_value_tokens`` are passed over, but never below the shortest three. An
    article with too few pairs gives what it has: a third of them, at most ``num_probes``, as probes, the rest to read.

    Raises:
        DataError: fewer than two pairs to read.
    """
    found = _pairs(article, options, lm)
    lengths = {pair.index: len(lm.encode(" " + pair.value)) for pair in found if lm.encode(pair.key)}
    shortest = sorted((index for index, length in lengths.items() if length), key=lambda index: lengths[index])[:3]
    pairs = [
        pair for pair in found if 0 < lengths.get(pair.index, 0) <= options.max_value_tokens or pair.index in shortest
    ]
    num_probes = options.num_probes
    if len(pairs) < (options.num_pairs or 2) + num_probes:
        num_probes = min(num_probes, len(pairs) // 3)
    num_pairs = min(options.num_pairs or len(pairs), len(pairs) - num_probes)
    if num_pairs < 2:
        raise DataError(f"'{name}' has {len(pairs)} usable pairs, and at least 2 are to be read; take a longer article")
    places = spread(len(pairs), num_pairs + num_probes)
    probe_places = {places[index] for index in spread(len(places), num_probes)}
    read = [pairs[place] for place in places if place not in probe_places]
    return Reading(
        name=name,
        title=article.title,
        keys=tuple(pair.key for pair in read),
        values=tuple(pair.value for pair in read),
        probe=" ".join(pairs[place].value for place in sorted(probe_places)),
    )


def spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places, evenly spread: place i is the middle of the i-th of ``count`` equal parts.

    >>> spread(10, 3)
    [1, 5, 8]
    """
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _pairs(article: Article, options: DataOptions, lm: LanguageModel) -> list[Pair]:
    if options.pairing == "sentences":
        return sentence_pairs(article.text, language=options.language)
    chunks = chunk_pairs(lm.encode(article.text), key_tokens=options.key_tokens, value_tokens=options.value_tokens)
    return [Pair(index, lm.decode(key), lm.decode(value).strip()) for index, (key, value) in enumerate(chunks)]
