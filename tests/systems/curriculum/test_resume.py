"""A run that was stopped anywhere goes on as if nothing had been: within an arm, between two, before the result."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preceptor.cli import main
from preceptor.run.checkpoint import Checkpoint
from preceptor.run.folder import Run
from preceptor.run.guard import NonFiniteGuard
from preceptor.systems.curriculum.learner import Learner, copy_tensors
from tests.systems.curriculum.small import ARMS, STEPS, arguments, rows

ALL_STEPS = STEPS * len(ARMS)
Saves = dict[int, tuple[dict[str, dict[str, Tensor]], Any]]


@contextlib.contextmanager
def recorded() -> Iterator[Saves]:
    """Everything that goes into a checkpoint, by step."""
    saves: Saves = {}
    save = Run.save

    def saving(run: Run, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        copies = {group: {name: t.detach().clone() for name, t in named.items()} for group, named in tensors.items()}
        own = {"streams": run.streams.state_dict(), "rows": [run.metrics.num_rows, run.decisions.num_rows]}
        saves[step] = copies, json.loads(json.dumps([state, own]))
        return save(run, step, tensors, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", saving)
        yield saves


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """SIGTERM comes while ``step`` is at work."""
    log = Run.log

    def logging(run: Run, at: int, row: Mapping[str, Any]) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, at, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", logging)
        yield


def difference(first: Saves, second: Saves, *, after: int, until: int = ALL_STEPS) -> str | None:
    """Where two runs' checkpoints after a step differ, or None."""
    for step in range(after + 1, until + 1):
        (tensors, state), (others, other_state) = first[step], second[step]
        if state != other_state:
            return f"state at step {step}"
        if {(g, n) for g in tensors for n in tensors[g]} != {(g, n) for g in others for n in others[g]}:
            return f"names at step {step}"
        for group, named in tensors.items():
            for name, tensor in named.items():
                if not torch.equal(tensor, others[group][name]):
                    return f"{group} {name} at step {step}"
    return None


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saves]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with recorded() as saves:
        assert main(arguments(tiny_folder, folder)) == 0
    return folder, saves


def same_files(first: Path, second: Path) -> None:
    assert rows(first / "metrics.jsonl") == rows(second / "metrics.jsonl")
    assert [row["step"] for row in rows(first / "metrics.jsonl")] == list(range(1, ALL_STEPS + 1))
    assert (first / "decisions.jsonl").read_bytes() == (second / "decisions.jsonl").read_bytes()
    assert json.loads((first / "result.json").read_text()) == json.loads((second / "result.json").read_text())
    for folder in ("model", "best_model"):
        weights = "model.safetensors"
        assert (first / folder / weights).read_bytes() == (second / folder / weights).read_bytes()


@pytest.mark.parametrize(
    "stop", [3, STEPS, STEPS + 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2 * STEPS + 1, ALL_STEPS))]
)
def test_two_parts_are_the_whole_bit_for_bit(
    tiny_folder: Path, whole: tuple[Path, Saves], tmp_path: Path, stop: int
) -> None:
    folder = tmp_path / "run"
    with recorded() as saves, stopped_at(stop):
        assert main(arguments(tiny_folder, folder)) == 128 + signal.SIGTERM
    assert max(saves) == stop
    assert not (folder / "result.json").exists()
    with recorded() as saves:
        assert main(["resume", str(folder), "--no-report"]) == 0
    assert difference(whole[1], saves, after=stop) is None
    same_files(whole[0], folder)


# ---- the negative control: each piece of state is needed -------------------------------------------------------------

STOP = 3
PIECES: dict[str, Callable[[Learner], None]] = {
    "optimiser": lambda learner: learner.optimiser.state.clear(),
    "mixture": lambda learner: learner.mixture.load_state_dict(
        learner.mixture.state_dict() | {"weights": [0.5, 0.5], "num_updates": 0}
    ),
    "sampler": lambda learner: learner.sampler.load_state_dict(
        type(learner.sampler)({"dialogue": 1, "noise": 1}, seed=0).state_dict() | {"seed": 0}
    ),
    "kl": lambda learner: learner.kl.load_state_dict({"coefficient": 0.1}) if learner.kl else None,
    "guard": lambda learner: vars(learner).update(guard=NonFiniteGuard()),
    "sample": lambda learner: learner.sample.clear(),
    "sample_losses": lambda learner: learner.sample_losses.clear(),
    "tokens_since": lambda learner: vars(learner).update(tokens_since=0 * learner.tokens_since),
    "curve": lambda learner: learner.curve.clear(),
    "rewards": lambda learner: learner.rewards.clear(),
    "mixtures": lambda learner: learner.mixtures.clear(),
    "counts": lambda learner: learner.counts.update(tokens=0),
    "best_loss": lambda learner: vars(learner).update(best_loss=-1.0),
}
WEIGHTS = ("policy", "frozen", "value_network")


@pytest.mark.parametrize(
    "piece", [*(name for name in PIECES if name not in ("guard", "sampler")), *WEIGHTS, "streams", "nothing"]
)
def test_a_resume_that_forgets_a_piece_is_found_out(
    tiny_folder: Path,
    whole: tuple[Path, Saves],
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece: str,
) -> None:
    folder, load, restore = tmp_path / "resumed", Learner.load, Run.restore
    shutil.copytree(half, folder)

    def forgetting(learner: Learner, checkpoint: Checkpoint) -> None:
        fresh = {group: {n: t.clone() for n, t in named.items()} for group, named in learner._live().items()}
        load(learner, checkpoint)
        if piece in PIECES:
            PIECES[piece](learner)
        elif piece in WEIGHTS:
            copy_tensors(fresh[piece], learner._live()[piece])

    def forgetting_streams(run: Run) -> Checkpoint | None:
        fresh = run.streams.state_dict()
        checkpoint = restore(run)
        if piece == "streams":
            run.streams.load_state_dict(fresh)
        return checkpoint

    monkeypatch.setattr(Learner, "load", forgetting)
    monkeypatch.setattr(Run, "restore", forgetting_streams)
    with recorded() as saves, stopped_at(STOP + 1):
        assert main(["resume", str(folder), "--no-report"]) == 128 + signal.SIGTERM
    found = difference(whole[1], saves, after=STOP, until=STOP + 1)
    assert (found is None) == (piece == "nothing"), found


@pytest.fixture(scope="module")
def half(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped within its first arm."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    with stopped_at(STOP):
        assert main(arguments(tiny_folder, folder)) == 128 + signal.SIGTERM
    return folder
