"""Attention on a CPU: PyTorch's own kernel, in float32 and at full precision, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from preceptor.lm import attention
from preceptor.lm.attention import CpuAttention


@pytest.fixture(autouse=True)
def _setting() -> Any:
    """Every test begins and ends at the setting that is the process's own."""
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def made(dtype: torch.dtype = torch.float64, *, heads: int = 2, kept: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, number, 5, 4) for number in (heads, kept, kept)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """One query at a time, one head at a time."""
    rows = []
    for b, h, t in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        weights = torch.stack([(query[b, h, t] * key[b, h, s]).sum() / math.sqrt(query.shape[-1]) for s in range(5)])
        weights = weights.masked_fill(~visible[t], -math.inf).softmax(0)
        rows.append((weights[:, None] * value[b, h]).sum(0))
    return torch.stack(rows).view_as(query)


@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients_are_those_of_the_formula(masked: bool) -> None:
    visible = torch.ones(5, 5).tril().bool()
    query, key, value = made()
    expected = by_hand(query, key, value, visible)
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (query, key, value), slopes)
    with CpuAttention():
        if masked:
            found = scaled_dot_product_attention(query, key, value, attn_mask=visible)
        else:
            found = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # float64
    for ours, theirs in zip(torch.autograd.grad(found, (query, key, value), slopes), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_bfloat16_is_computed_in_float32() -> None:
    """Rounding once, at the end, is all that parts it from the formula; gradients have the dtype of the inputs."""
    query, key, value = made(torch.bfloat16)
    with CpuAttention(), torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(query, key, value, is_causal=True)
    exact = by_hand(query.float(), key.float(), value.float(), torch.ones(5, 5).tril().bool())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.to(torch.bfloat16), atol=0, rtol=2**-8)
    assert all(part.dtype == torch.bfloat16 for part in torch.autograd.grad(found.sum(), (query, key, value)))


@pytest.mark.parametrize("how", ["by name", "by position", "all by name"])
def test_a_mask_is_heeded_however_it_is_given(how: str) -> None:
    """Models that are no part of Transformers give it by position."""
    query, key, value = made()
    visible = torch.ones(5, 5).tril().bool()
    expected = by_hand(query, key, value, visible)
    with CpuAttention():
        if how == "by name":
            found = scaled_dot_product_attention(query, key, value, attn_mask=visible)
        elif how == "by position":
            found = scaled_dot_product_attention(query, key, value, visible, 0.0, False)
            causal = scaled_dot_product_attention(query, key, value, None, 0.0, True)
            torch.testing.assert_close(causal, expected, atol=1e-12, rtol=0)
        else:
            found = scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=visible)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # float64


def test_a_learned_bias_gets_its_gradient() -> None:
    """The bias is added to the scores, so its slope is their slope, summed over rows and heads."""
    query, key, value = (part.detach() for part in made())
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    scores = query @ key.transpose(-1, -2) / math.sqrt(4) + bias
    (expected,) = torch.autograd.grad(((scores.softmax(-1) @ value) ** 2).sum(), bias)
    with CpuAttention():
        found = scaled_dot_product_attention(query, key, value, attn_mask=bias)
    (gradient,) = torch.autograd.grad((found**2).sum(), bias)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_an_added_mask_may_have_the_dtype_of_the_queries() -> None:
    """Transformers builds it in the model's own dtype, and the kernel wants that of its inputs."""
    query, key, value = made(torch.bfloat16)
    visible = torch.ones(5, 5).tril().bool()
    mask = torch.zeros(5, 5, dtype=torch.bfloat16).masked_fill_(~visible, torch.finfo(torch.bfloat16).min)
    with CpuAttention():
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    exact = by_hand(query.float(), key.float(), value.float(), visible)
    torch.testing.assert_close(found, exact.to(torch.bfloat16), atol=0, rtol=2**-8)
    assert mask.dtype == torch.bfloat16


def test_the_setting_survives_a_call_that_fails() -> None:
    before = torch.get_float32_matmul_precision()
    query, key, value = made(torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        with CpuAttention(), pytest.raises(RuntimeError):
            scaled_dot_product_attention(query, key[..., :3], value)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_what_needs_a_gradient_gets_one() -> None:
    query, key, value = made()
    with CpuAttention():
        found = scaled_dot_product_attention(query, key.detach(), value, is_causal=True)
        found.sum().backward()
        with torch.no_grad():
            assert not scaled_dot_product_attention(query, key, value, is_causal=True).requires_grad
    assert query.grad is not None
    assert value.grad is not None
    assert key.grad is None


def test_grouped_heads_and_a_scale_are_passed_on() -> None:
    query, key, value = made(heads=4, kept=2)
    arguments: dict[str, Any] = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    expected = scaled_dot_product_attention(query, key, value, **arguments)
    with CpuAttention():
        found = scaled_dot_product_attention(query, key, value, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("keys", "setting"), [(5, "highest"), (319, "highest"), (320, "medium")])
def test_the_kernel_runs_at_full_precision_both_ways(keys: int, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is seen from inside: at the kernel's forward call and when its backward pass begins."""
    seen: list[str] = []

    def kernel(*args: Tensor, **kwargs: Any) -> Tensor:
        output = scaled_dot_product_attention(*args, **kwargs)
        seen.append(torch.get_float32_matmul_precision())
        if output.requires_grad:
            output.register_hook(lambda _: seen.append(torch.get_float32_matmul_precision()))
        return output

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        query, key, value = (torch.randn(1, 1, keys, 64, requires_grad=True) for _ in range(3))
        attention._Attention.apply(query, key, value, {"is_causal": True}).sum().backward()  # type: ignore[no-untyped-call]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [setting, setting]


def test_dropout_is_left_to_pytorch() -> None:
    query, key, value = made(torch.float32)
    torch.manual_seed(0)
    expected = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(0)
    with CpuAttention():
        assert torch.equal(scaled_dot_product_attention(query, key, value, dropout_p=0.5), expected)


def test_a_model_attends_through_it(monkeypatch: pytest.MonkeyPatch, make_lm: Any) -> None:
    """Every layer of a model that calls PyTorch's attention, with and without logits; none of one that does not."""
    calls: list[int] = []
    forward = attention._Attention.forward
    monkeypatch.setattr(
        attention._Attention, "forward", staticmethod(lambda *args: (calls.append(1), forward(*args))[1])
    )
    tokens, keep = torch.tensor([[0, 5, 6]]), torch.ones(1, 3, dtype=torch.bool)
    for kind, expected in (("sdpa", 2), ("eager", 0)):
        lm = make_lm("llama", attention=kind)
        calls.clear()
        lm.forward(tokens, keep=keep)
        assert len(calls) == expected
        lm.chosen_log_probs(tokens, keep=keep, chosen=tokens[0])
        assert len(calls) == 2 * expected
