"""Attention on a CPU: our kernel and PyTorch's, in float32 and at full precision, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from preceptor.errors import ModelError
from preceptor.lm.cpu import attention
from preceptor.lm.cpu.attention import CpuAttention
from preceptor.lm.cpu.kernels import kernel_library


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
        attention._PytorchAttention.apply(query, key, value, {"is_causal": True}).sum().backward()  # type: ignore[no-untyped-call]
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


@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_model_attends_through_it(has_kernel: bool, monkeypatch: pytest.MonkeyPatch, make_lm: Any) -> None:
    """Every layer of a model that calls PyTorch's attention, with and without logits; none of one that does not."""
    calls: list[int] = []
    if has_kernel and kernel_library() is None:
        pytest.skip("no C compiler here")
    if not has_kernel:
        monkeypatch.setattr(attention, "kernel_library", lambda: None)
    used = attention._CompiledAttention if has_kernel else attention._PytorchAttention
    forward = used.forward
    monkeypatch.setattr(used, "forward", staticmethod(lambda *args: (calls.append(1), forward(*args))[1]))
    tokens, keep = torch.tensor([[0, 5, 6]]), torch.ones(1, 3, dtype=torch.bool)
    for kind, expected in (("sdpa", 2), ("eager", 0)):
        lm = make_lm("llama", attention=kind)
        calls.clear()
        lm.forward(tokens, keep=keep)
        assert len(calls) == expected
        lm.chosen_log_probs(tokens, keep=keep, chosen=tokens[0])
        assert len(calls) == 2 * expected


# ---- attention.c ----------------------------------------------------------------------------------------------------

SIZES = [  # rows, heads, kept heads, queries, slots, width of a head
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 5, 4),
    (2, 4, 2, 49, 49, 24),  # one query over a block of every processor; a width of one vector and a half
    (1, 2, 1, 130, 130, 20),  # several blocks of queries and keys, all but the first few of them ragged
    (1, 2, 2, 96, 70, 8),  # more queries than keys
    (2, 1, 1, 30, 100, 64),
    (1, 2, 2, 64, 128, 80),  # whole blocks of keys
]
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def _only_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernel must not stand in for ours."""
    if kernel_library() is None:
        pytest.skip("no C compiler here")
    monkeypatch.delattr(attention, "_PytorchAttention")


def case(sizes: tuple[int, ...], *, seed: int = 0) -> Case:
    """Queries, keys, values and the slope of the output, laid out as a model has them: a token's heads side by side."""
    rows, heads, kept, queries, slots, width = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, queries, heads, width), (rows, slots, kept, width), (rows, slots, kept, width)
    parts = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in (*shapes, shapes[0])]
    return parts[0], parts[1], parts[2], parts[3]


def written_out(parts: Case, added: Tensor, *, scale: float | None = None) -> list[Tensor]:
    """Output and gradients of softmax(q·k·scale + added) v in float64; no weight at all where nothing is visible."""
    query, key, value = (part.double().requires_grad_() for part in parts[:3])
    group = query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("bhtd,bhsd->bhts", query, keys) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = (scores + added.double()).softmax(-1).nan_to_num(0)
    output = torch.einsum("bhts,bhsd->bhtd", weights, values)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), parts[3].double())]


def found(parts: Case, **options: Any) -> list[Tensor]:
    """The same by the kernel."""
    query, key, value = (part.detach().requires_grad_() for part in parts[:3])
    with CpuAttention():
        output = scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), parts[3].to(output.dtype))]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("output", "for query", "for key", "for value"), ours, expected, strict=True):
        largest = b.abs().max().clamp_min(1)  # sums of up to 130 products of numbers about 1 in float32
        torch.testing.assert_close(
            a.double() / largest, b / largest, atol=3e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("_only_the_kernel")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "causal, scaled"])
def test_the_kernel_is_the_formula(sizes: tuple[int, ...], kind: str) -> None:
    parts, (queries, slots) = case(sizes), sizes[3:5]
    visible = torch.ones(queries, slots, dtype=torch.bool)
    options: dict[str, Any] = {"scale": 0.7} if "scaled" in kind else {}
    if "causal" in kind:
        visible, options["is_causal"] = visible.tril(), True
    added = torch.zeros(queries, slots).masked_fill_(~visible, -math.inf)
    assert_equal(found(parts, **options), written_out(parts, added, scale=options.get("scale")))


@pytest.mark.usefixtures("_only_the_kernel")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("axes", ["ts", "hts", "1ts", "b1ts", "1hts", "bhts"])
@pytest.mark.parametrize("is_bool", [True, False])
def test_the_kernel_heeds_masks_of_every_shape(sizes: tuple[int, ...], axes: str, is_bool: bool) -> None:
    rows, heads, _, queries, slots, _ = sizes
    shape = [{"b": rows, "h": heads, "t": queries, "s": slots, "1": 1}[axis] for axis in axes]
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(shape, generator=generator) > 0.4
    visible[..., 0] = True
    mask = visible if is_bool else torch.randn(shape, generator=generator)
    added = torch.zeros(shape).masked_fill_(~visible, -math.inf) if is_bool else mask
    parts = case(sizes)
    assert_equal(found(parts, attn_mask=mask), written_out(parts, added))


def test_a_mask_is_padded_to_whole_blocks_of_queries() -> None:
    """The kernel reads whole vectors, also where the last query does not fill one."""
    for queries, padded in ((1, 48), (48, 48), (49, 96)):
        laid_out = attention.mask_for_kernel(torch.ones(2, 1, queries, 5))
        assert laid_out.shape == (2, 1, 5, padded)
        assert laid_out.is_contiguous()
        assert laid_out[..., :queries].eq(1).all()


@pytest.mark.usefixtures("_only_the_kernel")
def test_every_layer_gets_its_own_mask() -> None:
    """A mask is laid out once and then remembered; another one is not taken for it."""
    parts = case((1, 2, 2, 20, 20, 8))
    generator = torch.Generator().manual_seed(3)
    masks = [torch.randn(20, 20, generator=generator) for _ in range(3)]
    with CpuAttention():
        for mask in (masks[0], masks[0], masks[1], masks[2]):
            ours = scaled_dot_product_attention(*parts[:3], attn_mask=mask)
            torch.testing.assert_close(ours.double(), written_out(parts, mask)[0], atol=3e-6, rtol=0)


@pytest.mark.usefixtures("_only_the_kernel")
@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_blocks_that_are_hidden_are_passed_over(hidden: float) -> None:
    """Three texts in one row, the first of which all see: most blocks of 48 queries and 64 keys hold nothing."""
    parts = case((2, 4, 2, 300, 300, 24))
    text = torch.tensor([0] * 20 + [1] * 150 + [2] * 130)
    visible = ((text[None] == 0) | (text[None] == text[:, None])).tril()
    added = torch.zeros(300, 300).masked_fill_(~visible, -math.inf)
    mask = torch.zeros(300, 300).masked_fill_(~visible, hidden)
    assert_equal(found(parts, attn_mask=mask), written_out(parts, added))
    query, key, value, slope = (part.clone() for part in parts)
    key[:, :, 64:128] = value[:, :, 64:128] = math.nan  # a whole block of the second text's own keys
    output = found((query, key, value, slope), attn_mask=mask)[0]
    assert output[:, :, 170 + 22 :].isfinite().all(), "blocks of the third text's queries alone saw the second's keys"


@pytest.mark.usefixtures("_only_the_kernel")
def test_a_query_that_sees_nothing_gets_nothing() -> None:
    """0 and no gradient, as PyTorch has it; the others are as if it were not there."""
    parts = case((2, 2, 2, 60, 70, 8))
    visible = torch.rand(2, 1, 60, 70, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[0, 0, 7] = visible[1, 0, 55:] = False
    added = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)
    ours = found(parts, attn_mask=visible)
    query, key, value = (part.detach().requires_grad_() for part in parts[:3])
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    theirs = [output.detach(), *torch.autograd.grad(output, (query, key, value), parts[3])]
    lowest = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    assert_equal(found(parts, attn_mask=lowest), [part.double() for part in ours])  # a mask of Transformers' kind
    assert (ours[0][0, :, 7] == 0).all()
    assert (ours[1][1, :, 55:] == 0).all()
    assert_equal(ours, [part.double() for part in theirs])
    assert_equal(ours, [written_out(parts, added)[0], *(part.double() for part in theirs[1:])])


@pytest.mark.usefixtures("_only_the_kernel")
def test_scores_of_hundreds_do_not_overflow() -> None:
    query, key, value, slope = case((1, 2, 2, 90, 90, 8))
    parts = 30 * query, 10 * key, value, slope
    scores = (parts[0] @ parts[1].transpose(-1, -2)) / 8**0.5
    assert scores.max() > 500  # e⁸⁹ is no float32
    added = torch.zeros(90, 90).masked_fill_(~torch.ones(90, 90).tril().bool(), -math.inf)
    ours, expected = found(parts, is_causal=True), written_out(parts, added)
    for a, b in zip(ours, expected, strict=True):
        # float32 rounds a score of 1,000 to 6e-5, and a weight by as much of itself
        torch.testing.assert_close(a.double(), b, atol=2e-3 * float(b.abs().max()), rtol=0)


@pytest.mark.usefixtures("_only_the_kernel")
def test_what_is_not_finite_stays_where_it_can_be_seen() -> None:
    """A NaN query spoils its own output; a NaN key those that see it, and no earlier one."""
    for position, spoilt in ((0, [50]), (1, list(range(50, 60)))):
        parts = case((1, 1, 1, 60, 60, 8))
        parts[position][0, 0, 50, 3] = math.nan
        with CpuAttention():
            output = scaled_dot_product_attention(*parts[:3], is_causal=True)
        assert output[0, 0].isnan().any(-1).nonzero().flatten().tolist() == spoilt


@pytest.mark.usefixtures("_only_the_kernel")
def test_threads_and_layout_change_no_bit() -> None:
    """Every head is one thread's work, in one order; so a run on two cores repeats one on four."""
    parts = case((3, 4, 2, 100, 100, 24))
    expected = found(parts, is_causal=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = found(parts, is_causal=True)
    finally:
        torch.set_num_threads(before)
    query, key, value, slope = (part.contiguous() for part in parts)
    turned = query.transpose(-1, -2).contiguous().transpose(-1, -2), key, value, slope  # coordinates far apart
    for other in (threaded, found((query, key, value, slope), is_causal=True), found(turned, is_causal=True)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_a_kernel_of_one_thread_is_for_one_thread(monkeypatch: pytest.MonkeyPatch, narrow_kernels: Any) -> None:
    """Built without OpenMP, it would lose to PyTorch's kernel on several cores."""
    assert kernel_library() is None or kernel_library().preceptor_attention_is_threaded()
    assert not narrow_kernels.preceptor_attention_is_threaded()
    monkeypatch.setattr(attention, "kernel_library", lambda: narrow_kernels)
    before = torch.get_num_threads()
    try:
        for threads, expected in ((1, True), (2, False)):
            torch.set_num_threads(threads)
            assert attention.kernel_is_faster() is expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("_only_the_kernel")
def test_a_gradient_of_a_sum_may_be_one_number_for_all() -> None:
    """``sum`` hands down a slope without strides."""
    query, key, value = (part.detach().requires_grad_() for part in case((1, 2, 2, 9, 9, 4))[:3])
    with CpuAttention():
        scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    assert value.grad is not None
    # Weights of one query sum to 1: each of 9 queries gives each coordinate of the values a slope of 1 in all.
    torch.testing.assert_close(value.grad.sum(2), torch.full((1, 2, 4), 9.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q[0], k[0], v[0]),
        lambda q, k, v: (q, k, torch.cat([v, v], -1)),
        lambda q, k, v: (q[:, :, :0], k, v),
    ],
    ids=["float64", "three axes", "wider values", "no query"],
)
def test_what_the_kernel_does_not_know_is_pytorchs(change: Callable[..., Any]) -> None:
    parts = change(*case((2, 2, 2, 5, 5, 4))[:3])
    with CpuAttention():
        output = scaled_dot_product_attention(*parts)
    assert torch.equal(output, scaled_dot_product_attention(*parts))


def test_fewer_keys_than_queries_must_be_asked_for() -> None:
    with CpuAttention(), pytest.raises(RuntimeError, match="must match"):
        scaled_dot_product_attention(*case((2, 4, 2, 5, 5, 4))[:3])


@pytest.mark.parametrize(
    "options",
    [{"attn_mask": torch.ones(1, 5)}, {"attn_mask": torch.ones(5, 1)}, {"attn_mask": torch.eye(5), "is_causal": True}],
    ids=["spread over queries", "spread over slots", "beside causality"],
)
def test_rarer_masks_are_pytorchs(options: dict[str, Any]) -> None:
    parts = case((2, 2, 2, 5, 5, 4))[:3]
    with CpuAttention():
        output = scaled_dot_product_attention(*parts, **options)
    assert torch.equal(output, scaled_dot_product_attention(*parts, **options))


@pytest.mark.usefixtures("_only_the_kernel")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_narrower_processors_get_the_same(
    sizes: tuple[int, ...], narrow_kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "kernel_library", lambda: narrow_kernels)
    parts, (queries, slots) = case(sizes), sizes[3:5]
    added = torch.zeros(queries, slots).masked_fill_(~torch.ones(queries, slots).tril().bool(), -math.inf)
    assert_equal(found(parts, is_causal=True), written_out(parts, added))
    mask = torch.randn(queries, slots, generator=torch.Generator().manual_seed(3))
    assert_equal(found(parts, attn_mask=mask), written_out(parts, mask))


@pytest.mark.usefixtures("_only_the_kernel")
def test_no_memory_is_an_error_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __getitem__(self, name: str) -> Callable[..., int]:
            return lambda *_: 1

    monkeypatch.setattr(attention, "kernel_library", Failing)
    with CpuAttention(), pytest.raises(ModelError, match="no memory for attention over 2 rows"):
        scaled_dot_product_attention(*case((2, 2, 2, 5, 5, 4))[:3])
