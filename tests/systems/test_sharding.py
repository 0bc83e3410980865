"""Reading with a model whose layers are divided among processes: the loss, the folder and the end of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from preceptor.api import go_on
from preceptor.cli import main
from preceptor.errors import Interrupted
from preceptor.lm.model import LanguageModel
from preceptor.runs.export import load_model
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.tensors import read_tensors
from preceptor.runs.world import World, is_sharded, local
from preceptor.systems.base import Services
from preceptor.systems.reading import loop
from preceptor.systems.reading.state import State
from tests.systems import test_distributed as shared
from tests.systems.test_distributed import differences, exactly, nearly, rows_of, run, tiny_folder
from tests.worlds import in_world

__all__ = ["tiny_folder"]  # a fixture
SHARDED = ("update.steps=4", "save_every=2", "model.sharding=full")
ADAPTER = ("model.adapter_rank=2", "update.learning_rate=0.01")
LOSSES = ("policy_loss", "query_kl", "value_kl", "reward", "query_entropy", "gradient_norm")


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module", autouse=True)
def _model(tiny_folder: Path) -> None:
    shared.MODEL.append(tiny_folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("reading", tmp_path_factory.mktemp("alone") / "run", None, *SHARDED)


def divided(out: Path, world: World, *extra: str) -> list[float]:
    """A run whose layers are divided; gives the share of each parameter of a layer that this process holds."""
    shares: list[float] = []

    class Watched(State):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            parts = [parameter for parameter in self.parameters.values() if is_sharded(parameter)]
            shares.extend(local(parameter).numel() / parameter.numel() for parameter in parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "State", Watched)
        run("reading", out, world, *SHARDED, *extra)
    return shares


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "run"
    for shares in in_world(2, lambda world: divided(folder, world)):
        assert len(shares) == 2 * 9  # nine weights a layer, each divided
        assert all(0.4 < share < 0.6 for share in shares)
    return folder


def losses(folder: Path) -> list[float]:
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    return [row[name] for row in rows for name in LOSSES if row[name] is not None]


def test_the_loss_is_that_of_one_process_to_a_hundred_thousandth(alone: Path, together: Path) -> None:
    one, two = losses(alone), losses(together)
    assert len(one) == len(two) == 4 * 5
    assert len(set(one)) > 12
    assert max(abs(left - right) for left, right in zip(one, two, strict=True)) < 1e-5
    assert list(differences(rows_of(alone), rows_of(together), close=nearly))[:5] == []


def test_checkpoint_and_model_are_whole_and_those_of_one_process(alone: Path, together: Path) -> None:
    newest = Path("checkpoints") / "step-000004"
    found = [
        {file.name: read_tensors(file) for file in sorted((folder / newest).glob("*.safetensors"))}
        for folder in (alone, together)
    ]
    models = [load_file(folder / "model" / "model.safetensors") for folder in (alone, together)]
    found = [{**parts, "model": model} for parts, model in zip(found, models, strict=True)]
    assert found[0].keys() == found[1].keys() >= {"policy.safetensors", "optimizer.safetensors"}
    for part, tensors in found[0].items():
        assert tensors.keys() == found[1][part].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[1][part][name], tensor, rtol=1e-3, atol=1e-4)
    assert load_model(together / "model")[0].num_parameters() == load_model(alone / "model")[0].num_parameters()


@pytest.mark.parametrize(
    "fault",
    ["gradients of layers are averaged", pytest.param("embeddings are not summed", marks=pytest.mark.slow)],
)
def test_a_planted_fault_is_seen(fault: str, alone: Path, tmp_path: Path) -> None:
    def wrong(world: World) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if fault == "gradients of layers are averaged":
                patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
            else:
                patch.setattr(World, "sum_gradients", lambda self, parameters: None)
            divided(tmp_path / "run", world, "update.steps=2")

    in_world(2, wrong)
    one, two = losses(alone), losses(tmp_path / "run")
    assert max(abs(left - right) for left, right in zip(one, two, strict=False)) > 1e-4


def stopped(folder: Path, world: World | None) -> None:
    """A run that a signal stops in its second step."""
    step = loop.step

    def stopping(setup: Any, state: State, number: int) -> dict[str, Any]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(setup, state, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", stopping)
        with pytest.raises(Interrupted):
            run("reading", folder, world, *SHARDED)


@pytest.mark.slow
def test_a_resume_is_exact_and_one_process_can_go_on(alone: Path, together: Path, tmp_path: Path) -> None:
    services = Services(cache_dir=tmp_path / "cache")

    def stopped_and_resumed(world: World) -> None:
        stopped(tmp_path / "two", world)
        go_on(tmp_path / "two", services, world=world, report=False, quiet=True)
        stopped(tmp_path / "half", world)

    in_world(2, stopped_and_resumed)
    assert list(differences(rows_of(together), rows_of(tmp_path / "two"), close=exactly))[:5] == []
    go_on(tmp_path / "half", services, allow_inexact=True, report=False, quiet=True)
    assert list(differences(rows_of(alone), rows_of(tmp_path / "half"), close=nearly))[:5] == []


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_divided(alone: Path, tmp_path: Path) -> None:
    stopped(tmp_path / "run", None)
    services = Services(cache_dir=tmp_path / "cache")

    def resumed(world: World) -> None:
        go_on(tmp_path / "run", services, allow_inexact=True, world=world, report=False, quiet=True)

    in_world(2, resumed)
    assert list(differences(rows_of(alone), rows_of(tmp_path / "run"), close=nearly))[:5] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
@pytest.mark.parametrize(
    "extra",
    [
        ADAPTER,
        ("update.gradient_checkpointing=true",),
        ("reward.reader=policy", "reward.normalisation=untrained_query", "reward.context=queries"),
        ("selection.embedder=attention", "update.value_kl_coefficient=0.1", "update.micro_batch_size=0"),
        ("reward.kind=probe", "update.reward_filter=best_fraction", "update.filter_fraction=0.15"),  # one row is kept
    ],
    ids=["adapter", "gradient checkpointing", "policy as reader", "attention", "one row"],
)
def test_other_configurations_too(extra: tuple[str, ...], tmp_path: Path) -> None:
    run("reading", tmp_path / "alone", None, *SHARDED, *extra)
    in_world(2, lambda world: divided(tmp_path / "together", world, *extra) and None)
    one, two = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert max(abs(left - right) for left, right in zip(one, two, strict=True)) < 1e-5
    assert list(differences(rows_of(tmp_path / "alone"), rows_of(tmp_path / "together"), close=nearly))[:5] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it
def test_frozen_weights_in_bfloat16_under_an_adapter_in_float32(tmp_path: Path) -> None:
    """Beside an undivided run without the fast path, which rounds otherwise; sums in bfloat16 take another order."""
    extra = (*ADAPTER, "model.dtype=bfloat16", "update.steps=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "engine", lambda self, dtype=None: None)
        run("reading", tmp_path / "alone", None, *SHARDED, *extra)
        in_world(2, lambda world: divided(tmp_path / "together", world, *extra) and None)
    (one,), (two,) = (list(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("alone", "together"))
    assert two["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-5)
    assert two["reward"] == pytest.approx(one["reward"], abs=1e-5)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0.01)


@pytest.mark.slow
def test_three_processes_under_torchrun(alone: Path, tmp_path: Path) -> None:
    overrides = (*shared.SMALL_READING, *SHARDED, f"model.name={shared.MODEL[-1]}")
    sets = [word for each in overrides for word in ("--set", each)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = ["run", "reading", "--preset", "smoke", "--threads", "1", "--no-report", "--device", "cpu"]
    command = [*torchrun, "-m", "preceptor", *words, *sets, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["environment"]["processes"] == 3
    assert max(abs(a - b) for a, b in zip(losses(alone), losses(tmp_path / "run"), strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["reading", "--set", "model.sharding=full", "--set", "update.kl_reference=snapshot"], "which no process has"),
        (["reading", "--set", "model.sharding=half"], "`model.sharding` must be"),
        (["curriculum", "--set", "model.sharding=full"], "sharding"),
        (["bandit", "--set", "model.sharding=full"], "sharding"),
        (["surgery", "--set", "model.sharding=full"], "sharding"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("preceptor: error: ")
    assert told in line
    assert not (tmp_path / "run").exists()
