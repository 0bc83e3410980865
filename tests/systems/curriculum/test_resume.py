"""A run that was stopped anywhere goes on as if nothing had been: within a method, between two, before the result."""

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
from preceptor.runs.checkpoint import Stateful, copy_tensors
from preceptor.runs.folder import Run
from preceptor.runs.tensors import split_state
from preceptor.systems.curriculum.state import State
from tests.systems.curriculum.small import METHODS, STEPS, arguments, rows

ALL_STEPS = STEPS * len(METHODS)
Saves = dict[int, tuple[dict[str, Tensor], Any]]


@contextlib.contextmanager
def recorded() -> Iterator[Saves]:
    """Everything that goes into a checkpoint, by step: tensors and the rest."""
    saves: Saves = {}
    save = Run.save

    def saving(run: Run, state: Stateful) -> Path:
        own = {"streams": run.streams.state_dict(), "rows": [run.metrics.num_rows, run.decisions.num_rows]}
        tensors, rest = split_state({**state.state_dict(), "own": own})
        saves[run.step] = {name: tensor.detach().clone() for name, tensor in tensors.items()}, rest
        return save(run, state)

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
        (tensors, rest), (others, other_rest) = first[step], second[step]
        if rest != other_rest:
            return f"plain state at step {step}"
        if tensors.keys() != others.keys():
            return f"names at step {step}"
        for name, tensor in tensors.items():
            if not torch.equal(tensor, others[name]):
                return f"{name} at step {step}"
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


def test_a_checkpoint_of_another_method_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with stopped_at(STEPS + 1):
        assert main(arguments(tiny_folder, folder)) == 128 + signal.SIGTERM
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"steps: {STEPS}\n", "steps: 20\n"))
    assert main(["resume", str(folder), "--no-report", "--allow-inexact"]) == 5
    assert "belongs to learning_progress+ppo and the checkpoint to frozen_policy" in capsys.readouterr().err


# ---- the negative control: each piece of state is needed -------------------------------------------------------------

STOP = 3
PIECES: dict[str, Callable[[State], object]] = {
    "optimizer": lambda state: state.optimizer.state.clear(),
    "mixture": lambda state: state.mixture.load_state_dict(
        state.mixture.state_dict() | {"weights": [0.5, 0.5], "num_updates": 0}
    ),
    "sampler": lambda state: state.sampler.load_state_dict(
        state.sampler.state_dict() | {"counts": dict.fromkeys(state.sampler.names, 0)}
    ),
    "kl": lambda state: state.kl.load_state_dict({"coefficient": 0.1}) if state.kl else None,
    "sample": lambda state: state.sample.clear(),
    "sample_losses": lambda state: state.sample_losses.clear(),
    "tokens_since": lambda state: vars(state).update(tokens_since=0 * state.tokens_since),
    "curve": lambda state: state.outcome.curve.clear(),
    "rewards": lambda state: state.outcome.rewards.clear(),
    "mixtures": lambda state: state.outcome.mixtures.clear(),
    "counts": lambda state: state.outcome.counts.update(tokens=0),
    "best_loss": lambda state: vars(state).update(best_loss=-1.0),
}
WEIGHTS = ("policy", "frozen_model", "value_network")


@pytest.mark.parametrize("piece", [*PIECES, *WEIGHTS, "streams", "nothing"])
def test_a_resume_that_forgets_a_piece_is_found_out(
    tiny_folder: Path,
    whole: tuple[Path, Saves],
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece: str,
) -> None:
    folder, load, restore = tmp_path / "resumed", State.load_state_dict, Run.restore
    shutil.copytree(half, folder)

    def forgetting(state: State, saved: dict[str, Any]) -> None:
        fresh = {part: {n: t.clone() for n, t in named.items()} for part, named in state._live_tensors().items()}
        load(state, saved)
        if piece in PIECES:
            PIECES[piece](state)
        elif piece in WEIGHTS:
            copy_tensors(fresh[piece], state._live_tensors()[piece])

    def forgetting_streams(run: Run, state: Stateful) -> None:
        fresh = run.streams.state_dict()
        restored = run._restored
        restore(run, state)
        if piece == "streams" and not restored:
            run.streams.load_state_dict(fresh)

    monkeypatch.setattr(State, "load_state_dict", forgetting)
    monkeypatch.setattr(Run, "restore", forgetting_streams)
    with recorded() as saves, stopped_at(STOP + 1):
        assert main(["resume", str(folder), "--no-report"]) == 128 + signal.SIGTERM
    found = difference(whole[1], saves, after=STOP, until=STOP + 1)
    assert (found is None) == (piece == "nothing"), found


@pytest.fixture(scope="module")
def half(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped within its first method."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    with stopped_at(STOP):
        assert main(arguments(tiny_folder, folder)) == 128 + signal.SIGTERM
    return folder
