"""Small parts of the systems: SAC step, GAE, surgical theater, mixture sampler."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.limits import arithmetic_seconds, bandwidth_seconds
from benchmarks.measurement import OURS, Bar, Comparison, require_equal
from benchmarks.models import starter
from preceptor.data.corpora.mixture import MixtureSampler
from preceptor.lm.edit_targets import attention_targets
from preceptor.objectives.advantages import gae
from preceptor.systems.surgery.policy import ReplayBuffer, SacAgent
from preceptor.systems.surgery.theater import SurgicalTheater

STATE, ACTION = 32, 8


def comparisons(*, quick: bool = False) -> Iterator[Comparison]:
    """All parts; ``quick`` leaves the sizes, which are small anyway."""
    yield gae_comparison(steps=64 if quick else 1_024)
    for batch_size, width in ((8, 16),) if quick else ((64, 64), (256, 256)):
        yield sac_comparison(batch_size, width, updates=2 if quick else 20)
    yield theater_comparison()
    yield sampler_comparison(rows=200 if quick else 20_000)


def gae_comparison(*, rows: int = 16, steps: int = 1_024) -> Comparison:
    """Advantages of a batch of long sequences against torchrl's vectorised ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchrl on what it deprecates in itself
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    mask = torch.ones(rows, steps, dtype=torch.bool)
    done = torch.zeros(rows, steps, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.cat([values[:, 1:], torch.zeros(rows, 1)], dim=1)

    def ours() -> Tensor:
        return gae(rewards, values, mask=mask, discount=0.99, gae_lambda=0.95)

    def torchrl() -> Tensor:
        advantages: Tensor = vec_generalized_advantage_estimate(
            0.99, 0.95, values[..., None], following[..., None], rewards[..., None], done
        )[0][..., 0]
        return advantages

    difference = float((ours() - torchrl()).abs().max())
    return Comparison(
        benchmark="gae",
        case=f"{rows} x {steps:,}",
        ways={OURS: ours, "torchrl": torchrl},
        bars=(Bar("torchrl", at_least=1.0),),
        agreement={"advantages": require_equal("advantages", difference, at_most=1e-4)},
        ideal_seconds=bandwidth_seconds(2 * rewards.nbytes + mask.nbytes + values.nbytes, (OURS, "torchrl")),
    )


def sac_comparison(batch_size: int, width: int, *, updates: int) -> Comparison:
    """Updates of critics, actor and temperature against the same written in plain PyTorch, and against torchrl."""
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(2 * batch_size, state_dim=STATE, action_dim=ACTION)
    for _ in range(2 * batch_size):
        state, following = (torch.randn(STATE, generator=generator) for _ in range(2))
        buffer.add(state, torch.rand(ACTION, generator=generator) * 2 - 1, 1.0, following, terminated=False)
    agent = SacAgent(
        STATE, ACTION, buffer=buffer, generator=generator, hidden_dim=width, batch_size=batch_size, random_steps=0
    )
    return Comparison(
        benchmark="sac",
        case=f"batch {batch_size}, width {width}",
        ways={
            OURS: lambda: [agent.update(generator=generator) for _ in range(updates)],
            "plain PyTorch": repeated(PlainSac(buffer, batch_size, width, generator).update, updates),
            "torchrl": repeated(torchrl_sac(buffer, batch_size, width, generator), updates),
        },
        bars=(Bar("plain PyTorch", at_least=1 / 1.1),),
        units=dict.fromkeys((OURS, "plain PyTorch", "torchrl"), updates),
        # Four forward passes' worth through the actor and twelve through a critic (a backward pass is worth two).
        ideal_seconds=arithmetic_seconds(
            2.0
            * updates
            * batch_size
            * (4 * weights(STATE, width, 2 * ACTION) + 12 * weights(STATE + ACTION, width, 1)),
            (OURS, "plain PyTorch", "torchrl"),
            torch.device("cpu"),
        ),
    )


def weights(inputs: int, width: int, outputs: int) -> int:
    """Of :func:`mlp`, without biases."""
    return inputs * width + width * width + width * outputs


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times)]


class PlainSac:
    """Soft actor-critic as one writes it: two critics, their averages, a squashed Gaussian, three Adams."""

    def __init__(self, buffer: ReplayBuffer, batch_size: int, width: int, generator: torch.Generator) -> None:
        self.buffer, self.batch_size, self.generator = buffer, batch_size, generator
        self.actor = mlp(STATE, width, 2 * ACTION)
        self.critics = nn.ModuleList(mlp(STATE + ACTION, width, 1) for _ in range(2))
        self.averages = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.optimizers = [
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (self.actor.parameters(), self.critics.parameters(), [self.log_temperature])
        ]

    def sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_deviation = self.actor(states).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_deviation.clamp(-20, 2).exp())
        raw = normal.rsample()
        jacobian = 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))
        return raw.tanh(), (normal.log_prob(raw) - jacobian).sum(-1)

    def update(self) -> None:
        batch = self.buffer.sample(self.batch_size, generator=self.generator)
        temperature = self.log_temperature.exp().detach()
        actor, critics, tuner = self.optimizers
        with torch.no_grad():
            actions, log_probs = self.sample(batch.next_states)
            pair = torch.cat([batch.next_states, actions], -1)
            following = torch.min(*(critic(pair)[:, 0] for critic in self.averages)) - temperature * log_probs
            targets = batch.rewards + 0.99 * (~batch.terminated) * following
        pair = torch.cat([batch.states, batch.actions], -1)
        self._step(critics, sum((critic(pair)[:, 0] - targets).square().mean() for critic in self.critics))
        actions, log_probs = self.sample(batch.states)
        pair = torch.cat([batch.states, actions], -1)
        values = torch.min(*(critic(pair)[:, 0] for critic in self.critics))
        self._step(actor, (temperature * log_probs - values).mean())
        self._step(tuner, -(self.log_temperature.exp() * (log_probs.detach() - ACTION)).mean())
        with torch.no_grad():
            for average, live in zip(self.averages.parameters(), self.critics.parameters(), strict=True):
                average.lerp_(live, 0.005)

    @staticmethod
    def _step(optimiser: torch.optim.Optimizer, loss: Tensor | int) -> None:
        assert isinstance(loss, Tensor)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def torchrl_sac(buffer: ReplayBuffer, batch_size: int, width: int, generator: torch.Generator) -> Callable[[], None]:
    """One update with torchrl's ``SACLoss`` and ``SoftUpdate``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensordict import TensorDict
        from tensordict.nn import NormalParamExtractor, TensorDictModule
        from torchrl.data import Bounded
        from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
        from torchrl.objectives import SACLoss, SoftUpdate

        class Value(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = mlp(STATE + ACTION, width, 1)

            def forward(self, observation: Tensor, action: Tensor) -> Tensor:
                value: Tensor = self.layers(torch.cat([observation, action], -1))
                return value

        spec = Bounded(-1, 1, (ACTION,))
        network = nn.Sequential(mlp(STATE, width, 2 * ACTION), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=spec,
            distribution_class=TanhNormal,
        )
        value = ValueOperator(Value(), in_keys=["observation", "action"])
        loss = SACLoss(actor, value, num_qvalue_nets=2)
        loss.make_value_estimator(gamma=0.99)
        averages = SoftUpdate(loss, tau=0.005)
        optimiser = torch.optim.Adam(loss.parameters(), lr=3e-4)

    def update() -> None:
        batch = buffer.sample(batch_size, generator=generator)
        done = batch.terminated[:, None]
        data = TensorDict(
            {
                "observation": batch.states,
                "action": batch.actions,
                "next": {
                    "observation": batch.next_states,
                    "reward": batch.rewards[:, None],
                    "done": done,
                    "terminated": done,
                },
            },
            batch_size=[batch_size],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            terms = loss(data)
        (terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]).backward()
        optimiser.step()
        optimiser.zero_grad()
        averages.step()

    return update


def theater_comparison() -> Comparison:
    """An edit that is taken back, against a deep copy of the model that is edited instead."""
    model = starter().model
    targets = attention_targets(model)
    before = targets[0].matrix()
    edited = sum(target.matrix().nbytes for target in targets)
    copied = sum(parameter.nbytes for parameter in model.parameters())

    def theater() -> None:
        with SurgicalTheater(model, targets):
            for target in targets:
                target.write(target.matrix() + 1)

    def deep_copy() -> None:
        edited = copy.deepcopy(model)
        for target in attention_targets(edited):
            target.write(target.matrix() + 1)

    theater()
    difference = float((targets[0].matrix() - before).abs().max())
    return Comparison(
        benchmark="theatre",
        case="starter, all attention projections",
        ways={OURS: theater, "copy.deepcopy": deep_copy},
        agreement={"weights after": require_equal("weights", difference, at_most=0.0)},
        # Saved, edited and put back; a copy is made and edited.
        ideal_seconds=bandwidth_seconds(6 * edited, (OURS,))
        | bandwidth_seconds(2 * copied + 2 * edited, ("copy.deepcopy",)),
    )


def sampler_comparison(*, rows: int, batch_size: int = 16) -> Comparison:
    """Drawing batches of (dataset, row) from eight datasets against a shuffling DataLoader over as many rows."""
    draws = rows // 2
    loader: DataLoader[int] = DataLoader(range(rows), batch_size=batch_size, shuffle=True)  # type: ignore[arg-type]

    def ours() -> None:
        sampler = MixtureSampler({str(number): rows // 8 for number in range(8)}, seed=0)
        for _ in range(draws):
            sampler.draw()

    def plain() -> None:
        for number, _ in enumerate(loader):
            if (number + 1) * batch_size >= draws:
                break

    return Comparison(
        benchmark="mixture sampler",
        case=f"batches of {batch_size} out of {rows:,} rows",
        ways={OURS: ours, "DataLoader": plain},
        units=dict.fromkeys((OURS, "DataLoader"), draws / batch_size),
    )
