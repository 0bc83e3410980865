from __future__ import annotations

import pytest
from pydantic import ValidationError

from preceptor.config import from_dict, load_config, to_dict
from preceptor.errors import ConfigError
from preceptor.systems.bandit.config import BanditConfig, names


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(BanditConfig, overrides=overrides)
    return list(caught.value.faults)


def test_the_default_is_the_predecessors_two_bandits() -> None:
    config = BanditConfig()
    assert [(b.words, b.base_reward, b.success) for b in config.bandits] == [
        (("bean", "chickpea"), 10.0, (0.75, 0.25)),
        (("lentil", "rice"), 1.0, (0.75, 0.25)),
    ]
    assert from_dict(BanditConfig, to_dict(config)) == config


def test_every_fault_is_told_at_once() -> None:
    bandit = "{words: [a, b], success: [1.5, 0.2]}"
    told = faults(f"bandits=[{bandit}]", "prompts.templates=['Pick one:']", "model.dropout=1.0")
    assert len(told) == 3
    assert any("`bandits[0].success[0]` must lie in [0, 1], got 1.5" in text for text in told)
    assert any("must name its options" in text and "'Pick one:'" in text for text in told)
    assert any("`model.dropout` must lie in [0, 1)" in text for text in told)


def test_windows_fit_the_context_of_a_model_from_random_weights() -> None:
    told = "`pretraining.window` must be at most `model.context_length` 16, got 24"
    assert faults("model.context_length=16") == [told]
    load_config(BanditConfig, overrides=["model.context_length=16", "model.name=starter"])  # which has its own


@pytest.mark.parametrize(
    ("bandits", "told"),
    [
        ("[{words: [a], success: [0.5]}]", "words` of a bandit must be at least 2, got 1"),
        ("[{words: [a, a], success: [0.5, 0.5]}]", "must differ, got 'a' 2 times"),
        ("[{words: [a, ' b'], success: [0.5, 0.5]}]", "must not be empty nor begin or end with a space"),
        ("[{words: [a, b], success: [0.5]}]", "one number for each of 2 words, got 1"),
        ("[{words: [a, b], kind: gaussian}]", "mean` must have one number for each of 2 words, got 0"),
        ("[{words: [a, b], kind: gaussian, mean: [1, 2], deviation: -1}]", "deviation` must be at least 0, got -1"),
        ("[{words: [a, b], kind: gaussian, mean: [1, .inf]}]", "`bandits[0].mean[1]` must be finite, got inf"),
        ("[{words: [a, b], success: [1, 0], prompts: ['Which one?']}]", "'Which one?' names none"),
        ("[{words: [a, b], success: [1, 0], prompts: ['a or c?']}]", "'a or c?' lacks 'b'"),
        ("[{words: [a, b], success: [1, 0]}, {words: [b, c], success: [1, 0]}]", "must not share words, got 'b'"),
        ("[]", "`bandits` is empty"),
    ],
)
def test_a_bandit_that_cannot_be_played_is_one_line(bandits: str, told: str) -> None:
    messages = faults(f"bandits={bandits}")
    assert any(told in message for message in messages)
    assert all("\n" not in message for message in messages)


def test_templates_seen_and_held_out_do_not_mix() -> None:
    assert any("must not repeat" in text for text in faults("prompts.held_out=['Pick {options}:']"))


def test_leave_one_out_needs_another() -> None:
    assert any("leave_one_out" in text for text in faults("update.batch_size=1"))
    load_config(BanditConfig, overrides=["update.batch_size=1", "update.baseline=running_mean"])


def test_a_word_must_stand_on_its_own() -> None:
    assert names("rice or bean?", "bean")
    assert not names("rice or beans?", "bean")
    assert names("beans or bean", "bean")


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        BanditConfig().seed = 1  # type: ignore[misc]
