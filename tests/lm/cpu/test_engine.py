"""The engine, with and without the compiled decode step, against Transformers' own forward, family by family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from preceptor.errors import ModelError
from preceptor.lm.cpu import engine
from preceptor.lm.cpu.engine import Engine, accelerate, probe_logits
from preceptor.lm.decode import Decoder, Generated
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling

ACCELERATED = ("llama", "gpt2", "qwen2", "qwen3", "mistral")
SAMPLING = Sampling(temperature=0.9, suppressed=(0, 1, 2))
MakeLM = Callable[..., LanguageModel]


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler."""
    monkeypatch.setattr(engine, "kernel_library", lambda: None)


def read(lm: LanguageModel, random_rows: list[list[int]], *, capture: nn.Module | None = None, **options: Any) -> Any:
    """Two rounds of reading and writing, ragged, with everything that they gave."""
    decoder = Decoder(lm, batch_size=3, capture=capture, **options)
    generator = torch.Generator().manual_seed(0)
    decoder.append(random_rows[:3])
    first = decoder.generate(5, sampling=SAMPLING, generator=generator)
    decoder.append(random_rows[3:])
    second = decoder.generate(4, sampling=SAMPLING, generator=generator)
    return decoder, first, second


def rows(random_tokens: Callable[[int], list[int]], lengths: tuple[int, ...] = (4, 9, 1, 5, 0, 7)) -> list[list[int]]:
    return [[*([0] if index < 3 else []), *random_tokens(length)] for index, length in enumerate(lengths)]


def assert_same(found: Generated, expected: Generated, *, tolerance: float = 2e-5) -> None:
    assert found.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=tolerance, rtol=tolerance)
    assert (found.captured is None) == (expected.captured is None)
    if found.captured is not None:
        torch.testing.assert_close(found.captured, expected.captured, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ACCELERATED)
@pytest.mark.parametrize("lengths", [(4, 9, 1, 5, 0, 7), (6, 6, 6, 3, 3, 3)], ids=["ragged", "even"])
@pytest.mark.parametrize("layer", [None, 0, -1])
def test_it_says_what_transformers_says(
    name: str, lengths: tuple[int, ...], layer: int | None, make_lm: MakeLM, random_tokens: Any
) -> None:
    lm = make_lm(name)
    capture = None if layer is None else lm.layers[layer]
    given = rows(random_tokens, lengths)
    decoder, *found = read(lm, given, capture=capture)
    slow_decoder, *expected = read(lm, given, capture=capture, use_engine=False)
    assert lm.has_engine
    assert decoder.uses_engine
    assert not slow_decoder.uses_engine
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ACCELERATED)
def test_it_does_so_without_a_compiler(name: str, make_lm: MakeLM, random_tokens: Any, without_compiler: None) -> None:
    lm, given = make_lm(name), rows(random_tokens)
    _, *found = read(lm, given, capture=lm.layers[0])
    _, *expected = read(lm, given, capture=lm.layers[0], use_engine=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "c_attn"])
def test_projections_are_captured_as_transformers_gives_them(module: str, make_lm: MakeLM, random_tokens: Any) -> None:
    lm, given = make_lm("gpt2" if module == "c_attn" else "qwen3"), rows(random_tokens)
    attention: Any = lm.layers[1].attn if module == "c_attn" else lm.layers[1].self_attn
    capture = getattr(attention, module)
    decoder, *found = read(lm, given, capture=capture)
    _, *expected = read(lm, given, capture=capture, use_engine=False)
    assert decoder.uses_engine
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_what_it_cannot_give_comes_from_transformers(make_lm: MakeLM, random_tokens: Any) -> None:
    """Another module's output, and an architecture that it does not know."""
    lm, given = make_lm(), rows(random_tokens)
    feed_forward: Any = lm.layers[0].mlp
    decoder, found, _ = read(lm, given, capture=feed_forward)
    assert not decoder.uses_engine
    assert found.captured is not None
    gemma = make_lm("gemma2")
    assert not gemma.has_engine
    assert not Decoder(gemma, batch_size=1).uses_engine
    with pytest.raises(ModelError, match=r"decodes in torch\.float32 alone, got torch\.bfloat16"):
        Decoder(gemma, batch_size=1, dtype=torch.bfloat16)


def test_a_model_that_says_something_else_is_not_taken_for_known(make_lm: MakeLM) -> None:
    """A Llama whose layers do more than a Llama's: the measurement at wrapping finds it."""
    lm = make_lm()
    output: Any = lm.layers[0].mlp.down_proj
    output.forward = lambda x: 1.5 * nn.functional.linear(x, output.weight, output.bias)
    assert not LanguageModel(lm.model, lm.tokenizer, name="other").has_engine


def silenced(make_lm: MakeLM, family: str, **changes: Any) -> LanguageModel:
    """A model whose feed-forward networks give nothing yet, so that what is in them does not show."""
    lm = make_lm(family, **changes)
    for layer in lm.layers:
        last: Any = layer.mlp.c_proj if family == "gpt2" else layer.mlp.down_proj
        last.weight.data.zero_()
    return LanguageModel(lm.model, lm.tokenizer, name="silenced")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("qwen2", {"hidden_act": "relu"}),
    ],
)
def test_another_activation_is_read_from_the_configuration(name: str, changes: dict[str, Any], make_lm: MakeLM) -> None:
    assert silenced(make_lm, name).has_engine
    assert not silenced(make_lm, name, **changes).has_engine


def test_agreement_is_measured_again_once_weights_have_moved(make_lm: MakeLM, random_tokens: Any) -> None:
    lm = silenced(make_lm, "llama")
    for layer in lm.layers:
        mlp: Any = layer.mlp
        mlp.act_fn = nn.GELU()  # unknown to the configuration, and hidden by the zeros behind it
    assert Decoder(lm, batch_size=1).uses_engine
    optimizer = torch.optim.SGD(lm.trainable_parameters().values(), lr=0.1)
    for _ in range(3):
        lm.model(input_ids=torch.tensor([random_tokens(9)])).logits.log_softmax(-1)[..., 7].sum().backward()
        optimizer.step()
    assert lm.engine() is None
    assert not Decoder(lm, batch_size=1).uses_engine
    (notice,) = lm.take_notices()
    assert notice.startswith("the fast path of silenced is switched off: its logits have come to differ")
    assert lm.take_notices() == []


def test_a_resumed_run_measures_when_the_first_would(make_lm: MakeLM) -> None:
    def move(lm: LanguageModel) -> None:
        with torch.no_grad():
            next(iter(lm.trainable_parameters().values())).add_(1e-3)

    def measured(lm: LanguageModel) -> bool:
        """Whether the next call for an engine measures."""
        before = lm._next_measurement
        assert lm.engine() is not None
        return lm._next_measurement != before

    lm, found = make_lm(), []
    for number in range(9):
        move(lm)
        resumed = make_lm()
        resumed.model.load_state_dict(lm.model.state_dict())
        resumed.load_engine_state(lm.engine_state())
        found.append(measured(lm))
        assert measured(resumed) == found[-1], number
        assert not measured(lm)
    assert found == [True, True, False, True, False, False, False, True, False]  # changes 1, 2, 4 and 8


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_adapter_is_part_of_the_weights(name: str, enabled: bool, make_lora: MakeLM, random_tokens: Any) -> None:
    lm, given = make_lora(name), rows(random_tokens)
    generator = torch.Generator().manual_seed(3)
    for parameter in lm.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    view = lm if enabled else lm.initial_model()
    decoder, *found = read(view, given)
    _, *expected = read(view, given, use_engine=False)
    assert decoder.uses_engine
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_weights_are_those_of_the_first_append(make_lm: MakeLM, random_tokens: Any) -> None:
    """An update between two decoders is seen, whoever made it."""
    lm, given = make_lm(), rows(random_tokens)
    read(lm, given)
    for parameter in lm.model.parameters():
        parameter.data.mul_(0.5)
    _, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_an_engine_reads_the_weights_at_its_first_pass(make_lm: MakeLM) -> None:
    """Making one costs nothing; what it has read, a later update does not change."""
    lm = make_lm()
    tokens = torch.tensor([[0, 7, 8, 9, 10]])

    def logits(engine: Engine) -> Tensor:
        return probe_logits(engine, tokens, num_layers=len(lm.layers))

    early = accelerate(lm.model)
    assert early is not None
    lm.layers[0].mlp.down_proj.weight.data.mul_(2.0)
    before = logits(early)
    torch.testing.assert_close(before, lm.model(tokens).logits[0], atol=1e-4, rtol=1e-4)
    lm.layers[0].mlp.down_proj.weight.data.mul_(2.0)
    assert torch.equal(logits(early), before)


def test_there_is_no_engine_for_an_unknown_architecture(make_lm: MakeLM) -> None:
    assert accelerate(make_lm("gemma2").model) is None


@pytest.mark.parametrize("through", ["argument", "autocast", "weights"])
def test_bfloat16_is_near_and_records_what_was_sampled(through: str, make_lm: MakeLM, random_tokens: Any) -> None:
    """The rounded weights in a float32 model are the reference: activations are not rounded more than products need."""
    given = rows(random_tokens)
    lm = make_lm(dtype=torch.bfloat16 if through == "weights" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=through == "autocast"):
        _, found, _ = read(lm, given, **({"dtype": torch.bfloat16} if through == "argument" else {}))
    rounded = make_lm()
    for parameter in rounded.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for index, prompt in enumerate(given[:3]):
        row = [*prompt, *found.tokens[index].tolist()]
        logits = rounded.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.9
        logits[:, :3] = -math.inf
        expected = logits.log_softmax(-1).gather(-1, found.tokens[index][:, None])[:, 0]
        # Logits reach 10 here, and the head and the prompt's products round to 8 bits.
        torch.testing.assert_close(found.log_probs[index], expected, atol=0.15, rtol=0)
    assert found.log_probs.dtype == torch.float32


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_shared_out_over_threads(threads: int, make_lm: MakeLM, random_tokens: Any) -> None:
    before = torch.get_num_threads()
    lm, given = make_lm(), rows(random_tokens)
    _, *expected = read(lm, given, capture=lm.layers[0], use_engine=False)
    torch.set_num_threads(threads)
    try:
        _, *found = read(lm, given, capture=lm.layers[0])
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 40, "head_dim": 10, "intermediate_size": 37}, {"head_dim": 64}, {"head_dim": 24}]
)
def test_widths_need_not_be_multiples_of_a_vector(shape: dict[str, int], make_lm: MakeLM, random_tokens: Any) -> None:
    lm, given = make_lm(**shape), rows(random_tokens)
    decoder, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    assert decoder.uses_engine
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_epsilons_are_the_models_own(make_lm: MakeLM, random_tokens: Any) -> None:
    """Large ones, so that a norm of heads, or any other, that had none would show."""
    lm, given = make_lm("qwen3", rms_norm_eps=0.5), rows(random_tokens)
    decoder, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    assert decoder.uses_engine
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_scores_far_below_zero_are_scores_like_others(make_lm: MakeLM, random_tokens: Any) -> None:
    """Queries of +8 and keys of −8 make every score about −180, which no empty slot may outweigh."""
    lm, given = make_lm("gpt2"), rows(random_tokens)
    attention: Any = lm.layers[0].attn
    attention.c_attn.bias.data[:32] += 8
    attention.c_attn.bias.data[32:64] -= 8
    _, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, tolerance=2e-3)  # float32 rounds 180 to 1e-5, and the model's weights are large


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activations_far_below_zero_vanish(name: str, make_lm: MakeLM, random_tokens: Any) -> None:
    """silu and GELU of −200 take e²⁰⁰ and more, which is no float32."""
    lm, given = make_lm(name), rows(random_tokens)
    for layer in lm.layers:
        feed_forward: Any = layer.mlp
        widened = feed_forward.gate_proj.weight if name == "llama" else feed_forward.c_fc.weight
        widened.data *= 300
    _, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    assert all(part.log_probs.isfinite().all() for part in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, tolerance=2e-3)  # float32 rounds activations of hundreds to 3e-5


def test_scores_far_apart_do_not_overflow(make_lm: MakeLM, random_tokens: Any) -> None:
    """Scores differ by hundreds, and e⁸⁹ is no float32: the largest of all slots is what is subtracted."""
    lm, given = make_lm("gpt2"), rows(random_tokens, (24, 39, 20, 5, 0, 7))
    for layer in lm.layers:
        attention: Any = layer.attn
        attention.c_attn.weight.data[:, :32] *= 40
    _, *found = read(lm, given)
    _, *expected = read(lm, given, use_engine=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs, tolerance=2e-3)  # float32 rounds scores of hundreds to 3e-5


@pytest.mark.parametrize("name", ACCELERATED)
def test_the_step_on_narrower_processors(
    name: str, narrow_kernels: Any, make_lm: MakeLM, random_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "kernel_library", lambda: narrow_kernels)
    lm, given = make_lm(name), rows(random_tokens)
    decoder, *found = read(lm, given, capture=lm.layers[-1])
    assert decoder._engine._decode_step._library is narrow_kernels
    _, *expected = read(lm, given, capture=lm.layers[-1], use_engine=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_attention_in_blocks_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scores at a time, grouped heads and a mask, against softmax(q·k/√d) v written out."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 5, 8, generator=generator)
    keys, values = (torch.randn(2, 2, 7, 8, generator=generator) for _ in range(2))
    visible = torch.rand(2, 1, 5, 7, generator=generator) > 0.4
    visible[..., 0] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill_(~visible, torch.finfo(torch.float32).min)
    scores = torch.einsum("bhtd,bhsd->bhts", queries, keys.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected: Tensor = torch.einsum("bhts,bhsd->bthd", weights, values.repeat_interleave(2, 1)).flatten(2)
    for limit in (2**24, 2 * 4 * 7 * 2, 1):
        monkeypatch.setattr(engine, "MAX_SCORES", limit)
        torch.testing.assert_close(
            engine.cached_attention(queries, keys, values, mask=mask), expected, atol=1e-5, rtol=1e-5
        )


def test_the_setting_of_products_is_left_as_it_was(make_lm: MakeLM, random_tokens: Any) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        read(make_lm(), rows(random_tokens))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_broken_weights_stay_broken(make_lm: MakeLM) -> None:
    """NaN in any matrix reaches the logits: nothing in the compiled decode step hides it."""
    for name in ("q_proj", "o_proj"):
        lm = make_lm()
        attention: Any = lm.layers[0].self_attn
        getattr(attention, name).weight.data[0, 0] = math.nan
        decoder = Decoder(lm, batch_size=1)
        decoder.append([[0]])
        assert decoder.next_log_probs.isnan().all()
