from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from preceptor.errors import ConfigError
from preceptor.objectives.sac import sample_squashed_gaussian
from preceptor.systems.surgery.policy import ReplayBuffer, SacAgent
from preceptor.systems.surgery.site_policy import SURGEON, SiteNetwork, TrainedSurgeon, flat_state, site_networks
from preceptor.systems.surgery.sites import FEATURE_DIM
from tests.systems.surgery.small import small_model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_sites(num: int, seed: int = 1) -> torch.Tensor:
    features = torch.randn(num, FEATURE_DIM, generator=generator(seed))
    features[:, 0] = 1
    return features


def networks(num_sites: int = 5) -> tuple[SiteNetwork, SiteNetwork]:
    return site_networks(num_sites * FEATURE_DIM, num_sites, hidden_dim=8, num_critics=2, generator=generator())


def test_padding_changes_nothing() -> None:
    actor, critics = networks()
    features, actions = some_sites(3), torch.tensor([0.1, -0.5, 0.9])
    padded = torch.cat([actions, torch.tensor([0.7, 0.7])])  # what stands in the places of sites that do not exist
    short, long = actor(flat_state(features, 3)[None])[0, 0], actor(flat_state(features, 5)[None])[0, 0]
    torch.testing.assert_close(long[[0, 1, 2, 5, 6, 7]], short)
    assert long[[3, 4]].tolist() == [0.0, 0.0]
    value = critics(torch.cat([flat_state(features, 3), actions])[None])
    torch.testing.assert_close(critics(torch.cat([flat_state(features, 5), padded])[None]), value)
    assert value.shape == (2, 1, 1)


def test_sites_that_do_not_exist_have_the_target_entropy() -> None:
    actor, _ = networks()
    output = actor(flat_state(some_sites(1), 5)[None])[0].detach().expand(20_000, -1)
    means, log_deviations = output.chunk(2, dim=-1)
    _, log_probs = sample_squashed_gaussian(means[:, 1:], log_deviations[:, 1:], generator=generator())
    assert float(-log_probs.mean()) == pytest.approx(-4, abs=0.06)  # four sites of −1 nat; a standard error is 0.01


def test_sites_are_exchangeable() -> None:
    actor, critics = networks(4)
    features, order = some_sites(4), torch.tensor([2, 0, 3, 1])
    means = actor(features.flatten()[None])[0, 0, :4]
    torch.testing.assert_close(actor(features[order].flatten()[None])[0, 0, :4], means[order])
    actions = torch.tensor([0.1, 0.2, -0.3, 0.4])
    value = critics(torch.cat([features.flatten(), actions])[None])
    torch.testing.assert_close(critics(torch.cat([features[order].flatten(), actions[order]])[None]), value)


def test_a_site_sees_the_others() -> None:
    actor, _ = networks(2)
    features = some_sites(2)
    other = features.clone()
    other[1, 3] += 1
    assert actor(features.flatten()[None])[0, 0, 0] != actor(other.flatten()[None])[0, 0, 0]


def test_sac_learns_to_undo_a_shift_of_every_site_and_generalises_to_more_sites() -> None:
    """The reward is −Σ (a_i + x_i)² of the sites that exist: the policy must answer −x_i."""
    sites, draws = 3, generator(5)
    dims = {"state_dim": sites * FEATURE_DIM, "action_dim": sites}
    agent = SacAgent(
        **dims, buffer=ReplayBuffer(2000, **dims), generator=generator(), hidden_dim=32, learning_rate=3e-3,
        discount=0.0, batch_size=64, initial_temperature=0.05, random_steps=400, networks=site_networks,
    )  # fmt: skip
    for number in range(400):
        features = torch.zeros(1 + number % sites, FEATURE_DIM)
        features[:, 0] = 1
        features[:, 3] = 1.2 * torch.rand(len(features), generator=draws) - 0.6
        action = agent.act(flat_state(features, sites), generator=draws)
        reward = -float((action[: len(features)] + features[:, 3]).square().sum())
        state = flat_state(features, sites)
        agent.observe(state, action, reward, state, terminated=True)
    for _ in range(200):
        agent.update(generator=draws)
    surgeon = surgeon_of(agent)
    wider = torch.zeros(6, FEATURE_DIM)
    wider[:, 0] = 1
    wider[:, 3] = torch.linspace(-0.5, 0.5, 6)
    error = (surgeon.act(wider) + wider[:, 3]).abs()
    assert float(error.mean()) < 0.15  # doing nothing has 0.3, a uniform action 0.58


def surgeon_of(agent: SacAgent) -> TrainedSurgeon:
    assert isinstance(agent.actor, SiteNetwork)
    return TrainedSurgeon(
        agent.actor, kind="head_scale", rank=2, roles=("output",), max_factor=6.0, gradients=True, num_windows=4
    )


def test_a_saved_surgeon_acts_alike(tmp_path: Path) -> None:
    actor, _ = networks()
    surgeon = TrainedSurgeon(
        actor, kind="head_scale", rank=2, roles=("output",), max_factor=6.0, gradients=False, num_windows=4
    )
    surgeon.save(tmp_path / SURGEON)
    loaded = TrainedSurgeon.load(tmp_path)
    features = some_sites(7)
    assert torch.equal(loaded.act(features), surgeon.act(features))
    assert loaded.act(features).shape == (7,)
    assert (loaded.roles, loaded.max_factor, loaded.gradients) == (("output",), 6.0, False)
    assert not loaded.mlp
    path = tmp_path / SURGEON / "surgeon.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"mlp": True}))
    assert len(TrainedSurgeon.load(tmp_path).sites(small_model()).targets) == 2 + 4
    del settings["mlp"]  # as surgeons were saved before MLPs could be edited
    path.write_text(json.dumps(settings))
    assert len(TrainedSurgeon.load(tmp_path).sites(small_model()).targets) == 2
    mean = float(actor(features.flatten()[None])[0, 0, 0].detach())
    assert float(loaded.act(features)[0]) == pytest.approx(math.tanh(mean), rel=1e-6)  # float32


def test_a_folder_without_a_surgeon_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trained surgeon"):
        TrainedSurgeon.load(tmp_path)
    actor, _ = networks()
    TrainedSurgeon(
        actor, kind="head_scale", rank=2, roles=("output",), max_factor=6.0, gradients=False, num_windows=4
    ).save(tmp_path / SURGEON)
    path = tmp_path / SURGEON / "surgeon.json"
    path.write_text(path.read_text().replace("norm_in_layer", "norm_of_layer"))
    with pytest.raises(ConfigError, match="other features"):
        TrainedSurgeon.load(tmp_path)
