"""Configuration of ``preceptor pretrain``: a small language model from text files, by cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass, field

from preceptor.config import option


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture."""

    path: str = option("", "file or folder, relative to data.root")
    share: float = option(
        1.0, "share of the training tokens, relative to the other sources (dimensionless)", within="(0, inf)"
    )
    adapter: str = option("text", "how a JSONL row becomes a document (see preceptor.data.corpora.corpus.ADAPTERS)")
    join: int = option(1, "rows that make one document")


@dataclass(frozen=True)
class Data:
    root: str = option("", "folder that source paths are relative to")
    sources: tuple[Source, ...] = option((), "the mixture")
    held_out: str = option("", "folder of articles for validation, relative to data.root")
    held_out_names: tuple[str, ...] = option((), "file names in data.held_out never trained on (in any source)")


@dataclass(frozen=True)
class Model:
    vocab_size: int = option(4096, "entries of the byte-pair encoding")
    width: int = option(256, "hidden size")
    num_layers: int = option(5, "decoder layers")
    num_heads: int = option(
        4, "query heads; width / num_heads = 64 is the fastest head width on CPU", within="[1, inf)"
    )
    num_key_value_heads: int = option(2, "key-value heads (grouped-query attention)", within="[1, inf)")
    feed_forward_width: int = option(640, "hidden size of the SwiGLU layer")
    context_length: int = option(1024, "tokens", within="[1, inf)")


@dataclass(frozen=True)
class Optimisation:
    steps: int = option(5000, "optimiser steps")
    batch_size: int = option(4, "sequences of context_length tokens a step", within="[1, inf)")
    matrix_learning_rate: float = option(2e-3, "Muon, for the matrices of the layers (RMS-matched to AdamW)")
    learning_rate: float = option(3e-3, "AdamW, for embeddings and norms")
    weight_decay: float = option(0.1, "decoupled, for matrices and embeddings")
    warm_up_steps: int = option(100, "linear warm-up", within="[1, inf)")
    decay_fraction: float = option(
        0.5, "last share of the steps in which the learning rate falls linearly to zero", within="(0, 1]"
    )
    clip_norm: float = option(1.0, "global gradient norm")
    bf16: bool = option(True, "autocast matrix products to bfloat16")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining recipe."""

    seed: int = option(0, "seed of every random stream")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimisation: Optimisation = field(default_factory=Optimisation)
    evaluate_every: int = option(500, "steps between measurements on the held-out articles", within="[1, inf)")
    save_every: int = option(250, "steps between checkpoints", within="[1, inf)")

    def faults(self) -> list[str]:
        """What is at odds in this configuration, besides numbers out of their range."""
        found = []
        if not self.data.sources:
            found.append("`data.sources` is empty; name at least one text file")
        if self.model.num_heads > 0 and self.model.width % (2 * self.model.num_heads):
            found.append(
                "`model.width` must be an even multiple of `model.num_heads`, got "
                f"{self.model.width} and {self.model.num_heads}"
            )
        if self.model.num_key_value_heads > 0 and self.model.num_heads % self.model.num_key_value_heads:
            found.append(
                f"`model.num_heads` must be a multiple of `model.num_key_value_heads`, got {self.model.num_heads} and "
                f"{self.model.num_key_value_heads}"
            )
        return found
