from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from preceptor.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    LockedError,
    LostProcessError,
    MissingExtraError,
    StorageError,
)
from preceptor.runs import environment as env
from preceptor.runs.checkpoint import load_optimizer, optimizer_state
from preceptor.runs.files import FolderLock
from preceptor.runs.folder import Run, create_run, open_run, shared_run
from preceptor.runs.guard import NonFiniteGuard
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.record import check_run_name, default_run_path
from preceptor.runs.world import World

CONFIG = {"learning_rate": 1e-5, "policy": {"rank": 8, "name": "on", "layers": (1, 2)}, "text": "Größe"}
PLAIN = CONFIG | {"policy": {"rank": 8, "name": "on", "layers": [1, 2]}}


def create(path: Path, **changes: Any) -> Run:
    arguments: dict[str, Any] = {
        "system": "reading", "config": CONFIG, "seed": 3, "streams": ["sampling", "noise"], "device": "cpu",
        "threads": 1, "save_every": 4, "quiet": True,
    }  # fmt: skip
    return create_run(path, **arguments | changes)


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    with create(tmp_path / "a" / "run") as run:
        assert (run.seed, run.threads, run.device, run.config) == (3, 1, torch.device("cpu"), PLAIN)
        assert list(run.streams) == ["sampling", "noise"]
    path = tmp_path / "a" / "run"
    assert yaml.safe_load((path / "config.yaml").read_text()) == PLAIN
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["system"] == "reading"
    assert manifest["seed"] == 3
    assert manifest["config"] == PLAIN
    assert set(manifest["code"]) == {"commit", "dirty"}
    assert manifest["environment"] == env.environment(torch.device("cpu"), 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", manifest["started"])
    assert sorted(os.listdir(path)) == ["config.yaml", "manifest.json", "run.lock"]


def test_a_run_that_goes_on_past_its_end_records_what_changed_and_when(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with create(path) as run:
        run.log(7, {"reward": 1.0})
        run.write_result({"system": "reading", "arms": {}, "verdict": ""})
    open_run(path, extended=CONFIG | {"learning_rate": 2e-5}, quiet=True).close()
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["extensions"] == [{"step": 7, "changed": ["learning_rate 1e-05 → 2e-05"]}]
    assert manifest["config"] == PLAIN | {"learning_rate": 2e-5}
    assert [file.name for file in path.glob("result*.json")] == ["result-step-000007.json"]


def test_a_run_begins_without_the_shared_weights_of_an_earlier_one_in_this_process(tmp_path: Path) -> None:
    world = World()
    world.around = lambda: contextlib.nullcontext()  # as dividing a model's layers leaves it
    assert world.shares_weights
    shared_run(world, lambda: create(tmp_path / "run")).close()
    assert not world.shares_weights


def test_creating_seeds_torchs_own_generator(tmp_path: Path) -> None:
    numbers = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        with create(tmp_path / name, seed=seed):
            numbers.append(torch.rand(3).tolist())
    assert numbers[0] == numbers[1] != numbers[2]


def test_folders_that_are_not_free(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("thesis: 1\n")
    with pytest.raises(ConfigError, match=r"mine is not empty and not a run \(it has 'config.yaml'\)"):
        create(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["config.yaml"], "not even a lock is left in it"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; give a folder"):
        create(tmp_path / "file")
    create(tmp_path / "run").close()
    with pytest.raises(ConfigError, match="run already holds a run; go on with: preceptor resume"):
        create(tmp_path / "run")
    with pytest.raises(ConfigError, match="mine is not a run folder"):
        open_run(tmp_path / "mine")


def test_a_run_made_between_the_check_and_the_lock_is_not_overwritten(tmp_path: Path, monkeypatch) -> None:
    def made_meanwhile(path: Path) -> FolderLock:
        monkeypatch.setattr("preceptor.runs.files.FolderLock", FolderLock)
        create(path, seed=8).close()
        return FolderLock(path)

    monkeypatch.setattr("preceptor.runs.files.FolderLock", made_meanwhile)
    with pytest.raises(ConfigError, match="already holds a run"):
        create(tmp_path / "run", seed=9)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["seed"] == 8


def test_dying_while_creating_leaves_a_folder_that_can_be_used(tmp_path: Path, disk, fork) -> None:
    for chosen in itertools.count():
        path = tmp_path / str(chosen)

        def die(chosen: int = chosen, path: Path = path) -> None:
            with disk.watched(disk.dies_at(chosen, torn=True)):
                create(path).close()

        status = fork(die).wait()
        complete = (path / "manifest.json").exists()
        run = open_run(path, quiet=True) if complete else create(path)
        assert run.config == PLAIN
        run.close()
        if status == 0:
            break
        assert status == 77
    assert complete
    assert chosen > 10


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"save_every": 0}, ConfigError, "save_every must be at least 1 step, got 0"),
        ({"keep_last": 0}, ConfigError, "keep_last must be at least 1, got 0"),
        ({"device": "cup"}, ConfigError, "device cup is not available"),
        ({"threads": 0}, ConfigError, "threads must be at least 1, got 0"),
        ({"seed": -1}, ConfigError, "seed must lie in"),
        ({"config": {"a": {"b": math.inf}}}, ConfigError, r"config\['a'\]\['b'\] is inf"),
        ({"config": {"a": Path("x")}}, ConfigError, r"config\['a'\] is a PosixPath"),
        ({"trackers": ["tensorbord"]}, ConfigError, "did you mean 'tensorboard'"),
        ({"trackers": ["wandb"]}, MissingExtraError, "preceptor"),
    ],
)
def test_bad_arguments_leave_no_run(tmp_path: Path, monkeypatch, changes, error, message: str) -> None:
    if changes.get("trackers") == ["wandb"]:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        create(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "manifest.json").exists()
    create(tmp_path / "run").close()  # and the lock is free


def test_a_run_in_use_cannot_be_opened(tmp_path: Path) -> None:
    with create(tmp_path / "run"), pytest.raises(LockedError, match=f"in use by pid {os.getpid()} since"):
        open_run(tmp_path / "run")
    open_run(tmp_path / "run", quiet=True).close()


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    change(data)
    path.write_text(json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data))


def test_what_would_not_be_exact_needs_a_word(tmp_path: Path) -> None:
    path = tmp_path / "run"
    create(path).close()
    with pytest.raises(ConfigError, match=r"^not bit-exact: threads 1 → 2; pass --allow-inexact"):
        open_run(path, threads=2)
    assert torch.get_num_threads() == 2
    with open_run(path, quiet=True) as run:
        assert run.threads == torch.get_num_threads() == 1, "by default the threads of the start"
    edit(path / "manifest.json", lambda manifest: manifest["environment"].update(torch="2.0", python="3.0"))
    edit(path / "config.yaml", lambda config: config["policy"].update(rank=16))
    expected = rf"not bit-exact: torch 2\.0 → {re.escape(torch.__version__)}, policy\.rank 8 → 16; "
    with pytest.raises(ConfigError, match=expected):
        open_run(path)
    with open_run(path, allow_inexact=True, quiet=True) as run:
        assert run.config["policy"]["rank"] == 16
        assert "resuming though it is not bit-exact: torch 2.0 → " in (path / "notices.log").read_text()


def test_other_code_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(tmp_path / "run").close()
    edit(tmp_path / "run/manifest.json", lambda manifest: manifest.update(code={"commit": "abc", "dirty": False}))
    open_run(tmp_path / "run").close()
    assert "the code has changed since the run began: commit abc → " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", "{", "manifest.json is damaged"),
        ("manifest.json", "[]", "manifest.json is damaged"),
        ("manifest.json", '{"schema": 1, "seed": 1}', "manifest.json is damaged .no streams, save_every"),
        ("manifest.json", '{"schema": 99}', "written by another version .schema 99"),
        ("config.yaml", "a: [", "config.yaml is not readable YAML"),
        ("config.yaml", "- a", "config.yaml must hold a mapping, got list"),
        ("config.yaml", "\x00", "config.yaml is not readable YAML"),
    ],
)
def test_damaged_records_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    create(tmp_path).close()
    (tmp_path / name).write_text(text)
    with pytest.raises((StorageError, ConfigError), match=message) as caught:
        open_run(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / name).unlink()
    with pytest.raises((StorageError, ConfigError), match=name):
        open_run(tmp_path)


def test_result_is_strict_json(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.write_result({"arms": {"random": {"reward": {"mean": 0.5, "low": math.nan}}}, "verdict": "größer"})
    text = (tmp_path / "result.json").read_text()
    assert "größer" in text
    result = json.loads(text, parse_constant=pytest.fail)
    assert result["arms"]["random"]["reward"] == {"mean": 0.5, "low": None}
    assert result["nonfinite"] == {"arms.random.reward.low": "nan"}


def test_notices_and_progress_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with create(tmp_path, quiet=False) as run:
        run.notice("before")
        run.show_progress(1, {"reward": "reward"})
        run.log(1, {"reward": 2.0, "kl": 1.0})
        run.notice("step 2 skipped")
    assert capsys.readouterr() == ("", "before\nstep 1/1  reward 2\nstep 2 skipped\n")
    lines = (tmp_path / "notices.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["before", "step 2 skipped"]


class Tracked:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, step: int, row: Any) -> None:
        self.seen.append((step, row))

    def close(self) -> None:
        self.seen.append("closed")


def test_trackers_open_at_the_first_row_and_close_with_the_run(tmp_path: Path, monkeypatch) -> None:
    opened: list[tuple[str, int]] = []
    tracked = Tracked()

    def open_tracker(name: str, folder: Path, *, first_step: int, manifest: Any) -> Tracked:
        opened.append((name, first_step))
        assert manifest["config"] == PLAIN
        return tracked

    monkeypatch.setattr("preceptor.runs.folder.open_tracker", open_tracker)
    monkeypatch.setattr("preceptor.runs.folder.check_trackers", lambda _: None)
    with create(tmp_path, trackers=["tensorboard"]) as run:
        assert not opened
        for step in run.loop(9, Counter()):
            run.log(step, {"reward": step})
            if step == 5:
                break
    assert opened == [("tensorboard", 1)]
    assert tracked.seen == [*((step, {"reward": step}) for step in (1, 2, 3, 4, 5)), "closed"]
    with open_run(tmp_path, quiet=True) as run:
        for step in run.loop(5, Counter()):
            run.log(step, {"reward": step})
    assert opened == [("tensorboard", 1), ("tensorboard", 5)]


def test_a_run_that_lost_a_process_outlives_its_launchers_signal(tmp_path: Path) -> None:
    """torchrun ends all that are left with SIGTERM, which here would end them before they have said why."""
    before = signal.getsignal(signal.SIGTERM)

    def lose(error: type[Exception]) -> None:
        with create(tmp_path / error.__name__):
            raise error("gone")

    with pytest.raises(LostProcessError):
        lose(LostProcessError)
    assert signal.getsignal(signal.SIGTERM) != before
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ValueError, match="gone"):
        lose(ValueError)
    assert signal.getsignal(signal.SIGTERM) == before


def test_leaving_closes_and_unlocks_even_when_something_fails(tmp_path: Path) -> None:
    class Broken(Tracked):
        def close(self) -> None:
            raise RuntimeError("no network")

    before = signal.getsignal(signal.SIGINT)
    run = create(tmp_path)
    run.log(1, {"reward": 1})
    run._trackers = [Broken()]
    with pytest.raises(RuntimeError, match="no network"), run:
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    open_run(tmp_path, quiet=True).close()


# The loop


class Counter:
    """A state of one number, the count of steps that it has lived through, and of how it was asked."""

    def __init__(self) -> None:
        self.count = 0
        self.num_loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "best": -math.inf}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state.keys() == {"count", "best"}
        self.count = state["count"]
        self.num_loads += 1


def count_to(
    run: Run, num_steps: int, state: Counter, *, at: dict[int, Callable[[], object]] | None = None
) -> list[int]:
    """The steps that ``run.loop`` gives; each counts, is logged, and is recorded as two decisions.

    ``at`` is what else happens in the body of a step.
    """
    steps = []
    for step in run.loop(num_steps, state):
        if at and step in at:
            at[step]()
        state.count += 1
        run.record({"step": step, "action": action} for action in (0, 1))
        run.log(step, {"reward": float(step), "count": state.count})
        steps.append(step)
    return steps


def logged(path: Path, name: str = "metrics.jsonl") -> list[int]:
    return [row["step"] for row in read_jsonl(path / name)]


def test_the_loop_gives_the_steps_that_are_left(tmp_path: Path) -> None:
    with create(tmp_path, save_every=4) as run:
        state = Counter()
        assert count_to(run, 6, state) == [1, 2, 3, 4, 5, 6]
        assert (run.step, state.count, state.num_loads) == (6, 6, 0)
    with open_run(tmp_path, quiet=True) as run:
        state = Counter()
        assert count_to(run, 6, state) == []
        assert (run.step, state.count, state.num_loads) == (6, 6, 1)
        assert count_to(run, 8, state) == [7, 8], "a longer run goes on"
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_loop_saves_when_due_and_at_the_end(tmp_path: Path) -> None:
    with create(tmp_path, save_every=4, keep_last=9) as run:
        count_to(run, 10, Counter())
        assert run.checkpoints.steps() == [4, 8, 10]
        counts = [json.loads((path / "state.json").read_text())["count"] for path in run.checkpoints.root.iterdir()]
        assert sorted(counts) == [4, 8, 10], "after the body of the step"


def test_a_last_step_that_is_due_is_saved_once(tmp_path: Path, monkeypatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Run, "save", lambda run, state: saved.append(run.step))
    with create(tmp_path, save_every=4) as run:
        count_to(run, 8, Counter())
    assert saved == [4, 8]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_loop_saves_and_stops_on_a_signal_once_the_step_is_done(tmp_path: Path, number: signal.Signals) -> None:
    state = Counter()
    with create(tmp_path, save_every=100) as run:
        message = re.escape(f"stopped at step 3; resume with: preceptor resume {tmp_path}")
        with pytest.raises(Interrupted, match=f"^{message}$") as caught:
            count_to(run, 9, state, at={3: lambda: os.kill(os.getpid(), number)})
        assert caught.value.exit_code == 128 + number
        assert run.checkpoints.steps() == [3]
    with open_run(tmp_path, quiet=True) as run:
        state = Counter()
        assert count_to(run, 9, state) == [4, 5, 6, 7, 8, 9]
        assert state.count == 9
    assert logged(tmp_path) == list(range(1, 10))


def test_an_error_in_the_body_saves_nothing(tmp_path: Path) -> None:
    with create(tmp_path, save_every=2) as run:
        with pytest.raises(ZeroDivisionError):
            count_to(run, 9, Counter(), at={4: lambda: 1 / 0})
        assert run.checkpoints.steps() == [2]
        assert run.step == 3, "the last step that was finished"
    with open_run(tmp_path, quiet=True) as run:
        assert count_to(run, 4, Counter()) == [3, 4]
    assert logged(tmp_path) == [1, 2, 3, 4], "the row after the checkpoint was dropped and written again"


def test_leaving_the_loop_saves_nothing(tmp_path: Path) -> None:
    with create(tmp_path, save_every=2) as run:
        for step in run.loop(9, Counter()):
            if step == 4:
                break
        assert run.checkpoints.steps() == [2]


def test_a_second_loop_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    """Two phases: each loop ends with a checkpoint, and a resume lands in the phase that it belongs to."""
    with create(tmp_path, save_every=100) as run:
        state = Counter()
        run.restore(state)
        run.show_progress(8)
        assert count_to(run, 3, state) == [1, 2, 3]
        state.count += 100  # the transition, which lies between the checkpoints of both loops
        assert count_to(run, 8, state) == [4, 5, 6, 7, 8]
        assert run.checkpoints.steps() == [3, 8]
        assert state.num_loads == 0
    assert json.loads((tmp_path / "plan.json").read_text()) == {"num_steps": 8}
    (tmp_path / "checkpoints/step-000008/state.json").write_text("")
    with open_run(tmp_path, quiet=True) as run:
        state = Counter()
        run.restore(state)
        assert (run.step, state.count, state.num_loads) == (3, 3, 1)
        run.restore(state)
        assert state.num_loads == 1, "a second call does nothing"
        assert count_to(run, 3, state) == []
        state.count += 100
        assert count_to(run, 8, state) == [4, 5, 6, 7, 8]
        assert (state.count, state.num_loads) == (108, 1)


def test_rows_of_the_body_survive_a_resume_and_rows_after_the_loop_do_not(tmp_path: Path) -> None:
    def train_and_evaluate(run: Run) -> None:
        count_to(run, 3, Counter())
        run.record([{"step": 3, "action": 9}])  # of a final evaluation, which every process does as a whole

    for opened in (create, open_run, open_run):
        with opened(tmp_path, quiet=True) as run:
            train_and_evaluate(run)
        assert logged(tmp_path) == [1, 2, 3]
        assert logged(tmp_path, "decisions.jsonl") == [1, 1, 2, 2, 3, 3, 3]


def test_an_evaluation_asks_whether_to_stop(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        count_to(run, 2, Counter())
        run.stop_if_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped at step 2; resume with") as caught:
            run.stop_if_requested()
        assert caught.value.exit_code == 143


def test_the_first_loop_shows_the_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with create(tmp_path, quiet=False) as run:
        state = Counter()
        for step in run.loop(1, state, columns={"gain": "gain"}):
            run.log(step, {"gain": 2.0, "reward": 1.0})
        for _ in run.loop(1, state, columns={"reward": "reward"}):
            pytest.fail("the step is done")
    assert capsys.readouterr().err == "step 1/1  gain 2\n"
    assert json.loads((tmp_path / "plan.json").read_text()) == {"num_steps": 1}


def test_the_runs_own_part_of_a_checkpoint_cannot_be_taken(tmp_path: Path) -> None:
    class Taken(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"run": 1}

    with create(tmp_path) as run, pytest.raises(AssertionError, match="the run's own"):
        run.save(Taken())


# Going on after a stop


class Learner:
    """Every kind of state: a parameter, an optimizer, a guard, and a number.

    ``drop`` names a piece that is forgotten at a resume: the negative control.
    """

    def __init__(self, *, drop: str | None = None) -> None:
        self.logits = torch.nn.Parameter(torch.randn(6))  # torch's own generator
        self.optimizer = torch.optim.AdamW([self.logits], lr=0.1)
        self.guard = NonFiniteGuard(limit=3)
        self.baseline = 0.0
        self.drop = drop

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": {"logits": self.logits},
            "optimizer": optimizer_state(self.optimizer),
            "guard": self.guard.state_dict(),
            "baseline": self.baseline,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["policy"]["logits"])
        if self.drop != "optimizer":
            load_optimizer(self.optimizer, state["optimizer"])
        if self.drop != "guard":
            self.guard.load_state_dict(state["guard"])
        if self.drop != "baseline":
            self.baseline = state["baseline"]


def train(run: Run, num_steps: int, *, drop: str | None = None, pause: float = 0.0) -> dict[str, str]:
    """A small REINFORCE loop that touches every kind of state; returns digests of all that it leaves.

    Gradients are written by hand, since autograd's threads do not survive a fork on every machine.
    """
    state = Learner(drop=drop)
    run.restore(state)
    if run.step and drop == "stream":
        run.streams["sampling"].manual_seed(0)
    if run.step and drop == "torch":
        torch.manual_seed(0)
    for step in run.loop(num_steps, state):
        probs = state.logits.detach().softmax(0)
        actions = torch.multinomial(probs, 4, replacement=True, generator=run.streams["sampling"])
        rewards = (actions == 2).float() + 0.1 * torch.randn(4, generator=run.streams["noise"])
        rewards = torch.nn.functional.dropout(rewards, 0.25)
        if step % 5 == 3:
            rewards[0] = math.nan
        run.record({"step": step, "action": int(a), "reward": float(r)} for a, r in zip(actions, rewards, strict=True))
        if rewards.isnan().any():
            run.notice(state.guard.skip(step, "reward is NaN"))
        else:
            state.guard.ok()
            advantages = rewards - state.baseline
            one_hot = torch.nn.functional.one_hot(actions, 6).float()
            state.logits.grad = -(advantages[:, None] * (one_hot - probs)).mean(0)
            state.optimizer.step()
            state.baseline += 0.1 * (float(rewards.mean()) - state.baseline)
        row = {"reward": float(rewards.mean()), "baseline": state.baseline, "skipped": state.guard.num_skipped}
        run.log(step, row)
        time.sleep(pause)
    for action in range(6):  # a final evaluation after the last save: every process that gets here does all of it
        run.record([{"step": num_steps, "action": action, "reward": float(state.logits.detach()[action])}])
        time.sleep(pause)
    files = {name: (run.path / name).read_bytes() for name in ("metrics.jsonl", "decisions.jsonl")}
    last = run.checkpoints.latest()
    assert last is not None
    assert last.step == num_steps
    files |= {path.name: path.read_bytes() for path in last.path.iterdir()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


NUM_STEPS = 23


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with create(tmp_path_factory.mktemp("unbroken")) as run:
        digests = train(run, NUM_STEPS)
        steps = [row["step"] for row in read_jsonl(run.metrics.path)]
        assert steps == list(range(1, NUM_STEPS + 1))
        assert len({row["reward"] for row in read_jsonl(run.metrics.path)}) > 10, "rewards must vary to prove anything"
    return digests


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 11, 16, 22])
def test_resume_is_bit_exact(tmp_path: Path, unbroken: dict[str, str], stop_after: int) -> None:
    """N steps, a stop without warning, and the rest leave the bytes of one go: weights, optimizer, state, logs."""
    with create(tmp_path) as run:
        train_until(run, stop_after)
    torch.manual_seed(99)
    for _ in range(2):  # once more: the training is over, the final evaluation replaces itself
        with open_run(tmp_path, quiet=True) as run:
            assert train(run, NUM_STEPS) == unbroken


class Stopped(Exception):
    pass


def train_until(run: Run, last_step: int) -> None:
    log = run.log

    def log_then_stop(step: int, row: Any) -> None:
        if step > last_step:
            raise Stopped
        log(step, row)

    run.log = log_then_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(run, NUM_STEPS)


@pytest.mark.parametrize("drop", ["optimizer", "baseline", "guard", "stream", "torch"])
def test_every_piece_of_state_matters(tmp_path: Path, unbroken: dict[str, str], drop: str) -> None:
    with create(tmp_path) as run:
        train_until(run, 14)
    with open_run(tmp_path, quiet=True) as run:
        assert train(run, NUM_STEPS, drop=drop) != unbroken


def test_a_damaged_last_checkpoint_costs_only_time(tmp_path: Path, unbroken: dict[str, str]) -> None:
    with create(tmp_path) as run:
        train_until(run, 14)
    (tmp_path / "checkpoints/step-000012/policy.safetensors").write_bytes(b"")
    with open_run(tmp_path, quiet=True) as run:
        assert train(run, NUM_STEPS) == unbroken
    notices = (tmp_path / "notices.log").read_text()
    assert "checkpoint step-000012 is damaged (policy.safetensors: 0 bytes, " in notices
    assert "resumed at step 8\n" in notices


def test_kill_9_at_random_moments_changes_nothing(tmp_path: Path, fork, unbroken: dict[str, str]) -> None:
    """Two runs, each killed up to ten times wherever it happens to be, end as the unbroken one."""
    chance = random.Random(4)
    num_killed = 0
    for index in range(2):
        path = tmp_path / str(index)
        for _ in range(10):

            def work(path: Path = path) -> None:
                run = open_run(path, quiet=True) if (path / "manifest.json").exists() else create(path)
                with run:
                    train(run, NUM_STEPS, pause=0.02)

            child = fork(work)
            time.sleep(chance.uniform(0.05, 0.25))
            os.kill(child.pid, signal.SIGKILL)
            num_killed += child.wait() == -signal.SIGKILL
        run = open_run(path, quiet=True) if (path / "manifest.json").exists() else create(path)
        with run:
            assert train(run, NUM_STEPS) == unbroken
    assert num_killed >= 2, "23 steps of 20 ms outlast the first 250 ms of either run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, fork, unbroken, number: signal.Signals) -> None:
    def work() -> int:
        try:
            with create(tmp_path) as run:
                train(run, NUM_STEPS, pause=0.3)
        except Interrupted as error:
            (tmp_path / "message").write_text(str(error))
            return error.exit_code
        return 0

    child = fork(work)
    deadline = time.monotonic() + 30
    while not (tmp_path / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, "the child never logged a step"
        time.sleep(0.01)
    time.sleep(0.15)
    os.kill(child.pid, number)
    asked = time.monotonic()
    assert child.wait() == 128 + number
    assert time.monotonic() - asked < 10
    message = (tmp_path / "message").read_text()
    last = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")][-1]
    assert 1 <= last < NUM_STEPS
    assert message == f"stopped at step {last}; resume with: preceptor resume {tmp_path}"
    assert (tmp_path / f"checkpoints/step-{last:06d}").is_dir()
    with open_run(tmp_path, quiet=True) as run:
        assert train(run, NUM_STEPS) == unbroken


def test_a_run_without_a_checkpoint_starts_again_and_says_so(tmp_path: Path) -> None:
    with create(tmp_path, save_every=100) as run:
        run.restore(Counter())
        run.log(1, {"reward": 1})
        run.record([{"step": 1}])
    with open_run(tmp_path, quiet=True) as run:
        run.restore(state := Counter())
        assert (run.step, state.num_loads) == (0, 0)
        assert (run.metrics.num_rows, run.decisions.num_rows) == (0, 0)
    assert "starting again from the first step" in (tmp_path / "notices.log").read_text()


def test_lost_checkpoints_are_never_taken_for_a_new_start(tmp_path: Path) -> None:
    with create(tmp_path, save_every=4) as run:
        for step in range(1, 6):
            run.log(step, {"reward": 1})
    with (
        open_run(tmp_path, quiet=True) as run,
        pytest.raises(CheckpointError, match="though the metrics reach step 5;"),
    ):
        run.restore(Counter())
    assert len(list(read_jsonl(tmp_path / "metrics.jsonl"))) == 5, "nothing was changed"


def test_no_sound_checkpoint_changes_nothing(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        train_until(run, 14)
    for path in tmp_path.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    with open_run(tmp_path, quiet=True) as run, pytest.raises(CheckpointError, match="2 found, 2 damaged"):
        run.restore(Learner())
    assert {path: path.read_bytes() for path in before} == before


def test_rows_that_somebody_lost_are_told(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        train_until(run, 9)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with open_run(tmp_path, quiet=True) as run:
        run.restore(Learner())
        assert run.step == 8
    assert "metrics.jsonl holds 1 of the 8 rows it had at step-000008" in (tmp_path / "notices.log").read_text()


# Names


@pytest.mark.parametrize("name", ["a", "reading-2025-01-31-1", "A.b_c-9", "x" * 64, "-"])
def test_good_names(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../x", "a b", "ä", "x" * 65, "a\n", "a\0"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"run name {name!r} is not allowed")):
        check_run_name(name)


def test_default_paths_count_up(tmp_path: Path) -> None:
    root, today = tmp_path / "runs", date(2025, 1, 31)
    assert default_run_path(root, "reading", today) == root / "reading-2025-01-31-1"
    assert default_run_path(root, "reading", today) == root / "reading-2025-01-31-2"
    (root / "reading-2025-01-31-2").rmdir()
    (root / "reading-2025-01-31-9").mkdir()
    (root / "reading-2025-01-31-x").mkdir()
    assert default_run_path(root, "reading", today).name == "reading-2025-01-31-10", "never a number used before"
    assert default_run_path(root, "surgery", today).name == "surgery-2025-01-31-1"
    create(root / "reading-2025-01-31-10").close()
    with pytest.raises(ConfigError, match="is not allowed"):
        default_run_path(root, "../reading", today)


def test_racing_processes_get_different_default_paths(tmp_path: Path, fork) -> None:
    start, go = os.pipe()
    told, tell = os.pipe()

    def race() -> None:
        os.close(go)
        os.read(start, 1)
        for _ in range(20):
            os.write(tell, default_run_path(tmp_path, "reading", date(2025, 1, 31)).name.encode() + b"\n")

    children = [fork(race) for _ in range(3)]
    os.close(go)
    os.close(tell)
    assert [child.wait() for child in children] == [0, 0, 0]
    with open(told, "rb") as file:
        names = file.read().decode().split()
    assert sorted(int(name.rsplit("-", 1)[1]) for name in names) == list(range(1, 61))
