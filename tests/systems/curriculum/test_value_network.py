"""The value network: zero at first, causal, blind to padding, and of storage of its own."""

from __future__ import annotations

import pytest
import torch

from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.value_network import ValueNetwork, build_value_network
from tests.systems.curriculum.made import rollouts_from


def build(lm: LanguageModel, kind: str, *, seed: int = 0) -> ValueNetwork:
    network = build_value_network(lm, kind=kind, width=64, num_layers=1, seed=seed)
    assert (network(rollouts_from([[5, 6]])) == 0).all()  # before anything is learned
    torch.nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(1))
    return network


@pytest.mark.parametrize("kind", ["small", "copy"])
@torch.no_grad()
def test_a_value_is_of_the_state_before_its_token(tiny: LanguageModel, kind: str) -> None:
    network = build(tiny, kind)
    values = network(rollouts_from([[5, 6, 7]], prompts=[[0, 20]]))
    other_last = network(rollouts_from([[5, 6, 8]], prompts=[[0, 20]]))
    other_first = network(rollouts_from([[9, 6, 7]], prompts=[[0, 20]]))
    torch.testing.assert_close(values, other_last)  # what is drawn last is not known yet
    assert float(values[0, 0]) == pytest.approx(float(other_first[0, 0]), abs=1e-5)
    assert abs(float(values[0, 1] - other_first[0, 1])) > 1e-3


@pytest.mark.parametrize("kind", ["small", "copy"])
@torch.no_grad()
def test_a_longer_neighbour_changes_nothing(tiny: LanguageModel, kind: str) -> None:
    network = build(tiny, kind)
    alone = network(rollouts_from([[5, 6]], prompts=[[0]]))
    beside = network(rollouts_from([[5, 6], [7, 8]], prompts=[[0], [0, 21, 22, 23]]))
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["small", "copy"])
def test_it_shares_no_storage_with_the_policy_and_learns(tiny: LanguageModel, kind: str) -> None:
    network = build(tiny, kind)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in tiny.model.parameters())
    network(rollouts_from([[5, 6, 7]])).sum().backward()
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    reached = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert "head.weight" in reached
    assert any("layers.0" in name for name in reached)


def test_the_seed_decides_the_weights_and_leaves_torchs_generator(tiny: LanguageModel) -> None:
    before = torch.get_rng_state()
    first, again, other = (build(tiny, "small", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(next(first.parameters()), next(again.parameters()))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
