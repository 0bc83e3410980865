"""A causal language model as Preceptor uses it: one forward pass that gives exactly the logits and states asked for.

Any ``AutoModelForCausalLM`` whose layers are attention layers fits: by hub name, by local folder, or the bundled starter.
The model is always in evaluation mode (dropout off), when acting as when learning, so that what is scored is what was
sampled; the mode never changes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import ModelError


@dataclass(frozen=True)
class Output:
    """What a forward pass gave.

    Attributes:
        logits: float32 logits of the kept positions, in row-major order.
        captured: output of the captured module, or None.
    """

    logits: Float[Tensor, "kept vocab"]
    captured: Tensor | None


class LanguageModel:
    """A model and its tokenizer behind one forward pass.

    Args:
        model: a causal language model; put into evaluation mode.
        tokenizer: its tokenizer.
        name: how the user named it.
        adapter_enabled: False makes a view in which the LoRA adapter is switched off (the untrained model).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        adapter_enabled: bool = True,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.adapter_enabled = adapter_enabled
        self.has_adapter = hasattr(model, "peft_config")
        self._causal_model: PreTrainedModel = model.get_base_model() if self.has_adapter else model
        self._decoder: nn.Module = self._causal_model.base_model
        self._head: nn.Module = self._causal_model.get_output_embeddings()
        if self._head is None or getattr(self._causal_model, "_is_stateful", False):
            raise ModelError(
                f"{name} is not an attention language model with an output head; use a decoder-only transformer"
            )
        self.context_length = _context_length(self._causal_model)
        self.begin_token = self._begin_token()
        self.special_tokens: tuple[int, ...] = tuple(sorted(set(tokenizer.all_special_ids)))
        self._head_is_linear = self._check_head()

    @property
    def device(self) -> torch.device:
        return self._causal_model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._causal_model.dtype

    @property
    def vocab_size(self) -> int:
        return int(self._head.weight.shape[0])

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last: the longest module list of the model."""
        lists = [module for module in self._decoder.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ModelError(f"{self.name} has no list of layers; use hidden states of a layered transformer")
        return max(lists, key=len)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimiser moves, by name: all of them, or the adapter's."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone. Text that spells a control token is encoded as plain text, never as that token."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, control tokens spelled out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        keep: Bool[Tensor, "batch time"],
        attention_mask: Float[Tensor, "batch 1 time slots"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        capture: nn.Module | None = None,
    ) -> Output:
        """One pass over ``tokens``, with logits at the positions that ``keep`` marks and nowhere else.

        Args:
            tokens: token ids; rows padded on the right need no mask, since attention is causal.
            keep: True = logits are wanted here. ``logits[i]`` predicts the token after the i-th kept position.
            attention_mask: additive mask (0 = attend, lowest float = not); None is plain causal attention.
            positions: position of each token in its row; None counts from 0 (or from the cache's length).
            cache: kept keys and values, which this pass extends.
            capture: a module of the model whose output is wanted too.
        """
        arguments = {
            "input_ids": tokens,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        captured: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if self.has_adapter and not self.adapter_enabled:
                stack.enter_context(self.model.disable_adapter())
            if capture is not None:
                hook = capture.register_forward_hook(lambda _module, _inputs, output: captured.append(_tensor(output)))
                stack.callback(hook.remove)
            if self._head_is_linear:
                logits = self._head(self._decoder(**arguments).last_hidden_state[keep])
            else:
                logits = self._causal_model(**arguments).logits[keep]
        return Output(logits=logits.float(), captured=captured[0] if captured else None)

    def untrained(self) -> LanguageModel:
        """The model as it is now, frozen: a view with the adapter off, or a copy that shares no storage.

        Call it before the first update.
        """
        if self.has_adapter:
            return LanguageModel(self.model, self.tokenizer, name=f"{self.name} (untrained)", adapter_enabled=False)
        return self.frozen_copy()

    def frozen_copy(self) -> LanguageModel:
        """A copy of the model as it is now, with its own storage and no gradient."""
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        live = {parameter.data_ptr() for parameter in self.model.parameters()}
        assert not any(parameter.data_ptr() in live for parameter in frozen.parameters()), (
            "a frozen copy shares storage"
        )
        return LanguageModel(frozen, self.tokenizer, name=f"{self.name} (frozen)", adapter_enabled=self.adapter_enabled)

    def _begin_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError(
            f"the tokenizer of {self.name} has neither a begin nor an end token; add one with add_special_tokens"
        )

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Whether logits are the output embedding of the last hidden state and nothing more.

        Some families scale or cap their logits; for those the whole model computes every position's logits, which costs
        memory but is exact. The answer is measured on a short input instead of being read from a list of names.
        """
        tokens = torch.arange(4, device=self.device)[None] % self.vocab_size
        output = self._causal_model(input_ids=tokens, use_cache=False)
        states = self._decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return torch.allclose(self._head(states).float(), output.logits.float(), rtol=1e-3, atol=1e-3)


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _context_length(model: PreTrainedModel) -> int:
    """Tokens that one pass may span: position limit, and the attention window where there is one."""
    text_config = model.config.get_text_config()
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions")]
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        limits.append(text_config.sliding_window)
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise ModelError("the model's configuration states no context length (max_position_embeddings)")
    return min(known)
