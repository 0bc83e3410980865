"""``preceptor doctor``: what must hold before a run, and whether a run that was made is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preceptor.api import cache_dir
from preceptor.cli import options
from preceptor.cli.parsing import SystemGroup, made, system_command
from preceptor.cli.replay import CHECK_FAILED
from preceptor.config import dump_yaml
from preceptor.errors import ConfigError, PreceptorError, did_you_mean, short_repr
from preceptor.systems import find_system, known_systems
from preceptor.systems.base import System, configuration

if TYPE_CHECKING:
    from preceptor.doctor.check import Check

HELP = """\
Check a configuration before a run, or the folder of a run.

Each check is a line: ok, warn or fail, with a figure and what to do.

\b
  preceptor doctor reading --model DIR    before a run, with the run's options
  preceptor doctor reading --preset paper --gpu-memory 24GiB
                                          whether a GPU will hold the run
  preceptor doctor runs/mine              a finished run: hashes, logs, lock

Before a run: model and tokenizer load, control tokens cannot come from data, the KV cache equals encoding afresh, the
probability ratio is 1 and the KL 0 before the first step, what is sampled is what is scored, the gradient reaches
exactly what is to learn, the reference stays frozen; then the run itself begins in a temporary folder, to forecast time
and memory. It ends with exit code 7 if a check fails.

What a GPU will hold is told part by part (weights, gradients, optimiser, reference, activations, logits, KV cache) from
the model's config.json alone, and where it is too much, a setting under which it fits. With --gpu-memory nothing else
is checked and no weights are loaded, so that any machine can tell for any other.
"""


class DoctorGroup(SystemGroup):
    """``preceptor doctor SYSTEM`` and ``preceptor doctor RUN``."""

    metavar = "SYSTEM|RUN"

    def made_for(self, word: str) -> Any:
        """The command that checks a system's configuration or the run in the folder ``word``."""
        if word in known_systems():
            system = find_system(word)
            text = f"Check a configuration of {system.name} before a run.\n\n{options.CONFIGURATION}"
            return system_command(system, _doctor, system.flags, help=text, epilog=options.EXIT_CODES)
        folder = Path(word)
        if (folder / "manifest.json").is_file():
            return made(lambda: _check_run(folder), name=word, help="Check the folder of a run.")
        if folder.is_dir():
            raise ConfigError(f"{folder} is not a run folder (no manifest.json); give the folder of a run or a system")
        hint = did_you_mean(word[:100], known_systems()) or f"; there are {', '.join(known_systems())}"
        raise ConfigError(f"{short_repr(word)} is neither a run folder nor a system{hint}")


APP = typer.Typer(cls=DoctorGroup, rich_markup_mode=None, help=HELP, epilog=options.EXIT_CODES)


def _doctor(
    system: System,
    *,
    preset: options.Preset = "default",
    config: options.ConfigFile = None,
    overrides: options.Overrides = None,
    print_config: options.PrintConfig = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            parser=options.num_bytes,
            help="Only tell whether a GPU of this memory, such as 24GiB, holds the run.  [default: this device's]",
            show_default=False,
        ),
    ] = None,
    no_forecast: Annotated[bool, typer.Option("--no-forecast", help="Do not begin the run to measure it.")] = False,
    log_level: options.LogLevel = "warning",
    **flags: Any,
) -> int:
    resolved = configuration(system, preset=preset, file=config, flags=flags, overrides=overrides or ())
    if print_config:
        print(dump_yaml(resolved), end="")
        return 0
    if gpu_memory is not None:
        return _told(_gpu_memory(system.name, resolved, gpu_bytes=gpu_memory))
    return _told(_before(system.name, resolved, device=device, threads=threads, forecasts=not no_forecast))


def _check_run(folder: Path) -> int:
    from preceptor.doctor.finished import check_run

    return _told(check_run(folder))


def _told(checks: Iterable[Check]) -> int:
    counts = dict.fromkeys(("ok", "warn", "fail"), 0)
    # Printed one by one: the forecast at the end can take minutes.
    for check in checks:
        counts[check.status] += 1
        print(check.line(), flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return CHECK_FAILED if counts["fail"] else 0


def _gpu_memory(name: str, config: Any, *, gpu_bytes: int) -> Iterator[Check]:
    """What a GPU of ``gpu_bytes`` would hold; a model that cannot be looked at is a failed check."""
    from preceptor.doctor.check import Check
    from preceptor.doctor.memory import memory_checks

    try:
        yield from memory_checks(name, config, gpu_bytes=gpu_bytes)
    except PreceptorError as error:
        yield Check("fail", "GPU memory", str(error))


def _before(name: str, config: Any, *, device: str, threads: int | None, forecasts: bool) -> Iterator[Check]:
    """The checks before a run: those of the model where the configuration names one, then the first steps."""
    from preceptor.doctor.check import Check
    from preceptor.doctor.forecast import forecast

    yield Check("ok", "configuration", f"{name}, no faults")
    model = getattr(config, "model", None)
    made_by_run = getattr(model, "made_by_run", False)
    if (gpu_bytes := _device_bytes(device)) is not None and not made_by_run:
        yield from _gpu_memory(name, config, gpu_bytes=gpu_bytes)
    if getattr(model, "name", "") and not made_by_run:
        yield from _model(model, getattr(config, "episode", None), device=device, threads=threads)
    else:
        yield Check("warn", "model", "made from random weights by the run itself", "only the first steps are checked")
    if forecasts:
        with tempfile.TemporaryDirectory(prefix="preceptor-doctor-") as parent:
            # Through a file, so that the run reads exactly the configuration that was checked.
            file = Path(parent) / "config.yaml"
            file.write_text(dump_yaml(config), encoding="utf-8")
            words = [name, "--config", str(file), "--device", device]
            words += ["--threads", str(threads)] if threads else []
            yield from forecast(words, Path(parent) / "run")


def _device_bytes(device: str) -> int | None:
    """The memory of the GPU that ``device`` means, None where it is none."""
    import torch

    from preceptor.runs.device import choose_device

    chosen = choose_device(device)
    return torch.cuda.get_device_properties(chosen).total_memory if chosen.type == "cuda" else None


def _model(model: Any, episode: Any, *, device: str, threads: int | None) -> Iterator[Check]:
    from preceptor.doctor.check import Check
    from preceptor.doctor.model import check_model
    from preceptor.lm.cpu.kernels import keep_kernels_in
    from preceptor.lm.load import Adapter, load_language_model
    from preceptor.lm.sampling import Sampling
    from preceptor.runs.device import choose_device, parse_dtype, set_threads

    set_threads(threads)
    keep_kernels_in(cache_dir(os.environ) / "kernels")
    rank = getattr(model, "adapter_rank", 0)
    try:
        lm = load_language_model(
            model.name,
            device=choose_device(device),
            dtype=parse_dtype(getattr(model, "dtype", "float32")),
            adapter=Adapter(rank, model.adapter_alpha) if rank else None,
        )
    except PreceptorError as error:
        yield Check("fail", "model", str(error))
        return
    learn = sum(parameter.numel() for parameter in lm.trainable_parameters().values())
    dtype = str(lm.dtype).removeprefix("torch.")
    yield Check("ok", "model", f"{model.name}, {learn:,} weights to learn, {dtype}, context {lm.context_length}")
    # A system that samples otherwise than by an episode's keys has its own tests of that.
    keys = {key: getattr(episode, key) for key in ("temperature", "top_k", "top_p") if hasattr(episode, key)}
    yield from check_model(lm, Sampling(**keys, suppressed=lm.never_drawn))
