"""Configuration of ``preceptor pretrain``: a small language model from text files, by cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from preceptor.config import Options


class Source(Options):
    """One corpus of the mixture."""

    path: str = Field("", description="File or folder, relative to data.root.")
    share: float = Field(1.0, gt=0, description="Share of the training tokens, relative to the other sources.")
    adapter: str = Field(
        "text", description="How a JSONL row becomes a document (see preceptor.data.corpora.corpus.ADAPTERS)."
    )
    join: int = Field(1, ge=1, description="Number of rows that make one document.")


class Data(Options):
    """What is learned from."""

    root: str = Field("", description="Folder that source paths are relative to.")
    sources: tuple[Source, ...] = Field((), description="The mixture.")
    held_out: str = Field("", description="Folder of articles for validation, relative to data.root.")
    held_out_names: tuple[str, ...] = Field(
        (), description="Names of files in data.held_out that are never trained on, in any source."
    )


class Model(Options):
    """Shape of the language model."""

    vocab_size: int = Field(4096, ge=1, description="Number of entries of the byte-pair encoding.")
    width: int = Field(256, ge=1, description="Hidden size.")
    num_layers: int = Field(5, ge=1, description="Number of decoder layers.")
    num_heads: int = Field(4, ge=1, description="Number of query heads; width / num_heads = 64 is fastest on a CPU.")
    num_key_value_heads: int = Field(2, ge=1, description="Number of key-value heads (grouped-query attention).")
    feed_forward_width: int = Field(640, ge=1, description="Hidden size of the SwiGLU layer.")
    context_length: int = Field(1024, ge=1, description="Context length in tokens.")


class Optimisation(Options):
    """How the model learns."""

    steps: int = Field(5000, ge=1, description="Number of optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Number of sequences per step, each of context_length tokens.")
    matrix_learning_rate: float = Field(
        2e-3, ge=0, description="Learning rate of Muon for the matrices of the layers (RMS-matched to AdamW)."
    )
    learning_rate: float = Field(3e-3, ge=0, description="Learning rate of AdamW for embeddings and norms.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay of matrices and embeddings.")
    warm_up_steps: int = Field(100, ge=1, description="Number of steps of linear warm-up.")
    decay_fraction: float = Field(
        0.5, gt=0, le=1, description="Last fraction of the steps, in which the learning rates fall linearly to zero."
    )
    clip_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Maximum global gradient norm; .inf clips nothing."
    )
    bf16: bool = Field(True, description="Compute matrix products in bfloat16 (autocast).")


class PretrainConfig(Options):
    """A pretraining recipe."""

    seed: int = Field(0, description="Seed of every random stream.")
    data: Data = Data()
    model: Model = Model()
    optimisation: Optimisation = Optimisation()
    evaluate_every: int = Field(500, ge=1, description="Number of steps between measurements on the held-out articles.")
    save_every: int = Field(250, ge=1, description="Number of steps between checkpoints.")

    def conflicts(self) -> Iterator[str]:
        """Values that do not go together."""
        if not self.data.sources:
            yield "`data.sources` is empty; name at least one text file"
        # Rotary embeddings turn pairs of coordinates, so each head needs an even width.
        if self.model.width % (2 * self.model.num_heads):
            yield (
                "`model.width` must be an even multiple of `model.num_heads`, got "
                f"{self.model.width} and {self.model.num_heads}"
            )
        # Each key-value head serves the same number of query heads.
        if self.model.num_heads % self.model.num_key_value_heads:
            yield (
                f"`model.num_heads` must be a multiple of `model.num_key_value_heads`, got {self.model.num_heads} and "
                f"{self.model.num_key_value_heads}"
            )
