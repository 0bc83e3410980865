"""The losses of an update: their gradients against plain ones, and against what must not change them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import PPOOptions
from preceptor.systems.curriculum.loss import (
    Documents,
    Experience,
    accumulate_by_dataset,
    accumulate_cross_entropy,
    accumulate_ppo,
    policy_loss,
)
from preceptor.systems.curriculum.policy import (
    Prompt,
    generate_rollouts,
    rollout_distributions,
    rollout_log_probs,
    rollout_sampling,
)
from preceptor.systems.curriculum.sums import Sums
from preceptor.systems.curriculum.value_network import build_value_network
from tests.systems.curriculum.made import rollouts_from

SAMPLING_TEMPERATURE = 0.8
BASE = PPOOptions(kl_place="none", temperature=SAMPLING_TEMPERATURE)


def gradients(lm: LanguageModel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in lm.trainable_parameters().items()}
    lm.model.zero_grad(set_to_none=True)
    return found


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    scale = max(float(tensor.abs().max()) for tensor in second.values())
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) <= tolerance * scale, name


@pytest.fixture
def experience(tiny: LanguageModel) -> Experience:
    """Six continuations of unequal prompts; some end early."""
    prompts = [Prompt("a", (0, 30, 31, 32), ()), Prompt("b", (0, 40), ()), Prompt("b", (0, 50, 51), ())]
    rollouts = generate_rollouts(
        tiny,
        prompts,
        group_size=2,
        num_tokens=5,
        sampling=rollout_sampling(tiny, SAMPLING_TEMPERATURE),
        generator=torch.Generator().manual_seed(0),
    )
    lengths = torch.tensor([5, 2, 5, 4, 1, 3])[:, None]
    rollouts = replace(rollouts, mask=torch.arange(5) < lengths)
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(6, 1, generator=generator) * rollouts.mask
    return Experience(
        rollouts=rollouts,
        advantages=advantages,
        returns=torch.randn(6, 5, generator=generator),
        values=torch.zeros(6, 5),
        reference_log_probs=rollouts.log_probs + 0.3 * torch.randn(6, 5, generator=generator),
    )


def ppo(
    lm: LanguageModel, experience: Experience, options: PPOOptions, **changes: Any
) -> tuple[dict[str, Tensor], Sums]:
    sums = Sums()
    arguments: dict[str, Any] = {
        "sampling": rollout_sampling(lm, SAMPLING_TEMPERATURE),
        "kl_coefficient": 0.5,
        "value_network": None,
        "reference_model": lm,
        "micro_batch_size": 6,
        "bf16": False,
    } | changes
    accumulate_ppo(lm, experience, options=options, sums=sums, **arguments)
    return gradients(lm), sums


def reinforce_gradient(lm: LanguageModel, experience: Experience, weights: Tensor) -> dict[str, Tensor]:
    """Gradient of −Σ weight · advantage · ln π(token), token by token from the model's own logits."""
    loss = torch.zeros(())
    for row, prompt in enumerate(experience.rollouts.prompts):
        tokens = experience.rollouts.tokens[row].tolist()
        logits = lm.model(torch.tensor([[*prompt.tokens, *tokens]])).logits[0]
        never = {0, 2} | set(range(logits.shape[-1])) - set(lm.tokenizer.get_vocab().values())  # control, and no token
        allowed = logits.index_fill(-1, torch.tensor(sorted(never)), -torch.inf) / SAMPLING_TEMPERATURE
        for place, token in enumerate(tokens):
            if experience.rollouts.mask[row, place]:
                log_prob = allowed[len(prompt.tokens) - 1 + place].log_softmax(-1)[token]
                loss = loss - weights[row] * experience.advantages[row, place] * log_prob
    loss.backward()
    return gradients(lm)


@pytest.mark.parametrize("loss", ["clip", "cispo", "reinforce", "gspo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_where_nothing_has_moved_every_loss_has_the_gradient_of_reinforce(
    tiny: LanguageModel, experience: Experience, loss: str, aggregation: str
) -> None:
    options = BASE.model_copy(update={"loss": loss, "aggregation": aggregation})
    ours, sums = ppo(tiny, experience, options)
    lengths = experience.rollouts.mask.sum(1)
    if loss == "gspo" or aggregation == "sequence_mean":
        weights = 1 / (6 * lengths)
    else:
        weights = torch.full((6,), 1 / float(lengths.sum()) if aggregation == "token_mean" else 1 / 30)
    assert_close(ours, reinforce_gradient(tiny, experience, weights), tolerance=1e-4)
    assert sums.means()["old_policy_kl"] == pytest.approx(0, abs=1e-8)
    assert sums.means()["clip_fraction"] == 0


@pytest.mark.parametrize("kl_place", ["none", "loss_k2", "loss_k3", "loss_exact"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_the_gradient_does_not_depend_on_the_micro_batch(
    tiny: LanguageModel, experience: Experience, kl_place: str, aggregation: str
) -> None:
    reference = tiny.frozen_copy()
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    options = BASE.model_copy(update={"kl_place": kl_place, "aggregation": aggregation})
    whole, whole_sums = ppo(tiny, experience, options, reference_model=reference)
    parts, part_sums = ppo(tiny, experience, options, reference_model=reference, micro_batch_size=2)
    assert_close(parts, whole)
    for name, value in whole_sums.means().items():
        assert part_sums.means()[name] == pytest.approx(value, rel=1e-4), name


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p ln(p/q) a place, the suppressed tokens left out."""
    return (p.exp() * (p - q).masked_fill(p.isinf(), 0.0)).sum(-1)


@pytest.mark.parametrize("kl_place", ["loss_k2", "loss_k3", "loss_exact"])
def test_the_kl_in_the_loss_pulls_towards_the_reference(
    tiny: LanguageModel, experience: Experience, kl_place: str
) -> None:
    """With zero advantages, steps along −gradient lessen the estimate of the KL that the option names."""
    reference = tiny.frozen_copy()
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    sampling, mask = rollout_sampling(tiny, SAMPLING_TEMPERATURE), experience.rollouts.mask

    @torch.no_grad()
    def divergence() -> float:
        ours, theirs = (rollout_log_probs(lm, experience.rollouts, sampling) for lm in (tiny, reference))
        if kl_place == "loss_exact":
            p, q = (rollout_distributions(lm, experience.rollouts, sampling) for lm in (tiny, reference))
            return float(exact_kl(p, q)[mask].mean())
        difference = (ours - theirs)[mask]
        k2, k3 = difference.square() / 2, (-difference).exp() - 1 + difference
        return float((k2 if kl_place == "loss_k2" else k3).mean())

    with torch.no_grad():
        reference_log_probs = rollout_log_probs(reference, experience.rollouts, sampling)
    still = replace(experience, advantages=torch.zeros(6, 5), returns=None, reference_log_probs=reference_log_probs)
    before = divergence()
    for _ in range(20):
        found, sums = ppo(tiny, still, BASE.model_copy(update={"kl_place": kl_place}), reference_model=reference)
        with torch.no_grad():
            for name, parameter in tiny.trainable_parameters().items():
                parameter.sub_(0.02 * found[name])
    assert divergence() < 0.8 * before
    # The coefficient of the helper is ½, and the policy loss is 0.
    found, sums = ppo(tiny, still, BASE.model_copy(update={"kl_place": kl_place}), reference_model=reference)
    assert sums.means()["policy_loss"] == pytest.approx(0.5 * divergence(), rel=1e-3)


def test_a_row_whose_reward_was_not_finite_teaches_nothing(tiny: LanguageModel, experience: Experience) -> None:
    lost = torch.tensor([False, False, True, False, False, False])
    advantages = experience.advantages.masked_fill(lost[:, None], float("nan"))
    emptied = replace(experience, rollouts=experience.rollouts.without(lost), advantages=advantages)
    kept = experience.at((~lost).nonzero()[:, 0])
    for aggregation in ("token_mean", "sequence_mean"):
        options = BASE.model_copy(update={"aggregation": aggregation})
        assert_close(ppo(tiny, emptied, options)[0], ppo(tiny, kept, options)[0])


def test_the_value_network_learns_its_targets_and_leaves_the_policy_alone(
    tiny: LanguageModel, experience: Experience
) -> None:
    network = build_value_network(tiny, kind="small", width=64, num_layers=1, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    returns = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.5, 0.5])[:, None].expand(6, 5)  # the prompt decides
    still = replace(experience, advantages=torch.zeros(6, 5), returns=returns)
    losses = []
    for _ in range(60):
        found, sums = ppo(tiny, still, BASE.model_copy(update={"value_clip_epsilon": 0.0}), value_network=network)
        assert max(float(tensor.abs().max()) for tensor in found.values()) == 0.0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sums.means()["value_loss"])
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("value_clip_epsilon", [0.0, 0.05])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_value_loss_is_a_mean_over_the_tokens_of_the_minibatch(
    tiny: LanguageModel, experience: Experience, value_clip_epsilon: float, micro_batch_size: int, aggregation: str
) -> None:
    """½ (V − R)² of what counts, or the larger of that and its clipped form, whatever the policy's aggregation is."""
    network = build_value_network(tiny, kind="small", width=64, num_layers=1, seed=0)
    old = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    options = BASE.model_copy(update={"value_clip_epsilon": value_clip_epsilon, "aggregation": aggregation})
    _, sums = ppo(
        tiny, replace(experience, values=old), options, value_network=network, micro_batch_size=micro_batch_size
    )
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    values, returns, mask = network(experience.rollouts), experience.returns, experience.rollouts.mask
    assert returns is not None
    total, num_clipped = torch.zeros(()), 0
    for row, place in mask.nonzero().tolist():
        value, target, before = values[row, place], returns[row, place], old[row, place]
        error = (value - target) ** 2
        if value_clip_epsilon:
            near = torch.minimum(torch.maximum(value, before - value_clip_epsilon), before + value_clip_epsilon)
            num_clipped += bool((near - target) ** 2 > error)
            error = torch.maximum(error, (near - target) ** 2)
        total = total + error / 2
    (total / mask.sum()).backward()
    assert num_clipped > 0 or not value_clip_epsilon
    assert sums.means()["value_loss"] == pytest.approx(float(total.detach()) / int(mask.sum()), rel=1e-5)
    for ours, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-4)


def one_token(ratios: list[float], advantages: list[float]) -> tuple[Tensor, Experience]:
    """Rows of one token whose probability has changed by ``ratios``."""
    rollouts = replace(rollouts_from([[5]] * len(ratios)), log_probs=torch.full((len(ratios), 1), -1.0))
    log_probs = (torch.tensor(ratios)[:, None].log() - 1).requires_grad_()
    return log_probs, Experience(rollouts, torch.tensor(advantages)[:, None], None, None, torch.zeros(len(ratios), 1))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # min(ρ A, clip(ρ, 0.9, 1.4) A) of (1.5, +2), (0.5, −1), (4, −2): 2.8, −0.9, −8
        ({}, -(2.8 - 0.9 - 8) / 3),
        # the last no lower than 3 A = −6
        ({"dual_clip": 3.0}, -(2.8 - 0.9 - 6) / 3),
        # min(ρ, 2) with gradient through ln π alone: 1.5 · 2 ln π₁ + 0.5 · (−1) ln π₂ + 2 · (−2) ln π₃
        ({"loss": "cispo", "max_ratio": 2.0}, None),
    ],
    ids=["clip", "dual clip", "cispo"],
)
def test_the_loss_has_the_bounds_that_the_options_name(options: dict[str, Any], expected: float | None) -> None:
    log_probs, part = one_token([1.5, 0.5, 4.0], [2.0, -1.0, -2.0])
    settings = {"clip_epsilon_low": 0.1, "clip_epsilon_high": 0.4, "dual_clip": 0.0} | options
    loss = policy_loss(log_probs, part, options=BASE.model_copy(update=settings))
    loss.backward()
    assert log_probs.grad is not None
    slopes = (3 * log_probs.grad).flatten().tolist()
    if expected is None:
        assert slopes == pytest.approx([-3.0, 0.5, 4.0])
    else:
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert slopes == pytest.approx([0.0, 0.0, 0.0 if options else 8.0], abs=1e-5)


def test_a_sequence_is_clipped_as_one() -> None:
    """GSPO: ratio 3 of the only token and A = 2 give min(6, 1.4 · 2); ratio 0.5 and A = −1 give min(−0.5, −0.9)."""
    log_probs, part = one_token([3.0, 0.5], [2.0, -1.0])
    options = BASE.model_copy(update={"loss": "gspo", "clip_epsilon_low": 0.1, "clip_epsilon_high": 0.4})
    assert policy_loss(log_probs, part, options=options).item() == pytest.approx(-(2.8 - 0.9) / 2, rel=1e-5)


def test_the_weight_of_the_policy_loss_is_that_of_its_gradient(tiny: LanguageModel, experience: Experience) -> None:
    once, _ = ppo(tiny, experience, BASE)
    thrice, _ = ppo(tiny, experience, BASE.model_copy(update={"weight": 3.0}))
    assert_close(thrice, {name: 3 * gradient for name, gradient in once.items()})


@pytest.mark.parametrize("micro_batch_size", [2, 6])
def test_the_drift_is_that_from_the_policy_that_wrote(
    tiny: LanguageModel, experience: Experience, micro_batch_size: int
) -> None:
    """k3 of KL(old ‖ new): e^d − 1 − d with d = ln new − ln old at what the old one drew, the mean over tokens."""
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        new = rollout_log_probs(tiny, experience.rollouts, rollout_sampling(tiny, SAMPLING_TEMPERATURE))
    d = (new - experience.rollouts.log_probs)[experience.rollouts.mask].double()
    expected = float((d.exp() - 1 - d).mean())
    assert expected != pytest.approx(float(((-d).exp() - 1 + d).mean()), rel=0.05)
    _, sums = ppo(tiny, experience, BASE, micro_batch_size=micro_batch_size)
    assert sums.means()["old_policy_kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_cross_entropy_is_torchs_mean_over_what_counts(tiny: LanguageModel, micro_batch_size: int) -> None:
    tokens = torch.tensor([[0, 30, 31, 32], [0, 40, 0, 0], [0, 50, 51, 0]])
    lengths = [4, 2, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    documents = Documents(tokens, mask, torch.tensor([1, 0, 1]))
    sums = accumulate_cross_entropy(
        tiny, documents, weight=2.0, num_datasets=3, micro_batch_size=micro_batch_size, bf16=False
    )
    ours = gradients(tiny)
    losses = []
    for row, length in enumerate(lengths):
        logits = tiny.model(tokens[row : row + 1, :length]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[row, 1:length], reduction="sum"))
    (2.0 * sum(losses) / 6).backward()
    assert_close(ours, gradients(tiny))
    expected = [[float(losses[1].detach()), 1], [float((losses[0] + losses[2]).detach()), 5], [0, 0]]
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_bfloat16_is_near_float32(tiny: LanguageModel, experience: Experience) -> None:
    exact, _ = ppo(tiny, experience, BASE)
    mixed, _ = ppo(tiny, experience, BASE, bf16=True)
    assert_close(mixed, exact, tolerance=0.1)  # eight bits of mantissa


def test_gradients_by_dataset_add_up_to_that_of_the_batch(tiny: LanguageModel) -> None:
    tokens = torch.tensor([[0, 20, 30, 40], [0, 50, 60, 9], [0, 70, 80, 90]])
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True] * 4])
    documents = Documents(tokens, mask, torch.tensor([2, 0, 2]))
    arguments: dict[str, Any] = {"weight": 0.7, "num_datasets": 3, "micro_batch_size": 8, "bf16": False}
    sums = accumulate_cross_entropy(tiny, documents, **arguments)
    whole = gradients(tiny)
    parts, by_dataset = accumulate_by_dataset(tiny, documents, **arguments)
    torch.testing.assert_close(parts, sums)
    assert_close(gradients(tiny), whole)
    assert list(by_dataset) == [0, 2]
    # Of the mean loss of a dataset's tokens, without the weight: dataset 0 has 2 of the 8 that count, dataset 2 has 6.
    names = list(tiny.trainable_parameters())
    summed = [0.7 * (2 * first + 6 * second) / 8 for first, second in zip(by_dataset[0], by_dataset[2], strict=True)]
    assert_close(dict(zip(names, summed, strict=True)), whole)
