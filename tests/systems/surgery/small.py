"""A text that a tiny student learns within seconds, and a configuration of a run over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from preceptor.config import load_config
from preceptor.systems.surgery.config import LearningOptions, StudentOptions, SurgeryConfig
from preceptor.systems.surgery.environment import Student, build_student
from preceptor.systems.surgery.reference_lm import NGramReference
from preceptor.systems.surgery.setup import Phase, prepare
from preceptor.systems.surgery.state import State

CPU = torch.device("cpu")

SETTINGS = (
    "student.num_layers=1", "student.num_heads=2", "student.width=16", "student.block_size=16", "referee.order=3",
    "learning.batch_size=4", "learning.warm_up_steps=2", "phases.bootstrap_steps=8", "phases.surgery_edits=6",
    "phases.joint_edits=3", "phases.updates_per_edit=2", "phases.plateau_window=2", "quality.num_prompts=3",
    "quality.prompt_tokens=4", "quality.continuation_tokens=6", "quality.num_windows=4",
    "quality.acceptance_windows=8", "quality.acceptance_z=0.0", "agent.hidden_dim=8", "agent.batch_size=4",
    "agent.random_edits=2", "agent.updates_per_edit=1", "controls.best_of=2", "evaluation.every=4",
    "evaluation.num_windows=4", "evaluation.ladder_order=3", "evaluation.num_prompts=4", "save_every=1",
)  # fmt: skip


def write_text(folder: Path) -> Path:
    """A file of 3,000 characters with structure at several distances."""
    generator = torch.Generator().manual_seed(0)
    words = ("the bee ", "a hive ", "flies ", "is full of honey ", "to the flower ", "and ", "rests.\n")
    order = torch.randint(len(words), (400,), generator=generator).tolist()
    path = folder / "bees.txt"
    path.write_text("".join(words[index] for index in order)[:3000], encoding="utf-8")
    return path


def small_config(text: Path, *overrides: str) -> SurgeryConfig:
    """The settings above over ``text``, changed by ``overrides``."""
    return load_config(SurgeryConfig, overrides=[*SETTINGS, f"data.text={text}", *overrides])


def small_model(*, vocab_size: int = 7, architecture: str = "gpt2", seed: int = 0, **size: Any) -> PreTrainedModel:
    """Two layers of two heads, a context of 16 tokens."""
    settings = {"num_layers": 2, "num_heads": 2, "width": 16, "block_size": 16} | size
    options = StudentOptions(architecture=architecture, **settings)  # type: ignore[arg-type]
    return build_student(options, vocab_size=vocab_size, seed=seed, device=CPU)


def small_student(learning: LearningOptions | None = None, **size: Any) -> Student:
    """A student of seven tokens with a bigram reference model."""
    tokens = torch.randint(7, (200,), generator=torch.Generator().manual_seed(1))
    reference_lm = NGramReference(tokens, order=2, vocab_size=7)
    return Student(small_model(**size), learning or LearningOptions(warm_up_steps=0), reference_lm)


def small_state(folder: Path, *overrides: str) -> State:
    """The state at the beginning of a run in ``folder`` over the text above."""
    return State(prepare(small_config(write_text(folder), *overrides), device=CPU, folder=folder))


def phase_of(state: State, method: str) -> Phase:
    """The phase of ``method``."""
    return next(phase for phase in state.phases if phase.method == method)
