"""A run that was stopped in any of its phases goes on as if nothing had been, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from preceptor.errors import Interrupted, PreceptorError
from preceptor.runs.folder import Run, open_run
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.loop import train
from preceptor.systems.surgery.setup import prepare
from preceptor.systems.surgery.state import State
from tests.systems.surgery.small import CPU, small_config, write_text
from tests.systems.surgery.test_loop import SERVICES, start

TIMING = {"evaluation_seconds", "peak_memory_mib"}

# (arm, step within it): in each of the three phases; at the seams, and in every control, among the slow tests.
STOPS = [("no_edit", 3), ("learned", 4), ("joint", 2), ("best_of_n", 3)]
SLOW_STOPS = [
    ("no_edit", 8), ("learned", 6), ("shuffled", 5), ("evolution", 3), ("random", 2), ("gradient", 1), ("training", 2),
    ("cross_entropy", 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurgeryConfig, dict[str, Any]]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("surgery")
    config = small_config(write_text(folder))
    with start(config, folder / "run") as run:
        return folder / "run", config, train(config, run, SERVICES)


def steps_of(config: SurgeryConfig, folder: Path) -> dict[tuple[str, int], int]:
    """The step of the run at every step of every arm."""
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["arm"], row["stretch_step"]): row["step"] for row in logged}


def metrics(folder: Path) -> list[dict[str, Any]]:
    def without_timing(row: dict[str, Any]) -> dict[str, Any]:
        return {
            name: without_timing(value) if isinstance(value, dict) else value
            for name, value in row.items()
            if name not in TIMING
        }

    return [without_timing(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped(config: SurgeryConfig, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Run.log

    def logging(run: Run, at: int, row: Mapping[str, Any]) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        log(run, at, row)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logging)
        with start(config, folder) as run, pytest.raises(Interrupted):
            train(config, run, SERVICES)


@pytest.mark.parametrize(
    "stop",
    [*STOPS, *(pytest.param(stop, marks=pytest.mark.slow) for stop in SLOW_STOPS)],
    ids=lambda stop: f"{stop[0]}-{stop[1]}",
)
def test_a_stop_leaves_no_trace(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, int],
) -> None:
    folder, config, result = whole
    step = steps_of(config, folder)[stop]
    stopped(config, tmp_path / "run", step, monkeypatch)
    with open_run(tmp_path / "run", quiet=True, threads=1) as run:
        assert train(config, run, SERVICES) == result
    assert metrics(tmp_path / "run") == metrics(folder)
    assert (tmp_path / "run" / "decisions.jsonl").read_bytes() == (folder / "decisions.jsonl").read_bytes()
    last = sorted((folder / "checkpoints").iterdir())[-1].name
    for path in sorted((folder / "checkpoints" / last).glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "run" / "checkpoints" / last / path.name).read_bytes(), path.name


PIECES = {
    "optimizer": lambda state: state.student.optimizer.state.clear(),
    "surgeon": lambda state: vars(state).update(surgeon=state.new_surgeon(state.phases[1])),
    "features": lambda state: vars(state).update(features=state._new_features()),
    "bootstrapped": lambda state: vars(state).update(bootstrapped=state.student.snapshot()),
    "records": lambda state: state.records.clear(),
    "learned_actions": lambda state: state.learned_actions.clear(),
    "counts": lambda state: vars(state).update(num_edits=0, num_committed=1),
    "costs": lambda state: vars(state.student.costs).update(flops=0),
}


@pytest.fixture(scope="module")
def half(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """The same run, stopped in the middle of SAC's surgery."""
    folder, config, _ = whole
    step = steps_of(config, folder)[("learned", 4)]
    place = tmp_path_factory.mktemp("runs") / "half"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped(config, place, step, monkeypatch)
    return place, step


@pytest.mark.parametrize("piece", [*PIECES, "nothing"])
def test_a_resume_that_forgets_a_piece_is_found_out(
    whole: tuple[Path, SurgeryConfig, dict[str, Any]],
    half: tuple[Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece: str,
) -> None:
    folder, config, result = whole
    shutil.copytree(half[0], tmp_path / "run")
    load = State.load_state_dict

    def forgetting(state: State, saved: dict[str, Any]) -> None:
        load(state, saved)
        if piece in PIECES:
            PIECES[piece](state)

    monkeypatch.setattr(State, "load_state_dict", forgetting)
    try:
        with open_run(tmp_path / "run", quiet=True, threads=1) as run:
            same = train(config, run, SERVICES) == result and metrics(tmp_path / "run") == metrics(folder)
    except (IndexError, PreceptorError):
        same = False  # what was forgotten is missed
    assert same == (piece == "nothing")


def test_the_stops_lie_in_every_phase(whole: tuple[Path, SurgeryConfig, dict[str, Any]]) -> None:
    folder, config, _ = whole
    phases = State(prepare(config, device=CPU, folder=folder)).phases
    assert {method for method, _ in STOPS + SLOW_STOPS} == {phase.method for phase in phases}
    steps = steps_of(config, folder)
    assert {stop for stop in STOPS + SLOW_STOPS if steps[stop] == steps[stop[0], 1] + stop[1] - 1} == {
        *STOPS,
        *SLOW_STOPS,
    }
