"""The state of a method: the same start for all, a frozen model in storage of its own, schedules, what is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from preceptor.errors import CheckpointError
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.baselines import Method
from preceptor.systems.curriculum.config import UpdateOptions
from preceptor.systems.curriculum.environment import Corpus
from preceptor.systems.curriculum.state import State, learning_rate_scale
from tests.systems.curriculum.made import CONFIG, setup_and_state

UNIFORM = Method("uniform", "uniform", num_steps=CONFIG.update.steps)
WITH_ROLLOUTS = Method("uniform+ppo", "uniform", policy_gradient=True, num_steps=CONFIG.update.steps)


def test_the_frozen_model_shares_no_storage_before_and_after_a_refresh(
    tiny: LanguageModel, corpora: list[Corpus]
) -> None:
    _, state = setup_and_state(tiny, corpora, UNIFORM)
    live = {parameter.data_ptr() for parameter in tiny.model.parameters()}
    for _ in range(2):
        assert live.isdisjoint(parameter.data_ptr() for parameter in state.frozen_model.model.parameters())
        kept = [parameter.clone() for parameter in state.frozen_model.model.parameters()]
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(kept, state.frozen_model.model.parameters(), strict=True))
        state.refresh_frozen_model()
        pairs = zip(tiny.model.parameters(), state.frozen_model.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(parameter.requires_grad for parameter in state.frozen_model.model.parameters())


def test_a_new_method_puts_everything_back(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    setup, state = setup_and_state(tiny, corpora, UNIFORM, WITH_ROLLOUTS)
    with torch.no_grad():
        next(tiny.model.parameters()).add_(1.0)
    state.refresh_frozen_model()
    state.best_loss = 1.0
    state.begin(WITH_ROLLOUTS)
    for model in (state.lm.model, state.frozen_model.model):
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], weight) for name, weight in setup.initial_weights.items())
    assert state.best_loss == float("inf")
    assert (state.method, state.steps_before) == (WITH_ROLLOUTS, CONFIG.update.steps)
    assert list(state.outcomes) == ["uniform", "uniform+ppo"]


def test_only_a_method_with_rollouts_has_a_value_network(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    assert setup_and_state(tiny, corpora, UNIFORM)[1].value_network is None
    assert setup_and_state(tiny, corpora, WITH_ROLLOUTS)[1].value_network is not None
    grouped = CONFIG.model_copy(update={"ppo": CONFIG.ppo.model_copy(update={"advantage": "rloo"})})
    assert setup_and_state(tiny, corpora, WITH_ROLLOUTS, config=grouped)[1].value_network is None


def test_a_method_that_does_not_learn_has_learning_rate_zero(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    _, state = setup_and_state(tiny, corpora, replace(WITH_ROLLOUTS, learns=False))
    state.set_learning_rate(1.0)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.0, 0.0]


def test_a_state_of_a_later_method_is_taken_up_from_the_first(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    setup, state = setup_and_state(tiny, corpora, UNIFORM, WITH_ROLLOUTS)
    state.begin(WITH_ROLLOUTS)
    state.outcome.counts["tokens"] = 7
    resumed = State(setup)
    resumed.load_state_dict(state.state_dict())
    assert (resumed.method, resumed.outcomes) == (WITH_ROLLOUTS, state.outcomes)
    assert resumed.value_network is not None


def test_a_state_of_another_configuration_is_refused(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    _, state = setup_and_state(tiny, corpora, UNIFORM)
    _, other = setup_and_state(tiny, corpora, WITH_ROLLOUTS)
    with pytest.raises(CheckpointError, match=r"of the method uniform\+ppo, this run has uniform;"):
        state.load_state_dict(other.state_dict())


def test_warm_up_and_decay() -> None:
    linear = UpdateOptions(steps=6, warm_up_steps=2, decay="linear")
    assert [learning_rate_scale(step, linear) for step in range(1, 7)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    flat = linear.model_copy(update={"decay": "none", "warm_up_steps": 0})
    assert {learning_rate_scale(step, flat) for step in range(1, 7)} == {1.0}
    cosine = linear.model_copy(update={"decay": "cosine"})
    assert learning_rate_scale(5, cosine) == pytest.approx(0.5)  # half of the decay is done
