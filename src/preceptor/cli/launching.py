"""Where the runs of a sweep or a search take place: the options that say it, and the launcher that they make."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from preceptor.cli.options import num_bytes
from preceptor.cli.parsing import explained
from preceptor.cli.run import run_command
from preceptor.errors import ConfigError, did_you_mean, short_repr
from preceptor.systems import find_system
from preceptor.systems.base import System, configuration

if TYPE_CHECKING:
    from preceptor.comparison.cells import Launcher as AnyLauncher

LAUNCHERS = ("local", "ray", "slurm")
PANEL = "Launching"

Launcher = Annotated[
    str,
    typer.Option(
        "--launcher",
        metavar="NAME",
        help="local: processes here, GPUs in turn; ray: tasks of Ray; slurm: jobs.",
        autocompletion=lambda incomplete: [name for name in LAUNCHERS if name.startswith(incomplete)],
        rich_help_panel=PANEL,
    ),
]
Jobs = Annotated[
    str | None,
    typer.Option(
        "--jobs",
        metavar="N",
        help="Runs at a time.  [default: local: by cores, GPUs and memory; else what the scheduler takes]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Cpus = Annotated[
    str | None,
    typer.Option(
        "--cpus", metavar="N", help="CPUs of a run (ray, slurm).  [default: 1]", show_default=False,
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N",
        help="GPUs of a run (ray, slurm); Ray takes 0.5 too.  [default: 1 if --device cuda stands after --, else 0]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=num_bytes,
        help="Memory of a run (ray, slurm), such as 8GiB.  [default: 2GiB]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use, or auto for the one here.  [default: one of this machine's own]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="Setting of the jobs: partition=gpu account=a time=120 (minutes).",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


class Launch(NamedTuple):
    """What the options say, checked."""

    name: str
    num_jobs: int | None
    cpus: float
    gpus: float | None  # None: by the device
    memory: int | None  # bytes
    address: str | None
    slurm: dict[str, str | int]


def launch_of(
    name: str,
    *,
    jobs: str | None,
    cpus: str | None,
    gpus: str | None,
    memory: int | None,
    address: str | None,
    slurm: Sequence[str] | None,
) -> Launch:
    """The options as a :class:`Launch`; raises :class:`ConfigError` with every fault of theirs."""
    faults: list[str] = []
    if name not in LAUNCHERS:
        hint = did_you_mean(name[:100], LAUNCHERS) or f"; there are {', '.join(LAUNCHERS)}"
        raise ConfigError(f"unknown launcher {short_repr(name)}{hint}")
    if jobs is not None and not (jobs.isdecimal() and len(jobs) <= 4 and int(jobs) >= 1):
        faults.append(f"--jobs must be a whole number from 1, got {short_repr(jobs)}")
    numbers = {"--cpus": _number(cpus), "--gpus": _number(gpus)}
    for flag, text in (("--cpus", cpus), ("--gpus", gpus)):
        if text is not None and numbers[flag] is None:
            faults.append(f"{flag} must be a number from 0 to 9999, got {short_repr(text)}")
    scheduled = ("ray", "slurm")
    belongs: list[tuple[str, object, tuple[str, ...]]] = [
        ("--cpus", cpus, scheduled),
        ("--gpus", gpus, scheduled),
        ("--memory", memory, scheduled),
        ("--address", address, ("ray",)),
        ("--slurm", slurm, ("slurm",)),
    ]
    for flag, given, launchers in belongs:
        if given is not None and name not in launchers:
            faults.append(f"{flag} belongs to --launcher {' or '.join(launchers)}, not to {name}")
    settings: dict[str, str | int] = {}
    for word in slurm or ():
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            faults.append(f"--slurm needs KEY=VALUE such as partition=gpu, got {short_repr(word)}")
        settings[key] = int(value) if value.isdecimal() and len(value) < 10 else value
    if faults:
        raise ConfigError(*faults)
    num_cpus = numbers["--cpus"]
    return Launch(
        name,
        None if jobs is None else int(jobs),
        1.0 if num_cpus is None else num_cpus,
        numbers["--gpus"],
        memory,
        address,
        settings,
    )


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None and len(text) < 20 else -1.0
    except ValueError:
        return None
    return number if 0 <= number < 10_000 else None


@contextlib.contextmanager
def launched(
    launch: Launch, root: Path, *, device: str, say: Callable[[str], None] = lambda text: None
) -> Iterator[AnyLauncher]:
    """The launcher of ``launch`` for the cells below ``root``, closed at the end."""
    from preceptor.comparison.cells import Resources

    gpus = float(device.startswith("cuda")) if launch.gpus is None else launch.gpus
    resources = Resources(launch.cpus, gpus, launch.memory or Resources().memory)
    launcher: AnyLauncher
    if launch.name == "ray":
        from preceptor.comparison.ray_launcher import RayLauncher

        # Ray tells its makers of every start, and lets its workers wait for everything else, unless told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
        launcher = RayLauncher(root, resources, address=launch.address, num_jobs=launch.num_jobs, say=say)
    elif launch.name == "slurm":
        from preceptor.comparison.slurm_launcher import SlurmLauncher

        launcher = SlurmLauncher(root, resources, settings=launch.slurm, num_jobs=launch.num_jobs)
    else:
        from preceptor.comparison.sweep import Local

        # A device with a number is the user's own choice, and so is the CPU.
        launcher = Local(root, num_jobs=launch.num_jobs, gpus=_visible_gpus() if device in ("auto", "cuda") else ())
    try:
        yield launcher
    finally:
        launcher.close()


def _visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return tuple(part for part in told.replace(" ", "").split(",") if part and part != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    # By UUID: their numbers are not in CUDA's order.
    words = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer has no GPU to give; a run says what it computes on
    return tuple(said.split())


def device_of(arguments: Sequence[str]) -> str:
    """The device that a cell's words ask for."""
    system, *words = arguments
    return str(_run_options(find_system(system), words)["device"])


def configuration_of_run(system: System, words: Sequence[str]) -> Any:
    """The configuration of ``preceptor run SYSTEM WORDS``, whose words must leave to the sweep what is the sweep's."""
    for flag in ("--seed", "--threads", "--preset"):
        # Once is right: the sweep's own is among the words.
        if sum(word == flag or word.startswith(f"{flag}=") for word in words) > 1:
            raise ConfigError(f"{flag} cannot stand after --; a sweep gives it to each run")
    given = _run_options(system, words)
    if given["out"] is not None or given["print_config"]:
        raise ConfigError("--out and --print-config cannot stand after --; a sweep has a folder for each run")
    flags = {flag: given[flag] for flag in system.flags}
    preset, file, overrides = given["preset"], given["config"], given["overrides"] or ()
    return configuration(system, preset=preset, file=file, flags=flags, overrides=overrides)


def _run_options(system: System, words: Sequence[str]) -> dict[str, Any]:
    try:
        # Parsed as `preceptor run` would parse it, so that a wrong option is found before any run starts.
        given: dict[str, Any] = run_command(system).make_context(f"preceptor run {system.name}", list(words)).params
    except typer.TyperException as error:
        raise ConfigError(f"after --: {explained(error)}") from error
    return given
