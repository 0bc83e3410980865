from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from preceptor.errors import ConfigError, ShapeError
from preceptor.lm.edit_targets import attention_targets
from preceptor.systems.surgery.rewards import window_losses
from preceptor.systems.surgery.sites import FEATURES, Sites, edited_targets
from tests.systems.surgery.small import small_model

WINDOWS = torch.randint(7, (4, 13), generator=torch.Generator().manual_seed(3))


def sites_of(model: PreTrainedModel, kind: str = "head_scale", *roles: str) -> Sites:
    targets = attention_targets(model, roles=roles or ("output",))  # type: ignore[arg-type]
    return Sites(model, targets, kind=kind, rank=3, max_factor=6.0)


def column(features: Tensor, name: str) -> list[float]:
    return features[:, FEATURES.index(name)].tolist()


def test_a_head_is_scaled_by_the_factor_to_the_power_of_its_number() -> None:
    model = small_model()
    sites = sites_of(model)
    before = [target.matrix().reshape(2, -1) for target in sites.targets]
    size = sites.apply_(torch.tensor([1.0, 0.0, -0.5, 0.0]))
    after = [target.matrix().reshape(2, -1) for target in sites.targets]
    torch.testing.assert_close(after[0][0], 6 * before[0][0])
    assert torch.equal(after[0][1], before[0][1])
    torch.testing.assert_close(after[1][0], before[1][0] / math.sqrt(6))
    assert size.relative_norms[0] == pytest.approx(5 * float(before[0][0].norm() / before[0].norm()), rel=1e-5)


@pytest.mark.parametrize("kind", ["head_scale", "singular_values"])
def test_an_edit_is_taken_back_by_its_opposite(kind: str) -> None:
    model = small_model(architecture="llama")
    sites = sites_of(model, kind)
    before = [target.matrix() for target in sites.targets]
    # Small enough that no singular value passes another, which would change places.
    action = 0.01 * torch.randn(sites.action_dim, generator=torch.Generator().manual_seed(0))
    sites.apply_(action)
    sites.apply_(-action)
    for target, matrix in zip(sites.targets, before, strict=True):
        torch.testing.assert_close(target.matrix(), matrix, rtol=1e-4, atol=1e-6)


def test_nothing_changes_at_zero() -> None:
    model = small_model()
    sites = sites_of(model)
    before = [target.matrix() for target in sites.targets]
    assert sites.apply_(torch.zeros(4)).max == 0
    assert all(torch.equal(target.matrix(), matrix) for target, matrix in zip(sites.targets, before, strict=True))


@pytest.mark.parametrize("kind", ["head_scale", "singular_values"])
def test_the_gradient_is_that_of_small_edits(kind: str) -> None:
    model = small_model().double()  # differences of float32 losses would be noise
    sites = sites_of(model, kind, "value", "output")
    for parameter in model.parameters():
        parameter.data.mul_(4)  # a random model hardly depends on its attention
    gradient = sites.gradient(WINDOWS)
    clean = [target.view.clone() for target in sites.targets]
    for site in (0, sites.action_dim - 1):
        losses = []
        for sign in (1, -1):
            logs = torch.zeros(sites.action_dim)
            logs[site] = sign * 1e-2
            sites.scale_(logs)
            losses.append(float(window_losses(model, WINDOWS).mean()))
            for target, copy in zip(sites.targets, clean, strict=True):
                target.view.copy_(copy)
        slope = (losses[0] - losses[1]) / 2e-2
        assert float(gradient[site]) == pytest.approx(slope, rel=0.02, abs=1e-5)  # matrices pass through float32


def test_features_show_which_head_was_scaled() -> None:
    model = small_model()
    sites = sites_of(model)
    before, loss = sites.features(WINDOWS)
    assert before.shape == (4, len(FEATURES))
    assert loss == pytest.approx(float(window_losses(model, WINDOWS).mean()), rel=1e-5)
    sites.scale_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    after, _ = sites.features(WINDOWS)
    change = torch.tensor(column(after, "norm_in_layer")) - torch.tensor(column(before, "norm_in_layer"))
    torch.testing.assert_close(change, torch.tensor([0.5, -0.5, 0.0, 0.0]), rtol=0, atol=1e-5)  # 1 less the mean 1/2
    change = torch.tensor(column(after, "norm_to_partner")) - torch.tensor(column(before, "norm_to_partner"))
    torch.testing.assert_close(change, torch.tensor([1.0, 0.0, 0.0, 0.0]), rtol=0, atol=1e-5)
    assert column(after, "spectrum") == pytest.approx(column(before, "spectrum"), abs=1e-5)  # scale does not matter
    assert column(after, "output") == [1.0] * 4
    assert column(after, "query") == [0.0] * 4
    assert column(after, "layer") == [0.0, 0.0, 1.0, 1.0]


def test_without_gradients_none_are_seen_and_parameters_keep_their_flags() -> None:
    model = small_model()
    frozen = next(model.parameters()).requires_grad_(False)
    sites = sites_of(model)
    blind, loss = sites.features(WINDOWS, gradients=False)
    seeing, same = sites.features(WINDOWS)
    assert column(blind, "gradient") == column(blind, "gradient_share") == [0.0] * 4
    assert any(column(seeing, "gradient"))
    assert loss == pytest.approx(same)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shared_value_heads_are_partners_of_their_group() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sites = sites_of(model)
    features, _ = sites.features(WINDOWS)
    values = attention_targets(model, roles=["value"])[0].matrix().reshape(2, -1).norm(dim=1).log()
    heads = attention_targets(model, roles=["output"])[0].matrix().reshape(4, -1).norm(dim=1).log()
    expected = heads - values[[0, 0, 1, 1]]
    torch.testing.assert_close(torch.tensor(column(features, "norm_to_partner")), expected)


def test_an_mlp_has_a_number_a_matrix_and_its_ends_are_told_apart() -> None:
    model = small_model()
    sites = Sites(model, edited_targets(model, ("output",), mlp=True), kind="head_scale", max_factor=2.0)
    heads = [(f"layer {layer} output", f"head {head}") for layer in (0, 1) for head in (1, 2)]
    mlps = [(f"layer {layer} mlp.{name}", "head 1") for layer in (0, 1) for name in ("c_fc", "c_proj")]
    assert sites.names == heads + mlps
    before = [target.matrix() for target in sites.targets]
    sites.apply_(torch.tensor([0.0] * 4 + [1.0, 0.0, 0.0, -1.0]))
    for index, factor in enumerate([1, 1, 2, 1, 1, 0.5]):
        torch.testing.assert_close(sites.targets[index].matrix(), factor * before[index])
    features, _ = sites.features(WINDOWS, gradients=False)
    assert column(features, "layer") == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert column(features, "place") == [0.0] * 4 + [0.0, 0.5] * 2
    assert column(features, "output") == [1.0] * 4 + [0.0] * 4
    assert len(edited_targets(model, ("output",), mlp=False)) == 2


def test_bad_arguments_are_named() -> None:
    model = small_model()
    with pytest.raises(ConfigError) as error:
        Sites(model, [], kind="scale", max_factor=1.0)
    assert len(error.value.faults) == 3
    sites = sites_of(model)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        sites.apply_(torch.zeros(3))
    with pytest.raises(ConfigError, match="squash"):
        sites.apply_(torch.full((4,), 1.5))
