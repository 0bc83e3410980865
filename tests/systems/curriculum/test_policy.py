"""The policy by name or from scratch; rollouts: what is recorded is what was sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preceptor.lm import model as lm_model
from preceptor.lm.cpu.attention import kernel_is_faster
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum import policy
from preceptor.systems.curriculum.config import ModelOptions
from preceptor.systems.curriculum.policy import (
    Prompt,
    build_policy,
    end_token,
    forward_batch,
    generate_rollouts,
    rollout_distributions,
    rollout_log_probs,
    rollout_sampling,
)
from tests.systems.curriculum.made import rollouts_from

CPU = torch.device("cpu")
PROMPTS = [Prompt("a", (0, 30, 31, 32, 33), ()), Prompt("b", (0, 40), ())]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probs_are_those_of_a_pass_over_the_whole_row(tiny: LanguageModel, temperature: float) -> None:
    # Prompts of unequal length, so that an off-by-one in either direction would show.
    sampling = rollout_sampling(tiny, temperature)
    rollouts = generate_rollouts(
        tiny, PROMPTS, group_size=3, num_tokens=7, sampling=sampling, generator=torch.Generator().manual_seed(0)
    )
    assert [prompt.dataset for prompt in rollouts.prompts] == ["a", "a", "a", "b", "b", "b"]
    with torch.no_grad():
        log_probs = rollout_log_probs(tiny, rollouts, sampling)
        distributions = rollout_distributions(tiny, rollouts, sampling)
    torch.testing.assert_close(log_probs, rollouts.log_probs, atol=2e-5, rtol=0)  # float32, other order of sums
    for row, prompt in enumerate(rollouts.prompts):  # and by hand, without the mask of positions
        tokens = rollouts.tokens[row].tolist()
        logits = tiny.model(torch.tensor([[*prompt.tokens, *tokens]])).logits[0].detach()
        # Begin, pad and ids without a token are never drawn.
        nameless = set(range(logits.shape[-1])) - set(tiny.tokenizer.get_vocab().values())
        logits[:, sorted({0, 2} | nameless)] = -torch.inf
        expected = (logits / temperature).log_softmax(-1)
        for place, token in enumerate(tokens):
            value = float(expected[len(prompt.tokens) - 1 + place, token])
            assert float(log_probs[row, place]) == pytest.approx(value, abs=2e-5)
            whole = expected[len(prompt.tokens) - 1 + place]
            torch.testing.assert_close(distributions[row, place], whole, atol=2e-5, rtol=0)
            entropy = -sum(float(p) * float(p.log()) for p in whole.exp() if p > 0)
            assert float(rollouts.entropy[row, place]) == pytest.approx(entropy, abs=1e-4)


def test_nothing_counts_behind_the_end(tiny: LanguageModel) -> None:
    end = end_token(tiny)
    with torch.no_grad():  # a model that ends often
        tiny.model.get_input_embeddings().weight[end] *= 3
    rollouts = generate_rollouts(
        tiny,
        PROMPTS * 20,
        group_size=1,
        num_tokens=12,
        sampling=rollout_sampling(tiny, 1.0),
        generator=torch.Generator().manual_seed(1),
    )
    ended = 0
    for row in range(len(rollouts)):
        tokens = rollouts.tokens[row].tolist()
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert rollouts.continuation(row) == expected
        ended += len(expected) < 12
    assert ended > 0


def test_control_tokens_but_the_end_and_ids_without_a_token_are_never_drawn(tiny: LanguageModel) -> None:
    nameless = set(range(tiny.vocab_size)) - set(tiny.tokenizer.get_vocab().values())
    assert rollout_sampling(tiny, 1.0).suppressed == sorted({0, 2} | nameless)


def test_rows_and_their_predicting_places() -> None:
    padded, keep = rollouts_from([[5, 6], [7, 8]], prompts=[[0, 1, 2], [0]]).padded(filler=99)
    assert padded.tolist() == [[0, 1, 2, 5, 6], [0, 7, 8, 99, 99]]
    # 5 is predicted at place 2 and 6 at 3; 7 at 0 and 8 at 1.
    assert keep.long().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_a_packed_group_holds_its_prompt_once() -> None:
    """Prompt 0 1 2 of rows 0 and 2, prompt 0 7 8 of row 1, two drawn tokens each."""
    made = rollouts_from([[5, 6], [3, 4], [8, 9]], prompts=[[0, 1, 2], [0, 7, 8], [0, 1, 2]])
    batch = forward_batch(made, filler=99, may_pack=True)
    assert batch.tokens.tolist() == [[0, 1, 2, 5, 2, 8], [0, 7, 8, 3, 99, 99]]
    assert batch.keep.long().tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert batch.order.tolist() == [0, 2, 1]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 0, 0]]
    assert batch.visible is not None
    assert batch.visible[0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert batch.visible.any(-1).all(), "a token that attends to nothing"


def test_rows_are_packed_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_packed(prompts: list[list[int]], drawn: int = 2, *, may_pack: bool = True) -> bool:
        made = rollouts_from([[5] * drawn for _ in prompts], prompts=prompts)
        return forward_batch(made, filler=99, may_pack=may_pack).visible is not None

    long = [0, *range(3, 20)]
    assert is_packed([long, long])
    assert not is_packed([long, long], may_pack=False)
    assert not is_packed([long, long[:-1]])
    assert is_packed([[0, 1, 2]] * 2, 6)  # 14 tokens for 18
    assert not is_packed([[0, 1]] * 2, 20)  # 41 for 44
    monkeypatch.setattr(policy, "MAX_MASK_ENTRIES", 21**2 - 1)
    assert not is_packed([long, long])  # a row of 17 + 2 · 2
    monkeypatch.setattr(policy, "MAX_MASK_ENTRIES", 21**2)
    assert is_packed([long, long])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_rows_say_and_teach_what_plain_rows_do(
    temperature: float, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities, distributions and gradients, with rows of a group apart from each other."""
    prompts = [Prompt("a", (0, *range(30, 62)), ()), Prompt("b", (0, *range(40, 63)), ())]
    sampling = rollout_sampling(tiny, temperature)
    rollouts = generate_rollouts(
        tiny, prompts, group_size=4, num_tokens=30, sampling=sampling, generator=torch.Generator().manual_seed(0)
    ).at(torch.tensor([6, 0, 3, 4, 1, 7, 2]))
    slopes = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    found = []
    for packs in (True, False):
        monkeypatch.setattr(LanguageModel, "skips_hidden_slots", packs)
        assert (forward_batch(rollouts, filler=0, may_pack=packs).visible is not None) == packs
        log_probs = rollout_log_probs(tiny, rollouts, sampling)
        (log_probs * slopes).sum().backward()
        gradients = {name: parameter.grad for name, parameter in tiny.trainable_parameters().items()}
        tiny.model.zero_grad(set_to_none=True)
        found.append((log_probs.detach(), rollout_distributions(tiny, rollouts, sampling).detach(), gradients))
    (ours, our_distributions, our_gradients), (plain, distributions, gradients) = found
    torch.testing.assert_close(ours, rollouts.log_probs, atol=5e-5, rtol=0)  # float32, other order of sums
    torch.testing.assert_close(ours, plain, atol=5e-5, rtol=0)
    torch.testing.assert_close(our_distributions, distributions, atol=5e-5, rtol=0)
    for name, gradient in gradients.items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-4 * scale, rtol=0)


def test_what_packs_is_a_cpu_with_the_kernel(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.skips_hidden_slots == kernel_is_faster()
    monkeypatch.setattr(lm_model, "kernel_is_faster", lambda: False)
    assert not tiny.skips_hidden_slots
    monkeypatch.setattr(lm_model, "kernel_is_faster", lambda: True)
    assert tiny.skips_hidden_slots
    tiny.model.set_attn_implementation("eager")
    assert not tiny.skips_hidden_slots


def test_a_selection_of_rows_keeps_everything_together() -> None:
    made = rollouts_from([[5, 6], [7], [8, 9]], prompts=[[1], [2], [3]])
    made = replace(made, log_probs=-torch.arange(6.0).view(3, 2), entropy=torch.arange(6.0).view(3, 2) + 10)
    part = made.at(torch.tensor([2, 0]))
    assert part.log_probs.tolist() == [[-4, -5], [0, -1]]
    assert part.entropy.tolist() == [[14, 15], [10, 11]]
    assert made.at(torch.tensor([0, 1])).mask.long().tolist() == [[1, 1], [1, 0]]
    assert made.at(torch.tensor([1])).mask.long().tolist() == [[1, 0]]
    assert [prompt.tokens for prompt in part.prompts] == [(3,), (1,)]
    assert part.tokens.tolist() == [[8, 9], [5, 6]]
    assert made.without(torch.tensor([True, False, False])).mask.long().tolist() == [[0, 0], [1, 0], [1, 1]]


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_named_model_has_its_own_weights(tiny: LanguageModel, tiny_folder: Path) -> None:
    named = build_policy(ModelOptions(name=str(tiny_folder)), device=CPU, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(named.model.parameters(), tiny.model.parameters(), strict=True))


def test_from_scratch_the_seed_decides_and_the_tokenizer_stays(tiny: LanguageModel, tiny_folder: Path) -> None:
    options = ModelOptions(name=str(tiny_folder), from_scratch=True, width=64, num_layers=1)
    before = torch.get_rng_state()
    first, again, other = (build_policy(options, device=CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))
    assert (first.model.config.hidden_size, len(first.layers)) == (64, 1)
    assert first.model.config.intermediate_size == 96  # 48 · 64 / 32
    assert first.encode("How much?") == tiny.encode("How much?")
    assert first.vocab_size == tiny.vocab_size


def test_an_untouched_shape_is_the_named_models(tiny: LanguageModel, tiny_folder: Path) -> None:
    scratch = build_policy(ModelOptions(name=str(tiny_folder), from_scratch=True), device=CPU, seed=1)
    theirs = {name: parameter.shape for name, parameter in tiny.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in scratch.model.named_parameters()} == theirs
