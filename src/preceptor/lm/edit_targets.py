"""Weights to edit: attention matrices of any model of Transformers by their role, or any matrices by name.

However a model names and fuses its projections, a target shows each matrix in the same way: its rows are the heads'
features, its columns the model's. So query, key and value projections appear as a linear layer holds them, the output
projection appears transposed, and a head is always a block of rows.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preceptor.errors import ConfigError, ModelError, did_you_mean

Role = Literal["query", "key", "value", "output"]
ROLES: tuple[Role, ...] = get_args(Role)

# The names in Transformers.
_SEPARATE: dict[Role, tuple[str, ...]] = {
    "query": ("q_proj", "query", "q_lin", "q"),
    "key": ("k_proj", "key", "k_lin", "k"),
    "value": ("v_proj", "value", "v_lin", "v"),
}
_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "Wo", "o")
# Queries, keys and values in one matrix: all queries, then all keys, then all values; or for each key-value head its
# queries, its key and its value. GPT-2's c_attn is in blocks, and so a Conv1D; GPT-BigCode's is a Linear in groups.
_FUSED_BLOCKS = ("qkv_proj", "Wqkv", "att_proj", "c_attn")
_FUSED_GROUPS = ("query_key_value", "c_attn")
# CodeGen's qkv_proj is laid out for the four processors that it was trained on.
_UNKNOWN_LAYOUTS = ("codegen",)


@dataclass(frozen=True)
class Layout:
    """Where in a parameter the heads of a target lie.

    Attributes:
        is_transposed: heads are along the parameter's columns.
        num_groups: groups that the rows (after transposing) are made of.
        heads_per_group: heads in each group, of whatever role.
        first: number of the target's first head in each group.
        end: number of the head after its last one; None is the group's end.
    """

    is_transposed: bool = False
    num_groups: int = 1
    heads_per_group: int = 1
    first: int = 0
    end: int | None = None

    def of(self, tensor: Float[Tensor, "in out"]) -> Float[Tensor, "groups heads head_dim width"]:
        """The target's part of ``tensor``, as a view."""
        rows = tensor.T if self.is_transposed else tensor
        return rows.view(self.num_groups, self.heads_per_group, -1, rows.shape[-1])[:, self.first : self.end]


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix to edit: a whole parameter, or the part of a fused one that plays one role.

    Attributes:
        name: the parameter's name in the model.
        parameter: the parameter itself; it is never replaced.
        role: what it does in attention; None when it was chosen by name.
        layout: where in the parameter it lies.
    """

    name: str
    parameter: nn.Parameter
    role: Role | None
    layout: Layout

    @property
    def view(self) -> Float[Tensor, "groups heads head_dim width"]:
        """The target's part of the live weights, detached: writing to it edits the model."""
        return self.layout.of(self.parameter.detach())

    @property
    def num_heads(self) -> int:
        """Heads whose features are the rows; 1 when no role is known."""
        groups, heads, *_ = self.view.shape
        return groups * heads

    def matrix(self) -> Float[Tensor, "rows width"]:
        """A copy in float32; the rows are the heads' features, head after head."""
        view = self.view
        return view.to(torch.float32, copy=True).reshape(-1, view.shape[-1])

    @torch.no_grad()
    def write(self, matrix: Float[Tensor, "rows width"]) -> None:
        """Writes ``matrix``, rounded to the weights' own dtype, into the live weights."""
        view = self.view
        view.copy_(matrix.reshape(view.shape))


def attention_targets(
    model: nn.Module, *, roles: Sequence[Role] = ROLES, layers: Sequence[int] | None = None
) -> list[Target]:
    """The attention matrices of ``model`` that play one of ``roles``, in the model's order; shared ones once.

    How the heads lie follows from names and shapes: the output projection takes num_heads · head_dim features, so the
    features of keys and values say how many key-value heads there are. Biases are no targets.

    Args:
        model: any model of Transformers, whole or with an adapter (whose frozen weights are then the targets).
        roles: which of query, key, value and output.
        layers: attention modules by number, first to last; None is all of them.

    Raises:
        ConfigError: a role or layer that does not exist.
        ModelError: there is no attention of a known layout.
    """
    if unknown := [role for role in roles if role not in ROLES]:
        raise ConfigError(
            f"roles of a target are {', '.join(ROLES)}; got {unknown[0]!r}{did_you_mean(unknown[0], ROLES)}"
        )
    attentions = [found for name, module in model.named_modules() if (found := _attention(model, name, module))]
    if not attentions:
        raise ModelError(f"{type(model).__name__} has no attention of a known layout; choose targets by name instead")
    numbers = range(len(attentions)) if layers is None else layers
    if beyond := [number for number in numbers if not 0 <= number < len(attentions)]:
        raise ConfigError(f"layers of the targets must lie in [0, {len(attentions) - 1}], got {beyond[0]}")
    return _once(attentions[number][role] for number in numbers for role in ROLES if role in roles)


def layer_targets(model: nn.Module) -> list[Target]:
    """Every matrix of the decoder layers of ``model``: :func:`attention_targets`, then those of the MLPs, each once.

    A layer is what holds an attention module, so embeddings and the head of the vocabulary are left out, as they are by
    compression. An MLP's matrix has no role and counts as one head; its rows are what it puts out.

    Raises:
        ModelError: there is no attention of a known layout.
    """
    attention = attention_targets(model)
    known = {id(target.parameter) for target in attention}
    layers = dict.fromkeys(layer for target in attention if (layer := _layer_of(target.name)))
    return attention + _once(
        Target(f"{name}.weight", layer.weight, None, Layout(is_transposed=layer.is_conv1d))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if _layer_of(name) in layers
        for layer in [_Projection(name, module.get_parameter("weight"), not isinstance(module, nn.Linear))]
        if layer.weight.ndim == 2 and layer.weight.is_floating_point() and id(layer.weight) not in known
    )


def _layer_of(name: str) -> str:
    """The name of the layer that something belongs to, up to the first number in it; nothing if there is none.

    >>> _layer_of("transformer.h.1.mlp.c_fc"), _layer_of("lm_head")
    ('transformer.h.1', '')
    """
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[: first + 1])


def named_targets(module: nn.Module, patterns: Sequence[str]) -> list[Target]:
    """The matrices whose names match one of ``patterns`` (shell patterns or whole names), in the module's order.

    Each counts as one head. Shared ones come once.

    Raises:
        ConfigError: a pattern that no matrix's name matches.

    >>> [target.name for target in named_targets(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), ["*.weight"])]
    ['0.weight', '1.weight']
    """
    matrices = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.ndim == 2 and parameter.is_floating_point()
    }
    faults = [
        f"no matrix of the model is named {pattern!r}{did_you_mean(pattern, matrices)}"
        for pattern in patterns
        if not any(fnmatch.fnmatchcase(name, pattern) for name in matrices)
    ]
    if faults or not patterns:
        raise ConfigError(*faults or ["targets by name need at least one name or pattern, got none"])
    return _once(
        Target(name, parameter, None, Layout())
        for name, parameter in matrices.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def _once(targets: Iterable[Target]) -> list[Target]:
    """Without those that are the same memory seen in the same way: tied weights are edited once."""
    kept: dict[tuple[object, ...], Target] = {}
    for target in targets:
        view = target.view
        kept.setdefault((view.device, view.data_ptr(), view.shape, view.stride()), target)
    return list(kept.values())


# ---- attention modules ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """A linear layer; ``is_conv1d`` says that its weight is [in, out]."""

    name: str
    weight: nn.Parameter
    is_conv1d: bool

    @property
    def num_in(self) -> int:
        return self.weight.shape[0 if self.is_conv1d else 1]

    @property
    def num_out(self) -> int:
        return self.weight.shape[1 if self.is_conv1d else 0]


def _attention(model: nn.Module, name: str, module: nn.Module) -> dict[Role, Target] | None:
    """The four targets of ``module``, or None when it is no attention of a known layout."""
    projections = dict(_projections(module, name))
    separate = {role: _first(projections, names) for role, names in _SEPARATE.items()}
    in_blocks, in_groups = _first(projections, _FUSED_BLOCKS), _first(projections, _FUSED_GROUPS)
    output = _first(projections, _OUTPUT) or _output_beside(model, name)
    num_heads = _num_heads(model, module)
    # A `q_attn` beside `c_attn` is GPT-2's attention to an encoder, whose `c_attn` has no queries.
    if output is None or num_heads is None or output.num_in % num_heads or "q_attn" in projections:
        return None
    head_dim = output.num_in // num_heads
    # Each branch decides, from the widths alone, how the rows of queries, keys and values are arranged.
    targets: dict[Role, Target] = {}
    if (query := separate["query"]) and (key := separate["key"]) and (value := separate["value"]):
        if query.num_out != num_heads * head_dim or key.num_out != value.num_out or key.num_out % head_dim:
            return None
        found: dict[Role, _Projection] = {"query": query, "key": key, "value": value}
        for role, projection in found.items():
            layout = Layout(projection.is_conv1d, heads_per_group=projection.num_out // head_dim)
            targets[role] = Target(projection.name, projection.weight, role, layout)
    elif fused := in_blocks or in_groups:
        num_shared = fused.num_out // head_dim - num_heads  # of the key and of the value heads together
        if fused.num_out % head_dim or num_shared < 2 or num_shared % 2 or num_heads % (num_shared // 2):
            return None
        # c_attn can mean either arrangement (GPT-2's or GPT-BigCode's); the kind of layer tells them apart.
        is_grouped = in_blocks is None or (in_groups is in_blocks and not fused.is_conv1d)
        num_groups = num_shared // 2 if is_grouped else 1  # one group a key-value head, or all in one
        queries, keys = num_heads // num_groups, num_shared // 2 // num_groups
        bounds: dict[Role, tuple[int, int]] = {
            "query": (0, queries),
            "key": (queries, queries + keys),
            "value": (queries + keys, queries + 2 * keys),
        }
        for role, (first, end) in bounds.items():
            layout = Layout(fused.is_conv1d, num_groups, queries + 2 * keys, first, end)
            targets[role] = Target(fused.name, fused.weight, role, layout)
    else:
        return None
    layout = Layout(not output.is_conv1d, heads_per_group=num_heads)
    return targets | {"output": Target(output.name, output.weight, "output", layout)}


def _projections(module: nn.Module, path: str) -> Iterator[tuple[str, _Projection]]:
    """The linear layers right below ``module``; below an adapter's wrapper, the layer that it wraps."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}".lstrip(".")
        base = getattr(child, "base_layer", None)
        layer = base if isinstance(base, nn.Module) else child
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point():
            weight_path = f"{child_path}.weight" if layer is child else f"{child_path}.base_layer.weight"
            yield name, _Projection(weight_path, weight, type(layer).__name__ == "Conv1D")


def _output_beside(model: nn.Module, path: str) -> _Projection | None:
    """BERT's output projection, ``attention.output.dense``, is not in ``attention.self`` but beside it."""
    parent, _, name = path.rpartition(".")
    beside = getattr(model.get_submodule(parent), "output", None) if name else None
    return dict(_projections(beside, f"{parent}.output")).get("dense") if isinstance(beside, nn.Module) else None


def _num_heads(model: nn.Module, module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    if config is None or getattr(config, "model_type", None) in _UNKNOWN_LAYOUTS:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads: int | None = getattr(text_config, "num_attention_heads", None)
    return num_heads


def _first(projections: dict[str, _Projection], names: Sequence[str]) -> _Projection | None:
    return next((projections[name] for name in names if name in projections), None)
