"""PPO's parts against torchrl's, on random masked tensors: values and gradients to 1e-6."""

from __future__ import annotations

import warnings

import pytest
import torch

from preceptor.objectives.advantages import gae
from preceptor.objectives.policy_gradient import ppo_clip_loss
from preceptor.objectives.value import value_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchrl on what it deprecates in itself
    pytest.importorskip("torchrl", reason="torchrl is an oracle of the test extra")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value.functional import generalized_advantage_estimate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
def test_gae(seed: int, discount: float, gae_lambda: float) -> None:
    """Rows of unequal length: torchrl gets each of them alone, as an episode that ends."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 8, (4,), generator=generator)
    mask = torch.arange(7) < lengths[:, None]
    ours = gae(rewards, values, mask=mask, discount=discount, gae_lambda=gae_lambda)
    for row, length in enumerate(lengths.tolist()):
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        next_values = torch.cat([values[row, 1:length], torch.zeros(1, dtype=torch.float64)])[:, None]
        theirs, _ = generalized_advantage_estimate(
            discount, gae_lambda, values[row, :length, None], next_values, rewards[row, :length, None], done
        )
        torch.testing.assert_close(ours[row, :length], theirs[:, 0], atol=1e-6, rtol=0)
        assert (ours[row, length:] == 0).all()


class Categorical(torch.nn.Module):
    """Logits that are parameters, one set a state, so that the gradient of a loss can be compared."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.logits[index]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_the_clipped_loss_and_its_gradient(seed: int, clip: float) -> None:
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
    from torch.distributions import Categorical as Distribution

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    old = (logits + 0.3 * torch.randn(12, 5, generator=generator, dtype=torch.float64)).log_softmax(-1)
    actions = torch.randint(0, 5, (12,), generator=generator)
    advantages = torch.randn(12, generator=generator, dtype=torch.float64)
    old_log_probs = old.gather(1, actions[:, None])[:, 0]

    policy = Categorical(logits.clone())
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(policy, in_keys=["index"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], out_keys=["action"], distribution_class=Distribution),
    )
    critic = TensorDictModule(torch.nn.Linear(1, 1, dtype=torch.float64), in_keys=["nothing"], out_keys=["state_value"])
    theirs = ClipPPOLoss(actor, critic, clip_epsilon=clip, entropy_bonus=False, normalize_advantage=False)
    sampled = TensorDict(
        {
            "index": torch.arange(12),
            "nothing": torch.zeros(12, 1, dtype=torch.float64),
            "action": actions,
            "action_log_prob": old_log_probs,
            "sample_log_prob": old_log_probs,
            "advantage": advantages[:, None],
            "value_target": torch.zeros(12, 1, dtype=torch.float64),
        },
        batch_size=[12],
    )
    expected = theirs(sampled)["loss_objective"]
    expected.backward()
    their_gradient = next(p.grad for name, p in theirs.named_parameters() if "logits" in name or p.shape == (12, 5))

    # Ours gets the same twelve actions as three rows, with a fourth column of junk that does not count.
    ours = logits.clone().requires_grad_()
    log_probs = ours.log_softmax(-1).gather(1, actions[:, None])[:, 0].view(3, 4)
    pad = lambda x: torch.nn.functional.pad(x.view(3, 4), (0, 1), value=float("nan"))  # noqa: E731
    mask = torch.arange(5) < torch.full((3, 1), 4)
    loss = ppo_clip_loss(
        pad(log_probs), pad(old_log_probs), pad(advantages), mask=mask, clip_epsilon_low=clip, clip_epsilon_high=clip
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, their_gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_value_loss(seed: int) -> None:
    from torchrl.objectives.utils import distance_loss

    generator = torch.Generator().manual_seed(seed)
    values, returns = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ours = value_loss(values, returns, mask=torch.ones(3, 4, dtype=torch.bool))
    assert ours.item() == pytest.approx(0.5 * distance_loss(values, returns, "l2").mean().item(), abs=1e-6)
