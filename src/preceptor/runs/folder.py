"""The run folder and the ``Run`` that a system's ``train`` works with.

config.yaml       the resolved configuration
manifest.json     system, seed, streams, versions, commit, device, threads; written once, last, so that its presence
                  means "this is a run"
plan.json         how many steps it will have
metrics.jsonl     one row a step
decisions.jsonl   every action of the teacher
checkpoints/      step-NNNNNN/
notices.log       what was worth telling, with the time
result.json       at the end
seal.json         what all of these were at the end
run.lock          who is at work here
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch

from preceptor.errors import CheckpointError, ConfigError, Interrupted, LostProcessError
from preceptor.runs import environment as env
from preceptor.runs.checkpoint import CheckpointStore, Stateful
from preceptor.runs.device import choose_world_device, device_of
from preceptor.runs.files import FolderLock, locked, replace_file, storage_errors, write_all
from preceptor.runs.metrics import JsonlLog, row_json
from preceptor.runs.progress import COLUMNS, PLAN_NAME, Progress
from preceptor.runs.random import RandomStreams, derived_seed, global_random_state, load_global_random_state
from preceptor.runs.record import (
    SEAL_NAME,
    extend_record,
    plain_config,
    read_config,
    read_manifest,
    require_free,
    seal,
    write_record,
)
from preceptor.runs.signals import StopSignals
from preceptor.runs.trackers import Tracker, check_trackers, open_tracker
from preceptor.runs.world import ALONE, World

__all__ = ["FORMAT", "Run", "create_run", "open_run", "shared_run"]

FORMAT = 1
"""Of a run folder's files (``manifest.json`` and ``result.json`` name it): raised when a reader of one form could not
read the other. Folders without a number are of the time before it, and are read like form 1."""


class Run:
    """One run at work in its folder, which it holds locked; made by ``create_run`` or ``open_run``.

    Use it as a context manager: on enter it installs signal handlers; on exit it closes logs and trackers and releases
    the lock. A system's loop is::

        for step in run.loop(num_steps, state):
            ...
            run.log(step, metrics)

    All rows of a step are written inside the loop's body, before the checkpoint that may follow it: a resume drops the
    rows that came after the checkpoint it starts from. Rows written after the loop (a final evaluation) are those that
    the system writes again when it is resumed.

    In a run on many processes every process has a ``Run`` with the same streams, which goes through the same steps;
    that of the first process holds the lock and writes, the others (``lock`` is None) write and show nothing.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        lock: FolderLock | None,
        *,
        quiet: bool,
        world: World = ALONE,
    ) -> None:
        self.path = path
        self.world = world
        self.manifest = manifest
        self.config: dict[str, Any] = manifest["config"]
        self.seed: int = manifest["seed"]
        self.device = device_of(manifest["device"], world)
        self.threads: int = manifest["environment"]["threads"]
        self.save_every: int = manifest["save_every"]
        self.streams = RandomStreams(self.seed, manifest["streams"])
        torch.manual_seed(derived_seed(self.seed, "torch"))  # dropout and initial weights draw from torch's own
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_last=manifest["keep_last"])
        self.metrics = JsonlLog(path / "metrics.jsonl", one_row_per_step=True)
        self.decisions = JsonlLog(path / "decisions.jsonl", one_row_per_step=False)
        self.quiet = quiet
        self._lock = lock
        self._signals = StopSignals(says_so=world.size == 1)
        self._progress: Progress | None = None
        self._trackers: list[Tracker] | None = None
        self._restored = False
        self.step = 0

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes into the run folder."""
        return self.world.is_first

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LostProcessError):
            self._signals.let_launcher_pass()
        self.close()

    def close(self) -> None:
        """Closes logs, trackers and the bar, puts the signal handlers back, unlocks; one failing stops none."""
        with contextlib.ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.release)
            stack.callback(self._signals.__exit__)
            stack.callback(self.metrics.close)
            stack.callback(self.decisions.close)
            for tracker in self._trackers or []:
                stack.callback(tracker.close)
            if self._progress is not None:
                stack.callback(self._progress.close)
            self._trackers, self._progress = None, None

    # What happened

    def show_progress(self, total: int, columns: Mapping[str, str] = COLUMNS) -> None:
        """Shows ``log``'s rows from now on: ``total`` steps in all, and ``columns`` (metric → label).

        The total is written down too, for whoever looks on from outside.
        """
        if not self.writes:
            return
        replace_file(self.path / PLAN_NAME, json.dumps({"num_steps": total}) + "\n")
        self._progress = Progress(total, first_step=self.step, columns=columns, enabled=not self.quiet)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Records the metrics of ``step``: to ``metrics.jsonl``, then the trackers and the screen."""
        if not self.writes:
            return
        self.metrics.append({"step": step, **row})
        for tracker in self._open_trackers(step):
            tracker.log(step, row)
        if self._progress is not None:
            self._progress.update(step, row)

    def record(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Records the teacher's actions; each row has its ``step``."""
        if self.writes:
            self.decisions.append(*rows)

    def notice(self, text: str) -> None:
        """Tells the person now and ``notices.log`` for later."""
        if not self.writes:
            return
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n".encode()
        with storage_errors(f"append to {self.path / 'notices.log'}"):
            descriptor = os.open(self.path / "notices.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                write_all(descriptor, line)
            finally:
                os.close(descriptor)
        if self._progress is not None:
            self._progress.notice(text)
        elif not self.quiet:
            print(text, file=sys.stderr)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json`` in one step; numbers that are not finite become ``null`` and are named."""
        text = json.dumps(json.loads(row_json({"format": FORMAT, **result})), indent=2, ensure_ascii=False)
        replace_file(self.path / "result.json", text + "\n")

    def conclude_trackers(self, result: Mapping[str, Any]) -> None:
        """Shows the trackers what came of the run, with ``report.html`` where it has been written."""
        page = self.path / "report.html"
        for tracker in self._open_trackers(self.step + 1):
            tracker.conclude(result, page if page.is_file() else None)

    def seal(self) -> None:
        """Notes sizes, rows and hashes of what the run leaves behind, as its last act."""
        self.metrics.sync()
        self.decisions.sync()
        seal(self.path)

    # The loop: stopping and going on

    def loop(self, num_steps: int, state: Stateful, *, columns: Mapping[str, str] = COLUMNS) -> Iterator[int]:
        """The steps up to ``num_steps`` that are still to do, counted from 1, each saved after the body when it is due.

        The first loop of a run restores ``state`` from the newest checkpoint and shows the progress of ``num_steps``
        steps with ``columns`` (metric → label); a system of several phases calls ``restore`` and ``show_progress``
        itself before it decides with which one to go on. A checkpoint is saved every ``save_every`` steps, after the
        last step, and when a signal asks to stop.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, once the step is done and saved.
        """
        self.restore(state)
        if self._progress is None:
            self.show_progress(num_steps, columns)
        while self.step < num_steps:
            yield self.step + 1
            self.step += 1
            stop = self._stop_signal()
            if self.step % self.save_every == 0 or self.step == num_steps or stop:
                self.save(state)
            self._stop_by(stop)

    def stop_if_requested(self) -> None:
        """Raises ``Interrupted`` with the signal's exit code if Ctrl-C or SIGTERM has come.

        Called by the loop after each step, and by a system between the parts of a long evaluation.
        """
        self._stop_by(self._stop_signal())

    def _stop_signal(self) -> int:
        """The signal that has asked to stop, the same in every process of the run at the same step; 0 without one."""
        return int(self.world.maximum(self._signals.signal_number or 0))

    def _stop_by(self, signal_number: int) -> None:
        if signal_number:
            how = self.world.resume_command(self.path)
            raise Interrupted(f"stopped at step {self.step}; resume with: {how}", signal_number)

    def save(self, state: Stateful) -> None:
        """Saves a checkpoint of ``state``, the random streams, and how far the logs were."""
        parts = state.state_dict()  # in every process: where weights are shared all of them put the whole together
        if not self.writes:
            return
        self.metrics.sync()
        self.decisions.sync()
        own = {
            "streams": self.streams.state_dict(),
            "torch": global_random_state(),
            "num_metrics": self.metrics.num_rows,
            "num_decisions": self.decisions.num_rows,
        }
        assert "run" not in parts, "this part of a checkpoint is the run's own"
        self.checkpoints.save(self.step, {**parts, "run": own})

    def restore(self, state: Stateful) -> None:
        """Puts ``state``, streams and logs back to the newest sound checkpoint; a second call does nothing.

        Without a checkpoint the logs are emptied, and streams and ``state`` are as created, so that training starts at
        its first step. Raises ``CheckpointError`` when no checkpoint is sound, or when they are gone though the metrics
        say that there were some; then nothing was changed.
        """
        if self._restored:
            return
        self._restored = True
        # The first process says which checkpoint, and reads every byte of it; the others read the same one.
        newest = self.checkpoints.latest() if self.writes else None
        step = self.world.of_first(lambda: None if newest is None else newest.step)
        checkpoint = newest if self.writes or step is None else self.checkpoints.read(step)
        if checkpoint is None:
            if not self.writes:
                return
            last_step = self.metrics.last_step
            if last_step > self.save_every:
                raise CheckpointError(
                    f"{self.checkpoints.root} has no checkpoint though the metrics reach step {last_step}; "
                    "nothing was changed; put the folder back or start a new run"
                )
            if self.metrics.num_rows or self.decisions.num_rows:
                self.notice("no checkpoint was saved before the stop; starting again from the first step")
            self.metrics.truncate_after(-1)
            self.decisions.truncate_after(-1)
            return
        own = checkpoint.state.pop("run")
        state.load_state_dict(checkpoint.state)
        self.streams.load_state_dict(own["streams"])
        load_global_random_state(own["torch"])
        self.step = checkpoint.step
        if not self.writes:
            return
        for text in self.checkpoints.notices:
            self.notice(text)
        for log, saved in ((self.metrics, own["num_metrics"]), (self.decisions, own["num_decisions"])):
            log.truncate_after(checkpoint.step, num_rows=saved)
            if log.num_rows < saved:
                self.notice(
                    f"{log.path.name} holds {log.num_rows} of the {saved} rows it had at {checkpoint.path.name}"
                )
        self.notice(f"resumed at step {checkpoint.step}")

    def _open_trackers(self, first_step: int) -> list[Tracker]:
        """The trackers, opened at the first row: only then is it known at which step a resumed run goes on."""
        if self._trackers is None:
            self._trackers = []
            for name in self.manifest["trackers"]:
                self._trackers.append(open_tracker(name, self.path, first_step=first_step, manifest=self.manifest))
        return self._trackers


def create_run(
    path: Path,
    *,
    system: str,
    config: Mapping[str, Any],
    seed: int,
    save_every: int,
    streams: Iterable[str] = (),
    device: str | torch.device = "auto",
    threads: int | None = None,
    float32_matmul_precision: str | None = None,
    keep_last: int = 2,
    trackers: Sequence[str] = (),
    preset: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    project: str = "preceptor",
    group: str | None = None,
    quiet: bool = False,
    world: World = ALONE,
) -> Run:
    """A new run in ``path``, which must be absent or empty; locks it, writes ``config.yaml`` and ``manifest.json``.

    Sets torch's threads (``None``: see ``set_threads``), its float32 matmul precision (``None``: see
    ``exact_matmul_precision``) and the seed of its own generators, and records them. ``config`` holds plain values;
    ``save_every`` counts steps. ``name``, ``tags``, ``project`` and ``group`` are what trackers and the page call the
    run; by default its name is the folder's.

    Raises ``ConfigError`` for a folder that is in use for something else or already a run, and for bad arguments;
    ``MissingExtraError`` for a tracker that is not installed; ``LockedError``; ``StorageError``.
    """
    check_trackers(trackers)
    if save_every < 1:
        raise ConfigError(f"save_every must be at least 1 step, got {save_every}")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "system": system,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": seed,
        "streams": list(streams),
        "save_every": save_every,
        "keep_last": keep_last,
        "trackers": list(trackers),
        "preset": preset,
        "name": name or path.name,
        "tags": list(tags),
        "project": project,
        "group": group,
        "device": str(choose_world_device(device, world)),
        "code": env.code_version(),
        "config": plain_config(config),
    }
    require_free(path)
    with storage_errors(f"create the run folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path) as lock:
        require_free(path)  # again: another process may have been here before the lock was ours
        manifest["environment"] = env.prepare(manifest["device"], threads, float32_matmul_precision, world)
        run = Run(path, manifest, lock, quiet=quiet, world=world)
        write_record(path, manifest)
        return run


def open_run(
    path: Path,
    *,
    allow_inexact: bool = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    extended: Mapping[str, Any] | None = None,
    quiet: bool = False,
    world: World = ALONE,
) -> Run:
    """The run in ``path``, locked, to be resumed with the configuration, device and threads it was started with.

    ``extended`` is a configuration to go on with past the planned end instead; what was measured at the old end is kept
    as ``result-step-NNNNNN.json``.

    Raises ``ConfigError`` when ``path`` is no run, and when versions, machine, device, threads or ``config.yaml``
    differ from the start, so that the resume could not be bit-exact, unless ``allow_inexact``; ``LockedError``. Seeds
    torch's own generators as ``create_run`` does, so that a run without a checkpoint starts with the same weights.
    """
    if not (path / "manifest.json").is_file():
        raise ConfigError(f"{path} is not a run folder (no manifest.json); start one with: preceptor run SYSTEM")
    with locked(path) as lock:
        manifest, config = read_manifest(path), read_config(path)
        recorded = {"processes": 1, **manifest["environment"]}  # older runs name no number of processes
        manifest["device"] = str(choose_world_device(device or manifest["device"], world))
        here = env.prepare(
            manifest["device"],
            recorded["threads"] if threads is None else threads,
            recorded["float32_matmul_precision"],
            world,
        )
        differing = env.changes(recorded, here, env.EXACT)
        differing += env.changes(env.flattened(manifest["config"]), env.flattened(config))
        if differing and not allow_inexact:
            raise ConfigError(f"not bit-exact: {', '.join(differing)}; pass --allow-inexact to resume all the same")
        check_trackers(manifest["trackers"])
        with storage_errors(f"unseal {path}"):
            (path / SEAL_NAME).unlink(missing_ok=True)  # from here on its files change
        if extended is not None:
            config = plain_config(extended)
            changed = env.changes(env.flattened(manifest["config"]), env.flattened(config))
            extend_record(path, manifest, config, changed=changed)
        run = Run(path, manifest | {"environment": here, "config": config}, lock, quiet=quiet, world=world)
        if differing:
            run.notice(f"resuming though it is not bit-exact: {', '.join(differing)}")
        if code := env.changes(manifest["code"], env.code_version()):
            run.notice(f"the code has changed since the run began: {', '.join(code)}")
        return run


def shared_run(world: World, opened: Callable[[], Run]) -> Run:
    """The run that ``opened`` gives in the first process, and in the others a run of the same streams without a lock.

    Raises:
        ConfigError: this process computes otherwise than the first one (another version, another kind of machine).
    """
    world.around = contextlib.nullcontext  # shared weights were those of an earlier run in these processes
    first = opened() if world.is_first else None

    def description() -> tuple[str, dict[str, Any]]:
        assert first is not None, "asked in the first process alone"
        return str(first.path), dict(first.manifest)

    path, manifest = world.of_first(description)
    if first is None:
        recorded = manifest["environment"]
        device = device_of(manifest["device"], world)
        here = env.prepare(str(device), recorded["threads"], recorded["float32_matmul_precision"], world)
        alike = [field for field in env.EXACT if field != "device"]
        if differing := env.changes(recorded, here, alike):
            raise ConfigError(
                f"it differs from the first process: {', '.join(differing)}; processes of one run must compute alike"
            )
        first = Run(Path(path), manifest, None, quiet=True, world=world)
    world.resume_hint = f"; resume with: {world.resume_command(first.path)}" if world.size > 1 else ""
    return first
