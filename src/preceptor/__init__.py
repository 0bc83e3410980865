"""Preceptor: reinforcement learning that steers a language model's own training, with controls that say how much."""

__version__ = "0.1.0"
