"""Sites: what a surgeon of any model edits and sees. A site is a part of a matrix that one number scales.

Neither the edit nor the features of a site depend on how many layers, heads or columns a model has, so a policy that is
shared over sites (:mod:`preceptor.systems.surgery.site_policy`) goes from one model to another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from preceptor.errors import ConfigError, ShapeError
from preceptor.lm.edit_targets import ROLES, Role, Target, attention_targets, layer_targets
from preceptor.systems.surgery.environment import attention_entropies
from preceptor.systems.surgery.trial import EditSize

FEATURES = (
    "exists",
    "norm_in_layer",
    "norm_in_model",
    "norm_to_partner",
    "spectrum",
    "gradient",
    "gradient_share",
    "loss",
    "attention_entropy",
    "layer",
    "place",
    *ROLES,
)
"""What is seen of a site, in this order. 0 is a feature that was left out, and all of a site that does not exist."""

FEATURE_DIM = len(FEATURES)
CLIP = 5.0
"""Largest absolute value of a feature."""


def edited_targets(model: PreTrainedModel, roles: Sequence[Role], *, mlp: bool) -> list[Target]:
    """The attention matrices of ``model`` that play one of ``roles`` and, with ``mlp``, the matrices of its MLPs."""
    mlps = [target for target in layer_targets(model) if target.role is None] if mlp else []
    return attention_targets(model, roles=roles) + mlps


@contextlib.contextmanager
def only_gradients_of(model: PreTrainedModel, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """In the block a backward pass is one for ``parameters`` of ``model`` alone."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def mean_loss(logits: Float[Tensor, "window time vocab"], windows: Int[Tensor, "window time"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the tokens that follow, with a graph, nats per token; computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


_PARTNERS: dict[Role, Role] = {"query": "key", "key": "query", "value": "output", "output": "value"}
_GRADIENT_SCALE = 30.0  # gradients of a tenth of a nat or less are linear, larger ones logarithmic
_SMALLEST = 1e-8  # of a norm, below which its logarithm is cut off


class Sites:
    """The sites of one model: an action space, where each number scales one part, and the features of every part.

    With ``head_scale`` a part is a head (its rows of the matrix; an MLP's matrix is one head), with ``singular_values``
    one of the ``rank`` leading singular triples. A number a in [−1, 1] scales its part by ``max_factor``^a, so that −a
    takes a back.

    Args:
        model: whose matrices they are; its attention must be able to return its weights (``eager``).
        targets: the matrices that are edited.
        kind: ``head_scale`` or ``singular_values``.
        rank: singular triples of a matrix; ``head_scale`` has no use for it.
        max_factor: above 1.

    Attributes:
        action_dim: number of sites.

    Raises:
        ConfigError: no targets, an unknown kind, or a factor of at most 1.
    """

    def __init__(
        self, model: PreTrainedModel, targets: Sequence[Target], *, kind: str, rank: int = 4, max_factor: float
    ) -> None:
        faults = [] if targets else ["sites need at least one target, got none"]
        if kind not in ("head_scale", "singular_values"):
            faults.append(f"sites are of head_scale or singular_values, got {kind!r}")
        if not max_factor > 1:
            faults.append(f"max_factor must be above 1, got {max_factor}")
        if faults:
            raise ConfigError(*faults)
        self.model = model
        self.kind = kind
        self.targets = tuple(targets)
        self.max_factor = max_factor
        self._rank = rank
        self._dims = [
            target.num_heads if kind == "head_scale" else min(rank, *target.matrix().shape) for target in self.targets
        ]
        self.action_dim = sum(self._dims)
        self._layers = _layer_numbers(self.targets)
        self._places = _places(self.targets, self._layers)
        self._partners = [self._partner(index) for index in range(len(self.targets))]

    @property
    def names(self) -> list[tuple[str, str]]:
        """(matrix, part) of every site, in the order of an action."""
        part = "head" if self.kind == "head_scale" else "\N{GREEK SMALL LETTER SIGMA}"
        return [
            (f"layer {layer} {target.role or _short(target)}", f"{part} {number + 1}")
            for target, layer, num in zip(self.targets, self._layers, self._dims, strict=True)
            for number in range(num)
        ]

    @torch.no_grad()
    def apply_(self, action: Float[Tensor, " site"]) -> EditSize:
        """Scales the live weights in place and gives the size of the edit; 0 leaves a matrix bit for bit as it is.

        Raises:
            ShapeError: ``action`` has another length.
            ConfigError: a number is beyond [−1, 1], or no number at all.
        """
        if action.shape != (self.action_dim,):
            raise ShapeError(f"an action of these sites has shape ({self.action_dim},), got {tuple(action.shape)}")
        if not (action.abs() <= 1).all():
            raise ConfigError(f"an action must lie in [-1, 1], got {action.abs().max():.6g}; squash it")
        return self.scale_(math.log(self.max_factor) * action)

    @torch.no_grad()
    def scale_(self, log_factors: Float[Tensor, " site"]) -> EditSize:
        """Scales every part by exp(``log_factors``), however large; 0 leaves a matrix bit for bit as it is."""
        norms = []
        for target, numbers in zip(self.targets, log_factors.float().split(self._dims), strict=True):
            if not numbers.any():
                norms.append(0.0)
                continue
            matrix = target.matrix()
            target.write(self._scaled(matrix, numbers.exp().to(matrix.device)))
            norm = float(matrix.norm())
            norms.append(float((target.matrix() - matrix).norm()) / norm if norm else 0.0)
        return EditSize(norms, sum(norms) / len(norms), max(norms))

    def _scaled(self, matrix: Float[Tensor, "rows width"], factors: Float[Tensor, " part"]) -> Tensor:
        if self.kind == "head_scale":
            return (matrix.reshape(len(factors), -1) * factors[:, None]).view_as(matrix)
        left, values, right = _leading(matrix, len(factors))
        return matrix + (left * (values * (factors - 1))) @ right  # [rows, rank] @ [rank, width]

    # What is seen

    def features(
        self, windows: Int[Tensor, "window time"], *, gradients: bool = True
    ) -> tuple[Float[Tensor, "site feature"], float]:
        """What is seen of every site (``FEATURES``), and the mean loss of ``windows`` in nats per token.

        Costs one forward pass, and with ``gradients`` one backward pass.
        """
        loss, attentions, slopes = self._loss(windows, gradients=gradients, attentions=True)
        vocab_size = self.model.config.vocab_size
        return self._rows(slopes, loss / math.log(vocab_size), attention_entropies(attentions)), loss

    def gradient(self, windows: Int[Tensor, "window time"]) -> Float[Tensor, " site"]:
        """The derivative of the mean loss of ``windows`` in the logarithm of every part's scale, nats per token."""
        return self._loss(windows, gradients=True, attentions=False)[2]

    def _loss(
        self, windows: Int[Tensor, "window time"], *, gradients: bool, attentions: bool
    ) -> tuple[float, tuple[Tensor, ...], Float[Tensor, " site"]]:
        """Mean loss, attention weights of every layer, and the gradient (zeros where it is not wanted)."""
        parameters = list(dict.fromkeys(target.parameter for target in self.targets)) if gradients else []
        with torch.set_grad_enabled(gradients), only_gradients_of(self.model, parameters):
            output = self.model(input_ids=windows[:, :-1], use_cache=False, output_attentions=attentions)
            loss = mean_loss(output.logits, windows)
            if not gradients:
                return float(loss), output.attentions or (), torch.zeros(self.action_dim)
            slopes = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        parts = [self._slopes(t, t.layout.of(slopes[t.parameter]).reshape(t.matrix().shape)) for t in self.targets]
        return float(loss.detach()), output.attentions or (), torch.cat(parts).cpu()

    @torch.no_grad()
    def _rows(
        self, gradient: Float[Tensor, " site"], loss_share: float, entropies: Float[Tensor, "layer head"]
    ) -> Float[Tensor, "site feature"]:
        num_layers = len(entropies)
        rows = []
        for index, target in enumerate(self.targets):
            log_norms = self.log_norms(target)  # [part]
            partner = self._partners[index]
            row = torch.zeros(len(log_norms), FEATURE_DIM)
            row[:, 0] = 1
            row[:, 1] = log_norms - log_norms.mean()
            row[:, 2] = log_norms  # the model's mean is taken away below
            if partner is not None:
                others = self.log_norms(partner)
                if self.kind == "head_scale":  # query heads share the key and value heads of their group
                    others = _matched(others, len(log_norms))
                row[:, 3] = log_norms - others[: len(log_norms)]
            row[:, 4] = self._spectrum(target)
            row[:, 7] = loss_share
            layer = self._layers[index]
            # A model whose attention modules are not its layers one by one has no entropies of its sites.
            if layer < len(entropies):
                of_layer = entropies[layer].cpu()
                heads = self.kind == "head_scale" and target.role is not None
                row[:, 8] = _matched(of_layer, len(log_norms)) if heads else of_layer.mean()
            row[:, 9] = layer / max(num_layers - 1, 1)
            in_matrix = torch.arange(len(log_norms)) / len(log_norms)
            row[:, 10] = in_matrix if self.kind == "singular_values" else self._places[index]
            if target.role is not None:
                row[:, 11 + ROLES.index(target.role)] = 1
            rows.append(row)
        table = torch.cat(rows)  # [site, feature]
        table[:, 2] -= table[:, 2].mean()
        size = gradient.square().mean().sqrt()
        table[:, 5] = torch.asinh(_GRADIENT_SCALE * gradient) / 2
        table[:, 6] = gradient / size if size > 0 else 0.0
        return table.clamp(-CLIP, CLIP)

    def log_norms(self, target: Target) -> Float[Tensor, " part"]:
        """ln ‖part‖ of every part of ``target``: norms of heads, or the leading singular values."""
        matrix = target.matrix().cpu()
        if self.kind == "head_scale":
            norms: Tensor = matrix.reshape(target.num_heads, -1).norm(dim=1)
        else:
            norms = torch.linalg.svdvals(matrix)[: self._rank]
        log_norms: Tensor = norms.clamp(min=_SMALLEST).log()
        return log_norms

    def _spectrum(self, target: Target) -> Float[Tensor, " part"] | float:
        """ln of the largest singular value over the norm: 0 for rank 1, lower the flatter the spectrum."""
        matrix = target.matrix().cpu()
        blocks = matrix.reshape(target.num_heads, -1, matrix.shape[-1]) if self.kind == "head_scale" else matrix[None]
        largest = torch.linalg.matrix_norm(blocks, 2).clamp(min=_SMALLEST)  # [part], or one for the whole matrix
        logs: Tensor = (largest / torch.linalg.matrix_norm(blocks).clamp(min=_SMALLEST)).log()
        return logs if self.kind == "head_scale" else float(logs)

    def _slopes(self, target: Target, gradient: Float[Tensor, "rows width"]) -> Float[Tensor, " part"]:
        """d loss / d ln(scale of a part) = Σ (part · gradient), nats."""
        matrix, gradient = target.matrix(), gradient.float()
        if self.kind == "head_scale":
            per_head: Tensor = (matrix * gradient).reshape(target.num_heads, -1)
            return per_head.sum(1)
        left, values, right = _leading(matrix, min(self._rank, *matrix.shape))
        slopes: Tensor = values * ((left.T @ gradient) * right).sum(1)
        return slopes

    def _partner(self, index: int) -> Target | None:
        """The matrix that a target's product is taken with: value and output, query and key, of the same layer."""
        role = self.targets[index].role
        if role is None:
            return None
        layers = [self._layers[index]]
        found = attention_targets(self.model, roles=(_PARTNERS[role],), layers=layers)
        return found[0] if found else None


def _leading(matrix: Float[Tensor, "rows width"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _matched(values: Float[Tensor, " few"], num: int) -> Float[Tensor, " num"]:
    """One value a head: repeated where query heads share one, averaged where shared heads are asked for."""
    if len(values) <= num:
        return values.repeat_interleave(num // len(values))
    return values.view(num, -1).mean(1)


def _layer_numbers(targets: Sequence[Target]) -> list[int]:
    """The number of the attention module that each target belongs to, from the digits in its name."""
    numbers = []
    for position, target in enumerate(targets):
        digits = [part for part in target.name.split(".") if part.isdigit()]
        numbers.append(int(digits[0]) if digits else position)
    return numbers


def _places(targets: Sequence[Target], layers: Sequence[int]) -> list[float]:
    """Where among the matrices of its layer without a role each one is, in [0, 1); 0 for all that have a role.

    So ``head_scale`` tells what goes into an MLP from what comes out of it.
    """
    places = []
    for index, target in enumerate(targets):
        beside = [k for k, layer in enumerate(layers) if layer == layers[index] and targets[k].role is None]
        places.append(beside.index(index) / len(beside) if target.role is None else 0.0)
    return places


def _short(target: Target) -> str:
    """``mlp.c_fc`` of ``transformer.h.0.mlp.c_fc.weight``."""
    return ".".join(target.name.removesuffix(".weight").split(".")[-2:])
