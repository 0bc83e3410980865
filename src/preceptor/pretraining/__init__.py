"""Pretraining: a small Llama by cross-entropy on a weighted mixture of texts."""

from __future__ import annotations

from preceptor.pretraining.config import PretrainConfig
from preceptor.systems.base import System, lazy

SYSTEM = System(
    name="pretrain",
    summary="train a small language model from text files",
    Config=PretrainConfig,
    streams=("data",),
    train=lazy("preceptor.pretraining.train:train"),
    extendable=("optimisation.steps",),
)
