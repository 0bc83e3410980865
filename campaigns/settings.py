"""Small runs under settings that nobody has tried together: each finishes, or is refused in one line.

One to four keys of a system's configuration get values of their kind at random. What a user may set, a run must stand.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from transformers import LlamaConfig, LlamaForCausalLM

from campaigns.forked import begin, warm_up
from preceptor.config import schema
from preceptor.lm.tokenizer import train_bpe_tokenizer
from preceptor.systems import find_system
from preceptor.systems.reading.articles import bundled_article

SECONDS = 60.0
"""After which a run counts as too large, which is no fault."""

WHOLE, REAL = (0, 1, 2, 3, 5, 8), (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0, 2.0)
EXIT_CODES = {0, 2, 3}
"""A finished run, a refusal, numbers that stay NaN."""

KEPT = ("seed", "trackers", "save_every", "ppo.url")
"""Keys that say nothing of what a run does, or reach out of it."""


class Job(NamedTuple):
    """A run of a second or two: preset and settings of ``system``."""

    system: str
    preset: str
    settings: tuple[str, ...]


TINY_MODEL = ("model.width=16", "model.num_layers=1", "model.num_heads=2")
BYTES = ("model.name=bytes", "model.width=32", "model.num_layers=1")
READING = (
    *("data.num_pairs=3", "data.num_probes=1", "episode.batch_size=4", "episode.query_tokens=2", "update.steps=2"),
    *("evaluation.every=1", "evaluation.num_episodes=2", "evaluation.num_orders=3", "evaluation.best_of=2"),
)
JOBS = (
    Job("reading", "smoke", READING),
    Job("reading", "study-smoke", ("update.steps=3", "study.num_train_pools=1", "study.num_eval_pools=1")),
    Job("bandit", "smoke", (*TINY_MODEL, "pretraining.steps=3", "update.epochs=2")),
    Job("bandit", "history", (*TINY_MODEL, "pretraining.steps=3", "history.steps=3", "history.evaluation_episodes=4")),
    Job(
        "bandit",
        "in-context",
        (
            *TINY_MODEL,
            "in_context.steps=2",
            "in_context.batch_size=8",
            "in_context.rounds=5",
            "in_context.first_rounds=3",
            "in_context.evaluation_bandits=40",
            "in_context.horizons=[1]",
        ),
    ),
    Job("curriculum", "smoke", BYTES),
    Job(
        "curriculum",
        "tasks",
        (*BYTES, "update.steps=3", "tasks.warm_up_steps=5", "tasks.validation_prompts=2", "tasks.tokens_per_step=200"),
    ),
    Job(
        "surgery",
        "smoke",
        (
            "phases.bootstrap_steps=8",
            "phases.surgery_edits=4",
            "phases.joint_edits=2",
            "agent.random_edits=2",
            "quality.num_prompts=2",
            "evaluation.num_prompts=2",
            "student.width=16",
        ),
    ),
)


def drawn(field: FieldInfo, rng: random.Random) -> Any:
    """A value of the kind of ``field``, small enough for a small run; None where there is none to draw."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = rng.choice(get_args(kind))
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        choices = get_args(get_args(kind)[0])
        return rng.sample(choices, rng.randint(0, len(choices)))
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return rng.choice(WHOLE)
    return rng.choice(REAL) if kind is float else None


def settings(job: Job, rng: random.Random) -> Iterator[str]:
    """One to four random settings of ``job``."""
    keys = {key: field for key, field in schema(find_system(job.system).Config).items() if key not in KEPT}
    for key in rng.sample(sorted(keys), rng.randint(1, 4)):
        value = drawn(keys[key], rng)
        if value is not None:
            yield f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def run_small(rng: random.Random, folder: Path) -> str | None:
    """One small run; what was wrong with its end, if anything."""
    job = rng.choice(JOBS)
    given = [*job.settings, *settings(job, rng)]
    out, errors = folder / "small", folder / "errors.txt"
    shutil.rmtree(out, ignore_errors=True)
    words = ["run", job.system, "--preset", job.preset, "--threads", "1", "--out", str(out)]
    if job.system == "reading":
        words += ["--model", str(tiny_model(folder))]
    words += [word for each in given for word in ("--set", each)]
    child = begin(words, errors)
    child.join(SECONDS)
    if child.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()
        return None
    said = errors.read_text(encoding="utf-8", errors="replace")
    if child.exitcode in EXIT_CODES and "Traceback" not in said:
        return None
    return f"{job.system} {job.preset} {given[len(job.settings) :]}: exit {child.exitcode}: {said[-500:]}"


def tiny_model(folder: Path) -> Path:
    """A Llama of random weights, width 32, with a tokenizer of its own; made once for a campaign."""
    path = folder / "tiny"
    if not (path / "tokenizer.json").is_file():
        warm_up()  # so that what is computed here leaves no threads behind that a fork would miss
        tokenizer = train_bpe_tokenizer([bundled_article().text], vocab_size=700, context_length=512)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=700, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, **sizes)
        LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path
