"""Pools and cases: what they hold, that they depend on their own seed alone, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from preceptor.errors import DataError
from preceptor.systems.reading.study.pool import NUM_HELD_OUT, Pool, draw_cases, draw_pools
from tests.systems.reading.study.small import SUBJECTS, article, pool

ARTICLES = [article(subject) for subject in SUBJECTS]


def draw(count: int, seed: int = 0, **options: object) -> list[Pool]:
    return draw_pools(ARTICLES, count, num_distractors=2, pairs_per_article=4, seed=seed, **options)  # type: ignore[arg-type]


def test_a_pool_mixes_articles_and_holds_pairs_out() -> None:
    pools = draw(12)
    assert Counter(each.articles[0] for each in pools) == dict.fromkeys(SUBJECTS, 2), "each article leads equally often"
    for each in pools:
        assert len(set(each.articles)) == 3
        assert Counter(each.sources) == {0: 4, 1: 4, 2: 4}
        for source, pair in zip(each.sources, each.candidates, strict=True):
            assert each.articles[source] in pair.key
            assert pair not in each.held_out[source], "what is asked must not be there to read"
        assert all(len(pairs) == NUM_HELD_OUT for pairs in each.held_out)
    assert any(list(each.sources) != sorted(each.sources) for each in pools), "candidates are shuffled"


def test_more_pools_begin_with_the_same_ones() -> None:
    assert draw(5) == draw(9)[:5]
    assert draw(5) != [*draw(5, seed=1)]


def test_half_of_the_distractors_may_come_from_elsewhere() -> None:
    others = [article("code"), article("talk")]
    for each in draw(6, others=others):
        assert sum(name in ("code", "talk") for name in each.articles) == 1
        # They are never asked for.
        cases = draw_cases([each], "asked", num_questions=1, target_names=SUBJECTS)
        assert len(cases) == 2 * 3
        assert not {case.article for case in cases} & {"code", "talk"}


@pytest.mark.parametrize(("num_questions", "targets"), [(1, [(0,), (1,), (2,)]), (2, [(0, 1)]), (3, [(0, 1, 2)])])
def test_questions_of_a_case(num_questions: int, targets: list[tuple[int, ...]]) -> None:
    cases = draw_cases([pool()], "asked", num_questions=num_questions, target_names=["bees"])
    assert [case.targets for case in cases] == targets
    assert all(case.seed is None for case in cases)


def test_a_seed_is_not_probed() -> None:
    cases = draw_cases([pool()], "seed", num_questions=1, target_names=["bees", "tides"])
    assert [(case.article, case.seed, case.targets) for case in cases] == [("bees", 0, (1, 2)), ("tides", 0, (1, 2))]
    assert len({case.name for case in cases}) == 2


def test_too_short_or_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="'moss' is too short for a pool: it needs 7"):
        draw_pools([*ARTICLES[:5], article("moss", 6)], 1, num_distractors=2, pairs_per_article=4, seed=0)
    with pytest.raises(DataError, match="a pool of 3 articles cannot be drawn from 2"):
        draw_pools(ARTICLES[:2], 1, num_distractors=2, pairs_per_article=4, seed=0)
