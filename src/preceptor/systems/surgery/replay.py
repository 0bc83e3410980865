"""Makes the recorded edits again, without any surgeon, and measures what they are worth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from preceptor.errors import DataError
from preceptor.run.metrics import read_jsonl
from preceptor.run.record import read_manifest
from preceptor.systems.base import Replayed, Services
from preceptor.systems.surgery.config import SurgeryConfig
from preceptor.systems.surgery.materials import prepare
from preceptor.systems.surgery.phases import update
from preceptor.systems.surgery.plan import Stretch
from preceptor.systems.surgery.session import Session


def replay(config: SurgeryConfig, folder: Path, services: Services) -> Iterator[Replayed]:
    """Every recorded reward, and quality before it, beside the same one measured again; commits are the recorded ones.

    The student has to learn again what it knew at each edit, so a replay takes as long as bootstrapping and the joint
    phase did; the arms without edits are left out.

    Raises:
        DataError: ``decisions.jsonl`` is missing or malformed, or ends before its arm does.
    """
    device = torch.device(read_manifest(folder)["device"])
    session = Session(config, prepare(config, device=device), device=device, folder=folder)
    rows = read_jsonl(folder / "decisions.jsonl")
    for stretch in session.plan:
        if stretch.arm == "no_edit":
            session.begin(stretch)
            for count in range(1, stretch.num_steps + 1):
                update(session, stretch, count, count)
            session.bootstrapped = session.patient.snapshot()
        elif stretch.surgeon is not None:
            yield from _edits(session, stretch, rows)


def _edits(session: Session, stretch: Stretch, rows: Iterator[dict[str, Any]]) -> Iterator[Replayed]:
    if stretch.start == "bootstrapped":
        assert session.bootstrapped is not None, "edits before bootstrapping"
        session.patient.load_state_dict(session.bootstrapped)
    updates = session.config.phases.updates_per_edit if stretch.phase == "joint" else 0
    for local in range(1, stretch.num_steps + 1):
        row = next(rows, None)
        where = f"{stretch.arm}, edit {local}"
        if row is None or (row["arm"], row["phase"], row["edit"]) != (stretch.arm, stretch.phase, local):
            raise DataError(f"decisions.jsonl has no row for {where}; it is of another run or was cut off")
        for count in range((local - 1) * updates + 1, local * updates + 1):
            update(session, stretch, count, row["step"])
        draws = session.draws(stretch, local)
        trial = session.surgery.try_edit(
            torch.tensor(row["action"]), before=session.surgery.examine(draws), draws=draws
        )
        yield Replayed(
            f"step {row['step']}, {where}, quality before", row["quality_before"]["total"], trial.before.total
        )
        yield Replayed(f"step {row['step']}, {where}, reward", row["reward"], trial.reward)
        if row["committed"]:
            session.surgery.commit(torch.tensor(row["tested"]))
