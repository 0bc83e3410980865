"""Mixed pools: sentence pairs of a target article among those of others, and the cases that a policy decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from preceptor.data.articles.article import Article, article_folder, read_file
from preceptor.data.articles.pairs import Pair, sentence_pairs
from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel

Mode = Literal["asked", "seed"]

NUM_HELD_OUT = 3
"""Pairs of each article in a pool that are never candidates: questions in ``asked``, seed and probes in ``seed``."""

MIN_CHARACTERS = 30
"""Shortest sentence in a pool; shorter ones carry no subject."""


@dataclass(frozen=True)
class StudyArticle:
    """An article cut into the pairs that may enter a pool, in its own order."""

    name: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Pool:
    """Candidates of several articles, shuffled, and the pairs that are held out of each.

    Attributes:
        name: unique within a run.
        articles: names, one for each source.
        sources: index into ``articles`` of each candidate.
        candidates: what can be read: a policy sees the keys, a reader the values.
        held_out: for each article, ``NUM_HELD_OUT`` pairs of the same stretch of text.
    """

    name: str
    articles: tuple[str, ...]
    sources: tuple[int, ...]
    candidates: tuple[Pair, ...]
    held_out: tuple[tuple[Pair, ...], ...]


@dataclass(frozen=True)
class Case:
    """One decision problem: a pool, what the context says, and what is asked afterwards.

    Attributes:
        pool: what can be read.
        mode: ``asked``: the context holds the keys of ``targets``; ``seed``: it holds the value of ``seed``.
        target: index of the target article in ``pool.articles``.
        targets: held-out pairs of it whose values are scored, each after its key.
        seed: the pair whose value is read first; None where ``mode`` is ``asked``.
    """

    pool: Pool
    mode: Mode
    target: int
    targets: tuple[int, ...]
    seed: int | None = None

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.pool.name}/{self.mode}/{self.target}/{'-'.join(map(str, self.targets))}"

    @property
    def article(self) -> str:
        """Name of the target article, over which intervals are clustered."""
        return self.pool.articles[self.target]

    @property
    def context(self) -> list[str]:
        """What the context says: the questions, or the sentence that was read."""
        if self.seed is not None:
            return [self.pairs([self.seed])[0].value]
        return [pair.key for pair in self.pairs(self.targets)]

    def pairs(self, indices: Sequence[int]) -> list[Pair]:
        """Held-out pairs of the target article."""
        return [self.pool.held_out[self.target][index] for index in indices]


def load_study_articles(
    folder: str, lm: LanguageModel, *, split: str, max_tokens: int, language: str = "en"
) -> list[StudyArticle]:
    """The articles of ``folder``, or the bundled ones of ``split`` (``learn`` or ``judge``) where it is empty.

    Pairs with a key or value of more than ``max_tokens`` tokens are left out whole: a cut value would make its length
    predict its reward.
    """
    if folder:
        articles = [read_file(path) for path in article_folder(Path(folder))]
    else:
        with resources.as_file(resources.files("preceptor") / "starter" / "study" / split) as path:
            articles = [read_file(file) for file in article_folder(path)]
    # By title: it names the cluster over which intervals are taken, so two articles may not share one.
    named: dict[str, StudyArticle] = {}
    for article in articles:
        if article.title in named:
            raise DataError(f"two articles are called '{article.title}'; give each text of a study its own title")
        named[article.title] = _cut(article, lm, max_tokens=max_tokens, language=language)
    return list(named.values())


def _cut(article: Article, lm: LanguageModel, *, max_tokens: int, language: str) -> StudyArticle:
    pairs = sentence_pairs(article.text, language=language, min_characters=MIN_CHARACTERS)
    fitting = [
        pair for pair in pairs if 0 < len(lm.encode(" " + pair.key)) <= max_tokens >= len(lm.encode(" " + pair.value))
    ]
    return StudyArticle(article.title, tuple(fitting))


def draw_pools(
    articles: Sequence[StudyArticle],
    count: int,
    *,
    others: Sequence[StudyArticle] = (),
    num_distractors: int,
    pairs_per_article: int,
    seed: int,
    name: str = "pool",
) -> list[Pool]:
    """``count`` pools; every article leads equally many, and its companions are drawn without replacement.

    Of each article a stretch of consecutive pairs is taken, and ``NUM_HELD_OUT`` of them are held out.

    Args:
        articles: of one split.
        count: number of pools.
        others: further articles, half of the distractors come from here if there are any; they are never targets.
        num_distractors: articles beside the first one.
        pairs_per_article: candidates from each.
        seed: of the draw; the pools do not depend on the seed of a run.
        name: their names begin with it.

    Raises:
        DataError: too few articles, or articles too short.
    """
    needed = pairs_per_article + NUM_HELD_OUT
    if short := [article.name for article in (*articles, *others) if len(article.pairs) < needed]:
        raise DataError(
            f"'{short[0]}' is too short for a pool: it needs {needed} sentence pairs ({pairs_per_article} to choose "
            f"from and {NUM_HELD_OUT} held out) whose sentences have at most data.max_value_tokens tokens; remove it, "
            "lower data.num_pairs or raise data.max_value_tokens"
        )
    # Half from elsewhere, so that a policy cannot learn that everything encyclopedic is on the subject.
    num_others = num_distractors // 2 if others else 0
    if len(articles) < 1 + num_distractors - num_others or len(others) < num_others:
        raise DataError(
            f"a pool of {1 + num_distractors} articles cannot be drawn from {len(articles)} (and {len(others)} "
            "distractors); give more articles or lower study.num_distractors"
        )
    generator = random.Random(seed)
    # Shuffled once and then taken in turn: with fewer pools than articles it is chance that decides which lead.
    leaders = list(articles)
    generator.shuffle(leaders)
    pools = []
    for number in range(count):
        leader = leaders[number % len(leaders)]
        rest = [article for article in articles if article.name != leader.name]
        chosen = [leader, *generator.sample(rest, num_distractors - num_others), *generator.sample(others, num_others)]
        pools.append(_pool(f"{name}-{seed}-{number}", chosen, pairs_per_article, generator))
    return pools


def _pool(name: str, chosen: Sequence[StudyArticle], pairs_per_article: int, generator: random.Random) -> Pool:
    candidates: list[tuple[int, Pair]] = []
    held_out = []
    for source, article in enumerate(chosen):
        # A stretch, not a sample: questions and candidates are of the same part of the article.
        width = pairs_per_article + NUM_HELD_OUT
        start = generator.randrange(len(article.pairs) - width + 1)
        window = list(article.pairs[start : start + width])
        places = sorted(generator.sample(range(width), NUM_HELD_OUT))
        held_out.append(tuple(window[place] for place in places))
        candidates += [(source, pair) for place, pair in enumerate(window) if place not in places]
    # Shuffled, so that a place in the pool says nothing about the article.
    generator.shuffle(candidates)
    return Pool(
        name=name,
        articles=tuple(article.name for article in chosen),
        sources=tuple(source for source, _ in candidates),
        candidates=tuple(pair for _, pair in candidates),
        held_out=tuple(held_out),
    )


def draw_cases(pools: Sequence[Pool], mode: Mode, *, num_questions: int, target_names: Sequence[str]) -> list[Case]:
    """Every case of ``pools``: each article named in ``target_names`` is the target in turn.

    ``asked`` makes a case of every ``num_questions`` held-out pairs (1: three cases; 2 or 3: one case); ``seed`` reads
    the first held-out value and probes the others.
    """
    names = set(target_names)
    cases = []
    for pool in pools:
        for target, article in enumerate(pool.articles):
            if article not in names:
                continue
            if mode == "seed":
                cases.append(Case(pool, mode, target, tuple(range(1, NUM_HELD_OUT)), seed=0))
                continue
            for start in range(0, NUM_HELD_OUT - num_questions + 1, num_questions):
                cases.append(Case(pool, mode, target, tuple(range(start, start + num_questions))))
    return cases
