"""A causal language model as Preceptor uses it: one forward pass that gives exactly the logits and states asked for.

Any ``AutoModelForCausalLM`` that attends where it is told to will do: by hub name, by local folder, or the bundled
starter. That it does is measured when it is wrapped, not read off a list of names. The model is always in evaluation
mode (dropout off), when acting as when learning, so that what is scored is what was sampled; the mode never changes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import ModelError
from preceptor.lm.cpu.attention import CpuAttention, kernel_is_faster
from preceptor.lm.cpu.engine import Engine, accelerate, probe_logits
from preceptor.lm.log_probs import chosen_log_probs
from preceptor.lm.sampling import Sampling


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
        model: a causal language model of Transformers, or peft's wrapper around one; put into evaluation mode.
        tokenizer: its tokenizer.
        name: how the user named it.

    Attributes:
        adapter_enabled: False in a view in which the LoRA adapter is switched off (the untrained model).
        context_length: tokens that a row may hold.
        has_engine: whether :meth:`engine` gives one: its logits agreed with the model's own.
        begin_token: starts a row, and fills what rows of a batch lack in length.
        special_tokens: ids of the control tokens that the model knows, ascending; text never becomes one of them.

    Raises:
        ModelError: the model or its tokenizer is not what Preceptor needs.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.adapter_enabled = True
        self._bind(model)
        self.context_length = _context_length(self._causal_model.config.get_text_config(), name)
        control_tokens = _control_tokens(tokenizer)
        self._check_vocabulary(control_tokens)
        self.begin_token = self._begin_token()
        self.special_tokens = tuple(sorted(token for token in control_tokens if token < self.vocab_size))
        # What a tokenizer gives for an unknown character is text, unless the same token ends a text too (GPT-2).
        self._never_text = control_tokens - ({tokenizer.unk_token_id} - {self.begin_token, tokenizer.eos_token_id})
        first_piece = str(tokenizer.convert_ids_to_tokens(self._tokenize("a")[:1]))
        self._prepends_space = "▁" in first_piece
        self._head_is_linear = self._measure()

    def _bind(self, model: Any) -> None:
        """Take ``model`` apart; typed loosely, since peft's wrapper passes on what a model of Transformers has."""
        self.model: PreTrainedModel = model.eval()
        self.has_adapter = hasattr(model, "peft_config")
        self._causal_model = model.get_base_model() if self.has_adapter else model
        self._decoder = self._causal_model.base_model
        self._head = self._causal_model.get_output_embeddings()
        if self._head is None or self._decoder is self._causal_model:
            raise ModelError(f"{self.name} has no output head over a decoder; use a decoder-only transformer")

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return torch.device(self._causal_model.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights (with an adapter: of the model under it)."""
        dtype: torch.dtype = self._causal_model.dtype
        return dtype

    @property
    def vocab_size(self) -> int:
        """Number of logits; it may exceed the tokenizer's entries."""
        return int(self._head.weight.shape[0])

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        num_layers = self._causal_model.config.get_text_config().num_hidden_layers
        for module in self._decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return module
        raise ModelError(f"{self.name} has no list of {num_layers} layers; use a layered transformer")

    @property
    def skips_hidden_slots(self) -> bool:
        """Whether attention to slots that a mask hides costs nothing, so that rows may be packed into one."""
        uses_kernel = self._causal_model.config.get_text_config()._attn_implementation == "sdpa"
        return self.device.type == "cpu" and self.dtype != torch.float64 and uses_kernel and kernel_is_faster()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimiser moves, by name: all of them, the adapter's, or none of a frozen model."""
        if not self.adapter_enabled:
            return {}
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, which stands alone or continues what is before it.

        Text that spells a control token is encoded as plain text, never as that token. Where the tokenizer puts a space
        before every text of its own accord (Llama 2), a leading space of ``text`` is that space, not a second one.
        """
        if self._prepends_space and text.startswith(" "):
            text = text[1:]
        return self._encode_text(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, control tokens spelled out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        keep: Bool[Tensor, "batch time"],
        attention_mask: Bool[Tensor, "batch time slots"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
        capture: nn.Module | None = None,
    ) -> Output:
        """One pass over ``tokens``, with logits at the positions that ``keep`` marks and nowhere else.

        Carries gradient into the trainable parameters, unless the caller switches it off.

        Args:
            tokens: token ids; rows padded on the right need no mask, since attention is causal.
            keep: True = logits are wanted here. ``logits[i]`` predicts the token after the i-th kept position.
            attention_mask: True = this token attends to that slot (of the cache, then of ``tokens``); every token must
                attend to something. None is plain causal attention.
            positions: position of each token in its row; None counts from 0 (or from the cache's length).
            cache: kept keys and values, which this pass extends.
            capture: a module of the model whose output is wanted too.
        """
        arguments = self._arguments(tokens, attention_mask, positions, cache)
        captured: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._computing())
            if capture is not None:
                hook = capture.register_forward_hook(lambda _module, _inputs, output: captured.append(_tensor(output)))
                stack.callback(hook.remove)
            if self._head_is_linear:
                logits = self._head(self._decoder(**arguments).last_hidden_state[keep])
            else:
                logits = self._causal_model(**arguments).logits[keep]
        return Output(logits=logits.float(), captured=captured[0] if captured else None)

    def engine(self, *, dtype: torch.dtype | None = None) -> Engine | None:
        """A faster forward pass without gradient, for the weights as they are at its first call; None if there is none.

        Args:
            dtype: matrices are rounded to this dtype; None is the model's own.
        """
        if not self.has_engine:
            return None
        return accelerate(self._causal_model, dtype=dtype, adapter_enabled=self.adapter_enabled)

    def chosen_log_probs(
        self,
        tokens: Int[Tensor, "batch time"],
        *,
        keep: Bool[Tensor, "batch time"],
        chosen: Int[Tensor, " kept"],
        attention_mask: Bool[Tensor, "batch time slots"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        sampling: Sampling | None = None,
    ) -> Float[Tensor, " kept"]:
        """Log-probability in nats of one token after each kept position, in row-major order; float32.

        As :meth:`forward` with a log-softmax, but the logits of all kept positions are never held at once
        (:func:`~preceptor.lm.log_probs.chosen_log_probs`). Carries gradient into the trainable parameters.

        Args:
            tokens: token ids.
            keep: True = a token is chosen after this position.
            chosen: those tokens.
            attention_mask: as for :meth:`forward`.
            positions: as for :meth:`forward`.
            sampling: the distribution that the tokens were drawn from; None is the model's own.
        """
        is_plain = sampling is None or (sampling.temperature > 0 and not sampling.top_k and sampling.top_p == 1)
        # An adapter's head is no plain product, and a truncation needs a row's logits all at once.
        if not (is_plain and self._head_is_linear and isinstance(self._head, nn.Linear)):
            logits = self.forward(tokens, keep=keep, attention_mask=attention_mask, positions=positions).logits
            log_probs = (sampling or Sampling()).log_probs(logits, drawn=chosen)
            return log_probs.gather(-1, chosen[:, None])[:, 0]
        bias: Tensor | None = self._head.bias
        with self._computing():
            states = self._decoder(**self._arguments(tokens, attention_mask, positions, None)).last_hidden_state[keep]
        if sampling is not None:
            states = states / sampling.temperature
            bias = torch.zeros_like(self._head.weight[:, 0]) if bias is None else bias / sampling.temperature
            bias = bias.index_fill(
                0, torch.tensor(sampling.suppressed, dtype=torch.long, device=bias.device), -torch.inf
            )
        return chosen_log_probs(states, self._head.weight, chosen, bias=bias)

    def initial_model(self) -> LanguageModel:
        """The model as it is now, frozen: a view with the adapter off, or a copy that shares no storage.

        Call it before the first update.
        """
        if not self.has_adapter:
            return self.frozen_copy()
        view = copy.copy(self)
        view.name, view.adapter_enabled = f"{self.name} (untrained)", False
        return view

    def frozen_copy(self) -> LanguageModel:
        """A copy of the model as it is now, which no gradient reaches and no update of the model changes.

        It shares no storage with what is trained. With an adapter, the weights under it, which nothing moves, are not
        copied.
        """
        live = list(self.model.parameters())
        shared = {id(parameter): parameter for parameter in live if self.has_adapter and not parameter.requires_grad}
        storages = {parameter.data_ptr() for parameter in live if id(parameter) not in shared}
        model = copy.deepcopy(self.model, dict(shared)).requires_grad_(False)
        assert storages.isdisjoint(parameter.data_ptr() for parameter in model.parameters()), "storage is shared"
        frozen = copy.copy(self)
        frozen.name = f"{self.name} (frozen)"
        frozen._bind(model)
        return frozen

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """The fast attention of a CPU, and the adapter switched off in a view of the untrained model."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(CpuAttention())
            if not self.adapter_enabled:
                stack.enter_context(cast(Any, self.model).disable_adapter())
            yield

    def _arguments(
        self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: Cache | None
    ) -> dict[str, Any]:
        return {
            "input_ids": tokens,
            "attention_mask": None if attention_mask is None else _additive(attention_mask, self.dtype),
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    # ---- text -------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str) -> list[int]:
        # `verbose` is advice on texts longer than a context.
        return list(
            self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        )

    def _encode_text(self, text: str) -> list[int]:
        tokens = self._tokenize(text)
        if len(text) < 2 or self._never_text.isdisjoint(tokens):
            return tokens
        # A unigram vocabulary holds control tokens among its pieces; cut in two, their spelling is text.
        middle = len(text) // 2
        return self._encode_text(text[:middle]) + self._encode_text(text[middle:])

    def _begin_token(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None and int(token) < self.vocab_size:
                return int(token)
        raise ModelError(
            f"the tokenizer of {self.name} has no begin or end token that the model knows; set its bos_token"
        )

    def _check_vocabulary(self, control_tokens: set[int]) -> None:
        """Refuse a tokenizer whose text the model cannot read; control tokens beyond its entries are never used."""
        largest = max(set(self.tokenizer.get_vocab().values()) - control_tokens, default=0)
        if largest >= self.vocab_size:
            raise ModelError(
                f"the tokenizer of {self.name} has {largest + 1} entries and the model {self.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )

    # ---- what the model can do --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> bool:
        """Whether logits are the output embedding of the last hidden state and nothing more.

        Some families scale or cap their logits; for those the whole model computes every position's logits, which costs
        memory but is exact.

        Raises:
            ModelError: a hole in a row, hidden by mask and positions, changes what the model says: it is not causal,
                takes positions from elsewhere (ALiBi), or keeps a state.
        """
        tokens = torch.arange(5, device=self.device)[None] % self.vocab_size
        with_hole = torch.cat([tokens[:, :2], tokens[:, :1], tokens[:, 2:]], dim=1)
        keep = torch.tensor([[True, True, False, True, True, True]], device=self.device)
        visible = torch.ones(6, 6, dtype=torch.bool, device=self.device).tril() & (keep | ~keep.T)
        positions = torch.tensor([[0, 1, 1, 2, 3, 4]], device=self.device)
        seen: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            for module, note in (
                (self._decoder, lambda _, __, output: seen.update(states=output[0])),
                (self._head, lambda _, inputs, output: seen.update(given=inputs[0], projected=output)),
            ):
                stack.callback(module.register_forward_hook(note).remove)
            logits = self._causal_model(input_ids=tokens, use_cache=False).logits
            head_is_linear = (
                seen.keys() == {"states", "given", "projected"}
                and torch.equal(seen["states"], seen["given"])
                and torch.equal(seen["projected"], logits)
            )
        self._head_is_linear = head_is_linear
        try:
            told = self.forward(with_hole, keep=keep, attention_mask=visible[None], positions=positions).logits
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"{self.name} {_UNFIT}") from error
        tolerance = 1e-4 if self.dtype in (torch.float32, torch.float64) else 5e-2  # rounding; all else is larger
        largest = tolerance * logits.float().abs().max()
        if (told - logits[0].float()).abs().max() > largest:
            raise ModelError(f"{self.name} {_UNFIT}")
        self.has_engine = False
        engine = accelerate(self._causal_model) if head_is_linear else None
        if engine is not None:
            difference = probe_logits(engine, tokens, num_layers=len(self.layers)) - logits[0].float()
            self.has_engine = bool(difference.abs().max() <= largest)
        return head_is_linear


_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size", "local": "window_size"}
"""Kind of layer, and the name of its window in a configuration."""

_UNFIT = (
    "does not attend as it is told to by mask and positions (ALiBi, recurrent and bidirectional models do not); "
    "use a decoder-only transformer with rotary or learned positions"
)


def _additive(mask: Bool[Tensor, "batch time slots"], dtype: torch.dtype) -> Float[Tensor, "batch 1 time slots"]:
    """0 where ``mask`` is True and the lowest finite number elsewhere, the form that every attention takes."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return additive.masked_fill_(~mask, torch.finfo(dtype).min)[:, None]


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the named special tokens and of added ones that are marked special (all of a chat template's)."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def _context_length(config: PreTrainedConfig, name: str) -> int:
    """Tokens that a row may hold: the limit of its positions, and whatever else changes attention beyond a length.

    Within an attention window (or chunk), a windowed layer sees what a full one does. Rotary positions that are
    rescaled beyond a length are rescaled for all tokens, also for those whose keys are kept.
    """
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    # Where a configuration does not list the kinds of its layers, a window that it states holds for all of them.
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or tuple(_WINDOWS)
    limits += [getattr(config, window, None) for kind, window in _WINDOWS.items() if kind in kinds]
    rotary = getattr(config, "rope_parameters", None) or {}
    for parameters in (rotary, *rotary.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            limits.append(parameters.get("original_max_position_embeddings"))
    known = [int(limit) for limit in limits if limit]
    if not known:
        raise ModelError(f"the configuration of {name} states no context length; set max_position_embeddings there")
    return min(known)
