"""The policy: a language model that writes queries, and the attention by which a query chooses a key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preceptor.errors import DataError, ModelError
from preceptor.lm.embedding import MODEL_EMBEDDINGS, ModelEmbedding, key_vectors
from preceptor.lm.model import LanguageModel
from preceptor.lm.sampling import Sampling
from preceptor.systems.reading.articles import TokenizedArticle
from preceptor.systems.reading.config import SelectionOptions

if TYPE_CHECKING:
    from preceptor.data.embedders.base import TextEmbedder


@dataclass(frozen=True)
class Keys:
    """Vectors of one article's keys, computed once before training.

    Attributes:
        vectors: one per pair, less ``centre``; float32, no gradient.
        centre: subtracted from queries too (the mean key, or zero).
        version: of the embedder that computed them.
    """

    vectors: Float[Tensor, "pairs dimension"]
    centre: Float[Tensor, " dimension"]
    version: str


class Policy:
    """A language model and the selection that its queries make.

    Args:
        lm: writes the queries.
        sampling: how query tokens are drawn.
        embedding: the model's own embedding (carries gradient), or None.
        text_embedder: an embedder of texts outside the model (no gradient), or None. Exactly one of the two is given.
        projection: linear map on the query's vector, or None.
        centre: subtract the mean key from keys and queries.
        temperature: of the softmax over keys, in units of the inner product.

    Raises:
        ModelError: both embedders are given, or neither.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        sampling: Sampling,
        embedding: ModelEmbedding | None,
        text_embedder: TextEmbedder | None = None,
        projection: nn.Linear | None = None,
        centre: bool = True,
        temperature: float = 1.0,
    ) -> None:
        if (embedding is None) == (text_embedder is None):
            raise ModelError("a policy needs either the model's own embedding or a text embedder, got both or neither")
        self.lm = lm
        self.sampling = sampling
        self.embedding = embedding
        self.text_embedder = text_embedder
        self.projection = projection
        self.centre = centre
        self.temperature = temperature

    @property
    def selection_has_gradient(self) -> bool:
        """Whether the choice of a key depends on a trainable parameter other than through the query's tokens."""
        return self.embedding is not None or self.projection is not None

    @property
    def captured_module(self) -> nn.Module | None:
        """The module of ``lm`` whose output at query tokens :meth:`query_vectors` needs."""
        return None if self.embedding is None else self.embedding.query_module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that an update may move, by name: ``model.…`` and ``projection.…``."""
        # An adapter's frozen base and a frozen model have none.
        named = {f"model.{name}": parameter for name, parameter in self.lm.trainable_parameters().items()}
        if self.projection is not None:
            named |= {f"projection.{name}": parameter for name, parameter in self.projection.named_parameters()}
        return named

    def embed_keys(self, article: TokenizedArticle) -> Keys:
        """Vectors of the article's keys under the policy's present weights."""
        if self.embedding is not None:
            vectors, version = key_vectors(self.lm, self.embedding, article.keys), self.embedding.version
        else:
            assert self.text_embedder is not None
            vectors = embed_texts(self.text_embedder, article.pairs.keys).to(self.lm.device)
            version = self.text_embedder.version
        # States crowd around their mean (cosines of 0.95 to 0.98); without it their differences remain.
        centre = vectors.mean(0) if self.centre else torch.zeros_like(vectors[0])
        return Keys(vectors=vectors - centre, centre=centre, version=version)

    def query_vectors(
        self, keys: Keys, *, captured: Tensor | None, queries: Int[Tensor, "*batch token"]
    ) -> Float[Tensor, "*batch dimension"]:
        """One vector per query: mean over its tokens (or the text's embedding), less the centre, projected.

        Args:
            keys: of the article; their centre is subtracted.
            captured: output of :attr:`captured_module` at the query tokens (``*batch token features``), or None.
            queries: token ids.
        """
        if self.embedding is not None:
            assert captured is not None
            vectors = self.embedding.queries(captured).mean(-2)  # *batch dimension
        else:
            assert self.text_embedder is not None
            # No gradient: a text embedder sees what the query says, not how it was computed.
            texts = [self.lm.decode(query) for query in queries.flatten(0, -2).tolist()]
            # No embedder takes an empty text; a full stop stands for a query of spaces.
            vectors = embed_texts(self.text_embedder, [text if text.strip() else "." for text in texts])
            vectors = vectors.to(self.lm.device).unflatten(0, queries.shape[:-1])
        # Centred before the projection, so that the identity gives the selection of the untrained policy.
        vectors = vectors - keys.centre
        return vectors if self.projection is None else self.projection(vectors)


def embed_texts(embedder: TextEmbedder, texts: Sequence[str]) -> Float[Tensor, "text dimension"]:
    """The vectors of ``texts``; an embedder from outside the package may do anything, and is named where it does.

    Raises:
        DataError: the embedder is a user's and raises, or returns something else than one finite vector a text.
    """
    if type(embedder).__module__.startswith("preceptor."):
        return embedder.embed(texts)
    from preceptor.runs.user_code import call  # few runs have code from outside

    what = f"the embedder {type(embedder).__name__}"
    vectors = call(what, embedder.embed, list(texts))
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(texts):
        got = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise DataError(f"{what} returned {got} for {len(texts)} texts, not a tensor of one vector each")
    if not vectors.is_floating_point() or not bool(vectors.isfinite().all()):
        raise DataError(f"{what} returned {vectors.dtype} with NaN or infinity, or no floating-point numbers")
    return vectors.detach().float()


def identity_projection(dimension: int, *, device: torch.device) -> nn.Linear:
    """A linear map without bias, initialised to the identity so that training starts from the initial selection."""
    projection = nn.Linear(dimension, dimension, bias=False, device=device)
    nn.init.eye_(projection.weight)
    return projection


# ---- what was learned, on disk ---------------------------------------------------------------------------------------


def save_selection(folder: Path, policy: Policy, keys: Mapping[str, Keys], options: SelectionOptions) -> None:
    """Write all of the policy that is not its language model, for :func:`load_policy`.

    ``selection.json`` holds the embedder, the temperature and how queries are sampled; ``selection.safetensors`` the
    projection and, for each article, the key vectors and their centre. The keys are saved because they were computed
    by the initial model, whose weights may be gone.

    Args:
        folder: an existing folder, usually that of the language model.
        policy: after training.
        keys: of each article by name.
        options: which embedder ``policy`` uses, and at which layer.
    """
    tensors = {} if policy.projection is None else {"projection": policy.projection.weight.detach()}
    # Numbered: an article's title may hold anything, a tensor's name should not.
    for index, each in enumerate(keys.values()):
        tensors |= {f"keys.{index}": each.vectors, f"centre.{index}": each.centre}
    description = {
        "embedder": options.embedder,
        "layer": options.layer,
        "temperature": policy.temperature,
        "centre": policy.centre,
        "sampling": asdict(policy.sampling),
        "articles": {name: each.version for name, each in keys.items()},
    }
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "selection.safetensors")
    (folder / "selection.json").write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", "utf-8")


def load_policy(
    folder: Path, lm: LanguageModel, *, text_embedder: TextEmbedder | None = None
) -> tuple[Policy, dict[str, Keys]]:
    """The policy whose selection :func:`save_selection` wrote, and the keys of its articles by name.

    Args:
        folder: holds ``selection.json`` and ``selection.safetensors``.
        lm: the trained language model.
        text_embedder: needed where the selection used an embedder outside the model.

    Raises:
        ModelError: a file is missing or damaged, or a text embedder is needed and not given.
    """
    try:
        description = json.loads((folder / "selection.json").read_text("utf-8"))
        tensors = load_file(folder / "selection.safetensors", device=str(lm.device))
        keys = {
            name: Keys(tensors[f"keys.{index}"], tensors[f"centre.{index}"], version)
            for index, (name, version) in enumerate(description["articles"].items())
        }
        embedder, layer = description["embedder"], description["layer"]
        sampling = Sampling(**description["sampling"])
        settings = {name: description[name] for name in ("centre", "temperature")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"the selection in {folder} cannot be loaded ({error}); give the folder `model` of a finished reading run"
        ) from error
    # The model's own embedding is built anew on the loaded model; an outside embedder has to be given.
    is_own = embedder in MODEL_EMBEDDINGS
    if not is_own and text_embedder is None:
        raise ModelError(f"the selection in {folder} used the embedder '{embedder}'; give it as `text_embedder`")
    policy = Policy(
        lm,
        sampling=sampling,
        embedding=MODEL_EMBEDDINGS[embedder](lm, layer=layer) if is_own else None,
        text_embedder=None if is_own else text_embedder,
        **settings,
    )
    if (weight := tensors.get("projection")) is not None:
        policy.projection = identity_projection(len(weight), device=lm.device)
        with torch.no_grad():
            policy.projection.weight.copy_(weight)
    return policy, keys
