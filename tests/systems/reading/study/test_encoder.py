"""The policy's own model: its gradient against plain autograd, what moves and what does not, and the written query."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preceptor.data.articles.pairs import Pair
from preceptor.errors import NumericError
from preceptor.lm.embedding import HiddenStates, mean_vectors
from preceptor.lm.model import LanguageModel
from preceptor.runs.world import ALONE, World
from preceptor.systems.reading.config import ReadingConfig
from preceptor.systems.reading.study import encoder as encoder_module
from preceptor.systems.reading.study.encoder import Encoder, Learner, build_encoder_optimizer, copy_of_reader
from preceptor.systems.reading.study.features import (
    CaseBatch,
    Corpus,
    case_batch,
    channel_names,
    channel_scales,
    pool_features,
    written_queries,
)
from preceptor.systems.reading.study.loop import State, step
from preceptor.systems.reading.study.policy import PoolPolicy, read
from preceptor.systems.reading.study.pool import Case
from preceptor.systems.reading.study.scores import Scorer
from tests.systems.reading.small import language_model
from tests.systems.reading.study.small import article, planted_setup, pool

CASES = (Case(pool(), "asked", 0, (0, 2)), Case(pool(), "asked", 1, (1,)), Case(pool(), "seed", 1, (1, 2), seed=0))


def world(channels: tuple[str, ...] = ()) -> tuple[LanguageModel, Scorer, HiddenStates, Corpus, CaseBatch]:
    """A reader, what is known of texts in general, and the three cases as tensors."""
    lm = language_model()
    scorer, embedding = Scorer(lm), HiddenStates(lm, layer=-2)
    pairs: list[Pair] = [*article("bees").pairs, *article("salt").pairs]
    names = channel_names(channels)
    corpus = Corpus.of(pairs, scorer, embedding, query_tokens=3 if "written_query" in names else 0)
    features = {"small": pool_features(pool(), corpus, scorer, embedding, channels=names, query_tokens=3)}
    scales = channel_scales(features, [pool()])
    gains = [scorer.candidate_gains(case) for case in CASES]
    return lm, scorer, embedding, corpus, case_batch(CASES, features, scales, gains)


def fresh_encoder(corpus: Corpus) -> Encoder:
    lm = language_model()
    return Encoder(lm, HiddenStates(lm, layer=-2), corpus)


def test_before_training_the_vectors_are_the_readers() -> None:
    _, _, _, corpus, batch = world()
    found, _ = fresh_encoder(corpus).encode(CASES, batch)
    # Rows in other batches: float32 sums in another order, over deviations of some hundredths.
    torch.testing.assert_close(found.queries, batch.queries, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.keys, batch.keys, atol=1e-4, rtol=1e-4)
    assert found.query_channels is batch.query_channels


def weights_gradient(loss: torch.Tensor, lm: LanguageModel) -> dict[str, torch.Tensor]:
    loss.backward()
    return {n: p.grad.clone() for n, p in lm.trainable_parameters().items() if p.grad is not None}


def reading_loss(batch: CaseBatch) -> torch.Tensor:
    """Minus the log-probability of reading candidates 2 and 0 of every case."""
    policy = PoolPolicy(batch.queries.shape[-1], num_channels=1, num_rounds=1, cosine_scale=torch.tensor([0.0, 0.3]))
    imposed = torch.tensor([2, 0]).expand(len(batch), 1, 2)
    return -read(policy, batch, budget=2, num_readings=1, generator=None, imposed=imposed).log_probs.sum()


@pytest.mark.parametrize("max_tokens", [8_192, 40])
def test_the_gradient_is_that_of_one_graph(max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "MAX_TOKENS", max_tokens)
    _, _, _, corpus, batch = world()
    encoder = fresh_encoder(corpus)
    cases, encoded = encoder.encode(CASES, batch)
    assert len(encoded.rows) == len({tuple(row) for row in encoded.rows}), "each text once"
    reading_loss(cases).backward()
    encoder.backward(encoded, micro_batch_size=1_000)
    found = {n: p.grad for n, p in encoder.lm.trainable_parameters().items() if p.grad is not None}

    # The slow way: every text of every case in one graph, from weights to loss.
    lm = language_model()
    embedding = HiddenStates(lm, layer=-2)

    def vectors(texts: list[str]) -> torch.Tensor:
        rows = [[lm.begin_token, *lm.encode(" " + text)] for text in texts]
        return (mean_vectors(lm, embedding, rows) - corpus.mean) / (corpus.deviation + 1e-6)

    queries = torch.stack([vectors(case.context).mean(0) for case in CASES])
    keys = torch.stack([vectors([pair.key for pair in case.pool.candidates]) for case in CASES])
    expected = weights_gradient(reading_loss(replace(batch, queries=queries, keys=keys)), lm)
    assert found.keys() == expected.keys()
    assert max(float(each.abs().max()) for each in expected.values()) > 1e-3
    for name, each in expected.items():
        # Sums over padded batches in another order, through the deviation of each component.
        torch.testing.assert_close(found[name], each, atol=2e-4, rtol=2e-3, msg=name)


def test_processes_that_share_the_texts_have_the_gradient_of_one() -> None:
    _, _, _, corpus, batch = world()
    total: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        encoder = fresh_encoder(corpus)
        two = SimpleNamespace(
            size=2, shard=World(rank=rank, size=2).shard, gathered=lambda n, compute: compute(slice(0, n))
        )
        encoder._world = two  # type: ignore[assignment]
        cases, encoded = encoder.encode(CASES, batch)
        (reading_loss(cases) / 2).backward()
        encoder.backward(encoded, micro_batch_size=1_000)
        for name, weight in encoder.lm.trainable_parameters().items():
            if weight.grad is not None:
                total[name] = total.get(name, torch.zeros(())) + weight.grad
    encoder = fresh_encoder(corpus)
    cases, encoded = encoder.encode(CASES, batch)
    reading_loss(cases).backward()
    encoder.backward(encoded, micro_batch_size=1_000)
    for name, weight in encoder.lm.trainable_parameters().items():
        if weight.grad is not None:
            torch.testing.assert_close(total[name], weight.grad, atol=2e-4, rtol=2e-3, msg=name)


def small_setup(
    batch: CaseBatch,
    encoder: Encoder | None,
    *,
    budget: int = 2,
    steps: int = 4,
    projection_learning_rate: float = 3e-4,
    **study: Any,
) -> Any:
    return planted_setup(
        batch,
        seed=0,
        cases=CASES,
        encoder=encoder,
        episode={"pool": "mixed", "budget": budget},
        data={"num_pairs": 2},
        study={"num_distractors": 1, "cases_per_update": 3, "num_readings": 4, **study},
        update={"steps": steps, "learning_rate": 1e-3, "projection_learning_rate": projection_learning_rate},
    )


def test_weights_move_in_the_last_updates_alone_and_the_readers_never() -> None:
    reader, _, _, corpus, batch = world()
    encoder = fresh_encoder(corpus)
    before = {name: tensor.clone() for name, tensor in reader.model.state_dict().items()}
    setup = small_setup(batch, encoder, model_steps=2)
    state = State(setup)
    norms = []
    for number in range(1, 5):
        row = step(setup, state, number)
        norms.append(row.get("model_gradient_norm"))
        moved = [name for name, tensor in encoder.lm.model.state_dict().items() if not tensor.equal(before[name])]
        assert bool(moved) == (number > 2)
    assert norms[:2] == [None, None]
    assert all(norm > 0 for norm in norms[2:])
    assert all(tensor.equal(before[name]) for name, tensor in reader.model.state_dict().items())
    # The vectors that the policy sees have moved with the weights.
    assert (encoder.encode(CASES, batch)[0].keys - batch.keys).abs().max() > 1e-3


def test_a_state_is_restored_with_the_weights() -> None:
    _, _, _, corpus, batch = world()
    first = State(small_setup(batch, fresh_encoder(corpus), model_steps=4))
    assert first.learner is not None
    assert "weights" not in first.state_dict()["learner"], "what has not moved need not be kept"
    step(small_setup(batch, first.learner.encoder, model_steps=4), first, 1)
    second = State(small_setup(batch, fresh_encoder(corpus), model_steps=4))
    second.load_state_dict(first.state_dict())
    assert second.learner is not None
    assert second.learner.has_moved
    for name, weight in first.learner.weights.items():
        assert weight.equal(second.learner.weights[name])
    saved = first.learner.optimizer.state_dict()["state"]
    assert saved.keys() == second.learner.optimizer.state_dict()["state"].keys()
    assert saved


def test_a_checkpoint_with_one_guard_for_all_modes_is_taken() -> None:
    _, _, _, _, batch = world()
    first, second = (State(small_setup(batch, None)) for _ in range(2))
    first.guards["asked"].skip(1, "a gradient")
    older = first.state_dict()
    older["guard"] = older.pop("guards")["asked"]
    second.load_state_dict(older)
    assert second.guards["asked"].num_skipped == 1


def test_past_the_planned_end_the_vectors_stay_those_that_were_learned() -> None:
    """A run that was extended: four updates of which two trained the weights, then two of eight that do not yet."""
    _, _, _, corpus, batch = world()
    encoder = fresh_encoder(corpus)
    state = State(small_setup(batch, encoder, model_steps=2))
    for number in range(1, 5):
        step(small_setup(batch, encoder, model_steps=2), state, number)
    learned = {name: weight.clone() for name, weight in encoder.lm.trainable_parameters().items()}
    calls = []
    encode = encoder.encode
    encoder.encode = lambda *given: calls.append(1) or encode(*given)  # type: ignore[method-assign, func-returns-value]
    row = step(small_setup(batch, encoder, steps=8, model_steps=2), state, 5)
    assert calls == [1]
    assert "model_gradient_norm" not in row
    assert all(weight.equal(learned[name]) for name, weight in encoder.lm.trainable_parameters().items())


def test_a_gradient_that_is_never_finite_ends_the_run() -> None:
    _, _, _, corpus, batch = world()
    encoder = fresh_encoder(corpus)
    setup = small_setup(batch, encoder, steps=20, model_steps=20)
    state = State(setup)
    assert state.learner is not None
    backward = encoder.backward

    def broken(*given: Any, **named: Any) -> None:
        backward(*given, **named)
        next(w for w in encoder.lm.trainable_parameters().values() if w.grad is not None).grad.fill_(torch.inf)

    encoder.backward = broken  # type: ignore[method-assign]
    for number in range(1, 6):
        step(setup, state, number)
    with pytest.raises(NumericError):
        step(setup, state, 6)


def test_memory_that_runs_out_takes_fewer_texts_and_gives_the_same_gradient() -> None:
    _, _, _, corpus, batch = world()
    sizes: list[int] = []

    def gradients(limit: int) -> dict[str, torch.Tensor]:
        encoder = fresh_encoder(corpus)
        learner = Learner(encoder, ReadingConfig().update)
        backward = encoder.backward

        def scarce(encoded: Any, *, micro_batch_size: int) -> None:
            sizes.append(micro_batch_size)
            backward(encoded, micro_batch_size=micro_batch_size)
            if micro_batch_size > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        encoder.backward = scarce  # type: ignore[method-assign]
        cases, encoded = encoder.encode(CASES, batch)
        reading_loss(cases).backward()
        run: Any = SimpleNamespace(world=ALONE, notice=sizes.append)
        found: dict[str, torch.Tensor] = {}
        learner.optimizer.step = lambda: found.update(  # type: ignore[method-assign, assignment, return-value]
            {name: weight.grad.clone() for name, weight in learner.weights.items() if weight.grad is not None}
        )
        learner.step([encoded], run, number=1)
        return found

    whole = gradients(1_000)
    (most,) = sizes
    sizes.clear()
    scarce = gradients(most // 2)
    assert sizes[:2] == [most, most // 2]
    assert "memory ran out" in str(sizes[2])
    for name, gradient in whole.items():
        # float32 sums in another order, of gradients that are clipped alike.
        torch.testing.assert_close(scarce[name], gradient, atol=1e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_encoder_begins_as_the_reader_and_shares_what_stays_frozen(rank: int) -> None:
    reader, _, _, corpus, batch = world()
    reader.model.requires_grad_(False)
    config = ReadingConfig.model_validate({"model": {"adapter_rank": rank}})
    encoder = copy_of_reader(reader, config, corpus)
    found, _ = encoder.encode(CASES, batch)
    # Rows in other batches: float32 sums in another order, over deviations of some hundredths.
    torch.testing.assert_close(found.keys, batch.keys, atol=1e-4, rtol=1e-4)
    own = {weight.data_ptr() for weight in reader.model.parameters()}
    learning = encoder.lm.trainable_parameters()
    assert own.isdisjoint(weight.data_ptr() for weight in learning.values())
    assert all(("lora_" in name) == bool(rank) for name in learning)
    frozen = [weight for weight in encoder.lm.model.parameters() if not weight.requires_grad]
    assert {weight.data_ptr() for weight in frozen} == (own if rank else set())
    assert not any(weight.requires_grad for weight in reader.model.parameters())


def test_rewards_reach_the_weights() -> None:
    """A planted reward, 1 for candidate 0 and 0 for the others: learned by the weights alone, the policy held still."""
    _, _, _, corpus, batch = world()
    asked = replace(batch, gains=torch.tensor([[1.0, 0, 0, 0]] * 3))
    encoder = fresh_encoder(corpus)
    still = {"projection_learning_rate": 0.0, "learning_rate": 0.0}
    setup = small_setup(asked, encoder, budget=1, steps=150, model_steps=150, num_readings=8, **still)
    state = State(setup)

    def chance() -> float:
        with torch.no_grad():
            cases, _ = encoder.encode(CASES, asked)
            policy = state.policies["asked"]
            return float((policy.scores(cases) / policy.temperature).softmax(-1)[:, 0].mean())

    before = chance()
    for number in range(1, 151):
        step(setup, state, number)
    assert before < 0.4
    assert chance() > 0.8


def test_the_optimizer_is_the_configured_one() -> None:
    weights = {"w": torch.nn.Parameter(torch.zeros(2))}
    update = ReadingConfig.model_validate({"update": {"optimizer": "adam", "learning_rate": 0.5}}).update
    assert type(build_encoder_optimizer(weights, update)) is torch.optim.Adam
    update = ReadingConfig.model_validate({"update": {"weight_decay": 0.25, "learning_rate": 0.5}}).update
    (group,) = build_encoder_optimizer(weights, update).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)


def test_a_written_query_is_the_likeliest_continuation() -> None:
    lm, scorer, embedding, corpus, batch = world(("written_query",))
    rows = [[5, 6, 7], [8, 9]]
    found = written_queries(scorer, embedding, rows, num_tokens=3)
    for row, vector in zip(rows, found, strict=True):
        # The slow way: the whole row through the model for each token.
        tokens = [lm.begin_token, *row]
        for _ in range(3):
            logits = lm.model(torch.tensor([tokens])).logits[0, -1].detach()
            logits[list(lm.never_drawn)] = -torch.inf
            tokens.append(int(logits.argmax()))
        states = lm.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[len(lm.layers) - 1]
        torch.testing.assert_close(vector, states[0, -3:].mean(0).detach(), atol=1e-5, rtol=1e-4)

    # As a channel: between queries and keys, centred by what the model writes after training keys.
    assert corpus.written_mean is not None
    names = channel_names(("written_query",))
    features = pool_features(pool(), corpus, scorer, embedding, channels=names, query_tokens=3)
    question = scorer.value(CASES[1].pairs([1])[0].key)
    written = written_queries(scorer, embedding, [question], num_tokens=3)[0]
    written = (written - corpus.written_mean) / (corpus.deviation + 1e-6)
    expected = torch.nn.functional.cosine_similarity(written[None], batch.keys[1], dim=-1)
    place = features.held_out(1, 1)
    torch.testing.assert_close(features.channels[1, place, 8:12], expected, atol=1e-4, rtol=1e-3)
    assert features.channels[1, 8:].abs().max() == 0.0
