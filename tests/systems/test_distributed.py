"""Runs on several processes: the numbers of one process, one folder, one end; and faults that these tests must see."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.api import go_on, start
from preceptor.cli import main
from preceptor.errors import ConfigError, Interrupted
from preceptor.lm.model import LanguageModel
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.world import World
from preceptor.systems import find_system
from preceptor.systems.base import Services, configuration
from preceptor.systems.curriculum import loss as curriculum_loss
from preceptor.systems.reading import loss as reading_loss
from preceptor.systems.reading.environment import Trajectories
from preceptor.systems.reading.policy import Keys, Policy
from tests.systems.reading import conftest as shared_fixtures
from tests.worlds import free_port, in_processes, in_world, launcher_variables

LEFT_OUT = {"seconds", "tokens_per_second", "peak_memory_mib", "evaluation_seconds", "z", "acceptance_z"}
"""How fast the machine was; and z of a test, a ratio of two roundings where an edit hardly moves the loss."""

SMALL_READING = (
    "data.num_pairs=4",
    "data.num_probes=1",
    "episode.batch_size=7",  # cannot be cut into equal parts
    "episode.query_tokens=2",
    "update.steps=20",
    "update.learning_rate=1e-3",
    "update.micro_batch_size=3",
    "evaluation.every=10",
    "evaluation.num_episodes=3",
    "evaluation.num_orders=8",
    "evaluation.best_of=4",
    "evaluation.beam_width=2",
    "save_every=5",
)
SMALL_GPT = ("model.width=16", "model.num_layers=1", "model.num_heads=2", "model.dropout=0")
IN_CONTEXT = (
    "in_context.steps=3",
    "in_context.warm_start=thompson",
    "in_context.warm_steps=2",
    "in_context.batch_size=9",
    "in_context.rounds=6",
    "in_context.first_rounds=4",
    "in_context.evaluation_bandits=40",
    "in_context.horizons=[1]",
)
HISTORY = ("pretraining.steps=4", "history.steps=3", "history.batch_size=5", "history.evaluation_episodes=4")
BYTES = ("model.name=bytes", "model.width=32", "model.num_layers=1")
TASKS = (
    "update.steps=3",
    "tasks.warm_up_steps=10",
    "tasks.validation_prompts=3",
    "tasks.tokens_per_step=300",
    "tasks.controls=[]",
)
STUDY = (
    "study.cases_per_update=5",  # cannot be cut into equal parts
    "update.steps=6",
    "study.real_steps=2",
    "study.model_steps=3",
    "study.channels=[bm25,written_query]",
    "study.num_eval_pools=1",
    "record_every=1",
    "save_every=2",
)
SURGERY = (
    "phases.bootstrap_steps=8",
    "phases.surgery_edits=4",
    "phases.joint_edits=2",
    "agent.random_edits=2",
    "learning.batch_size=7",
    "quality.num_prompts=3",
    "evaluation.num_prompts=3",
    "controls.arms=[learned, random]",
    "controls.objectives=[]",
)
JOBS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "reading": ("reading", "smoke", SMALL_READING),
    "normalised": (
        "reading",
        "smoke",
        (*SMALL_READING, "update.steps=6", "reward.normalisation=untrained_query", "reward.context=queries"),
    ),
    "bandit": ("bandit", "smoke", (*SMALL_GPT, "pretraining.steps=4", "update.epochs=2", "update.kl_coefficient=0.1")),
    "in-context": ("bandit", "in-context", (*SMALL_GPT, *IN_CONTEXT)),
    "history": ("bandit", "history", (*SMALL_GPT, *HISTORY)),
    "curriculum": ("curriculum", "smoke", (*BYTES, "controls.frozen_policy=false")),
    "alignment": ("curriculum", "smoke", (*BYTES, "mixture.rule=alignment", "ppo.weight=0", "controls.rules=[]")),
    "tasks": ("curriculum", "tasks", (*BYTES, *TASKS)),
    "surgery": ("surgery", "smoke", SURGERY),
    "study": ("reading", "study-smoke", STUDY),
}


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


tiny_folder = shared_fixtures.tiny_folder


@pytest.fixture(scope="module", autouse=True)
def _model(tiny_folder: Path) -> None:
    """The starter model would take minutes where the one that the tests of reading share takes seconds."""
    MODEL.append(tiny_folder)


MODEL: list[Path] = []


def run(name: str, out: Path, world: World | None = None, *extra: str) -> Path:
    """The run of a job in ``out``, in this process or as one of ``world``."""
    system, preset, overrides = JOBS[name]
    chosen = find_system(system)
    if system == "reading":
        overrides += (f"model.name={MODEL[-1]}",)
    config = configuration(chosen, preset=preset, file=None, flags={}, overrides=(*overrides, *extra))
    services = Services(cache_dir=out.parent / "cache")
    start(chosen, config, services, out=out, device="cpu", threads=1, report=False, quiet=True, world=world)
    return out


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Everything that a run recorded, timing left out."""
    rows = [*read_jsonl(folder / "metrics.jsonl"), *read_jsonl(folder / "decisions.jsonl")]
    result = json.loads((folder / "result.json").read_text())
    return [*rows, {"records": result["records"], "order": result.get("order")}]


def differences(one: Any, other: Any, *, close: Callable[[float, float], bool], where: str = "") -> Iterator[str]:
    """Where two records differ; choices and texts must be equal, numbers close."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in one.keys() | other.keys():
            if name not in LEFT_OUT:
                yield from differences(one.get(name), other.get(name), close=close, where=f"{where}.{name}")
    elif isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        if len(one) != len(other):
            yield f"{where}: {len(one)} and {len(other)}"
            return
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, close=close, where=f"{where}[{number}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not close(one, other):
            yield f"{where}: {one} and {other}"
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


def nearly(one: float, other: float) -> bool:
    """Equal up to the order of sums, after some updates."""
    return math.isclose(one, other, rel_tol=2e-3, abs_tol=1e-4)


def exactly(one: float, other: float) -> bool:
    """Bit for bit."""
    return one == other


# ---- the numbers of one process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a job in one process, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), set[str]()

    def of(name: str) -> Path:
        if name not in made:
            made.add(name)
            run(name, folder / name)
        return folder / name

    return of


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all jobs in two processes, one after another."""
    folder = tmp_path_factory.mktemp("together")
    in_world(2, lambda world: [run(name, folder / name, world) and None for name in JOBS])
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_the_choices_and_numbers_of_one(
    name: str, alone: Callable[[str], Path], together: Path
) -> None:
    one, two = rows_of(alone(name)), rows_of(together / name)
    assert len(one) > 3
    assert list(differences(one, two, close=nearly))[:5] == []


def test_rewards_agree_to_a_ten_thousandth_after_twenty_updates(alone: Callable[[str], Path], together: Path) -> None:
    one, two = (list(read_jsonl(folder / "metrics.jsonl")) for folder in (alone("reading"), together / "reading"))
    assert len(one) == len(two) == 20
    assert len({row["reward"] for row in one}) > 15  # rewards that vary
    assert max(abs(left["reward"] - right["reward"]) for left, right in zip(one, two, strict=True)) < 1e-4
    orders = [
        [tuple(span.get("pair") for span in row["policy_spans"]) for row in read_jsonl(folder / "decisions.jsonl")]
        for folder in (alone("reading"), together / "reading")
    ]
    assert orders[0] == orders[1]
    assert len(set(orders[0])) > 5


def test_the_folder_is_that_of_one_process(alone: Callable[[str], Path], together: Path) -> None:
    names = [{path.name for path in folder.iterdir()} for folder in (alone("reading"), together / "reading")]
    assert names[0] == names[1]
    manifest = json.loads((together / "reading" / "manifest.json").read_text())
    assert manifest["environment"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_four_processes_too(name: str, alone: Callable[[str], Path], tmp_path: Path) -> None:
    in_world(4, lambda world: run(name, tmp_path / name, world) and None)
    assert list(differences(rows_of(alone(name)), rows_of(tmp_path / name), close=nearly))[:5] == []


# ---- faults that the comparison must see -----------------------------------------------------------------------------


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """A mistake that code for many processes is prone to."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "gradients are not summed":
            patch.setattr(World, "sum_gradients", lambda self, parameters: None)
        elif fault == "a stream for each process":
            patch.setattr(World, "stream", lambda self, generator, rows, num_rows, each=1: generator)
        elif fault == "rows out of order":
            gather = World.gather
            patch.setattr(
                World, "gather", lambda self, n, *parts: tuple(each.flip(0) for each in gather(self, n, *parts))
            )
        elif fault == "means of this process's rows":
            patch.setattr(World, "sums", lambda self, values: dict(values))
        yield


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("gradients are not summed", "reading"),
        ("a stream for each process", "reading"),
        ("rows out of order", "reading"),
        ("means of this process's rows", "reading"),
        ("gradients are not summed", "curriculum"),
        ("a stream for each process", "history"),
        ("gradients are not summed", "surgery"),
        ("rows out of order", "study"),
    ],
)
def test_a_planted_fault_is_seen(fault: str, name: str, alone: Callable[[str], Path], tmp_path: Path) -> None:
    steps = ("update.steps=3",) if name == "reading" else ()

    def wrong(world: World) -> None:
        with planted(fault):
            run(name, tmp_path / name, world, *steps)

    in_world(2, wrong)
    right, planted_in = (steps_of(folder) for folder in (alone(name), tmp_path / name))
    assert list(differences(right[: len(planted_in)], planted_in, close=nearly))


def steps_of(folder: Path) -> list[list[dict[str, Any]]]:
    """What a run recorded of each of its first steps, before any evaluation."""
    last = 6 if "history" in folder.name else 2  # the history run learns from rewards after four steps
    rows = [*read_jsonl(folder / "metrics.jsonl"), *read_jsonl(folder / "decisions.jsonl")]
    return [[row for row in rows if row["step"] == step] for step in range(1, last + 1)]


def test_without_a_fault_the_first_steps_are_those_of_one_process(alone: Callable[[str], Path], together: Path) -> None:
    for name in ("reading", "curriculum", "history", "surgery"):
        assert list(differences(steps_of(alone(name)), steps_of(together / name), close=nearly)) == []


# ---- stopping and going on -------------------------------------------------------------------------------------------


def stopped(folder: Path, world: World) -> str:
    """A run that a signal to the second process alone stops in its fourth step; gives what is told."""
    before, calls = World.sum_gradients, []

    def sum_gradients(self: World, parameters: Any) -> None:
        calls.append(self.rank)
        if len(calls) == 4 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        before(self, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "sum_gradients", sum_gradients)
        with pytest.raises(Interrupted) as stop:
            run("normalised", folder, world)
    return str(stop.value)


def test_a_signal_to_one_process_stops_all_at_one_step_and_a_resume_is_exact(together: Path, tmp_path: Path) -> None:
    folder, services = tmp_path / "stopped", Services(cache_dir=tmp_path / "cache")

    def stopped_and_resumed(world: World) -> str:
        told = stopped(folder, world)
        go_on(folder, services, world=world, report=False, quiet=True)
        return told

    first, second = in_world(2, stopped_and_resumed)
    assert (
        first == second == f"stopped at step 4; resume with: torchrun --nproc-per-node 2 -m preceptor resume {folder}"
    )
    assert "resumed at step 4" in (folder / "notices.log").read_text()
    assert list(differences(rows_of(together / "normalised"), rows_of(folder), close=exactly))[:5] == []


def test_memory_that_runs_out_in_one_process_leaves_the_numbers_and_gives_both_one_size(tmp_path: Path) -> None:
    short = ("update.steps=2", "save_every=2", "update.micro_batch_size=0")

    def limited(world: World) -> None:
        real = reading_loss.score_actions

        def short_of_memory(policy: Policy, part: Trajectories, keys: Keys, **options: Any) -> Any:
            if world.rank == 1 and len(part) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(policy, part, keys, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading_loss, "score_actions", short_of_memory)
            run("reading", tmp_path / "two", world, *short)

    in_world(2, limited)
    one, two = rows_of(run("reading", tmp_path / "one", None, *short)), rows_of(tmp_path / "two")
    assert [row.pop("micro_batch_size") for row in two[:2]] == [1, 1]
    assert list(differences(one, two, close=nearly))[:5] == []


@contextlib.contextmanager
def short_of_memory(rows: int, *, of: str) -> Iterator[None]:
    """More rollouts than ``rows``, or documents (``of`` alignment), do not fit in an update's pass."""
    rollout_log_probs, cross_entropy = curriculum_loss.rollout_log_probs, curriculum_loss.accumulate_cross_entropy
    sizes: list[int] = []

    def rollouts(lm: LanguageModel, part: curriculum_loss.Rollouts, sampling: Any) -> Any:
        # Some passes fit, since a first step has no rewards; then the first of each size leaves its metrics behind.
        sizes.append(len(part))
        if len(part) > rows and len(sizes) > 2 and len(part) in sizes[:-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return rollout_log_probs(lm, part, sampling)

    def documents(lm: LanguageModel, part: curriculum_loss.Documents, **options: Any) -> Any:
        given = cross_entropy(lm, part, **options)  # the gradient is there when memory runs out, and must go
        if options["micro_batch_size"] > rows and of == "alignment":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum_loss, "rollout_log_probs", rollouts)
        patch.setattr(curriculum_loss, "accumulate_cross_entropy", documents)
        yield


@pytest.mark.parametrize("name", ["curriculum", "alignment", "tasks"])
@pytest.mark.parametrize("processes", [1, 2])
def test_memory_that_runs_out_in_curriculum_changes_no_number_but_the_passes(
    name: str, processes: int, tmp_path: Path
) -> None:
    """In the last process alone, where there are two."""
    folder = tmp_path / name
    larger = () if name == "tasks" else ("update.batch_tokens=1024", "ppo.prompts=8", "ppo.minibatches=1")

    def limited(world: World | None) -> None:
        is_last = world is None or world.rank == world.size - 1
        with short_of_memory(1 if is_last else 10**6, of=name):
            run(name, folder, world, *larger)

    if processes == 1:
        limited(None)
    else:
        in_world(processes, limited)
    one, other = rows_of(run(name, tmp_path / "plenty", None, *larger)), rows_of(folder)
    found = [row.pop("micro_batch_size") for row in other if "micro_batch_size" in row]
    assert found
    assert set(found) == {1}
    assert list(differences(one, other, close=nearly))[:5] == []
    assert "memory ran out; from now on" in (folder / "notices.log").read_text()


def test_another_number_of_processes_needs_consent_and_then_goes_on(
    alone: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, services = tmp_path / "half", Services(cache_dir=tmp_path / "cache")
    in_world(2, lambda world: stopped(folder, world))
    with pytest.raises(ConfigError, match=r"not bit-exact: processes 2 → 1; pass --allow-inexact"):
        go_on(folder, services, quiet=True)
    go_on(folder, services, allow_inexact=True, report=False, quiet=True)
    assert list(differences(rows_of(alone("normalised")), rows_of(folder), close=nearly))[:5] == []


# ---- the command line ------------------------------------------------------------------------------------------------


def commanded(words: Sequence[str]) -> list[tuple[int, list[str]]]:
    """``preceptor WORDS`` in two processes as a launcher starts them: exit code and errors told, of each."""

    def command(_: int) -> tuple[int, list[str]]:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        return code, [line for line in err.getvalue().splitlines() if line.startswith("preceptor:")]

    return in_processes(2, command)


def test_an_error_in_one_process_is_one_line_and_one_exit_code(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os\n\n\n"
        "def reward(prompts, continuations, references):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('planted')\n"
        "    return [0.0] * len(prompts)\n"
    )
    reward = f"ppo.rewards=[{{name: '{tmp_path / 'rewards.py'}:reward', weight: 1.0}}]"
    words = ["run", "curriculum", "--preset", "smoke", "--threads", "1", "--no-report", "--out", str(tmp_path / "run")]
    first, second = commanded([*words, *(word for each in (*BYTES, reward) for word in ("--set", each))])
    assert first == (8, []) or first == (2, [])  # whether it had noticed that the other is gone, or was told
    code, (line,) = second
    assert code == 2
    assert line.startswith("preceptor: error: process 1 of 2: the reward ")
    assert line.endswith(f"resume with: torchrun --nproc-per-node 2 -m preceptor resume {tmp_path / 'run'}")


def test_what_cannot_be_shared_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(world: World) -> list[str]:
        found = []
        for system, preset, override in (
            ("bandit", "smoke", "model.dropout=0.1"),
            ("pretrain", "smoke", "data.sources=[{path: a.txt}]"),
            ("curriculum", "smoke", "ppo.generator=transformers"),
        ):
            chosen = find_system(system)
            config = configuration(chosen, preset=preset, file=None, flags={}, overrides=(override,))
            with pytest.raises(ConfigError, match="works in one process, this run has 2; start it without") as refusal:
                start(
                    chosen,
                    config,
                    Services(cache_dir=tmp_path / "cache"),
                    out=tmp_path / system,
                    quiet=True,
                    device="cpu",
                    world=world,
                )
            found.append(str(refusal.value))
            world.barrier()
        return found

    first, second = in_world(2, refused)
    assert first == second
    assert [line.split(" works")[0] for line in first] == [
        "dropout (a mask is drawn for a whole batch; set `model.dropout` 0)",
        "the system pretrain",
        "`ppo.generator` transformers",
    ]
    assert not list(tmp_path.glob("*/manifest.json"))  # what was refused leaves no run behind
    for name, value in launcher_variables(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    assert main(["compare", "reading", "--seeds", "0-1", "--out", str(tmp_path / "sweep")]) == 2
    assert capsys.readouterr().err == (
        "preceptor: error: preceptor compare works in one process, 2 were started; start it without a launcher\n"
    )
    monkeypatch.setenv("RANK", "1")  # the others say nothing
    assert main(["compare", "reading", "--seeds", "0-1", "--out", str(tmp_path / "sweep")]) == 2
    assert capsys.readouterr().err == ""


def test_a_killed_process_ends_all_under_torchrun_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["run", "surgery", "--preset", "smoke", "--threads", "1", "--no-report", "--out", str(folder)]
    sets = [word for each in (*SURGERY, "phases.bootstrap_steps=4000", "save_every=10") for word in ("--set", each)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher = subprocess.Popen(
        [*torchrun, "-m", "preceptor", *words, *sets],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint was saved"
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)
    os.kill(_worker(launcher.pid, rank=1), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=60)
    lines = [line for line in out.splitlines() if line.startswith("preceptor: error")]
    assert lines == [
        "preceptor: error: a process of this run has ended (2 belong to it), so the others end too; what was saved is "
        f"safe; resume with: torchrun --nproc-per-node 2 -m preceptor resume {folder}"
    ]
    assert launcher.returncode != 0


def _worker(launcher: int, *, rank: int) -> int:
    """The launcher's child that is process ``rank``."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process {rank} among {children}")
