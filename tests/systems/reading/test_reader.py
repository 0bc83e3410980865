"""What the reader says of a trajectory, against one plain re-encoding per value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.errors import DataError
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.systems.reading.credit import judge
from preceptor.systems.reading.material import Material, Reading, encode_reading
from preceptor.systems.reading.policy import Trajectories
from preceptor.systems.reading.reader import (
    LanguageModelReader,
    probe_curve,
    reader_rows,
    scores_after_reference_queries,
)
from tests.systems.reading.small import READING, language_model, perturb, policies, rollout


def slow_log_probs(lm: LanguageModel, before: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
    """Of ``tokens`` after ``before``, from the bare model."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*before, *tokens]])).logits[0]
    places = torch.arange(len(before) - 1, len(before) + len(tokens) - 1)
    return logits.log_softmax(-1)[places, torch.tensor(tokens)]


@pytest.fixture(scope="module")
def setting() -> tuple[LanguageModelReader, Material, Trajectories]:
    policy, untrained, material, keys = policies(language_model())
    perturb(policy, scale=0.1)
    trajectories = rollout(policy, material, keys, reference=untrained, num_episodes=3, budget=4)
    return LanguageModelReader(untrained.lm), material, trajectories


@pytest.mark.parametrize("with_probe", [False, True])
@pytest.mark.parametrize("context", ["values", "queries"])
def test_each_value_is_scored_after_all_that_its_context_holds(setting: Any, context: Any, with_probe: bool) -> None:
    reader, material, trajectories = setting
    scored = reader.score(reader_rows(reader, trajectories, context=context, with_probe=with_probe))
    for episode, row in enumerate(scored):
        before = [reader.lm.begin_token] if context == "values" else list(material.prompt)
        expected = []
        for step, pair in enumerate(trajectories.order[episode].tolist()):
            if context == "queries":
                before += trajectories.queries[episode, step].tolist()
            expected.append(slow_log_probs(reader.lm, before, material.values[pair]))
            before += material.values[pair]
        if with_probe:
            expected.append(slow_log_probs(reader.lm, before, material.probe))
        assert len(row.log_probs) == len(expected)
        for found, slow in zip(row.log_probs, expected, strict=True):
            torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


def test_the_reference_query_takes_the_place_of_the_policys_and_nothing_else_changes(setting: Any) -> None:
    reader, material, trajectories = setting
    rows = reader_rows(reader, trajectories, context="queries")
    scored = scores_after_reference_queries(reader, trajectories, rows)
    for episode, row in enumerate(scored):
        before = list(material.prompt)
        for step, pair in enumerate(trajectories.order[episode].tolist()):
            other = trajectories.reference_queries[episode, step].tolist()
            slow = slow_log_probs(reader.lm, [*before, *other], material.values[pair])
            torch.testing.assert_close(row.log_probs[step], slow, rtol=1e-5, atol=1e-5)
            before += [*trajectories.queries[episode, step].tolist(), *material.values[pair]]


def test_reference_queries_and_a_probe_must_be_there_to_be_scored() -> None:
    policy, _, material, keys = policies(language_model())
    trajectories, reader = rollout(policy, material, keys), LanguageModelReader(policy.lm)
    with pytest.raises(DataError, match="run the episodes with a reference"):
        scores_after_reference_queries(reader, trajectories, reader_rows(reader, trajectories, context="queries"))
    bare = encode_reading(
        Reading("no probe", "None", READING.keys, READING.values), policy.lm, prompt="", use_chat_template=False
    )
    with pytest.raises(DataError, match=r"set data\.num_probes to at least 1"):
        probe_curve(reader, bare, (0, 1))


# ---- a reader of another vocabulary ----------------------------------------------------------------------------------


def other_reader(policy_lm: LanguageModel, reader_lm: LanguageModel) -> tuple[LanguageModelReader, Material]:
    theirs = encode_reading(READING, reader_lm, prompt="{title}\n", use_chat_template=True)
    return LanguageModelReader(reader_lm, policy_lm=policy_lm, materials={READING.name: theirs}), theirs


def check_other_vocabulary(policy_lm: LanguageModel, reader_lm: LanguageModel) -> None:
    policy, untrained, material, keys = policies(policy_lm)
    trajectories = rollout(policy, material, keys, reference=untrained, num_episodes=8, budget=3, query_tokens=2)
    reader, theirs = other_reader(policy_lm, reader_lm)
    assert theirs.values != material.values
    for row, order in zip(
        reader.score(reader_rows(reader, trajectories, context="values")), trajectories.order.tolist(), strict=True
    ):
        before = [reader_lm.begin_token]
        for found, pair in zip(row.log_probs, order, strict=True):
            torch.testing.assert_close(
                found, slow_log_probs(reader_lm, before, theirs.values[pair]), rtol=1e-5, atol=1e-5
            )
            before += theirs.values[pair]
    rows = reader_rows(reader, trajectories, context="queries")
    for row, queries in zip(rows, trajectories.queries.tolist(), strict=True):
        written = [list(row.tokens[span.start : span.end]) for span in row.spans if span.kind == "query"]
        assert written == [reader_lm.encode(policy_lm.decode(query)) for query in queries]
    judged = judge(
        trajectories,
        reader=reader,
        untrained_reader=reader,
        kind="values",
        context="queries",
        normalisation="untrained_query",
    )
    assert judged.normalised.total.isfinite().all()


def test_a_reader_of_another_vocabulary_gets_texts() -> None:
    from preceptor.systems.reading.articles import bundled_article

    reader_lm = language_model(seed=1)
    from preceptor.lm.tokenizer import train_bpe_tokenizer

    tokenizer = train_bpe_tokenizer([bundled_article().text], vocab_size=300, context_length=256)
    check_other_vocabulary(language_model(), LanguageModel(reader_lm.model, tokenizer, name="other"))


@pytest.mark.parametrize(("policy", "reader"), [("stories3m", "stories260k"), ("stories260k", "stories3m")])
def test_real_models_read_for_one_another(test_data: Path, policy: str, reader: str) -> None:
    cpu = torch.device("cpu")
    check_other_vocabulary(
        load_language_model(str(test_data / "lm" / policy), device=cpu),
        load_language_model(str(test_data / "lm" / reader), device=cpu),
    )


def test_a_query_that_is_no_token_for_the_reader_keeps_its_place(test_data: Path) -> None:
    """A lone space is nothing to a tokenizer that puts one before every text; its value must still be its value."""
    policy_lm = language_model()
    policy, untrained, material, keys = policies(policy_lm)
    space = policy_lm.encode(" ")
    trajectories = rollout(policy, material, keys, reference=untrained, num_episodes=2, budget=3, query_tokens=1)
    trajectories.queries[0, 1] = torch.tensor(space)
    trajectories.reference_queries[1, 2] = torch.tensor(space)  # type: ignore[index]
    reader_lm = load_language_model(str(test_data / "lm" / "stories260k"), device=torch.device("cpu"))
    reader, theirs = other_reader(policy_lm, reader_lm)
    assert reader.query_tokens(space) == []
    rows = reader_rows(reader, trajectories, context="queries")
    scored = scores_after_reference_queries(reader, trajectories, rows)
    before = list(theirs.prompt)
    for step, pair in enumerate(trajectories.order[0].tolist()):
        other = reader.query_tokens(trajectories.reference_queries[0, step].tolist())  # type: ignore[index]
        slow = slow_log_probs(reader_lm, [*before, *other], theirs.values[pair])
        torch.testing.assert_close(scored[0].log_probs[step], slow, rtol=1e-5, atol=1e-5)
        before += [*reader.query_tokens(trajectories.queries[0, step].tolist()), *theirs.values[pair]]
