"""What is measured while a method trains."""

from __future__ import annotations

import pytest
import torch

from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.config import DataOptions, DatasetOptions
from preceptor.systems.curriculum.environment import evenly_spaced_rows, read_corpora
from preceptor.systems.curriculum.evaluate import sample_texts, validation_losses


def test_validation_is_the_mean_over_tokens(tiny: LanguageModel) -> None:
    datasets = (
        DatasetOptions(name="a", location="builtin:dialogue"),
        DatasetOptions(name="b", location="builtin:noise", target=False),
    )
    corpora = read_corpora(DataOptions(datasets=datasets, block_tokens=32), tiny)
    losses = validation_losses(tiny, corpora, num_rows=4)
    rows = evenly_spaced_rows(corpora[0].validation, 4)
    assert len(rows) == 4
    total, count = 0.0, 0
    for row in rows:
        logits = tiny.model(torch.tensor([row])).logits[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
    assert losses["a"] == pytest.approx(total / count, abs=1e-5)


def test_samples_are_the_same_for_the_same_weights(tiny: LanguageModel) -> None:
    first = sample_texts(tiny, ["How much", "Ada:"], num_tokens=5, seed=1)
    assert first == sample_texts(tiny, ["How much", "Ada:"], num_tokens=5, seed=1)
    assert first != sample_texts(tiny, ["How much", "Ada:"], num_tokens=5, seed=2)
    assert sample_texts(tiny, ["How much"], num_tokens=0, seed=1) == []
