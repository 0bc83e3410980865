"""Rollouts by another engine, through the command line: the audit is logged, corrects the loss, and stops a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.cli import main
from preceptor.config import from_dict, load_config
from preceptor.errors import ConfigError
from preceptor.lm.generators.base import Generations, OwnGenerator
from preceptor.lm.generators.transformers_generate import TransformersGenerator
from preceptor.lm.load import load_language_model
from preceptor.lm.model import LanguageModel
from preceptor.runs.world import World
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.engines import corrected
from preceptor.systems.curriculum.loss import Experience, policy_loss
from preceptor.systems.curriculum.policy import Prompt, Rollouts, generate_rollouts, rollout_log_probs, rollout_sampling
from preceptor.systems.curriculum.ppo_config import PPOOptions
from preceptor.systems.curriculum.rewards import RewardTerm
from preceptor.systems.curriculum.scored import scored_rollouts
from preceptor.systems.curriculum.tasks import loop as tasks_loop
from tests.lm.generators.fake_server import serving
from tests.systems.curriculum.small import STEPS, arguments, rows
from tests.systems.curriculum.tasks import test_run as tasks_run
from tests.systems.curriculum.test_resume import stopped_at

ALONE = ["controls.rules=[]", "controls.frozen_policy=false"]
METRICS = {"generator_gap", "generator_max_gap", "generator_kl", "generator_truncated", "generator_weight"}
SECRET = "sk-planted-secret"


def test_transformers_writes_the_rollouts_and_a_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert main(arguments(tiny_folder, folder, [*ALONE, "ppo.generator=transformers"])) == 0
    logged = rows(folder / "metrics.jsonl")
    for row in logged[:STEPS]:
        assert row.keys() >= METRICS
        assert row["generator_gap"] < 1e-5
        assert row["generator_weight"] == pytest.approx(1, abs=1e-5)
    assert not METRICS & set(logged[STEPS]), "the method without rollouts has nothing to audit"
    stopped = tmp_path / "stopped"
    with stopped_at(2):
        assert main(arguments(tiny_folder, stopped, [*ALONE, "ppo.generator=transformers"])) == 143
    assert main(["resume", str(stopped), "--no-report"]) == 0
    assert rows(stopped / "metrics.jsonl") == logged


def test_our_own_decoder_is_the_default_and_logs_no_audit(finished: Path) -> None:
    assert not METRICS & set(rows(finished / "metrics.jsonl")[0])
    assert CurriculumConfig().ppo.generator == "own"


def test_a_server_writes_the_rollouts_with_the_weights_of_each_step(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    with serving(load_language_model(str(tiny_folder), device=torch.device("cpu"))) as server:
        changes = [*ALONE, "ppo.generator=vllm", f"ppo.generator_url={server.url}"]
        assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 0
        assert len(server.reloaded) == STEPS
        assert {key for _, _, key in server.requests} == {f"Bearer {SECRET}"}
    for row in rows(tmp_path / "run" / "metrics.jsonl")[:STEPS]:
        assert row["generator_gap"] < 1e-5
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_a_server_that_is_0_1_nats_off_stops_the_run_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(load_language_model(str(tiny_folder), device=torch.device("cpu"))) as server:
        server.shift = 0.1
        changes = [*ALONE, "ppo.generator=vllm", f"ppo.generator_url={server.url}"]
        assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preceptor: error: ")]
    assert len(lines) == 1
    assert "vLLM and the model that is trained are 0.1 nats a token apart" in lines[0]
    assert "0.05 are allowed (ppo.generator_max_gap)" in lines[0]


def test_answers_to_tasks_are_written_by_another_engine(tmp_path: Path) -> None:
    words = [*tasks_run.arguments(tmp_path / "run"), "--set", "ppo.generator=transformers"]
    assert main([*words, "--set", "tasks.controls=[uniform]"]) == 0
    logged = tasks_run.metrics(tmp_path / "run")
    assert logged
    for row in logged:
        assert row.keys() >= METRICS
        assert row["generator_gap"] < 1e-5


class Shifted(OwnGenerator):
    """Our decoder, which says each log-probability by these many nats too low."""

    name = "a shifted engine"

    def __init__(self, lm: LanguageModel, shift: float) -> None:
        super().__init__(lm)
        self._shift = shift

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        found = super().generate(*arguments, **options)
        return replace(found, log_probs=found.log_probs - self._shift, entropy=None)


def written(lm: LanguageModel, shift: float) -> Rollouts:
    return generate_rollouts(
        lm,
        [Prompt("d", (lm.begin_token, 30, 31), ())] * 2,
        group_size=2,
        num_tokens=4,
        sampling=rollout_sampling(lm, 1.0),
        generator=torch.Generator().manual_seed(0),
        engine=Shifted(lm, shift),
    )


def loss_of(lm: LanguageModel, rollouts: Rollouts, options: PPOOptions) -> float:
    with torch.no_grad():
        log_probs = rollout_log_probs(lm, rollouts, rollout_sampling(lm, 1.0))
    advantages = torch.ones(rollouts.tokens.shape)
    part = Experience(rollouts, advantages, None, None, torch.zeros_like(advantages))
    return float(policy_loss(log_probs, part, options=options))


@pytest.mark.parametrize("loss", ["clip", "cispo", "gspo"])
def test_the_loss_is_weighed_by_the_truncated_ratio(loss: Any, tiny: LanguageModel) -> None:
    options = PPOOptions(loss=loss, generator="transformers", generator_max_gap=2.0, generator_max_weight=1.5)
    sampling = rollout_sampling(tiny, 1.0)
    own, _ = corrected(written(tiny, 0.0), tiny, sampling=sampling, engine=TransformersGenerator(tiny), options=options)
    plain = loss_of(tiny, own, options)
    for shift, weight in ((0.1, 1.1051709), (-0.1, 0.9048374), (1.0, 1.5)):
        rollouts, metrics = corrected(
            written(tiny, shift), tiny, sampling=sampling, engine=Shifted(tiny, shift), options=options
        )
        assert metrics["generator_gap"] == pytest.approx(abs(shift), abs=1e-5)
        assert rollouts.weights is not None
        counted = rollouts.weights[rollouts.mask]
        assert counted.tolist() == pytest.approx([weight] * len(counted), rel=1e-5)
        # The ratio itself begins at 1, whatever the engine said, so nothing is clipped and the loss scales.
        assert loss_of(tiny, rollouts, options) == pytest.approx(weight * plain, rel=1e-5)


def test_rollouts_of_another_engine_keep_their_weights_on_the_way_to_the_update(tiny: LanguageModel) -> None:
    scored = scored_rollouts(
        tiny,
        [Prompt("d", (tiny.begin_token, 30, 31), ())] * 2,
        group_size=2,
        num_tokens=4,
        sampling=rollout_sampling(tiny, 1.0),
        generator=torch.Generator().manual_seed(0),
        terms=[RewardTerm("length", 1.0, lambda rollouts: rollouts.mask.float())],
        reference_model=tiny,
        engine=Shifted(tiny, 0.1),
        options=PPOOptions(generator="transformers", generator_max_gap=2.0, generator_max_weight=1.5),
        world=World(),
    )
    rollouts = scored.rollouts
    assert rollouts.weights is not None
    counted = rollouts.weights[rollouts.mask]
    assert counted.tolist() == pytest.approx([1.1051709] * len(counted), rel=1e-5)
    assert scored.metrics["generator_gap"] == pytest.approx(0.1, abs=1e-5)
    assert torch.equal(scored.rewards.terms["length"], rollouts.mask.sum(1).float())
    assert scored.values is None


def test_answers_to_tasks_are_corrected_before_they_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_loop, "build_engine", lambda options, lm, run, services: Shifted(lm, 0.02))
    assert main([*tasks_run.arguments(tmp_path / "run"), "--set", "tasks.controls=[]"]) == 0
    for row in tasks_run.metrics(tmp_path / "run"):
        assert row["generator_gap"] == pytest.approx(0.02, abs=1e-5)
        # PPO's ratio begins at 1; with the engine's own log-probabilities the KL would be 0.02² / 2 = 2e-4.
        assert row["old_policy_kl"] < 1e-6


def test_the_weight_of_a_sequence_is_its_geometric_mean(tiny: LanguageModel) -> None:
    sampling = rollout_sampling(tiny, 1.0)
    rollouts = written(tiny, 0.0)
    differences = torch.tensor([[0.4, -0.2, 0.1, 0.1]]).expand(4, 4)  # mean 0.1
    rollouts = replace(rollouts, log_probs=rollouts.log_probs - differences, mask=torch.ones(4, 4, dtype=torch.bool))
    weights = {}
    for loss in ("clip", "gspo"):
        options = PPOOptions(loss=loss, generator_max_gap=1.0)  # type: ignore[arg-type]
        found, _ = corrected(rollouts, tiny, sampling=sampling, engine=Shifted(tiny, 0.0), options=options)
        weights[loss] = found.weights
    assert torch.allclose(weights["clip"], differences.exp(), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(weights["gspo"], torch.full((4, 4), 1.1051709), atol=1e-5)  # type: ignore[arg-type]


def test_weights_follow_their_rows(tiny: LanguageModel) -> None:
    rollouts = written(tiny, 0.0)
    rollouts = replace(rollouts, weights=torch.arange(4.0)[:, None].expand(4, 4))
    assert rollouts.at(torch.tensor([2, 0])).weights[:, 0].tolist() == [2.0, 0.0]  # type: ignore[index]
    assert rollouts.without(torch.tensor([True, False, False, False])).weights is rollouts.weights


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["ppo.generator=vllm"], "`ppo.generator_url` must be http"),
        (["ppo.generator=vllm", "ppo.generator_url=http://me:secret@host:1"], "without a user name or a query"),
        (
            ["ppo.generator_url=http://host:1"],
            "`ppo.generator_url` goes with `ppo.generator` vllm alone, got it with own",
        ),
        (
            ["ppo.generator=vllm", "ppo.generator_url=http://h:1", "model.adapter_rank=2"],
            "`model.adapter_rank` must be 0",
        ),
        (["ppo.generator=sglang"], "own, transformers, vllm"),
        (["ppo.generator_max_gap=0"], "above 0"),
        (["ppo.generator_max_weight=0.5"], "at least 1"),
    ],
)
def test_refusals(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(CurriculumConfig, overrides=settings)
    assert "secret" not in str(refused.value)


def test_a_server_that_is_not_there_is_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [*ALONE, "ppo.generator=vllm", "ppo.generator_url=http://127.0.0.1:9"]
    assert main(arguments(tiny_folder, tmp_path / "run", changes)) == 6
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists(), "nothing began, so nothing is left"


def test_the_configuration_of_a_run_without_the_keys_still_loads(finished: Path) -> None:
    config = json.loads((finished / "result.json").read_text())["config"]
    for name in ("generator", "generator_url", "generator_max_gap", "generator_max_weight"):
        del config["ppo"][name]
    assert from_dict(CurriculumConfig, config).ppo.generator == "own"
