"""Recorded edits made again, without a surgeon, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import DataError
from preceptor.runs.metrics import read_jsonl
from preceptor.runs.record import read_manifest
from preceptor.systems.base import Replayed, Services
from preceptor.systems.surgery import amortised
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.loop import draws, update, updates_of
from preceptor.systems.surgery.setup import Phase, prepare
from preceptor.systems.surgery.state import State


def verify(config: SurgeryConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Every recorded reward, and the quality before it, beside the same number measured again.

    Edits are committed where the record says so. The student has to learn again what it knew at each edit, so this
    takes as long as bootstrapping and the joint phase did; methods without edits are left out.

    Raises:
        DataError: ``decisions.jsonl`` is missing or malformed, or ends before its method does.
    """
    if config.training == "amortised":
        yield from amortised.verify(config, folder, services)
        return
    device = torch.device(read_manifest(folder)["device"])
    state = State(prepare(config, device=device, folder=folder))
    rows = read_jsonl(folder / "decisions.jsonl")
    for phase in state.phases:
        if phase.method == "no_edit":
            state.begin(phase)
            for step in range(1, phase.num_steps + 1):
                update(state, step, run_step=step)
            state.bootstrapped = state.student.snapshot()
        elif phase.surgeon is not None:
            yield from _edits(state, phase, rows)


def _edits(state: State, phase: Phase, rows: Iterator[dict[str, Any]]) -> Iterator[Replayed]:
    if phase.start == "bootstrapped":
        assert state.bootstrapped is not None, "edits before bootstrapping"
        state.student.load_state_dict(state.bootstrapped)
    state.equip(phase)
    state.phase = phase  # and no surgeon: the recorded actions take its place
    for step in range(1, phase.num_steps + 1):
        row = next(rows, None)
        where = f"{phase.method}, edit {step}"
        if row is None or (row["arm"], row["phase"], row["edit"]) != (phase.method, phase.kind, step):
            raise DataError(f"decisions.jsonl has no row for {where}; it belongs to another run or was cut off")
        for number in updates_of(state, step):
            update(state, number, run_step=row["step"])
        common = draws(state, step)
        before = state.surgery.examine(common)
        trial = state.surgery.try_edit(torch.tensor(row["action"]), before=before, draws=common)
        where = f"step {row['step']}, {where}"
        yield Replayed(f"{where}, quality before", row["quality_before"]["total"], trial.before.total)
        yield Replayed(f"{where}, reward", row["reward"], trial.reward)
        if row["committed"]:
            state.surgery.commit(torch.tensor(row["tested"]))
