from __future__ import annotations

import pytest
import torch

from preceptor.errors import DataError, ModelError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.difficulty import document_losses


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
    with pytest.raises(ModelError, match="does not fit the context"):
        document_losses(starter, [[[5] * (starter.context_length + 1)]])
