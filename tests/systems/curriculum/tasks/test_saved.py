"""A trained teacher as files: it comes back the same, and what is none is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from preceptor.errors import ConfigError
from preceptor.objectives.learned_rule import FEATURES, SourcePolicy
from preceptor.objectives.task_mixture import make_task_mixture
from preceptor.systems.curriculum.tasks.saved import TEACHER, load_teacher, save_teacher


def trained() -> SourcePolicy:
    """A policy whose outputs are not 0."""
    policy = SourcePolicy(6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (policy.score, policy.value):
            layer.weight.copy_(torch.linspace(-2, 2, layer.weight.numel())[None])
    return policy


def test_a_saved_policy_is_the_same(tmp_path: Path) -> None:
    policy = trained()
    save_teacher(policy, tmp_path / TEACHER)
    seen = torch.rand(5, len(FEATURES), dtype=torch.float64)
    for folder in (tmp_path, tmp_path / TEACHER):  # a run, or the folder itself
        loaded = load_teacher(folder)
        for ours, theirs in zip(policy(seen), loaded(seen), strict=True):
            assert torch.equal(ours, theirs)


def test_a_policy_keeps_the_exploration_that_it_was_trained_with(tmp_path: Path) -> None:
    save_teacher(SourcePolicy(4, exploration=0.3), tmp_path)
    loaded = load_teacher(tmp_path)
    assert make_task_mixture("learned", num_levels=[2], policy=loaded).rule.exploration == 0.3
    assert make_task_mixture("learned", num_levels=[2], policy=loaded, exploration=0.1).rule.exploration == 0.1


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no trained teacher; give the folder of a finished run"):
        load_teacher(tmp_path)
    save_teacher(trained(), tmp_path)
    settings = json.loads((tmp_path / "teacher.json").read_text())
    (tmp_path / "teacher.json").write_text(json.dumps(settings | {"features": ["level"]}))
    with pytest.raises(ConfigError, match="was trained on other features"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps({"hidden_dim": 6}))
    with pytest.raises(ConfigError, match="has no trained teacher"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps(settings | {"hidden_dim": 7}))
    with pytest.raises(ConfigError, match="has other weights than it says"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="has no trained teacher"):
        load_teacher(tmp_path)
