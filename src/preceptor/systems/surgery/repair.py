"""Repair of any model by a surgeon that was trained on others: a few edits, each accepted by a test on other text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from preceptor.errors import ConfigError, DataError
from preceptor.evaluation.intervals import bootstrap_interval
from preceptor.runs.export import save_model
from preceptor.runs.files import replace_file
from preceptor.runs.random import derived_seed
from preceptor.systems.surgery.patient import load_editable
from preceptor.systems.surgery.rewards import acceptance, draw_windows, window_losses
from preceptor.systems.surgery.setup import encode, read_text
from preceptor.systems.surgery.site_policy import TrainedSurgeon
from preceptor.systems.surgery.sites import Sites
from preceptor.systems.surgery.theater import SurgicalTheater

PARTS = {"seen": (0.0, 0.5), "acceptance": (0.5, 0.75), "report": (0.75, 1.0)}
"""Parts of the text: what the surgeon sees, what an edit is tested on, and what is reported."""

MAXIMUM_WINDOW = 128
"""Tokens of a window, where the model's context is longer."""
TEST_WINDOWS = 64
"""Windows of an acceptance test, drawn afresh for each, and of the report."""
REPORT = "repair.json"


@dataclass(frozen=True)
class EditTried:
    """One edit: its numbers by site, the paired test of it, and whether it was committed."""

    action: list[float]
    gain: float  # nats per token, on the text of the acceptance test
    z: float
    committed: bool


@dataclass(frozen=True)
class Repair:
    """What a repair did. Losses are nats per token on text that neither the surgeon nor the test has seen.

    Attributes:
        model, surgeon, text: what was given.
        loss_before, loss_after: of the model.
        gain: the difference; ``low`` and ``high`` are its 95 % interval over windows.
        forward_passes: of all edits and their tests, over ``tokens`` tokens; a backward pass counts two.
        bytes_held: copied weights during a trial.
        bytes_of_copy: of the whole model.
        sites: (matrix, part) of each number of an edit.
        edits: in order.
    """

    model: str
    surgeon: str
    text: str
    loss_before: float
    loss_after: float
    gain: float
    low: float | None
    high: float | None
    forward_passes: int
    bytes_held: int
    bytes_of_copy: int
    sites: list[tuple[str, str]] = field(default_factory=list)
    edits: list[EditTried] = field(default_factory=list)


def repair_model(
    name: str,
    *,
    surgeon_run: Path,
    text: Path,
    out: Path,
    evaluations: int = 3,
    required_z: float = 1.64,
    seed: int = 0,
    device: torch.device,
    notice: Callable[[str], None] = lambda _: None,
) -> Repair:
    """Edits the model ``name`` and writes it to ``out``, with ``repair.json`` beside the weights.

    Args:
        name: ``starter`` or a model folder.
        surgeon_run: folder of a finished amortised run.
        text: a file of text that the model should be good at.
        out: a folder that does not exist yet, or is empty.
        evaluations: edits that may be tried, at least 1.
        required_z: standard errors by which the paired loss must fall on the text of the test.
        seed: of the windows.
        device: for the model.
        notice: is told of every edit.

    Raises:
        ConfigError: ``out`` is in use, a value is out of range, or there is no surgeon in ``surgeon_run``.
        DataError: the text is too short.
        ModelError: the model cannot be loaded, or its attention is of no known layout.
    """
    faults = []
    if evaluations < 1:
        faults.append(f"--evaluations must be at least 1, got {evaluations}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        faults.append(f"{out} is not empty; give a folder that does not exist yet")
    if faults:
        raise ConfigError(*faults)
    surgeon = TrainedSurgeon.load(surgeon_run)
    model, tokenizer = load_editable(name, device=device)
    tokens = {part: encode(tokenizer, piece) for part, piece in _parts(text).items()}
    length = min(MAXIMUM_WINDOW, model.config.max_position_embeddings) + 1
    if short := [part for part, piece in tokens.items() if len(piece) <= 2 * length]:
        raise DataError(
            f"{text} has {len(tokens[short[0]])} tokens to {short[0]}, more than {2 * length} are needed; "
            "give a longer text"
        )

    def windows(part: str, number: int, num_windows: int) -> Int[Tensor, "window time"]:
        generator = torch.Generator().manual_seed(derived_seed(seed, f"{part} {number}"))
        return draw_windows(tokens[part], num_windows=num_windows, length=length, generator=generator).to(device)

    sites = surgeon.sites(model)
    report = windows("report", 0, TEST_WINDOWS)
    before = window_losses(model, report)
    edits, passes = [], 0
    for number in range(1, evaluations + 1):
        features, _ = sites.features(windows("seen", number, surgeon.num_windows), gradients=surgeon.gradients)
        action = surgeon.act(features)
        tried = _try(sites, action, windows("acceptance", number, TEST_WINDOWS), required_z=required_z)
        edits.append(tried)
        passes += surgeon.num_windows * (3 if surgeon.gradients else 1) + 2 * TEST_WINDOWS
        notice(f"edit {number}: {tried.gain:+.4f} nats, z {tried.z:.1f}, {'kept' if tried.committed else 'undone'}")
    gains = before - window_losses(model, report)  # [window]
    low, high = bootstrap_interval(gains.tolist())
    repair = Repair(
        model=name,
        surgeon=str(surgeon_run),
        text=str(text),
        loss_before=float(before.mean()),
        loss_after=float((before - gains).mean()),
        gain=float(gains.mean()),
        low=low,
        high=high,
        forward_passes=passes,
        bytes_held=sum(target.view.nbytes for target in sites.targets),
        bytes_of_copy=sum(parameter.nbytes for parameter in model.parameters()),
        sites=sites.names,
        edits=edits,
    )
    save_model(model, tokenizer, out)
    replace_file(out / REPORT, json.dumps(asdict(repair), indent=2) + "\n")
    return repair


def _try(sites: Sites, action: Tensor, windows: Int[Tensor, "window time"], *, required_z: float) -> EditTried:
    """An edit in the theater, kept if it passes the paired test on ``windows``."""
    before = window_losses(sites.model, windows)
    with SurgicalTheater(sites.model, sites.targets) as theater:
        sites.apply_(action)
        after = window_losses(sites.model, windows)
        test = acceptance(before, after, required_z=required_z)
        if test.passed and bool(after.isfinite().all()):
            theater.commit()
    z = test.z if math.isfinite(test.z) else 0.0
    return EditTried([round(number, 6) for number in action.tolist()], test.gain, z, test.passed)


def _parts(text: Path) -> dict[str, str]:
    whole = read_text(str(text))[1]
    return {part: whole[int(low * len(whole)) : int(high * len(whole))] for part, (low, high) in PARTS.items()}


def summary(repair: Repair) -> dict[str, Any]:
    """What the command line prints, label → text."""
    spread = "" if repair.low is None else f" [{repair.low:+.4f}, {repair.high:+.4f}]"
    kept = sum(edit.committed for edit in repair.edits)
    share = 100 * repair.bytes_held / repair.bytes_of_copy
    return {
        "edits": f"{kept} of {len(repair.edits)} kept",
        "loss": f"{repair.loss_before:.4f} before, {repair.loss_after:.4f} after (nats per token, text of its own)",
        "gain": f"{repair.gain:+.4f}{spread} nats per token",
        "memory": f"{repair.bytes_held:,} bytes held during a trial, {share:.1f} % of a copy of the model",
        "cost": f"{repair.forward_passes:,} windows read forwards (a backward pass counts two)",
    }
