"""The state of an arm: same start for all, a frozen model of its own storage, schedules, difficulty and documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preceptor.config import load_config
from preceptor.lm.model import LanguageModel
from preceptor.systems.curriculum.arms import Arm
from preceptor.systems.curriculum.config import (
    CurriculumConfig,
    DataOptions,
    DatasetOptions,
    DifficultyOptions,
    UpdateOptions,
)
from preceptor.systems.curriculum.learner import Learner, learning_rate_scale
from preceptor.systems.curriculum.material import Corpus, read_corpora
from preceptor.systems.curriculum.step import draw_documents, measure_difficulty
from tests.systems.curriculum.small import SETTINGS

CONFIG = load_config(CurriculumConfig, overrides=SETTINGS)


@pytest.fixture
def corpora(tiny: LanguageModel) -> list[Corpus]:
    return read_corpora(CONFIG.data, tiny)


def make(lm: LanguageModel, corpora: list[Corpus], arm: Arm, config: CurriculumConfig = CONFIG) -> Learner:
    initial = {name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()}
    return Learner(arm, config, lm, initial=initial, corpora=corpora)


def test_the_frozen_model_shares_no_storage_before_and_after_a_refresh(
    tiny: LanguageModel, corpora: list[Corpus]
) -> None:
    learner = make(tiny, corpora, Arm("x", "uniform"))
    live = {parameter.data_ptr() for parameter in tiny.model.parameters()}
    for _ in range(2):
        assert live.isdisjoint(parameter.data_ptr() for parameter in learner.frozen.model.parameters())
        kept = [parameter.clone() for parameter in learner.frozen.model.parameters()]
        with torch.no_grad():
            for parameter in tiny.model.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(a, b) for a, b in zip(kept, learner.frozen.model.parameters(), strict=True))
        learner.refresh_frozen()
        pairs = zip(tiny.model.parameters(), learner.frozen.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(parameter.requires_grad for parameter in learner.frozen.model.parameters())


def test_a_new_arm_puts_the_policy_back(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    initial = {name: parameter.detach().clone() for name, parameter in tiny.trainable_parameters().items()}
    with torch.no_grad():
        next(tiny.model.parameters()).add_(1.0)
    Learner(Arm("x", "uniform"), CONFIG, tiny, initial=initial, corpora=corpora)
    assert all(torch.equal(p, initial[name]) for name, p in tiny.trainable_parameters().items())


def test_only_an_arm_that_writes_has_a_value_network(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    assert make(tiny, corpora, Arm("x", "uniform")).value_network is None
    assert make(tiny, corpora, Arm("x", "uniform", writes=True)).value_network is not None
    grouped = CONFIG.model_copy(update={"ppo": CONFIG.ppo.model_copy(update={"advantage": "rloo"})})
    assert make(tiny, corpora, Arm("x", "uniform", writes=True), grouped).value_network is None


def test_an_arm_that_does_not_learn_has_learning_rate_zero(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    learner = make(tiny, corpora, Arm("x", "uniform", writes=True, learns=False))
    learner.set_learning_rate(1.0)
    assert [group["lr"] for group in learner.optimiser.param_groups] == [0.0, 0.0]


def test_warm_up_and_decay() -> None:
    linear = UpdateOptions(steps=6, warm_up_steps=2, decay="linear")
    assert [learning_rate_scale(step, linear) for step in range(1, 7)] == [0.5, 1, 1, 0.75, 0.5, 0.25]
    flat = linear.model_copy(update={"decay": "none", "warm_up_steps": 0})
    assert {learning_rate_scale(step, flat) for step in range(1, 7)} == {1.0}
    cosine = linear.model_copy(update={"decay": "cosine"})
    assert learning_rate_scale(5, cosine) == pytest.approx(0.5)  # half of the decay is done


def test_difficulty_is_the_frozen_models_loss_on_one_sample(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    learner = make(tiny, corpora, Arm("x", "learning_progress"))
    generator = torch.Generator().manual_seed(0)

    def measure(options: DifficultyOptions = CONFIG.difficulty) -> dict[str, list[float]]:
        row = measure_difficulty(learner, corpora, options, generator=generator, step=1)
        found: dict[str, list[float]] = row["difficulty"]
        return found

    first = measure()
    sample = [list(indices) for indices in learner.sample]
    assert [len(indices) for indices in sample] == [5, 5]
    for dataset, corpus in enumerate(corpora):  # by hand
        losses = []
        for index in sample[dataset]:
            row = corpus.difficulty[index]
            logits = learner.frozen.model(row[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).detach())
        assert first["mean"][dataset] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
        assert first["variance"][dataset] == pytest.approx(float(torch.stack(losses).var()), abs=1e-4)
    with torch.no_grad():
        next(tiny.model.parameters()).mul_(1.5)
    assert measure()["mean"] == first["mean"]  # the policy has moved, the frozen model has not
    learner.refresh_frozen()
    assert measure()["mean"] != first["mean"]
    assert learner.sample == sample
    measure(CONFIG.difficulty.model_copy(update={"resample": True}))
    assert learner.sample != sample


def test_the_weights_are_shares_of_tokens_however_long_the_rows(tiny: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "pears"}\n' * 100)
    datasets = (
        DatasetOptions(name="short", location="short.jsonl"),
        DatasetOptions(name="noise", location="builtin:noise"),
    )
    corpora = read_corpora(DataOptions(root=str(tmp_path), datasets=datasets, block_tokens=24), tiny)
    assert len(corpora[0].train[0]) < 6  # rows four times as short as the noise's
    learner = make(tiny, corpora, Arm("x", "static", weights=(3.0, 1.0)))
    for step in range(1, 41):
        documents = draw_documents(learner, corpora, num_tokens=step * 200)
        assert 0 <= learner.counts["tokens"] - step * 200 < 24
        assert (documents.token_mask.sum(1) >= 2).all()
    share = float(learner.tokens_since[0] / learner.tokens_since.sum())
    assert share == pytest.approx(0.75, abs=0.05)  # 8,000 tokens: about 85 draws of long rows
    assert int(learner.tokens_since.sum()) == learner.counts["tokens"]


def test_a_weight_of_zero_is_never_drawn(tiny: LanguageModel, corpora: list[Corpus]) -> None:
    learner = make(tiny, corpora, Arm("x", "static", weights=(1.0, 0.0)))
    documents = draw_documents(learner, corpora, num_tokens=2_000)
    assert set(documents.datasets.tolist()) == {0}
