"""The policy over words against re-encoding every option on its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from preceptor.errors import ConfigError
from preceptor.lm.model import LanguageModel
from preceptor.systems.bandit.policy import Context, Vocabulary, decide
from preceptor.systems.bandit.prompts import prompts_for

WORDS = ("red", "blue", "green", "violet")


def slow(lm: LanguageModel, context: tuple[int, ...], options: tuple[tuple[int, ...], ...]) -> Tensor:
    """Sum of each option's token log-probabilities, an option at a time, by the model alone."""
    scores = []
    for option in options:
        tokens = torch.tensor([[*context, *option]])
        log_probs = lm.model(tokens).logits.log_softmax(-1)[0]
        scores.append(sum(log_probs[len(context) - 1 + at, token] for at, token in enumerate(option)))
    return torch.stack(scores)  # type: ignore[arg-type]


def test_words_are_one_token_or_several(lm: LanguageModel) -> None:
    lengths = {word: len(tokens) for word, tokens in Vocabulary(lm, WORDS).tokens.items()}
    assert lengths["red"] == lengths["blue"] == 1 < lengths["green"] < lengths["violet"]


@pytest.mark.parametrize("words", [("red", "blue"), ("green", "violet"), WORDS])
def test_probabilities_are_those_of_each_option_encoded_alone(lm: LanguageModel, words: tuple[str, ...]) -> None:
    vocabulary = Vocabulary(lm, WORDS)
    contexts = [
        vocabulary.context(lm, prompt) for prompt in prompts_for(words, ["Pick {options}:", "{options}? I say"])
    ]
    decision = decide(lm, contexts)
    for context, log_probs, p_candidates in zip(contexts, decision.log_probs, decision.p_candidates, strict=True):
        scores = slow(lm, context.tokens, context.choices[0][1])
        torch.testing.assert_close(log_probs, scores.log_softmax(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(p_candidates, scores.exp().sum().detach(), atol=1e-6, rtol=1e-5)
        assert float(log_probs.detach().exp().sum()) == pytest.approx(1, abs=1e-6)


def test_choices_of_different_sizes_share_a_batch(lm: LanguageModel) -> None:
    vocabulary = Vocabulary(lm, WORDS)
    two, four = (prompts_for(words, ["Pick {options}:"])[0] for words in (WORDS[:2], WORDS))
    log_probs = decide(lm, [vocabulary.context(lm, two), vocabulary.context(lm, four)]).log_probs
    assert log_probs[0, 2:].tolist() == [-torch.inf] * 2
    alone = decide(lm, [vocabulary.context(lm, two)]).log_probs[0]
    torch.testing.assert_close(log_probs[0, :2], alone, atol=1e-5, rtol=0)


def test_choices_within_a_text_are_those_of_its_beginnings(lm: LanguageModel) -> None:
    vocabulary = Vocabulary(lm, WORDS)
    options = vocabulary.options(WORDS[1:])
    tokens = (lm.begin_token, *lm.encode("Pick: green 1. blue 0. violet 1."))
    places = (4, 9, len(tokens))
    together = decide(lm, [Context(tokens, tuple((place, options) for place in places))])
    apart = decide(lm, [Context.asking(tokens[:place], options) for place in places])
    torch.testing.assert_close(together.log_probs, apart.log_probs, atol=1e-5, rtol=0)


def test_the_gradient_flows_through_every_token_of_a_word(lm: LanguageModel) -> None:
    context = Vocabulary(lm, WORDS).context(lm, prompts_for(WORDS[1:], ["Pick {options}:"])[0])
    parameters = list(lm.model.parameters())
    fast = torch.autograd.grad(decide(lm, [context]).log_probs[0, 2], parameters)
    scores = slow(lm, context.tokens, context.choices[0][1])
    expected = torch.autograd.grad(scores.log_softmax(0)[2], parameters)
    for one, other in zip(fast, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_words_that_share_their_tokens_are_refused_together(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        Vocabulary(lm, ["red", "reddish", "blue", "bluest"])
    assert len(caught.value.args) == 2 or str(caught.value).count("cannot be told apart") == 2
    assert "'red' and 'reddish'" in str(caught.value)
    with pytest.raises(ConfigError, match="tokens of 'red' begin those of 'reddish'"):
        Vocabulary(lm, ["reddish", "red"])  # whichever comes first
    monkeypatch.setattr(lm, "encode", lambda text: [5])
    with pytest.raises(ConfigError) as caught:
        Vocabulary(lm, ["b", "a"])
    assert str(caught.value).count("cannot be told apart") == 1  # the same tokens: one fault and not two


def test_the_reference_is_not_blind_to_the_order_of_tokens(lm: LanguageModel) -> None:
    """The planted fault, tokens of an option scored in the wrong order, is one that the tests above would catch."""
    vocabulary = Vocabulary(lm, WORDS)
    context = vocabulary.context(lm, prompts_for(("green", "violet"), ["Pick {options}:"])[0])
    right = slow(lm, context.tokens, context.choices[0][1])
    for wrong in itertools.islice(itertools.permutations(context.choices[0][1][0]), 1, 2):
        assert abs(float((slow(lm, context.tokens, (wrong,))[0] - right[0]).detach())) > 1e-3
