"""``preceptor doctor``: what must hold before a run, and whether a run that was made is whole."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.cli.arguments import CONFIGURATION, EXIT_CODES, Command, add_configuration, add_device, add_system_flags
from preceptor.cli.replay import CHECK_FAILED
from preceptor.cli.systems import configuration
from preceptor.config import dump_yaml
from preceptor.errors import ConfigError, PreceptorError, short_repr
from preceptor.systems import find_system, known_systems

if TYPE_CHECKING:
    from preceptor.doctor.check import Check

DESCRIPTION = """\
Checks, a line each: ok, warn or fail, with a figure and what to do.

  preceptor doctor reading --model DIR    before a run, with the options that the run will have
  preceptor doctor runs/mine              a run that was made: hashes, logs, lock, environment

Before a run: model and tokenizer load, control tokens cannot come from data, the KV cache equals encoding anew, the
probability ratio is 1 and the KL 0 before the first step, what is sampled is what is scored, the gradient reaches
exactly what is to learn, the reference stays frozen; then the run itself begins in a folder that is thrown away, to
forecast time and memory. It ends with exit code 7 if a check fails.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="SYSTEM | RUN", help=f"one of: {', '.join(known_systems())}; or a run's folder")
    add_configuration(parser)
    add_system_flags(parser)
    add_device(parser.add_argument_group("execution"))
    parser.add_argument("--no-forecast", action="store_true", help="do not begin the run to measure it")


def _doctor(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if options.what in known_systems():
        config = configuration(find_system(options.what), options)
        if options.print_config:
            print(dump_yaml(config), end="")
            return 0
        checks = _before(options.what, config, options)
    elif (Path(options.what) / "manifest.json").is_file():
        from preceptor.doctor.finished import check_run

        checks = check_run(Path(options.what))
    elif Path(options.what).is_dir():
        raise ConfigError(
            f"{options.what} is not a run folder (no manifest.json); give the folder of a run or a system"
        )
    else:
        raise ConfigError(
            f"{short_repr(options.what)} is neither a run folder nor a system; there are {', '.join(known_systems())}"
        )
    counts = dict.fromkeys(("ok", "warn", "fail"), 0)
    for check in checks:
        counts[check.status] += 1
        print(check.line(), flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return CHECK_FAILED if counts["fail"] else 0


def _before(name: str, config: Any, options: argparse.Namespace) -> Iterator[Check]:
    """The checks before a run: those of the model where the configuration names one, then the first steps."""
    from preceptor.doctor.check import Check
    from preceptor.doctor.forecast import forecast

    yield Check("ok", "configuration", f"{name}, no faults")
    model = getattr(config, "model", None)
    if getattr(model, "name", ""):
        yield from _model(model, getattr(config, "episode", None), options)
    else:
        yield Check("warn", "model", "made from random weights by the run itself", "only the first steps are checked")
    if not options.no_forecast:
        with tempfile.TemporaryDirectory(prefix="preceptor-doctor-") as parent:
            file = Path(parent) / "config.yaml"
            file.write_text(dump_yaml(config), encoding="utf-8")
            words = [name, "--config", str(file), "--device", options.device]
            words += ["--threads", str(options.threads)] if options.threads else []
            yield from forecast(words, Path(parent) / "run")


def _model(model: Any, episode: Any, options: argparse.Namespace) -> Iterator[Check]:
    from preceptor.doctor.check import Check
    from preceptor.doctor.model import check_model
    from preceptor.lm.load import Adapter, load_language_model
    from preceptor.lm.sampling import Sampling
    from preceptor.run.device import choose_device, parse_dtype, set_threads

    set_threads(options.threads)
    rank = getattr(model, "adapter_rank", 0)
    try:
        lm = load_language_model(
            model.name,
            device=choose_device(options.device),
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
    suppressed = tuple(token for token in lm.special_tokens if token < lm.vocab_size)
    yield from check_model(lm, Sampling(**keys, suppressed=suppressed))


DOCTOR = Command(
    "check a configuration before a run, or the folder of a run",
    _add_arguments,
    _doctor,
    description=DESCRIPTION,
    epilog=f"{CONFIGURATION}\n{EXIT_CODES}",
)
