"""Rollouts and states made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from preceptor.config import load_config
from preceptor.lm.model import LanguageModel
from preceptor.runs.world import ALONE
from preceptor.systems.curriculum.baselines import Method
from preceptor.systems.curriculum.config import CurriculumConfig
from preceptor.systems.curriculum.environment import Corpus
from preceptor.systems.curriculum.policy import Prompt, Rollouts
from preceptor.systems.curriculum.setup import Setup
from preceptor.systems.curriculum.state import State
from tests.systems.curriculum.small import SETTINGS

CONFIG = load_config(CurriculumConfig, overrides=SETTINGS)


def setup_and_state(
    lm: LanguageModel, corpora: list[Corpus], *methods: Method, config: CurriculumConfig = CONFIG
) -> tuple[Setup, State]:
    """The setup of a run that trains ``methods``, with seeded streams and no folder, and the state of its first one."""
    run: Any = SimpleNamespace(streams={"difficulty": torch.Generator().manual_seed(0)}, world=ALONE)
    initial_weights = {name: parameter.detach().clone() for name, parameter in lm.trainable_parameters().items()}
    setup = Setup(
        config, run, methods, lm, initial_weights, lm.initial_model(), corpora, corpora, prompts=(), held_out_terms=()
    )
    return setup, State(setup)


def rollouts_from(
    continuations: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    references: Sequence[Sequence[int]] | None = None,
    num_tokens: int | None = None,
) -> Rollouts:
    """Continuations as rollouts; short ones are filled with token 9, sampled after their end, which does not count."""
    width = num_tokens or max(map(len, continuations))
    prompts = prompts or [[0]] * len(continuations)
    references = references or [[]] * len(continuations)
    tokens = torch.tensor([[*row, *([9] * (width - len(row)))] for row in continuations])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in continuations])
    return Rollouts(
        prompts=tuple(Prompt("d", tuple(p), tuple(r)) for p, r in zip(prompts, references, strict=True)),
        tokens=tokens,
        mask=mask,
        log_probs=torch.zeros(tokens.shape),
        entropy=torch.zeros(tokens.shape),
    )
