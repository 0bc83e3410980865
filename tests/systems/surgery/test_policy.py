from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preceptor.errors import CheckpointError, ConfigError, NumericError, ShapeError
from preceptor.runs.tensors import join_state, read_tensors, split_state, write_tensors
from preceptor.systems.surgery.policy import Mlp, ReplayBuffer, SacAgent


def make(seed: int = 0, *, state_dim: int = 3, action_dim: int = 2, capacity: int = 50, **options: Any) -> SacAgent:
    buffer = ReplayBuffer(capacity, state_dim=state_dim, action_dim=action_dim)
    generator = torch.Generator().manual_seed(seed)
    return SacAgent(state_dim, action_dim, buffer=buffer, generator=generator, **options)


def live(agent: SacAgent, num_steps: int, generator: torch.Generator) -> list[dict[str, float]]:
    """Steps in a world whose reward is the first action's sine, ending now and then."""
    metrics = []
    for _ in range(num_steps):
        state = torch.randn(3, generator=generator)
        action = agent.act(state, generator=generator)
        reward = float(action[0].sin() + state[0])
        agent.observe(state, action, reward, state.roll(1), terminated=bool(state[1] > 1))
        metrics.append(agent.update(generator=generator))
    return metrics


# ---- networks -------------------------------------------------------------------------------------------------------


def test_networks_side_by_side_are_the_networks_one_by_one() -> None:
    both = Mlp([3, 8, 8, 2], num_networks=2, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 3)
    outputs = both(inputs)
    assert outputs.shape == (2, 5, 2)
    for network in range(2):
        layers: list[nn.Module] = []
        for weight, bias in zip(both.weights, both.biases, strict=True):
            linear = nn.Linear(*weight.shape[1:])
            linear.weight.data, linear.bias.data = weight[network].T, bias[network, 0]
            layers += [linear, nn.ReLU()]
        assert torch.allclose(outputs[network], nn.Sequential(*layers[:-1])(inputs), atol=1e-6)
    assert all(0.9 < weight.abs().max() * math.sqrt(weight.shape[1]) <= 1 for weight in both.weights)


def test_the_critics_begin_apart() -> None:
    """Two that were the same would learn the same, and the smaller of their values would counter nothing."""
    agent = make()
    for weight in agent._critics.weights:
        assert not torch.isclose(weight[0], weight[1]).any()
    assert all(map(torch.equal, agent._critics.parameters(), agent._targets.parameters()))


def test_everything_comes_from_the_generators() -> None:
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        agent = make(7, batch_size=8, random_steps=5)
        runs.append(live(agent, 20, torch.Generator().manual_seed(1))[-1])
    assert runs[0] == runs[1]
    assert torch.equal(torch.get_rng_state(), before)


# ---- acting ---------------------------------------------------------------------------------------------------------


def test_actions_are_uniform_at_first_and_the_policys_after() -> None:
    agent = make(random_steps=1)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(3)
    actions = torch.stack([agent.act(state, generator=generator) for _ in range(4000)])
    assert actions.abs().max() < 1
    assert actions.mean(0).abs().max() < 0.05
    assert (actions.var(0) - 1 / 3).abs().max() < 0.02
    agent.observe(state, actions[0], 0.0, state, terminated=False)
    actions = torch.stack([agent.act(state, generator=generator) for _ in range(4000)])
    mean, log_standard_deviation = agent._policy(state[None])
    assert torch.allclose(actions.atanh().mean(0), mean[0], atol=0.06)
    assert torch.allclose(actions.atanh().std(0), log_standard_deviation[0].exp(), rtol=0.05)
    deterministic = agent.act(state, generator=generator, deterministic=True)
    assert torch.equal(deterministic, torch.tanh(mean[0].detach()))
    assert not deterministic.requires_grad


# ---- one update -----------------------------------------------------------------------------------------------------


def torchrl_loss(agent: SacAgent) -> Any:
    """torchrl's SAC around the agent's networks, as they are now."""
    pytest.importorskip("torchrl", reason="needs torchrl as an oracle")
    from tensordict.nn import TensorDictModule
    from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import SACLoss

    class Policy(nn.Module):
        def __init__(self, network: Mlp) -> None:
            super().__init__()
            self.network = network

        def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_standard_deviation = self.network(states)[0].chunk(2, dim=-1)
            return mean, log_standard_deviation.clamp(-5, 2).exp()

    class Critic(nn.Module):
        def __init__(self, network: Mlp) -> None:
            super().__init__()
            self.network = network

        def forward(self, states: Tensor, actions: Tensor) -> Tensor:
            return self.network(torch.cat([states, actions], -1))[0]

    def one_of(both: Mlp, number: int) -> Mlp:
        one = copy.deepcopy(both)
        for parameters in (one.weights, one.biases):
            for parameter in parameters:
                parameter.data = parameter.data[number : number + 1].clone()
        return one

    actor = ProbabilisticActor(
        TensorDictModule(Policy(copy.deepcopy(agent._actor)), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"safe_tanh": False},
    )
    critics = [ValueOperator(Critic(one_of(agent._critics, n)), in_keys=["observation", "action"]) for n in range(2)]
    targets = [ValueOperator(Critic(one_of(agent._targets, n)), in_keys=["observation", "action"]) for n in range(2)]
    loss = SACLoss(
        actor,
        critics,
        loss_function="l2",
        alpha_init=agent.temperature,
        target_entropy=agent.target_entropy,
        action_spec=None,
    )
    loss.make_value_estimator(gamma=agent.discount)
    names = [name for name, _ in targets[0].named_parameters()]
    for name in names:
        stacked = torch.stack([dict(target.named_parameters())[name].data for target in targets])
        loss.target_qvalue_network_params[tuple(name.split("."))].data.copy_(stacked)
    return loss


@pytest.mark.filterwarnings("ignore")  # whatever torchrl warns of is not ours
def test_an_update_is_that_of_torchrl() -> None:
    """Losses and the parameters after one step of Adam, at targets that differ from the critics."""
    pytest.importorskip("torchrl", reason="needs torchrl as an oracle")
    from tensordict import TensorDict

    agent = make(3, batch_size=32, target_step=0.1, learning_rate=1e-2, initial_temperature=0.3, random_steps=5)
    live(agent, 40, torch.Generator().manual_seed(5))
    for optimizer in agent._optimizers.values():
        optimizer.state.clear()  # both sides start Adam afresh
    before = copy.deepcopy(agent)
    oracle = torchrl_loss(before)

    torch.manual_seed(11)
    metrics = agent.update(generator=torch.default_generator)

    torch.manual_seed(11)
    batch = before.buffer.sample(32, generator=torch.default_generator)
    data = TensorDict(
        {
            "observation": batch.states,
            "action": batch.actions,
            "next": {
                "observation": batch.next_states,
                "reward": batch.rewards[:, None],
                "terminated": batch.terminated[:, None],
                "done": batch.terminated[:, None],
            },
        },
        [32],
    )
    assert 0 < batch.terminated.sum() < 32
    critic_loss, _ = oracle.qvalue_v2_loss(data)
    assert metrics["critic_loss"] == pytest.approx(0.5 * critic_loss.mean().item(), rel=1e-4)  # theirs has no ½
    gradient = torch.autograd.grad(0.5 * critic_loss.mean(), list(oracle.qvalue_network_params.values(True, True)))
    for stacked, got in zip(gradient, oracle.qvalue_network_params.keys(True, True), strict=True):
        layer = getattr(before._critics, got[-2])[int(got[-1])]
        moved = getattr(agent._critics, got[-2])[int(got[-1])]
        expected = layer - 1e-2 * stacked[:, 0] / (stacked[:, 0].abs() + 1e-8)  # Adam's first step
        assert torch.allclose(moved, expected, atol=1e-4)

    moved_critics = copy.deepcopy(before)
    moved_critics._critics.load_state_dict(agent._critics.state_dict())
    oracle = torchrl_loss(moved_critics)
    actor_loss, metadata = oracle.actor_loss(data)  # the global generator is where the agent drew its second noise
    assert metrics["actor_loss"] == pytest.approx(actor_loss.mean().item(), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(-metadata["log_prob"].mean().item(), rel=1e-4)
    alpha_gradient = torch.autograd.grad(oracle.alpha_loss(metadata["log_prob"]).mean(), oracle.log_alpha)[0]
    expected_log_alpha = before._log_temperature - 1e-2 * alpha_gradient.sign()
    assert agent._log_temperature.item() == pytest.approx(expected_log_alpha.item(), rel=1e-5)
    for name, parameter in before._actor.named_parameters():
        (actor_gradient,) = [
            value
            for key, value in zip(
                oracle.actor_network_params.keys(True, True),
                torch.autograd.grad(
                    actor_loss.mean(), list(oracle.actor_network_params.values(True, True)), retain_graph=True
                ),
                strict=True,
            )
            if ".".join(key).endswith(name)
        ]
        expected = parameter - 1e-2 * actor_gradient / (actor_gradient.abs() + 1e-8)
        assert torch.allclose(dict(agent._actor.named_parameters())[name], expected, atol=1e-4)


def test_targets_follow_slowly_and_the_actors_loss_leaves_the_critics_alone() -> None:
    agent = make(batch_size=8, target_step=0.25)
    generator = torch.Generator().manual_seed(0)
    live(agent, 3, generator)
    old = [parameter.detach().clone() for parameter in agent._targets.parameters()]
    live(agent, 1, generator)
    for target, was, critic in zip(agent._targets.parameters(), old, agent._critics.parameters(), strict=True):
        assert torch.allclose(target, 0.75 * was + 0.25 * critic, atol=1e-6)
        assert not target.requires_grad
    assert agent.num_updates == 4


@pytest.mark.parametrize(("terminated", "expected"), [(True, 1.0), (False, 1.0 / (1 - 0.5))])
def test_termination_ends_the_value(terminated: bool, expected: float) -> None:
    """One state, reward 1, γ = ½ and hardly any entropy bonus: Q is 1 where it ends there, 1 + ½ + ¼ + … if not."""
    agent = make(
        state_dim=1, action_dim=1, discount=0.5, learning_rate=3e-3, initial_temperature=1e-6, target_step=0.1,
        batch_size=32, hidden_dim=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for action in torch.linspace(-1, 1, 50):
        agent.observe(torch.ones(1), action[None], 1.0, torch.ones(1), terminated=terminated)
    for _ in range(600):
        metrics = agent.update(generator=generator)
    assert metrics["q_value"] == pytest.approx(expected, rel=0.02)


def test_a_one_step_problem_ends_at_its_closed_form() -> None:
    """For r = −‖a − a*‖² the best policy is N(a*, α/2), whose entropy names the α at which the temperature settles.

    H = ½ ln(2πe · α/2) for each dimension, so asking for H at α = 0.02 gives mean a*, variance 0.01 and α = 0.02; the
    squashing bends a Gaussian this narrow by less than the tolerance.
    """
    temperature, best = 0.02, torch.tensor([0.3, -0.2])
    entropy = 2 * 0.5 * math.log(math.pi * math.e * temperature)
    agent = make(
        state_dim=1, capacity=4000, learning_rate=3e-3, target_entropy=entropy, initial_temperature=0.1, random_steps=0
    )
    generator = torch.Generator().manual_seed(0)
    state = torch.ones(1)
    for action in 2 * torch.rand(4000, 2, generator=generator) - 1:
        agent.observe(state, action, -float((action - best).square().sum()), state, terminated=True)
    temperatures = [agent.update(generator=generator)["temperature"] for _ in range(1500)]
    actions = torch.stack([agent.act(state, generator=generator) for _ in range(4000)])
    assert statistics.fmean(temperatures[-500:]) == pytest.approx(temperature, rel=0.1)
    assert torch.allclose(actions.mean(0), best, atol=0.03)  # the critics' last steps move it by a third of σ
    assert torch.allclose(actions.var(0), torch.full((2,), temperature / 2), rtol=0.2)


def test_metrics_say_where_the_entropy_stands() -> None:
    agent = make(batch_size=64, random_steps=0)
    metrics = live(agent, 1, torch.Generator().manual_seed(0))[0]
    assert metrics["entropy_maximum"] == pytest.approx(2 * math.log(2))
    assert metrics["entropy_target"] == -2
    assert metrics["entropy"] < metrics["entropy_maximum"]
    assert metrics["temperature"] == agent.temperature < 1  # above the target, so it falls
    assert all(math.isfinite(value) for value in metrics.values())


# ---- state ----------------------------------------------------------------------------------------------------------


def test_resume_is_bit_identical_through_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    agent = make(1, batch_size=16, random_steps=5, capacity=30)  # the ring has gone round
    live(agent, 40, generator)
    tensors, rest = split_state(agent.state_dict())
    write_tensors(tmp_path / "agent.safetensors", tensors)
    random_state = generator.get_state()
    expected = live(agent, 15, generator)

    resumed = make(2, batch_size=16, random_steps=5, capacity=30)
    resumed.load_state_dict(join_state(read_tensors(tmp_path / "agent.safetensors"), rest))
    assert live(resumed, 15, torch.Generator().manual_seed(0).set_state(random_state)) == expected
    for name, network in agent._networks().items():
        assert all(map(torch.equal, network.parameters(), resumed._networks()[name].parameters()))
    assert resumed.num_updates == agent.num_updates == 55


def test_a_state_of_another_agent_is_refused() -> None:
    agent = make(batch_size=8)
    live(agent, 2, torch.Generator().manual_seed(0))
    state = agent.state_dict()
    with pytest.raises(CheckpointError, match="resume with the same configuration"):
        make(hidden_dim=16).load_state_dict(state)
    with pytest.raises(CheckpointError, match="resume with the same configuration"):
        make().load_state_dict({name: value for name, value in state.items() if name != "log_temperature"})
    with pytest.raises(CheckpointError, match="resume with the same capacity"):
        make(capacity=1).load_state_dict(state)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make(
            hidden_dim=0, learning_rate=0.0, discount=1.1, target_step=0.0, batch_size=0, initial_temperature=0.0,
            target_entropy=1.4,
        )  # fmt: skip
    assert len(caught.value.faults) == 7
    agent = make()
    with pytest.raises(ShapeError, match="nothing to sample"):
        agent.update(generator=torch.Generator())
    with pytest.raises(NumericError, match="leave it out"):
        agent.observe(torch.zeros(3), torch.zeros(2), math.inf, torch.zeros(3), terminated=False)


# ---- a known bar ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # whatever gymnasium warns of is not ours
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendulum_in_20k_steps(seed: int) -> None:
    """Within 10 of the optimum on 100 fixed starts, where dynamic programming on a fine grid scores −126.3.

    512 transitions an update: with 256 the policy of the last step is now and then a poor one of its neighbours.
    """
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium's Pendulum-v1")
    world, test_world = gymnasium.make("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    agent = make(seed, state_dim=3, action_dim=1, capacity=20_000, learning_rate=1e-3, hidden_dim=256, batch_size=512)
    generator = torch.Generator().manual_seed(seed)
    state = torch.from_numpy(world.reset(seed=seed)[0])
    for step in range(20_000):
        action = agent.act(state, generator=generator)
        observed, reward, terminated, truncated, _ = world.step(2 * action.numpy())
        next_state = torch.from_numpy(observed)
        agent.observe(state, action, float(reward), next_state, terminated=terminated)
        state = torch.from_numpy(world.reset()[0]) if terminated or truncated else next_state
        if step >= agent.random_steps:
            agent.update(generator=generator)

    returns = []
    for start in range(10_000, 10_100):
        observed, done, total = test_world.reset(seed=start)[0], False, 0.0
        while not done:
            action = agent.act(torch.from_numpy(observed), generator=generator, deterministic=True)
            observed, reward, terminated, truncated, _ = test_world.step(2 * action.numpy())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    assert statistics.fmean(returns) >= -126.3 - 10


def test_no_policy_is_wider_or_narrower_than_the_limits() -> None:
    """σ lies in [e⁻⁵, e²] whatever the network says, so that densities stay finite."""
    agent = make(random_steps=0)
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for said, expected in ((60.0, 2.0), (-60.0, -5.0)):
        agent._actor.biases[-1].data[..., 2:] = said  # two numbers of an action: means first, then these
        mean, log_standard_deviation = agent._policy(states)
        assert mean.shape == (4, 2)
        assert (log_standard_deviation == expected).all()
