"""The policy on disk: what a run learned, loaded again in another place, chooses as it did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from preceptor.errors import ModelError
from preceptor.lm.load import load_language_model, save_language_model
from preceptor.systems.reading.config import SelectionOptions
from preceptor.systems.reading.policy import Policy, load_policy, save_selection
from tests.systems.reading.small import HashedBytes, language_model, perturb, policies, rollout


def saved(folder: Path) -> tuple[Policy, Path]:
    """A policy that has moved away from where it began, its language model and its selection in ``folder``."""
    policy, _, _, keys = policies(language_model(), top_k=50)
    perturb(policy, scale=0.05)
    assert policy.projection is not None
    with torch.no_grad():
        policy.projection.weight.add_(0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
    save_language_model(policy.lm, folder)
    save_selection(folder, policy, {"bees": keys}, SelectionOptions(layer=-2))
    return policy, folder


def test_a_loaded_policy_writes_and_chooses_as_the_saved_one(tmp_path: Path) -> None:
    policy, folder = saved(tmp_path)
    lm = load_language_model(str(folder), device=torch.device("cpu"))
    loaded, keys = load_policy(folder, lm)
    _, _, article, initial_keys = policies(language_model())
    assert torch.equal(keys["bees"].vectors, initial_keys.vectors)  # embedded before training
    assert keys["bees"].version == initial_keys.version
    before, after = rollout(policy, article, initial_keys), rollout(loaded, article, keys["bees"])
    assert torch.equal(before.queries, after.queries)
    assert torch.equal(before.order, after.order)
    torch.testing.assert_close(after.selection_log_probs, before.selection_log_probs, rtol=0, atol=1e-6)
    assert (loaded.temperature, loaded.centre) == (policy.temperature, policy.centre)
    assert dataclasses.asdict(loaded.sampling) == {
        **dataclasses.asdict(policy.sampling),
        "suppressed": list(policy.sampling.suppressed),
    }


def test_a_text_embedder_has_to_be_given_again(tmp_path: Path) -> None:
    lm = language_model()
    own, _, article, _ = policies(lm)
    policy = Policy(lm, sampling=own.sampling, embedding=None, text_embedder=HashedBytes(), temperature=3.0)
    keys = policy.embed_keys(article)
    save_selection(tmp_path, policy, {"bees": keys}, SelectionOptions(embedder="sentence_transformers"))
    with pytest.raises(
        ModelError, match=r"^the selection in .* used the embedder 'sentence_transformers'; give it as `text_embedder`"
    ):
        load_policy(tmp_path, lm)
    loaded, loaded_keys = load_policy(tmp_path, lm, text_embedder=HashedBytes())
    assert loaded.projection is None
    before, after = rollout(policy, article, keys), rollout(loaded, article, loaded_keys["bees"])
    assert torch.equal(before.order, after.order)


@pytest.mark.parametrize("damage", ["no file", "no json", "no key", "no tensor"])
def test_a_damaged_selection_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    policy, folder = saved(tmp_path)
    path = folder / "selection.json"
    description = json.loads(path.read_text())
    if damage == "no file":
        path.unlink()
    elif damage == "no json":
        path.write_text("{")
    elif damage == "no key":
        path.write_text(json.dumps({name: value for name, value in description.items() if name != "temperature"}))
    else:
        path.write_text(json.dumps({**description, "articles": {**description["articles"], "more": "v"}}))
    with pytest.raises(ModelError, match=r"cannot be loaded .*; give the folder `model` of a finished reading run"):
        load_policy(folder, policy.lm)
