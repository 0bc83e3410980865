from __future__ import annotations

from importlib import resources

import pytest

from preceptor.config import load_config, schema
from preceptor.errors import ConfigError
from preceptor.systems.surgery.config import ARMS, CHOICES, EDITING_ARMS, FLAGS, OBJECTIVES, SurgeryConfig

FAULTS = [
    (["data.vocab_size=1"], "`data.vocab_size` must be at least 2"),
    (["data.train_share=1"], "`data.train_share` must lie in (0, 1), got 1"),
    (["student.num_layers=0"], "`student.num_layers` must be at least 1"),
    (["student.width=66"], "`student.width` must be a multiple of `student.num_heads`"),
    (["student.width=20", "student.architecture=llama"], "an even one for llama"),
    (["quality.continuation_tokens=40"], "must fit `student.block_size` 48, got 12 + 40"),
    (["referee.order=0"], "`referee.order` must be at least 1"),
    (["learning.partial_reward=-1"], "`learning.partial_reward` must be at least 0"),
    (["learning.learning_rate=.inf"], "must be at least 0 and finite, got inf"),
    (["learning.clip_norm=0"], "`learning.clip_norm` must be above 0"),
    (["learning.group_size=1"], "`learning.group_size` must be at least 2"),
    (["learning.objective=cross_entropy"], "`controls.objectives` holds `learning.objective` cross_entropy itself"),
    (["phases.bootstrap_steps=0"], "`phases.bootstrap_steps` must be at least 1"),
    (["phases.plateau_window=1"], "`phases.plateau_window` must be at least 2"),
    (["edit.max_relative_norm=1"], "`edit.max_relative_norm` must lie in (0, 1)"),
    (["edit.roles=[query, tail]"], "`edit.roles[1]` must be one of query, key, value, output, got 'tail'"),
    (["edit.roles=[]"], "`edit.roles` is empty"),
    (["edit.kind=head_scale"], "`edit.roles` must be (output)"),
    (["agent.discount=1"], "`agent.discount` must lie in [0, 1)"),
    (["agent.target_step=0"], "`agent.target_step` must lie in (0, 1]"),
    (["agent.initial_temperature=0"], "`agent.initial_temperature` must be above 0"),
    (["controls.arms=[learned, luck]"], "`controls.arms[1]` must be one of no_edit, learned"),
    (["controls.arms=[random]"], "`controls.arms` random is matched to learned"),
    (["controls.objectives=[luck]"], "`controls.objectives[0]` must be one of sampled"),
    (["evaluation.every=0"], "`evaluation.every` must be at least 1"),
    (["save_every=0"], "`save_every` must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "text"), FAULTS, ids=[" ".join(overrides) for overrides, _ in FAULTS])
def test_what_cannot_run_is_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SurgeryConfig, overrides=overrides)
    assert len(error.value.faults) == 1, error.value.faults
    assert text in error.value.faults[0]


def test_a_referee_model_brings_its_tokens() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SurgeryConfig, overrides=["referee.kind=model"])
    assert len(error.value.faults) == 2
    load_config(SurgeryConfig, overrides=["referee.kind=model", "referee.model=folder", "data.tokens=referee"])


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(SurgeryConfig, overrides=["save_every=0", "agent.discount=2", "edit.rank=0"])
    assert len(error.value.faults) == 3


EDGES = [
    ["phases.joint_edits=0", "phases.updates_per_edit=0"],
    ["controls.arms=[]", "controls.objectives=[]"],
    ["edit.kind=head_scale", "edit.roles=[output]", "edit.layers=[1]"],
    ["learning.clip_norm=.inf", "learning.confidence_penalty=0"],
    ["agent.discount=0", "quality.acceptance_z=0"],
    ["learning.objective=distil"],
]


@pytest.mark.parametrize("overrides", EDGES, ids=" ".join)
def test_the_edge_of_what_can_run_runs(overrides: list[str]) -> None:
    load_config(SurgeryConfig, overrides=overrides)


def test_choices_and_flags_are_those_of_the_configuration() -> None:
    keys = schema(SurgeryConfig)
    assert set(FLAGS.values()) <= set(keys)
    assert set(CHOICES["objectives"]) == set(keys["learning.objective"].annotation.__args__) == set(OBJECTIVES)
    assert set(CHOICES["edits"]) == set(keys["edit.kind"].annotation.__args__)
    assert set(CHOICES["arms"]) == set(ARMS)
    assert set(EDITING_ARMS) < set(ARMS)


@pytest.mark.parametrize("preset", ["smoke", "small", "nanogpt"])
def test_the_presets_load(preset: str) -> None:
    with resources.as_file(resources.files("preceptor") / "presets" / "surgery" / f"{preset}.yaml") as path:
        assert path.read_text(encoding="utf-8").startswith("# ")
        load_config(SurgeryConfig, preset=path)


@pytest.mark.parametrize(("width", "architecture"), [(20, "gpt2"), (16, "llama"), (64, "llama")])
def test_rotary_heads_alone_must_be_even(width: int, architecture: str) -> None:
    load_config(SurgeryConfig, overrides=[f"student.width={width}", f"student.architecture={architecture}"])
