"""A run that was stopped, killed or broken off goes on as if nothing had been: 2N steps are N and a resume of N.

The configuration uses everything that has state: an adapter, a snapshot for the KL, a queue of articles, the filter on
standard deviations with the running mean, the pair baseline, and, planted, a skipped step and two without gradient.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.cli import main
from preceptor.objectives.statistics import RunningMoments
from preceptor.runs.checkpoint import copy_tensors
from preceptor.runs.folder import Run
from preceptor.runs.guard import MicroBatch, NonFiniteGuard
from preceptor.runs.tensors import split_state
from preceptor.systems.reading import loop
from preceptor.systems.reading.articles import bundled_article
from preceptor.systems.reading.config import UpdateOptions
from preceptor.systems.reading.rewards import PairBaseline, ReturnBaseline
from preceptor.systems.reading.setup import Setup
from preceptor.systems.reading.state import CollapseWatch, State
from tests.systems.reading.small import language_model, policies

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks for it

STOP, STEPS = 5, 8
SETTINGS = (
    "model.adapter_rank=2", "data.num_pairs=3", "data.num_probes=1", "episode.batch_size=8", "episode.query_tokens=2",
    f"update.steps={STEPS}", "update.learning_rate=0.01", "update.kl_reference=snapshot", "update.snapshot_every=2",
    "update.value_kl_coefficient=0.01", "update.reward_filter=standard_deviations", "update.filter_warm_up=8",
    "update.filter_standard_deviations=-0.5", "update.advantage=running_mean", "evaluation.every=3",
    "evaluation.num_episodes=2", "evaluation.num_orders=3", "evaluation.best_of=1", "evaluation.beam_width=1",
    "evaluation.max_train_articles=2", "save_every=1",
)  # fmt: skip
TIMING = {"seconds", "tokens_per_second", "peak_memory_mib"}

Saves = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three articles cut out of the bundled one."""
    folder = tmp_path_factory.mktemp("articles")
    paragraphs = bundled_article().text.split("\n\n")
    for number in range(3):
        (folder / f"part_{number}.txt").write_text("\n\n".join(paragraphs[number::3]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_folder: Path, articles: Path) -> Callable[[Path], list[str]]:
    sets = [argument for setting in SETTINGS for argument in ("--set", setting)]
    common = ["run", "reading", "--model", str(tiny_folder), "--train-articles", str(articles), "--threads", "1"]
    return lambda out: [*common, "--no-report", *sets, "--out", str(out)]


@contextlib.contextmanager
def planted_faults() -> Iterator[None]:
    """Three rows a pass are found in step 2, 4 is not finite, 5 and 6 have no gradient, in every run alike."""
    optimizer_step = loop.optimizer_step

    def faulty(setup: Setup, state: State, number: int, **rest: Any) -> float:
        if number == 2:
            state.micro_batch.found = 3  # as if memory had run out
        if number not in (4, 5, 6):
            return optimizer_step(setup, state, number, **rest)
        state.optimizer.zero_grad(set_to_none=True)
        if number == 4:
            setup.run.notice(state.guard.skip(number, "planted"))
        return float("nan") if number == 4 else 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", faulty)
        yield


@contextlib.contextmanager
def recorded() -> Iterator[Saves]:
    """Everything that goes into a checkpoint, by step."""
    saves: Saves = {}
    save = Run.save

    def saving(run: Run, state: State) -> Path:
        own = {
            "streams": run.streams.state_dict(),
            "metrics": run.metrics.num_rows,
            "decisions": run.decisions.num_rows,
        }
        saves[run.step] = {**copy.deepcopy(state.state_dict()), "run": own}
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


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def difference(first: Saves, second: Saves, *, after: int) -> str | None:
    """Where two runs' checkpoints after a step differ, or None."""
    for step in range(after + 1, STEPS + 1):
        (tensors, rest), (others, other_rest) = split_state(first[step]), split_state(second[step])
        if rest != other_rest:  # names of the tensors included
            return f"state at step {step}"
        for name, tensor in tensors.items():
            if not torch.equal(tensor, others[name]):
                return f"{name} at step {step}"
    return None


@pytest.fixture(scope="module")
def whole(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saves]:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with planted_faults(), recorded() as saves:
        assert main(arguments(folder)) == 0
    return folder, saves


@pytest.fixture(scope="module")
def half(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Saves]:
    """The same run, stopped after half its steps."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    with planted_faults(), recorded() as saves, stopped_at(STOP):
        assert main(arguments(folder)) == 128 + signal.SIGTERM
    assert max(saves) == STOP
    return folder, saves


def same_files(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    assert [row["step"] for row in metrics(first)] == list(range(1, STEPS + 1))
    assert (first / "decisions.jsonl").read_bytes() == (second / "decisions.jsonl").read_bytes()
    assert json.loads((first / "result.json").read_text()) == json.loads((second / "result.json").read_text())
    compared = [*(first / f"checkpoints/step-{STEPS:06d}").glob("*.safetensors"), *(first / "model").iterdir()]
    assert len(compared) > 5
    for path in compared:
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


def test_two_halves_are_the_whole_bit_for_bit(
    whole: tuple[Path, Saves], half: tuple[Path, Saves], tmp_path: Path
) -> None:
    # What the negative control below drops is there to be dropped.
    state, begun = half[1][STOP], whole[1][1]
    assert any(not torch.equal(tensor, begun["policy"][name]) for name, tensor in state["policy"].items())
    assert any(not torch.equal(tensor, begun["snapshot"][name]) for name, tensor in state["snapshot"].items())
    assert split_state(state["optimizer"])[0]
    assert state["moments"]["count"] == STOP * 8
    assert len(state["queue"]) == 1
    assert state["guard"]["num_skipped"] == 1
    assert state["collapse"]["gradient"] == 1
    assert len(state["pair_baseline"]) == 3

    folder = tmp_path / "resumed"
    shutil.copytree(half[0], folder)
    with planted_faults(), recorded() as saves:
        assert main(["resume", str(folder), "--no-report"]) == 0
    assert difference(whole[1], saves, after=STOP) is None
    same_files(whole[0], folder)


def test_a_stop_during_the_final_measurement_is_resumed_too(
    whole: tuple[Path, Saves], arguments: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    folder, evaluate_article = tmp_path / "run", loop.evaluate_article

    def stopping(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate_article(*given, **named)

    with planted_faults(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_article", stopping)
        assert main(arguments(folder)) == 128 + signal.SIGINT
    assert not (folder / "result.json").exists()
    assert main(["resume", str(folder), "--no-report"]) == 0
    same_files(whole[0], folder)


# ---- the negative control: each piece of state is needed -------------------------------------------------------------


def new_counts(**counts: int) -> Callable[[State], None]:
    return lambda state: vars(state).update(counts)


PIECES: dict[str, Callable[[State], None]] = {
    "optimizer": lambda state: state.optimizer.state.clear(),
    "moments": lambda state: vars(state).update(moments=RunningMoments()),
    "pair_baseline": lambda state: vars(state).update(pair_baseline=PairBaseline()),
    "return_baseline": lambda state: vars(state).update(return_baseline=ReturnBaseline()),
    "guard": lambda state: vars(state).update(guard=NonFiniteGuard()),
    "micro_batch": lambda state: vars(state).update(micro_batch=MicroBatch()),
    "collapse": lambda state: vars(state).update(collapse=CollapseWatch()),
    "queue": lambda state: state.queue.clear(),
    "num_episodes": new_counts(num_episodes=0),
    "num_scored_values": new_counts(num_scored_values=0),
    "num_rewards_excluded": new_counts(num_rewards_excluded=1),
}


@pytest.mark.parametrize("piece", [*PIECES, "policy", "snapshot", "streams", "nothing"])
def test_a_resume_that_forgets_a_piece_is_found_out(
    whole: tuple[Path, Saves], half: tuple[Path, Saves], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: str
) -> None:
    folder, load, restore = tmp_path / "resumed", State.load_state_dict, Run.restore
    shutil.copytree(half[0], folder)

    def forgetting(state: State, saved: Mapping[str, Any]) -> None:
        fresh = copy.deepcopy({"policy": state.state_dict()["policy"], "snapshot": state.state_dict()["snapshot"]})
        load(state, saved)
        if piece in PIECES:
            PIECES[piece](state)
        elif piece in fresh:
            copy_tensors(fresh[piece], state.parameters if piece == "policy" else state._snapshot())

    def forgetting_streams(run: Run, state: State) -> None:
        fresh, was_restored = run.streams.state_dict(), run._restored
        restore(run, state)
        if piece == "streams" and not was_restored:
            run.streams.load_state_dict(fresh)

    monkeypatch.setattr(State, "load_state_dict", forgetting)
    monkeypatch.setattr(Run, "restore", forgetting_streams)
    monkeypatch.setattr(loop, "evaluate", lambda *_: [])
    monkeypatch.setattr(loop, "result", lambda *_, **__: {})
    with planted_faults(), recorded() as saves:
        assert main(["resume", str(folder), "--no-report"]) == 0
    found = difference(whole[1], saves, after=STOP) or ("metrics" if metrics(folder) != metrics(whole[0]) else None)
    assert (found is None) == (piece == "nothing"), found


def test_nothing_that_the_state_holds_is_outside_the_control() -> None:
    """A new piece of state must be saved, and come into the control above."""
    policy, untrained, _, _ = policies(language_model())
    known = {*PIECES, "parameters", "reference_model"}  # policy and snapshot by their names in the checkpoint
    held = {name for name in vars(State(policy, untrained.lm, UpdateOptions())) if not name.startswith("_")}
    assert held == known


# ---- other ends ------------------------------------------------------------------------------------------------------

PATIENCE = 900.0
"""Seconds to wait for a process; much more than it takes, since the machine may be busy."""


def wait_for_rows(folder: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    path = folder / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run did not come as far"
        time.sleep(0.002)


@pytest.mark.parametrize("seed", [1, 2])
def test_after_a_kill_at_any_moment_the_run_goes_on(
    whole: tuple[Path, Saves], arguments: Callable[[Path], list[str]], tmp_path: Path, seed: int
) -> None:
    folder, chance = tmp_path / "run", random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads of torch that idle here
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), planted_faults():
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            main(arguments(folder))
        os._exit(0)
    try:
        wait_for_rows(folder, chance.randrange(1, STEPS))
        time.sleep(chance.uniform(0, 0.15))  # into the next step, or its checkpoint
    finally:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (-signal.SIGKILL, 0)  # 0: it was done sooner than we
    with planted_faults():
        assert main(["resume", str(folder), "--no-report"]) == 0
    same_files(whole[0], folder)


def test_a_terminated_process_says_how_to_go_on(
    arguments: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "preceptor", *arguments(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for_rows(folder, 1)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 143
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("preceptor: stopped at step ")
    assert last.endswith(f"; resume with: preceptor resume {folder}")
    stopped = metrics(folder)
    assert main(["resume", str(folder), "--no-report"]) == 0
    assert metrics(folder)[: len(stopped)] == stopped
    assert [row["step"] for row in metrics(folder)] == list(range(1, STEPS + 1))
    capsys.readouterr()
