"""Gradient checkpointing: layers keep their inputs alone until the backward pass, which computes the rest again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def recomputed(
    layers: Iterable[nn.Module], *, computing: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """In the block, the forward pass of each of ``layers`` is one whose activations are not kept.

    Transformers' own switch works in training mode alone, and models are in evaluation mode here. What is checkpointed
    is ``forward`` and not the call, so that hooks (those of FSDP2 among them) run once.

    Args:
        layers: not called with a KV cache in the block: a second computation would extend it a second time.
        computing: makes the context of the second computation, which has to be that of the first.
    """

    def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_again(*arguments: Any, **options: Any) -> Any:
            return checkpoint(
                forward,
                *arguments,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing is drawn: dropout is off
                context_fn=lambda: (nullcontext(), computing()),
                **options,
            )

        return forward_again

    with contextlib.ExitStack() as stack:
        for layer in layers:
            before = vars(layer).get("forward")
            # Set past `nn.Module`'s own bookkeeping, and put back as it was: a copy of the model must not hold it.
            vars(layer)["forward"] = checkpointed(layer.forward)
            stack.callback(_put_back, layer, before)
        yield


def _put_back(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del vars(layer)["forward"]
    else:
        vars(layer)["forward"] = forward
