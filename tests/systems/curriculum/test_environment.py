"""Datasets split in three, prompts, and the losses that measure difficulty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.errors import DataError, ModelError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import BUILTIN, DataOptions, DatasetOptions
from preceptor.systems.curriculum.environment import (
    MAX_CHARACTERS,
    builtin_documents,
    document_losses,
    draw_prompts,
    gradient_alignment,
    held_out_prompts,
    prompt_of,
    read_corpora,
)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_dataset_is_the_same_at_every_call_and_small(name: str) -> None:
    documents = builtin_documents(name)
    assert documents == builtin_documents(name)
    assert len(documents) >= 10
    assert all(documents)
    assert sum(map(len, documents)) <= MAX_CHARACTERS


def test_the_three_parts_share_no_document(tiny: LanguageModel, tmp_path: Path) -> None:
    # Every document has one word of its own.
    texts = [f"Ada: {number:03d} apples" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    options = DataOptions(
        root=str(tmp_path),
        datasets=(DatasetOptions(name="a", location="a.jsonl"),),
        validation_fraction=0.1,
        difficulty_fraction=0.2,
    )
    (corpus,) = read_corpora(options, tiny)
    parts = [
        [tiny.decode(block.tolist()) for block in (blocks[i] for i in range(len(blocks)))]
        for blocks in (corpus.train, corpus.difficulty, corpus.validation)
    ]
    assert sum(len(part) for part in parts) == 40
    assert len({text for part in parts for text in part}) == 40
    assert (len(parts[1]), len(parts[2])) == (9, 4)  # a fifth, to within a document, and a tenth


def test_missing_datasets_are_named_together(tiny: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    options = DataOptions(
        root=str(tmp_path),
        datasets=(DatasetOptions(name="a", location="absent.jsonl"), DatasetOptions(name="b", location="empty.txt")),
    )
    with pytest.raises(DataError) as caught:
        read_corpora(options, tiny)
    assert "absent.jsonl" in str(caught.value)
    assert "empty.txt" in str(caught.value)


def test_a_prompt_is_at_most_half_of_its_document() -> None:
    prompt = prompt_of("a", list(range(10)), prompt_tokens=3, continuation_tokens=4)
    assert (prompt.tokens, prompt.reference) == ((0, 1, 2), (3, 4, 5, 6))
    assert prompt_of("a", [0, 1, 2, 3], prompt_tokens=3, continuation_tokens=4).tokens == (0, 1)
    assert prompt_of("a", [0, 1], prompt_tokens=3, continuation_tokens=4).tokens == (0,)


def test_prompts_follow_the_weights(tiny: LanguageModel) -> None:
    datasets = (
        DatasetOptions(name="a", location="builtin:dialogue"),
        DatasetOptions(name="b", location="builtin:noise", target=False),
    )
    corpora = read_corpora(DataOptions(datasets=datasets), tiny)
    prompts = draw_prompts(
        corpora,
        torch.tensor([0.2, 0.8], dtype=torch.float64),
        num_prompts=500,
        prompt_tokens=6,
        continuation_tokens=4,
        generator=torch.Generator().manual_seed(0),
    )
    share = sum(prompt.dataset == "b" for prompt in prompts) / 500
    assert share == pytest.approx(0.8, abs=0.06)  # three standard errors of 0.018
    beginnings = {tuple(document[:6]) for document in corpora[0].documents}
    assert all(prompt.tokens in beginnings for prompt in prompts if prompt.dataset == "a")
    assert {
        prompt.dataset for prompt in held_out_prompts(corpora, num_prompts=5, prompt_tokens=6, continuation_tokens=4)
    } == {"a"}


# --- difficulty -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starter() -> LanguageModel:
    return load_language_model("starter", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def samples(starter: LanguageModel) -> list[list[list[int]]]:
    texts = [["Ice floats on water.", "Why?"], ["def f(x):\n    return x + 1\n"], ["a b a b a b a b", "The end", "zq"]]
    return [[[starter.begin_token, *starter.encode(text)] for text in group] for group in texts]


def test_losses_are_those_of_transformers_one_row_at_a_time(starter, samples):
    losses = document_losses(starter, samples)
    assert [len(values) for values in losses] == [2, 1, 3]
    for rows, values in zip(samples, losses, strict=True):
        for row, loss in zip(rows, values, strict=True):
            tokens = torch.tensor([row])
            with torch.no_grad():
                expected = starter.model(input_ids=tokens, labels=tokens).loss  # mean over all tokens but the first
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # float32, another order of sums


def test_batching_changes_nothing(starter, samples):
    together = document_losses(starter, samples)
    for one_by_one, values in zip(document_losses(starter, samples, max_tokens=1), together, strict=True):
        torch.testing.assert_close(one_by_one, values)


def test_no_gradient_and_no_change_of_the_model(starter, samples):
    before = {name: values.clone() for name, values in starter.model.state_dict().items()}
    assert not any(values.requires_grad for values in document_losses(starter, samples))
    assert all(torch.equal(values, before[name]) for name, values in starter.model.state_dict().items())


def test_what_has_no_loss_is_refused(starter, samples):
    for bad in ([], [[starter.begin_token]]):
        with pytest.raises(DataError, match="sample of dataset 1 must hold rows of two tokens or more"):
            document_losses(starter, [samples[0], bad])
    (shortest,) = document_losses(starter, [[samples[0][0][:2]]])
    assert shortest.shape == (1,)  # two tokens are enough
    with pytest.raises(ModelError, match="does not fit the context"):
        document_losses(starter, [[[5] * (starter.context_length + 1)]])


# --- gradients --------------------------------------------------------------------------------------------------------


def flat_gradient(lm: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    """Of the mean cross-entropy over the tokens, by Transformers' own forward pass."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = lm.model(torch.tensor([row])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
        count += len(row) - 1
    gradients = torch.autograd.grad(total / count, list(lm.trainable_parameters().values()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_alignment_is_the_product_of_gradients_under_adams_scale(tiny: LanguageModel) -> None:
    samples = [[[0, 20, 30, 40], [0, 50, 60]], [[0, 70, 80]]]
    targets = [[[0, 90, 100, 110]], [[0, 20, 30, 41]]]
    optimizer = torch.optim.AdamW(tiny.trainable_parameters().values(), lr=1e-3, betas=(0.9, 0.99))
    plain, losses = gradient_alignment(tiny, samples, targets)
    goal = (flat_gradient(tiny, targets[0]) + flat_gradient(tiny, targets[1])) / 2
    expected = [float(flat_gradient(tiny, rows) @ goal) for rows in samples]
    torch.testing.assert_close(plain, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-6)
    assert [len(values) for values in losses] == [2, 1]
    assert torch.equal(gradient_alignment(tiny, samples, targets, optimizer=optimizer)[0], plain)  # no moments yet
    # One step: v̂ = g² whatever the decay, so P = 1/(|g| + ε).
    gradient = flat_gradient(tiny, samples[0])
    weights = torch.nn.utils.parameters_to_vector(tiny.trainable_parameters().values()).detach().clone()
    start = 0
    for parameter in tiny.trainable_parameters().values():
        parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    optimizer.step()
    torch.nn.utils.vector_to_parameters(weights, tiny.trainable_parameters().values())
    scaled = goal / (gradient.abs() + 1e-8)
    expected = [float(flat_gradient(tiny, rows).double() @ scaled.double()) for rows in samples]
    measured = gradient_alignment(tiny, samples, targets, optimizer=optimizer)[0]
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float64), rtol=1e-2, atol=1e-3)
