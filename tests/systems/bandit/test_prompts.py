from __future__ import annotations

from collections import Counter

from preceptor.systems.bandit.environment import Bandit
from preceptor.systems.bandit.prompts import (
    corpus,
    crossed_pairs,
    literal_prompts,
    prompts_for,
    training_word_sets,
)

ONE = Bandit("one", ("bean", "chickpea"), "bernoulli", 10.0, (0.75, 0.25))
TWO = Bandit("two", ("lentil", "rice"), "bernoulli", 1.0, (0.75, 0.25))


def test_every_word_stands_once_at_each_place() -> None:
    prompts = prompts_for(("a", "b", "c"), ["Pick {options}!"])
    assert [prompt.text for prompt in prompts] == ["Pick a, b or c!", "Pick b, c or a!", "Pick c, a or b!"]
    for place in range(3):
        assert {prompt.order[place] for prompt in prompts} == {0, 1, 2}


def test_the_corpus_answers_each_prompt_with_each_word_once() -> None:
    lines = corpus(prompts_for(ONE.words, ["Pick {options}:", "{options}?"]))
    answers = Counter(line.rstrip(".").split()[-1] for line in lines)
    assert len(lines) == len(set(lines)) == 8
    assert answers == {"bean": 4, "chickpea": 4}


def test_a_literal_prompt_names_its_words_in_its_own_order() -> None:
    (prompt,) = literal_prompts(("bean", "chickpea"), ["chickpea, or a bean?"])
    assert prompt.words == ("bean", "chickpea")
    assert prompt.order == (1, 0)


def test_only_words_of_different_bandits_cross() -> None:
    assert crossed_pairs([ONE, TWO]) == [((0, 0), (1, 0)), ((0, 0), (1, 1)), ((0, 1), (1, 0)), ((0, 1), (1, 1))]


def test_the_corpus_holds_own_pairs_or_all() -> None:
    assert training_word_sets([ONE, TWO], pairs="own") == [ONE.words, TWO.words]
    every = training_word_sets([ONE, TWO], pairs="all")
    assert len(every) == 6 == len({frozenset(words) for words in every})
