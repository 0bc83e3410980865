"""A causal language model behind one forward pass, which computes logits only where they are wanted.

Any ``AutoModelForCausalLM`` that respects an attention mask works. Whether it does is measured when the model is
wrapped, not looked up in a list of names. The model stays in evaluation mode (dropout off) for sampling and training
alike, so that the probabilities trained on are those that were sampled from.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from preceptor.errors import ModelError
from preceptor.lm.cpu.attention import CpuAttention, kernel_is_faster
from preceptor.lm.cpu.engine import Engine, accelerate, relative_difference
from preceptor.lm.forward import Output, additive_mask, first_tensor
from preceptor.lm.log_probs import chosen_log_probs
from preceptor.lm.sampling import Sampling
from preceptor.lm.vocabulary import Vocabulary, context_length


class LanguageModel:
    """A model and its tokenizer behind one forward pass.

    Args:
        model: a causal language model of Transformers, or peft's wrapper around one; put into evaluation mode.
        tokenizer: its tokenizer.
        name: what the user called it.

    Attributes:
        adapter_enabled: False in a view of the model with its LoRA adapter switched off (:meth:`initial_model`).
        recomputes: gradient checkpointing: layers keep their inputs alone for a backward pass, at one more forward
            pass of each; the gradient is the same.
        context_length: the most tokens a row may hold.
        has_engine: whether :meth:`engine` returns one: its logits agreed with the model's own.
        notices: what the user should be told, such as that the engine was given up; taken out by who tells it.
        begin_token: starts a row, and pads short rows of a batch.
        special_tokens: ids of the control tokens that the model has an embedding for, ascending. Text is never encoded
            as one of them. A pad or end token that is ordinary text ("!") is none.
        nameless_tokens: ids that the model has a logit for and the tokenizer no text, ascending.

    Raises:
        ModelError: the model ignores attention masks or positions, or it does not fit its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.adapter_enabled, self.recomputes = True, False
        self._bind(model)
        self.context_length = context_length(self._causal_model.config.get_text_config(), name)
        self._vocabulary = Vocabulary(tokenizer, size=self.vocab_size, name=name)
        self.begin_token = self._vocabulary.begin_token
        self.special_tokens = self._vocabulary.special_tokens
        self.nameless_tokens = self._vocabulary.nameless_tokens
        self.notices: list[str] = []
        self.has_engine = False
        self._num_changes, self._next_measurement = 0, 1
        self._measure()

    def _bind(self, model: Any) -> None:
        """Find decoder and head of ``model``; typed loosely, since peft's wrapper forwards Transformers' attributes."""
        self.model: PreTrainedModel = model.eval()
        # Under peft the wrapper is trained and saved, while attributes such as `device` belong to the model inside it.
        self.has_adapter = hasattr(model, "get_base_model")  # Transformers sets `peft_config` on plain models too
        self._causal_model = model.get_base_model() if self.has_adapter else model
        # Body and head apart: `base_model` gives hidden states, so that logits are computed only where they are wanted.
        self._decoder = self._causal_model.base_model
        self._head = self._causal_model.get_output_embeddings()
        if self._head is None or self._decoder is self._causal_model:
            raise ModelError(f"{self.name} has no output head over a decoder; use a decoder-only transformer")
        self._measured_version = self._weights_version()

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return torch.device(self._causal_model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; with an adapter, of the model underneath."""
        dtype: torch.dtype = self._causal_model.dtype
        return dtype

    @property
    def vocab_size(self) -> int:
        """Number of logits; may exceed the number of tokens that the tokenizer has."""
        return int(self._head.weight.shape[0])

    @property
    def decoder(self) -> nn.Module:
        """The model without its head: every forward pass goes through it."""
        decoder: nn.Module = self._decoder
        return decoder

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        num_layers = self._causal_model.config.get_text_config().num_hidden_layers
        # Families name the list `layers`, `h` or `blocks`; what they share is one ModuleList as long as
        # num_hidden_layers.
        for module in self._decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return module
        raise ModelError(f"{self.name} has no list of {num_layers} layers; use a layered transformer")

    @property
    def skips_hidden_slots(self) -> bool:
        """Whether masked slots cost no attention time, so that packing several texts into one row saves work."""
        # Only the kernel skips masked slots. float64 never reaches it, and `eager` attention never calls the function
        # that it replaces.
        uses_kernel = self._causal_model.config.get_text_config()._attn_implementation == "sdpa"
        return self.device.type == "cpu" and self.dtype != torch.float64 and uses_kernel and kernel_is_faster()

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Ids that are no text and must not be sampled as such: control tokens, and those without a token."""
        return tuple(sorted({*self.special_tokens, *self.nameless_tokens}))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that require a gradient, by name: all of them, the adapter's, or none of a frozen model."""
        # Without its adapter the view is a frozen reference: an optimizer over its weights would train the policy
        # instead.
        if not self.adapter_enabled:
            return {}
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without begin or end token; concatenate them with others freely.

        Text that spells a control token is encoded as plain text, never as that token. Some tokenizers put a space in
        front of every text (Llama 2); a leading space of ``text`` is then dropped, so that there is only one.
        """
        return self._vocabulary.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, with control tokens spelled out."""
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

        Gradients flow into the trainable parameters unless the caller disables them.

        Args:
            tokens: token ids; rows padded on the right need no mask, since attention is causal.
            keep: True = logits are wanted here. ``logits[i]`` predicts the token after the i-th marked position.
            attention_mask: True = this token attends to that slot (those of the cache first, then those of ``tokens``);
                every token must attend to at least one. None is causal attention.
            positions: position of each token in its row; None counts from 0 (or from the cache's length).
            cache: KV cache, which this pass extends.
            capture: a module of the model whose output is returned too.
        """
        arguments = self._arguments(tokens, attention_mask, positions, cache)
        with self._computing(), _captured(capture) as captured:
            if self._head_is_linear:
                # The head only sees the marked positions: [batch, time, width] -> [kept, width] -> [kept, vocab].
                logits = self._head(self._decoder(**arguments).last_hidden_state[keep])
            else:
                # Logits of every position at once, [batch, time, vocab]: this family scales or caps them outside its
                # head.
                logits = self._causal_model(**arguments).logits[keep]
        return Output(logits=logits.float(), captured=captured[0] if captured else None)

    def states(
        self, tokens: Int[Tensor, "batch time"], *, keep: Bool[Tensor, "batch time"], capture: nn.Module | None = None
    ) -> tuple[Float[Tensor, "kept width"], Tensor | None]:
        """As :meth:`forward`, but what goes into the head, for :meth:`logits_of` to turn into logits a few at a time.

        Only where :attr:`has_linear_head`.
        """
        with self._computing(), _captured(capture) as captured:
            states = self._decoder(**self._arguments(tokens, None, None, None)).last_hidden_state[keep]
        return states, captured[0] if captured else None

    def logits_of(self, states: Float[Tensor, "row width"]) -> Float[Tensor, "row vocab"]:
        """Float32 logits of hidden states that :meth:`states` gave."""
        with self._computing():
            logits: Tensor = self._head(states)
        return logits.float()

    @property
    def has_linear_head(self) -> bool:
        """Whether logits follow from the last hidden states alone; some families scale or cap them afterwards."""
        return self._head_is_linear

    def engine(self, *, dtype: torch.dtype | None = None) -> Engine | None:
        """A faster forward pass without gradient, or None where there is none that agrees with this model.

        It uses the weights as they are at its first call; ask for a new one after an update.

        Args:
            dtype: dtype of the matrices; None is the model's own.
        """
        self._measure_again()
        if not self.has_engine:
            return None
        return accelerate(self._causal_model, dtype=dtype, adapter_enabled=self.adapter_enabled)

    def give_up_engine(self, reason: str) -> None:
        """Use the model itself from now on, and leave a notice that says why."""
        if self.has_engine:
            self.has_engine = False
            self.notices.append(f"the fast path of {self.name} is switched off: {reason}")

    def engine_state(self) -> dict[str, int]:
        """What a resumed run needs in order to take the engine, and measure it, when this one would."""
        return {
            "has_engine": int(self.has_engine),
            "num_changes": self._num_changes,
            "next_measurement": self._next_measurement,
            "changed": int(self._weights_version() != self._measured_version),
        }

    def load_engine_state(self, state: Mapping[str, int]) -> None:
        """Restore :meth:`engine_state`, after the weights."""
        self.has_engine = self.has_engine and bool(state["has_engine"])
        self._num_changes, self._next_measurement = state["num_changes"], state["next_measurement"]
        self._measured_version = -1 if state["changed"] else self._weights_version()

    def take_notices(self) -> list[str]:
        """The notices so far, each given once."""
        taken, self.notices = self.notices, []
        return taken

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
        """Log-probability in nats of one token after each marked position, in row-major order; float32.

        Equal to :meth:`forward` and a log-softmax, but the logits of all positions are never held at once
        (:func:`~preceptor.lm.log_probs.chosen_log_probs`). Gradients flow into the trainable parameters.

        Args:
            tokens: token ids.
            keep: True = the token after this position is scored.
            chosen: the token after each marked position.
            attention_mask: as for :meth:`forward`.
            positions: as for :meth:`forward`.
            sampling: the distribution that the tokens were drawn from; None is the model's own.
        """
        is_plain = sampling is None or (sampling.temperature > 0 and not sampling.top_k and sampling.top_p == 1)
        # In blocks only if the head is a plain matrix (an adapter's is not) and nothing is truncated: top-k and top-p
        # need all logits of a row.
        if not (is_plain and self._head_is_linear and isinstance(self._head, nn.Linear)):
            logits = self.forward(tokens, keep=keep, attention_mask=attention_mask, positions=positions).logits
            log_probs = (sampling or Sampling()).log_probs(logits, drawn=chosen)
            return log_probs.gather(-1, chosen[:, None])[:, 0]
        bias: Tensor | None = self._head.bias
        # The pass itself, up to the states that predict a scored token: [batch, time, width] -> [kept, width].
        with self._computing():
            states = self._decoder(**self._arguments(tokens, attention_mask, positions, None)).last_hidden_state[keep]
        # Dividing states and bias divides the logits, and −inf in the bias suppresses a token: softmax((Wh + b) / T).
        # Both are cheaper than touching the logits, of which there are vocab per position.
        if sampling is not None:
            states = states / sampling.temperature
            bias = torch.zeros_like(self._head.weight[:, 0]) if bias is None else bias / sampling.temperature  # [vocab]
            bias = bias.index_fill(
                0, torch.tensor(sampling.suppressed, dtype=torch.long, device=bias.device), -torch.inf
            )
        return chosen_log_probs(states, self._head.weight, chosen, bias=bias)

    def initial_model(self) -> LanguageModel:
        """The model before training, frozen: a view with the adapter off, or else a copy that shares no storage.

        Call it before the first update.
        """
        if not self.has_adapter:
            return self.frozen_copy()
        # A shallow copy: the two share every weight, so a second model costs no memory, and only the flag differs.
        view = copy.copy(self)
        view.name, view.adapter_enabled = f"{self.name} (untrained)", False
        return view

    def frozen_copy(self) -> LanguageModel:
        """A copy of the model as it is now, without gradients and untouched by later updates.

        It shares no storage with trainable parameters. With an adapter, the frozen weights underneath are not copied.
        """
        live = list(self.model.parameters())
        # deepcopy with a filled memo takes the frozen weights under an adapter as they are instead of copying them.
        shared = {id(parameter): parameter for parameter in live if self.has_adapter and not parameter.requires_grad}
        storages = {parameter.data_ptr() for parameter in live if id(parameter) not in shared}
        model = copy.deepcopy(self.model, dict(shared)).requires_grad_(False)
        # A reference that shared memory with the policy would follow it, and every KL would be 0 without an error.
        assert storages.isdisjoint(parameter.data_ptr() for parameter in model.parameters()), "storage is shared"
        frozen = copy.copy(self)
        frozen.name = f"{self.name} (frozen)"
        frozen._bind(model)
        return frozen

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """The context of every pass: the fast attention on a CPU, and the adapter off where this view says so."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(CpuAttention())
            if not self.adapter_enabled:
                stack.enter_context(cast(Any, self.model).disable_adapter())
            if self.recomputes and torch.is_grad_enabled():
                from preceptor.lm.recompute import recomputed

                again = CpuAttention if self.device.type == "cpu" else contextlib.nullcontext
                stack.enter_context(recomputed(self.layers, computing=again))
            yield

    def _arguments(
        self, tokens: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: Cache | None
    ) -> dict[str, Any]:
        return {
            # An additive mask, since not every family's attention accepts a Boolean one of four dimensions.
            "input_ids": tokens,
            "attention_mask": None if attention_mask is None else additive_mask(attention_mask, self.dtype),
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    # ---- what the model can do --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> None:
        """Find out whether the head alone turns the last hidden states into logits, and whether an engine agrees.

        Some families scale or cap their logits. Their logits are computed at every position by the whole model, which
        costs memory but is exact.

        Raises:
            ModelError: a token that mask and positions hide changes the logits of the others: the model is not causal,
                takes positions from elsewhere (ALiBi), or is recurrent.
        """
        # The same five tokens twice: plain, and with a sixth in the middle that nothing else attends to.
        tokens = torch.arange(5, device=self.device)[None] % self.vocab_size
        with_hole = torch.cat([tokens[:, :2], tokens[:, :1], tokens[:, 2:]], dim=1)
        keep = torch.tensor([[True, True, False, True, True, True]], device=self.device)
        # [query, key]: the hidden token attends to itself and to what is before it; no other token attends to it.
        visible = torch.ones(6, 6, dtype=torch.bool, device=self.device).tril() & (keep | ~keep.T)
        positions = torch.tensor([[0, 1, 1, 2, 3, 4]], device=self.device)
        seen: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            # The states that leave the decoder, and what goes into the head and comes out of it. If both ends are
            # identical, head(states) is all there is to the logits.
            for module, note in (
                (self._decoder, lambda _, __, output: seen.update(states=output[0])),
                (self._head, lambda _, inputs, output: seen.update(given=inputs[0], projected=output)),
            ):
                stack.callback(module.register_forward_hook(note).remove)
            logits = self._causal_model(input_ids=tokens, use_cache=False).logits
            self._head_is_linear = (
                seen.keys() == {"states", "given", "projected"}
                and torch.equal(seen["states"], seen["given"])
                and torch.equal(seen["projected"], logits)
            )
        # Positions 0 1 1 2 3 4 with the third token hidden must give the logits of 0 1 2 3 4.
        try:
            masked = self.forward(with_hole, keep=keep, attention_mask=visible[None], positions=positions).logits
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"{self.name} {_UNFIT}") from error
        tolerance = _tolerance(self.dtype)
        largest_difference = tolerance * logits.float().abs().max()
        if (masked - logits[0].float()).abs().max() > largest_difference:
            raise ModelError(f"{self.name} {_UNFIT}")
        self.has_engine = self._head_is_linear and self._engine_difference() <= tolerance

    @torch.no_grad()
    def _engine_difference(self) -> float:
        """Largest difference of the engine's logits from the model's own, over the largest logit."""
        engine = accelerate(self._causal_model, adapter_enabled=self.adapter_enabled)
        if engine is None:
            return math.inf
        tokens = torch.arange(5, device=self.device)[None] % self.vocab_size
        with self._computing():
            logits = self._causal_model(input_ids=tokens, use_cache=False).logits[0].float()  # [time, vocab]
        return relative_difference(engine, tokens, logits, num_layers=len(self.layers))

    def _weights_version(self) -> int:
        """A number that grows with every change of a weight in place."""
        return sum(parameter._version for parameter in self.model.parameters())

    def _measure_again(self) -> None:
        """Measure the engine anew once the weights have moved: zeros (a pruned projection) hide what follows them.

        At the 1st, 2nd, 4th, 8th, … change that is seen: what a small step hides a longer way shows, and the cost of
        all measurements together stays small.
        """
        version = self._weights_version() if self.has_engine else self._measured_version
        if version == self._measured_version:
            return
        self._measured_version = version
        self._num_changes += 1
        if self._num_changes < self._next_measurement:
            return
        self._next_measurement *= 2
        if (difference := self._engine_difference()) > _tolerance(self.dtype):
            self.give_up_engine(f"its logits have come to differ from the model's own by {difference:.1e}")


_UNFIT = (
    "does not attend as it is told to by mask and positions (ALiBi, recurrent and bidirectional models do not); "
    "use a decoder-only transformer with rotary or learned positions"
)


@contextlib.contextmanager
def _captured(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """A list that receives what ``module`` puts out in the block."""
    captured: list[Tensor] = []
    if module is None:
        yield captured
        return
    hook = module.register_forward_hook(lambda _module, _inputs, output: captured.append(first_tensor(output)))
    try:
        yield captured
    finally:
        hook.remove()


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding, relative to the largest logit; a model that ignores the mask is off by far more."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
