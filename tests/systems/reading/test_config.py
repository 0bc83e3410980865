"""The configuration: every fault is named before anything runs, all of them together, and the presets are sound."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from preceptor.config import load_config, schema
from preceptor.errors import ConfigError
from preceptor.systems.reading.config import FLAGS, ReadingConfig

FAULTS = [
    (["data.num_pairs=-1"], "`data.num_pairs` must be at least 0, got -1"),
    (["data.num_pairs=1"], "must be at least 2"),
    (["data.num_pairs=4", "episode.budget=5"], "`episode.budget` must be at most `data.num_pairs`"),
    (["data.num_probes=-1"], "`data.num_probes` must be at least 0"),
    (["data.max_value_tokens=0"], "`data.max_value_tokens` must be at least 1"),
    (["data.key_tokens=0"], "`data.key_tokens` must be at least 1"),
    (["data.value_tokens=0"], "`data.value_tokens` must be at least 1"),
    (["data.article=a", "data.train_articles=b"], "exclude each other"),
    (["episode.budget=-1"], "`episode.budget` must be at least 0"),
    (["episode.query_tokens=0"], "`episode.query_tokens` must be at least 1"),
    (["episode.temperature=0"], "`episode.temperature` must be above 0, got 0"),
    (["episode.temperature=.inf"], "`episode.temperature` must be above 0 and finite, got inf"),
    (["episode.temperature=.nan"], "`episode.temperature`"),
    (["episode.top_p=0"], "`episode.top_p` must lie in (0, 1], got 0"),
    (["episode.top_p=1.2"], "`episode.top_p` must lie in (0, 1], got 1.2"),
    (["episode.top_k=-1"], "`episode.top_k` must be at least 0"),
    (["episode.batch_size=0"], "`episode.batch_size` must be at least 1"),
    (["episode.batch_size=1"], "`episode.batch_size` must be at least 2, got 1; or use running_mean"),
    (["selection.temperature=-1"], "`selection.temperature` must be at least 0"),
    (["selection.temperature=.inf"], "`selection.temperature`"),
    (["selection.entropy_fraction=1"], "`selection.entropy_fraction` must lie in (0, 1), got 1"),
    (["selection.entropy_fraction=0"], "`selection.entropy_fraction` must lie in (0, 1), got 0"),
    (["selection.max_usd=-1"], "`selection.max_usd`"),
    (["reward.kind=probe", "data.num_probes=0"], "needs `data.num_probes` of at least 1"),
    (["reward.normalisation=untrained_reader"], "identically zero under a frozen reader"),
    (["reward.normalisation=untrained_query"], "needs `reward.context` queries"),
    (["reward.normalisation=untrained_query", "reward.context=queries", "reward.kind=probe"], "`reward.kind` values"),
    (["update.steps=-1"], "`update.steps` must be at least 0"),
    (["update.learning_rate=-1e-5"], "must be at least 0"),
    (["update.learning_rate=.nan"], "`update.learning_rate`"),
    (["update.projection_learning_rate=-1"], "must be at least 0"),
    (["update.weight_decay=-0.1"], "`update.weight_decay`"),
    (["update.clip_norm=0"], "`update.clip_norm` must be above 0, got 0"),
    (["update.clip_norm=-1"], "`update.clip_norm` must be above 0"),
    (["update.micro_batch_size=-1"], "`update.micro_batch_size` must be at least 0"),
    (["update.snapshot_every=0"], "`update.snapshot_every` must be at least 1"),
    (["update.filter_fraction=0"], "`update.filter_fraction` must lie in (0, 1]"),
    (["update.filter_warm_up=-1"], "`update.filter_warm_up` must be at least 0"),
    (["update.value_kl_coefficient=-1"], "`update.value_kl_coefficient`"),
    (["update.query_kl_coefficient=-1"], "`update.query_kl_coefficient`"),
    (["evaluation.every=-1"], "`evaluation.every` must be at least 0"),
    (["evaluation.num_episodes=0"], "`evaluation.num_episodes` must be at least 1"),
    (["evaluation.num_orders=1"], "`evaluation.num_orders` must be at least 2"),
    (["evaluation.selection_budget=-1"], "`evaluation.selection_budget` must be at least 0"),
    (["evaluation.beam_width=0"], "`evaluation.beam_width` must be at least 1"),
    (["evaluation.best_of=-1"], "`evaluation.best_of` must be at least 0"),
    (["evaluation.max_train_articles=0"], "`evaluation.max_train_articles` must be at least 1"),
    (["model.adapter_rank=-1"], "`model.adapter_rank` must be at least 0"),
    (["model.prompt={title} {author}"], "`model.prompt` may hold {title} and no other braces"),
    (["save_every=0"], "`save_every` must be at least 1"),
    (["record_every=0"], "`record_every` must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "text"), FAULTS, ids=[" ".join(overrides) for overrides, _ in FAULTS])
def test_a_number_that_cannot_run_is_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(ReadingConfig, overrides=overrides)
    assert len(error.value.faults) == 1
    assert text in error.value.faults[0]


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(ReadingConfig, overrides=["episode.top_p=2", "update.steps=-1", "selection.temperature=-1"])
    assert len(error.value.faults) == 3


EDGES = [
    ["data.num_pairs=0"],
    ["data.num_pairs=2", "episode.budget=2"],
    ["episode.batch_size=1", "update.advantage=running_mean"],
    ["episode.top_p=1", "episode.top_k=0"],
    ["selection.temperature=0"],
    ["update.clip_norm=.inf"],
    ["update.learning_rate=1e-5"],  # YAML 1.1 takes this for text
    ["update.learning_rate=0", "update.projection_learning_rate=0", "update.steps=0"],
    ["reward.normalisation=untrained_reader", "reward.reader=policy"],
    ["reward.normalisation=untrained_query", "reward.context=queries"],
    ["data.train_articles=a", "data.eval_articles=b"],
]


@pytest.mark.parametrize("overrides", EDGES, ids=" ".join)
def test_the_edge_of_what_can_run_runs(overrides: list[str]) -> None:
    load_config(ReadingConfig, overrides=overrides)


def test_every_option_of_the_command_line_is_a_key() -> None:
    keys = schema(ReadingConfig)
    assert set(FLAGS.values()) <= set(keys)
    assert {"model", "seed", "article", "train_articles", "eval_articles"} == set(FLAGS)


@pytest.mark.parametrize("preset", ["smoke", "paper"])
def test_the_presets_load(preset: str) -> None:
    with resources.as_file(resources.files("preceptor") / "presets" / "reading" / f"{preset}.yaml") as path:
        load_config(ReadingConfig, preset=path)


def test_the_paper_preset_carries_the_predecessors_numbers() -> None:
    """As its text has them; see the tables of deviations in docs/systems/reading.md."""
    with resources.as_file(resources.files("preceptor") / "presets" / "reading" / "paper.yaml") as path:
        config = load_config(ReadingConfig, preset=path)
    assert config.model.name == "meta-llama/Llama-3.2-3B-Instruct"
    assert config.selection.text_model == "text-embedding-ada-002"
    assert (config.selection.temperature, config.selection.centre, config.selection.projection) == (1.0, False, False)
    assert (config.update.filter_warm_up, config.update.filter_standard_deviations) == (15, 1.0)
    assert config.update.reward_filter == "standard_deviations"
    assert (config.update.learning_rate, config.update.value_kl_coefficient) == (1e-5, 0.01)
    assert config.update.steps * config.episode.batch_size == 1_000
    assert config.reward.normalisation == "untrained_query"


def test_the_documentation_names_every_preset_and_default_of_the_loop(tmp_path: Path) -> None:
    config = load_config(ReadingConfig)
    assert config.selection.layer == -2
    assert config.selection.entropy_fraction == 0.9
    assert config.reward.context == "values"
    assert config.evaluation.num_orders >= 200
