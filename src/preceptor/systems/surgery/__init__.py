"""Surgery: a soft actor-critic edits a model's attention while the model learns next-token prediction by RL."""

from __future__ import annotations

from preceptor.systems.base import System, lazy
from preceptor.systems.surgery.config import CHOICES, FLAGS, SurgeryConfig

SYSTEM = System(
    name="surgery",
    summary="a language model learns to speak by reinforcement, a surgeon edits its attention",
    Config=SurgeryConfig,
    streams=(),
    train=lazy("preceptor.systems.surgery.loop:train"),
    result=lazy("preceptor.systems.surgery.evaluate:result"),
    sections=lazy("preceptor.systems.surgery.report:sections"),
    verify=lazy("preceptor.systems.surgery.verify:verify"),
    flags=FLAGS,
    choices=CHOICES,
    distributed=True,
)
