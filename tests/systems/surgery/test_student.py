from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from preceptor.systems.surgery.flops import flops_per_token
from preceptor.systems.surgery.student import knowledge, next_token_logits, save_student, window_losses, write
from preceptor.systems.surgery.text import character_tokenizer
from tests.systems.surgery.small import CPU, small_student


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_weights_come_from_the_seed_alone(architecture: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (small_student(architecture=architecture, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_nanogpts_configuration_has_its_size() -> None:
    # nanoGPT says 0.80M for 4 layers, 4 heads, width 128 and 65 characters, without positions; ours has biases too.
    student = small_student(vocab_size=65, num_layers=4, num_heads=4, width=128, block_size=64)
    without_biases = sum(parameter.numel() for parameter in student.parameters() if parameter.ndim == 2)
    assert without_biases - 64 * 128 == 4 * 12 * 128**2 + 65 * 128 == 794_752


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_flops_are_those_of_the_matrix_products(architecture: str) -> None:
    """Counted by torch itself, which knows nothing of our formula; it counts attention without causality."""
    from torch.utils.flop_counter import FlopCounterMode

    student = small_student(architecture=architecture, width=32, num_layers=3)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        next_token_logits(student, tokens)
    attention = 2 * 3 * 32 * 16  # layers · width · context, twice what causality leaves, for scores and mixing
    expected = counter.get_total_flops() / 16 - attention
    # Llama's rotary angles are a small matrix product of their own
    assert flops_per_token(student, context=16) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("length", [49, 44, 10])
def test_knowledge_predicts_every_token_once(length: int) -> None:
    # To catch: the last, shorter block left out.
    student = small_student()
    tokens = torch.randint(7, (length,), generator=torch.Generator().manual_seed(0))
    nats, hits, entropies = [], 0, []
    for start in range(0, length - 1, 16):
        block = tokens[start : start + 17]
        logits = next_token_logits(student, block[None, :-1]).detach()[0]
        for row, target in zip(logits, block[1:], strict=True):
            log_probs = row.log_softmax(-1)
            nats.append(-log_probs[target].item())
            entropies.append(-(log_probs.exp() * log_probs).sum().item())
            hits += int(row.argmax() == target)
    assert len(nats) == length - 1
    found = knowledge(student, tokens, block_size=16)
    assert found.cross_entropy == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert found.entropy == pytest.approx(sum(entropies) / len(nats), rel=1e-5)
    assert found.accuracy == hits / len(nats)


def test_window_losses_are_the_means_of_each_row() -> None:
    student = small_student()
    windows = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(0))
    expected = [F.cross_entropy(next_token_logits(student, row[None, :-1])[0], row[1:]).item() for row in windows]
    assert window_losses(student, windows).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_writing_draws_by_inversion_without_a_cache(architecture: str) -> None:
    # To catch: the distribution of the position before, and a strict inequality the wrong way round.
    student = small_student(architecture=architecture)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(7, (3, 4), generator=generator)
    noise = torch.rand(3, 8, dtype=torch.float64, generator=generator)
    written = write(student, prompts, noise)
    for row in range(3):
        text = prompts[row].tolist()
        for step in range(8):
            probs = next_token_logits(student, torch.tensor([text]))[0, -1].detach().double().softmax(-1).tolist()
            cumulative, token = probs[0], 0
            while cumulative <= noise[row, step] and token < 6:
                token += 1
                cumulative += probs[token]
            text.append(token)
        assert written[row].tolist() == text[4:]


def test_written_tokens_follow_the_distribution() -> None:
    student = small_student()
    prompts = torch.full((4000, 1), 3)
    noise = torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(write(student, prompts, noise)[:, 0], minlength=7) / 4000
    probs = next_token_logits(student, prompts[:1])[0, -1].softmax(-1).detach()
    assert (shares - probs).abs().max() < 4 * math.sqrt(0.25 / 4000)  # four standard errors


def test_a_saved_student_is_a_folder_of_transformers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("abcdefg", context_length=16)
    student = small_student()
    save_student(student, tokenizer, tmp_path)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("gabe", add_special_tokens=False)["input_ids"]])
    assert tokens.tolist() == [[6, 0, 1, 4]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(CPU)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, next_token_logits(student, tokens), atol=1e-6)
