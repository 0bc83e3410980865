"""Configurations: every fault is found, all together, and the presets have none."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import pytest

from preceptor.config import load_config, schema
from preceptor.errors import ConfigError
from preceptor.objectives.mixture import MIXTURE_RULES
from preceptor.systems.curriculum import config
from preceptor.systems.curriculum.config import CHOICES, FIXED_RULES, FLAGS, RULES, CurriculumConfig

PRESETS = importlib.resources.files("preceptor") / "presets" / "curriculum"


def presets() -> list[Path]:
    return sorted(Path(str(entry)) for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def test_the_defaults_can_run() -> None:
    assert load_config(CurriculumConfig) == CurriculumConfig()


def test_there_are_presets() -> None:
    assert {path.stem for path in presets()} >= {"smoke", "paper"}


@pytest.mark.parametrize("path", presets(), ids=lambda path: path.stem)
def test_a_preset_can_run_and_says_what_it_is(path: Path) -> None:
    load_config(CurriculumConfig, preset=path)
    assert path.read_text().startswith("# ")


def test_the_papers_datasets() -> None:
    paper = load_config(CurriculumConfig, preset=Path(str(PRESETS / "paper.yaml")))
    assert paper.model.name == "meta-llama/Llama-3.2-1B"
    assert len(paper.data.datasets) == 10


def test_the_flags_stand_for_keys() -> None:
    assert set(FLAGS.values()) <= set(schema(CurriculumConfig))


def test_the_rules_are_those_of_the_objectives() -> None:
    assert set(RULES) == set(MIXTURE_RULES)
    assert set(FIXED_RULES) < set(RULES)
    assert CHOICES["rules"] is RULES
    assert config.Config is CurriculumConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=5", "`model.width` must be even, since rotary positions turn pairs of dimensions, got 5"),
        ("value.width=33", "`value.width` must be even"),
        ("update.steps=0", "`update.steps` must be at least 1, got 0"),
        ("update.learning_rate=.inf", "must be at least 0 and finite, got inf"),
        ("ppo.temperature=0", "`ppo.temperature` must be above 0, got 0"),
        ("ppo.temperature=.inf", "`ppo.temperature` must be above 0 and finite, got inf"),
        ("ppo.gae_lambda=1.5", "`ppo.gae_lambda` must lie in [0, 1], got 1.5"),
        ("ppo.clip_epsilon_low=1", "`ppo.clip_epsilon_low` must lie in (0, 1), got 1"),
        ("data.validation_fraction=0.6", "`data.validation_fraction` must lie in (0, 0.5), got 0.6"),
        ("data.datasets=[]", "`data.datasets` is empty"),
        ("data.datasets=[{name: a, location: 'builtin:poems'}]", "has no builtin:poems; built in are code"),
        ("data.datasets=[{name: a, location: x.txt, adapter: dialogue}]", "unknown adapter 'dialogue'"),
        ("data.datasets=[{name: a, location: x.txt, target: false}]", "has no target"),
        ("mixture.rule=unifrom", "`mixture.rule` must be one of second_order"),
        ("controls.rules=[static]", "`controls.rules` cannot hold static"),
        ("mixture.rule=static", "`mixture.weights` must be 4 numbers for the rule static, got 0"),
        ("mixture.weights=[1, 2]", "go with the rule static alone"),
        ("ppo.rewards=[{name: repetitions}]", "has no term 'repetitions'; use repetition"),
        ("ppo.rewards=[{name: length, weight: .inf}]", "`ppo.rewards[0].weight` must be finite, got inf"),
        ("difficulty.sample_size=1", "`difficulty.sample_size` must be at least 2, got 1"),
        ("ppo.rewards=[]", "`ppo.rewards` is empty"),
        ("ppo.rewards=[{name: length}, {name: length}]", "names a term twice"),
        ("ppo.advantage=rloo", "`ppo.group_size` must be at least 2"),
        ("ppo.loss=gspo", "needs one advantage a sequence, which `ppo.advantage` gae does not give"),
        ("ppo.dual_clip=0.5", "`ppo.dual_clip` must be above 1"),
        ("ppo.kl_coefficient=0", "must be above 0 for an adaptive KL"),
        ("ppo.minibatches=100", "must be at most the 16 continuations of a step"),
    ],
)
def test_a_fault_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CurriculumConfig, overrides=[override])
    assert any(message in fault for fault in caught.value.faults), caught.value.faults


def test_faults_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CurriculumConfig, overrides=["update.steps=0", "ppo.discount=2", "mixture.rule=none"])
    assert len(caught.value.faults) == 3


def test_learning_from_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="both 0"):
        load_config(CurriculumConfig, overrides=["ppo.weight=0", "update.cross_entropy_weight=0"])


def test_without_rollouts_their_options_are_not_checked() -> None:
    load_config(CurriculumConfig, overrides=["ppo.weight=0", "ppo.advantage=rloo"])
