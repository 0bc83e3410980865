"""Vectors of a local sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version

import torch
from jaxtyping import Float
from torch import Tensor

from preceptor.data.embedders.base import require_texts
from preceptor.errors import MissingExtraError, ModelError, NumericError


class SentenceTransformerEmbedder:
    """Unit-norm vectors of a local sentence-transformers model, by hub name or folder.

    Needs the extra ``sentence-transformers``.

    Nothing that a model folder carries is executed: remote code is off, weights must be safetensors, and the package
    must be of version 6 or later, since earlier ones import code from a *local* folder whatever the flag says
    (huggingface/sentence-transformers#3801). Texts longer than the model's window are cut by the model.

    Args:
        model: name on the hub or path of a folder.
        device: a torch device, such as ``"cpu"`` or ``"cuda"``.
        batch_size: texts per forward pass.

    Raises :class:`MissingExtraError` without the package, :class:`ModelError` if the model cannot be loaded.
    """

    name = "sentence-transformers"

    def __init__(self, model: str, *, device: str = "cpu", batch_size: int = 32) -> None:
        installed = _installed_version()
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(
                model, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"sentence-transformers model {model!r} cannot be loaded: {reason}; give a model on the hub or a "
                "folder with safetensors weights and no code of its own"
            ) from error
        # The package's version too: a new one may pool or normalise otherwise.
        self.version = f"{model} (sentence-transformers {installed})"
        self.dimension: int | None = self._model.get_embedding_dimension()
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.version!r}, dimension={self.dimension})"

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
        """See :meth:`TextEmbedder.embed`. Unit norm. Raises :class:`NumericError` if the model yields NaN."""
        require_texts(texts)
        # encode([]) has no well-defined shape.
        if not texts:
            return torch.empty(0, self.dimension or 0)
        vectors = self._model.encode(
            list(texts),
            batch_size=self._batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        # encode() runs under inference mode; a clone made outside of it may take part in autograd again.
        vectors = torch.Tensor.clone(vectors.to(device="cpu", dtype=torch.float32))
        # One bad vector would make every cosine with it NaN.
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            position = int((~finite).nonzero()[0])
            raise NumericError(
                f"the vector of text {position + 1} of {len(texts)} by {self.version} is not finite; "
                "use another model or device"
            )
        return vectors


def _installed_version() -> str:
    """The version of sentence-transformers; :class:`MissingExtraError` if it is absent or older than 6."""
    try:
        installed = package_version("sentence-transformers")
    except PackageNotFoundError:
        installed = "0"
    if int(installed.split(".")[0]) < 6:
        raise MissingExtraError(
            "the sentence-transformers embedder", package="sentence-transformers>=6", extra="sentence-transformers"
        )
    return installed
