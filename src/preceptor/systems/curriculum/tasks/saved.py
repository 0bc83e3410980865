"""A trained teacher as files: the weights of its policy, and what they are of."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from preceptor.errors import ConfigError
from preceptor.objectives.learned_rule import FEATURES, SourcePolicy
from preceptor.runs.files import storage_errors

TEACHER = "teacher"
"""Folder of a run with the teacher that it trained or uses."""


def save_teacher(policy: SourcePolicy, folder: Path) -> None:
    """Writes ``teacher.safetensors`` and ``teacher.json`` into ``folder``, which is made."""
    settings = {"features": list(FEATURES), "hidden_dim": policy.hidden_dim, "exploration": policy.exploration}
    with storage_errors(f"save the teacher in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in policy.state_dict().items()}
        save_file(weights, folder / "teacher.safetensors")
        (folder / "teacher.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_teacher(folder: str | Path) -> SourcePolicy:
    """The policy in ``folder``, or in the ``teacher`` of a run in ``folder``.

    Raises:
        ConfigError: there is none, or it was trained on other features.
    """
    inner = Path(folder) / TEACHER if (Path(folder) / TEACHER).is_dir() else Path(folder)
    try:
        settings = json.loads((inner / "teacher.json").read_text(encoding="utf-8"))
        features, exploration = settings["features"], float(settings["exploration"])
        policy = SourcePolicy(int(settings["hidden_dim"]), exploration=exploration)
        weights = load_file(inner / "teacher.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} has no trained teacher; give the folder of a finished run of: "
            "preceptor run curriculum --preset teacher"
        ) from error
    if features != list(FEATURES):
        raise ConfigError(f"the teacher in {folder} was trained on other features; train it with this version")
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"the teacher in {folder} has other weights than it says; train it again") from error
    return policy
