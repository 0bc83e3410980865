"""``preceptor replay``: the recorded decisions again, without the policy, and whether they earn what was recorded."""

from __future__ import annotations

import math
import os
from typing import Annotated

import typer

from preceptor.api import services
from preceptor.cli.options import Folder
from preceptor.config import from_dict
from preceptor.errors import ConfigError, DataError, short_repr
from preceptor.systems import find_system

CHECK_FAILED = 7
"""Exit code of a command whose business is to check, and which found a fault."""

SHOWN = 5
"""Places that are named where a replay parts from the record."""


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be a number of at least 0, got {short_repr(text)}")
    return value


def replay(
    folder: Folder,
    *,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="X",
            parser=_tolerance,
            help="Largest difference, absolute or relative, that counts as equal.",
        ),
    ] = 1e-4,
) -> int:
    """Execute recorded decisions again and compare the rewards.

    It computes the rewards anew without the policy. A recorded and a recomputed number count as equal if they differ by
    at most the tolerance, absolutely or relative to the larger one. The default, 1e-4, is above the rounding of float32
    in another batch or on another machine and far below what any other decision would earn. If they differ anywhere,
    the command says where and ends with exit code 7; so it does if a file has changed since the run ended.
    """
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder} is not a run folder (no manifest.json); give the folder of a run")
    # Imported late, for torch comes with them and the check above needs none.
    from preceptor.lm.cpu.kernels import keep_kernels_in
    from preceptor.runs.device import set_threads
    from preceptor.runs.record import read_manifest, seal_faults

    manifest = read_manifest(folder)
    name = str(manifest["system"])
    system = find_system(name)
    if system.verify is None:
        raise ConfigError(f"runs of {name} cannot be replayed: it has no teacher and records no decisions")
    if not (folder / "decisions.jsonl").is_file():
        raise DataError(f"{folder} has no decisions.jsonl; without the recorded decisions there is nothing to replay")
    from_environment = services(os.environ)
    keep_kernels_in(from_environment.cache_dir / "kernels")
    # Another number of threads sums in another order, and last bits would part.
    set_threads(manifest["environment"]["threads"])
    config = from_dict(system.Config, manifest["config"])
    count, largest, partings = 0, 0.0, 0
    for where, recorded, recomputed in system.verify(config, folder, from_environment):
        count += 1
        difference = _difference(recorded, recomputed)
        largest = max(largest, difference)
        # NaN against a number is infinitely far (see `_difference`), so it cannot pass as equal.
        if difference > tolerance:
            partings += 1
            if partings <= SHOWN:
                print(f"parted: {where}: recorded {recorded:.9g}, recomputed {recomputed:.9g}")
    # After the partings: where a reward was changed, that says more.
    changed = seal_faults(folder)
    for fault in changed:
        print(f"changed since the run ended: {fault}")
    if not count:
        raise DataError(f"{folder / 'decisions.jsonl'} holds no decision; there is nothing to replay")
    if partings:
        if getattr(getattr(config, "model", None), "dtype", "float32") != "float32":
            print(f"the run's model is in {config.model.dtype}, which rounds to three digits; see --tolerance")
        further = f" ({partings - SHOWN} further places are not shown)" if partings > SHOWN else ""
        print(f"{partings} of {count} numbers part by more than {tolerance:g}{further}")
        return CHECK_FAILED
    print(f"{count} numbers recomputed, all equal within {tolerance:g} (largest difference {largest:.2g})")
    return CHECK_FAILED if changed else 0


def _difference(recorded: float, recomputed: float) -> float:
    """Absolute difference, or relative to the larger number where that is above 1; two NaN are equal."""
    if recorded == recomputed or (math.isnan(recorded) and math.isnan(recomputed)):
        return 0.0
    difference = abs(recorded - recomputed) / max(1.0, abs(recorded), abs(recomputed))
    return math.inf if math.isnan(difference) else difference
