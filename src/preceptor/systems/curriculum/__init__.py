"""Curriculum: dataset weights follow what the model can learn next, while PPO improves what it writes."""

from __future__ import annotations

from preceptor.systems.base import System, lazy
from preceptor.systems.curriculum.config import CHOICES, FLAGS, CurriculumConfig

SYSTEM = System(
    name="curriculum",
    summary="a language model learns by PPO on datasets mixed by what it can learn next",
    Config=CurriculumConfig,
    streams=("difficulty", "prompt", "rollout", "minibatch"),
    train=lazy("preceptor.systems.curriculum.kinds:train"),
    result=lazy("preceptor.systems.curriculum.kinds:result"),
    sections=lazy("preceptor.systems.curriculum.report:sections"),
    verify=lazy("preceptor.systems.curriculum.kinds:verify"),
    flags=FLAGS,
    choices=CHOICES,
    distributed=True,
)
