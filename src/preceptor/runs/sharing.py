"""A run in all processes of its world: the first one makes or opens the folder, the others follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preceptor.errors import ConfigError
from preceptor.runs import environment as env
from preceptor.runs.device import device_of
from preceptor.runs.folder import Run, prepare
from preceptor.runs.world import World


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
        here = prepare(str(device), recorded["threads"], recorded["float32_matmul_precision"], world)
        alike = [field for field in env.EXACT if field != "device"]
        if differing := env.changes(recorded, here, alike):
            raise ConfigError(
                f"it differs from the first process: {', '.join(differing)}; processes of one run must compute alike"
            )
        first = Run(Path(path), manifest, None, quiet=True, world=world)
    world.resume_hint = f"; resume with: {world.resume_command(first.path)}" if world.size > 1 else ""
    return first
