"""Texts to vectors: what every embedder of texts offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from preceptor.errors import DataError


class TextEmbedder(Protocol):
    """Texts to vectors that are compared by inner product.

    ``name`` says which kind of embedder it is. ``version`` is declared: equal versions promise interchangeable vectors,
    so it is part of every cache key and of the checkpoint. ``dimension`` is ``None`` where it is not known before the
    first call.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def dimension(self) -> int | None: ...

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """One vector per text, in order: float32 on the CPU, finite, without gradient.

        Whether vectors have unit norm is documented by the class; both embedders of this package return unit norm, so
        their inner product is the cosine. No texts give shape (0, dimension). Raises :class:`DataError` for a text that
        cannot be embedded (empty, not text), naming its position, before any work is done.
        """
        ...


def require_texts(texts: Sequence[str]) -> None:
    """Raise :class:`DataError` naming the first of ``texts`` that is not a string or is empty."""
    # A string is a sequence of strings too: its letters would be embedded one by one.
    if isinstance(texts, str):
        raise DataError("texts must be a sequence of strings, got one string; wrap it in a list")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"text {position + 1} of {len(texts)} must be a string, got {type(text).__name__}; remove or convert it"
            )
        # Services refuse an empty text, or bill it for a vector that means nothing.
        if not text:
            raise DataError(f"text {position + 1} of {len(texts)} is empty, which has no embedding; remove it")
