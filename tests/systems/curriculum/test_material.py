"""Datasets cut in three, prompts out of documents, and what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.errors import DataError
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.choices import BUILTIN
from preceptor.systems.curriculum.config import DataOptions, DatasetOptions
from preceptor.systems.curriculum.material import draw_prompts, evenly, prompt_of, read_corpora
from preceptor.systems.curriculum.texts import MAX_CHARACTERS, builtin_documents
from preceptor.systems.curriculum.validation import held_out_prompts, macro_mean, validation_losses, write_samples


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


def test_validation_is_the_mean_over_tokens(tiny: LanguageModel) -> None:
    datasets = (
        DatasetOptions(name="a", location="builtin:dialogue"),
        DatasetOptions(name="b", location="builtin:noise", target=False),
    )
    corpora = read_corpora(DataOptions(datasets=datasets, block_tokens=32), tiny)
    losses = validation_losses(tiny, corpora, num_rows=4)
    rows = evenly(corpora[0].validation, 4)
    assert len(rows) == 4
    total, count = 0.0, 0
    for row in rows:
        logits = tiny.model(torch.tensor([row])).logits[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    assert losses["a"] == pytest.approx(total / count, abs=1e-5)
    assert macro_mean(losses, corpora) == losses["a"]


def test_samples_are_the_same_for_the_same_weights(tiny: LanguageModel) -> None:
    first = write_samples(tiny, ["How much", "Ada:"], num_tokens=5, seed=1)
    assert first == write_samples(tiny, ["How much", "Ada:"], num_tokens=5, seed=1)
    assert first != write_samples(tiny, ["How much", "Ada:"], num_tokens=5, seed=2)
    assert write_samples(tiny, ["How much"], num_tokens=0, seed=1) == []
