"""Bandit: a language model plays a bandit by choosing words; does what it learns transfer to other prompts?"""

from __future__ import annotations

from preceptor.systems.bandit.config import CHOICES, FLAGS, BanditConfig
from preceptor.systems.base import System, lazy

SYSTEM = System(
    name="bandit",
    summary="a language model plays a bandit by choosing words; does what it learns transfer to other prompts?",
    Config=BanditConfig,
    streams=("windows", "dropout", "prompts", "actions", "environment", "references"),
    train=lazy("preceptor.systems.bandit.loop:train"),
    result=lazy("preceptor.systems.bandit.result:result"),
    sections=lazy("preceptor.systems.bandit.report:sections"),
    verify=lazy("preceptor.systems.bandit.verify:verify"),
    flags=FLAGS,
    choices=CHOICES,
    extendable=("update.epochs", "history.steps"),
    distributed=True,
)
