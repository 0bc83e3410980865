"""Running, resuming and comparing from Python; the command line calls the same functions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.config import from_dict, to_dict
from preceptor.errors import ConfigError, Interrupted, PreceptorError
from preceptor.result import Result, write_page
from preceptor.systems import find_system
from preceptor.systems.base import Services, System, extended_configuration

if TYPE_CHECKING:
    from preceptor.comparison.runs import FinishedRun
    from preceptor.runs.folder import Run
    from preceptor.runs.world import World
    from preceptor.systems.surgery.repair import Repair


def services(environ: Mapping[str, str]) -> Services:
    """What systems take from the environment."""
    return Services(
        cache_dir=cache_dir(environ),
        openai_api_key=environ.get("OPENAI_API_KEY"),
        openai_base_url=environ.get("OPENAI_BASE_URL"),
        vllm_api_key=environ.get("VLLM_API_KEY"),
    )


def cache_dir(environ: Mapping[str, str]) -> Path:
    """The cache folder: PRECEPTOR_CACHE_DIR, else ``preceptor`` in the XDG cache folder."""
    if own := environ.get("PRECEPTOR_CACHE_DIR"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "preceptor"


def started_together(environ: Mapping[str, str]) -> bool:
    """Whether a launcher (torchrun, accelerate launch) started several processes with this command."""
    return environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def launched(environ: Mapping[str, str]) -> Iterator[World | None]:
    """The processes that a launcher started together; None without one."""
    if not started_together(environ):
        yield None  # before torch is imported
        return
    from preceptor.runs.world import joined

    with joined(environ) as world:
        yield world


def start(
    system: System,
    config: Any,
    services: Services,
    *,
    preset: str = "default",
    out: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    trackers: Sequence[str] = (),
    name: str | None = None,
    tags: Sequence[str] = (),
    project: str = "preceptor",
    group: str | None = None,
    report: bool = True,
    quiet: bool = False,
    world: World | None = None,
) -> Result:
    """Trains ``system`` with ``config`` in a new run folder and measures what the training was worth.

    A folder in which nothing happened, since an article or a model was refused, is removed again. ``world`` holds the
    processes that do this together, if there are several: each of them calls this function.

    Raises:
        PreceptorError: of the kind that says what is wrong; ``Interrupted`` after Ctrl-C, when the run can be resumed.
    """
    from preceptor.lm.cpu.kernels import keep_kernels_in
    from preceptor.runs.folder import create_run, shared_run
    from preceptor.runs.record import default_run_path, discard_unbegun
    from preceptor.runs.world import ALONE

    world = world or ALONE
    _require_distributed(system, world)
    keep_kernels_in(services.cache_dir / "kernels")

    def created() -> Run:
        # Dated and numbered: two runs started on one day do not collide.
        path = out or default_run_path(Path("runs"), system.name, date.today())
        try:
            return create_run(
                path,
                system=system.name,
                config=to_dict(config),
                seed=config.seed,
                save_every=config.save_every,
                streams=system.streams,
                device=device,
                threads=threads,
                trackers=trackers,
                preset=preset,
                name=name,
                tags=tags,
                project=project,
                group=group,
                quiet=quiet,
                world=world,
            )
        except PreceptorError:
            # The folder was made for this run and is empty; one that the user named is left to the user.
            if out is None:
                with contextlib.suppress(OSError):  # no longer empty: then it holds something to look at
                    path.rmdir()
            raise

    run = shared_run(world, created)
    try:
        # On entry: signal handlers. On exit: logs and trackers are closed and the lock is released.
        with run:
            _record(run, system.train(config, run, services), report=report)
    except Interrupted:
        raise
    except PreceptorError:
        if run.writes:
            discard_unbegun(run.path)  # what was refused must not block the next try
        raise
    return Result(run.path)


def go_on(
    folder: Path,
    services: Services,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    device: str | None = None,
    threads: int | None = None,
    allow_inexact: bool = False,
    report: bool = True,
    quiet: bool = False,
    world: World | None = None,
) -> Result:
    """Goes on with the run in ``folder`` from its last checkpoint, bit for bit.

    Args:
        folder: of the run.
        services: what the system takes from its surroundings.
        overrides: keys that let the run go on past its planned end (``update.steps=60``).
        device: another device than before; needs ``allow_inexact``.
        threads: another number of CPU threads than before; needs ``allow_inexact``.
        allow_inexact: go on though last bits, or more, will differ.
        report: write ``report.html`` at the end.
        quiet: show no progress.
        world: the processes that do this together, if there are several.

    Raises:
        ConfigError: no run, another machine or version without ``allow_inexact``, or a key that may not change.
    """
    from preceptor.lm.cpu.kernels import keep_kernels_in
    from preceptor.runs.folder import open_run, shared_run
    from preceptor.runs.record import read_manifest
    from preceptor.runs.world import ALONE

    world = world or ALONE
    if not (folder / "manifest.json").is_file():
        raise ConfigError(f"{folder} is not a run folder (no manifest.json); start one with: preceptor run SYSTEM")
    keep_kernels_in(services.cache_dir / "kernels")
    # The manifest is the record of the run; whether config.yaml was edited since then is checked on opening.
    manifest = read_manifest(folder)
    system = find_system(manifest["system"])
    _require_distributed(system, world)
    config = from_dict(system.Config, manifest["config"])

    def opened() -> Run:
        extended = extended_configuration(system, config, overrides) if overrides else None
        return open_run(
            folder,
            allow_inexact=allow_inexact,
            device=device,
            threads=threads,
            extended=None if extended is None else to_dict(extended),
            quiet=quiet,
            world=world,
        )

    run = shared_run(world, opened)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(run.close)
        # Read again, since a resume may have extended it; closed if even that fails, or the lock would stay.
        config = from_dict(system.Config, run.config)
        on_failure.pop_all()
    with run:
        _record(run, system.train(config, run, services), report=report)
    return Result(folder)


def _record(run: Run, result: Mapping[str, Any], *, report: bool) -> None:
    """Writes what came of ``run`` beside its model, and shows it to the trackers."""
    from preceptor.runs.export import write_model_card

    if run.writes:
        run.write_result(result)
        write_model_card(run.path)
        run.seal()
        if report:
            write_page(run.path)
        run.conclude_trackers(result)
    run.world.barrier()  # so that nobody reads the folder, or leaves, before it is whole
    run.world.resume_hint = ""


def _require_distributed(system: System, world: World) -> None:
    if not system.distributed:
        world.refuse(f"the system {system.name}")


def compare(folders: Sequence[Path], *, methods: Sequence[str] = (), out: Path | None = None) -> Result:
    """Compares the finished runs in ``folders`` (or in sweeps' folders) and writes what may be claimed to ``out``.

    Raises:
        ConfigError: runs of several systems, runs that have not ended, or an unknown method.
    """
    from preceptor.comparison.runs import read_finished, run_folders
    from preceptor.runs.record import default_run_path

    runs = [read_finished(path) for path in run_folders(folders)]
    if not runs:
        raise ConfigError("nothing to compare; give the folders of finished runs")
    _, result = compared(runs, methods=methods, out=out or default_run_path(Path("runs"), "comparison", date.today()))
    assert result is not None, "a comparison with a folder has a result"
    return result


def repair(
    model: str,
    *,
    surgeon: Path,
    text: Path,
    out: Path | None = None,
    evaluations: int = 3,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
) -> Repair:
    """Edits the attention of ``model`` with the surgeon of a finished run, and writes it to ``out``.

    Args:
        model: ``starter`` or a model folder, which is left as it is.
        surgeon: folder of a finished run with ``training=amortised``.
        text: a file of text that the model should predict.
        out: ``MODEL-repaired`` in the current folder by default; ``repair.json`` is written beside the weights.
        evaluations: edits that may be tried.
        seed: of the windows of text.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        threads: CPU threads.

    Raises:
        PreceptorError: of the kind that says what is wrong.
    """
    from preceptor.runs.device import choose_device, set_threads
    from preceptor.systems.surgery.repair import repair_model

    set_threads(threads)
    return repair_model(
        model,
        surgeon_run=surgeon,
        text=text,
        out=out or Path(f"{Path(model).name}-repaired"),
        evaluations=evaluations,
        seed=seed,
        device=choose_device(device),
    )


def compared(
    runs: Sequence[FinishedRun], *, methods: Sequence[str] = (), out: Path | None = None
) -> tuple[dict[str, Any], Result | None]:
    """The comparison of finished runs as ``comparison.json`` holds it; written to ``out`` with its page, if given."""
    from preceptor.comparison.result import comparison_of, merged_result
    from preceptor.comparison.runs import grouped
    from preceptor.comparison.write import write_comparison

    system = find_system(runs[0].system)
    if system.result is None:
        raise ConfigError(f"runs of {system.name} have no baselines to compare")
    # Runs may differ in their inputs within a group; in anything else they are groups of their own.
    groups = grouped(runs, inputs=list(system.inputs.values()))
    merged = merged_result(groups, system.result)
    # "articles" -> "article": how the verdict calls one item.
    noun = next(iter(system.inputs), "").removesuffix("s").replace("_", " ")
    comparison = comparison_of(groups, merged, arms=list(methods), noun=noun)
    if out is None:
        return comparison, None
    write_comparison(out, comparison, {**merged, "verdict": comparison["verdict"]}, runs, sections=system.sections)
    write_page(out)
    return comparison, Result(out)
